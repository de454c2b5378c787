"""The demo checkpoint as a user meets it: quality on unseen pairs, `zoo demo`, `zoo change`, `zoo validate`."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import zoo
from zoo_remote_sensing import plugin
from zoo_remote_sensing.commands import change, map_pixels

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "change"
NAME = "changemamba_micro.scenes"


@pytest.fixture(scope="module")
def scenes():
    spec = importlib.util.spec_from_file_location("scenes", ROOT / "plugins/remote_sensing/recipes/scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(NAME, tile=96, overlap=32)


def test_unseen_pairs(scenes, pipe):
    # new seeds: neither trained on nor among the pairs of the card
    hits = found = there = 0
    for seed in range(5_000_000, 5_000_012):
        before, after, label = scenes.scene_pair(seed, 128)
        changed = pipe((before, after)).changed
        hits, found, there = hits + int((changed & label).sum()), found + int(changed.sum()), there + int(label.sum())
    assert 2 * hits / (found + there) > 0.85


def test_season_and_registration_alone_are_no_change(scenes, pipe):
    """The same objects at another season, shifted by a pixel and a half: hardly anything is called changed."""
    rng = np.random.default_rng(3)
    size = 128 + 2 * scenes.MARGIN
    under, objects = scenes.ground(rng, size), scenes.layout(rng, size)
    kept = [{**one, "after": one["before"]} for one in objects]
    dates = [
        scenes.photograph(rng, scenes.draw(rng, size, under, kept, "before", season), move)
        for season, move in ((0.2, (0.0, 0.0)), (2.4, (1.2, -0.9)))
    ]
    assert pipe(tuple(dates)).share < 0.05


def test_demo_entries_run():
    for entry in plugin.zoo_demos():
        package = Path(plugin.__file__).parent
        files = tuple(package / name.strip() for name in entry["file"].split(";"))
        result = zoo.pipeline(entry["model"])(files)
        assert 0 < result.share < 0.6
        assert result.picture().size == (160, 160)


def test_change_command_on_the_examples(tmp_path):
    pytest.importorskip("rasterio")
    pair = [str(EXAMPLES / f"scene_0_{date}.tif") for date in ("before", "after")]
    written = [str(tmp_path / name) for name in ("map.tif", "map.png", "map.json")]
    words = [NAME, *pair, "--map", written[0], "--picture", written[1], "--summary", written[2], "--tile", "128"]
    run = CliRunner().invoke(change, words, standalone_mode=False)
    assert run.exception is None, run.output
    assert "ha)" in run.output
    found = json.loads(Path(written[2]).read_text())
    assert found["hectares"] == pytest.approx(found["changed_pixels"] / 10_000)
    run = CliRunner().invoke(change, [*words, "--json"], standalone_mode=False)
    assert json.loads(run.output)["changed_pixels"] == found["changed_pixels"]
    run = CliRunner().invoke(change, [NAME, pair[0], str(EXAMPLES / "scene_1_after.tif")])
    assert "different grids" in str(run.exception)
    run = CliRunner().invoke(change, ["morpmamba_houston", *pair])
    assert "morpmamba_houston is for pixel-classification" in run.output


def test_validate_on_the_examples(tmp_path):
    pytest.importorskip("rasterio")
    pytest.importorskip("torchmetrics")
    for folder, kind in (("T1", "before"), ("T2", "after"), ("GT", "label")):
        (tmp_path / folder).mkdir()
        for number in range(2):
            source = EXAMPLES / f"scene_{number}_{kind}.tif"
            (tmp_path / folder / f"{number}.tif").write_bytes(source.read_bytes())
    found = zoo.validate(NAME, tmp_path, tile=128, overlap=32)
    assert found.samples == 2
    assert found.metrics["F1"] > 0.85


def test_map_pixels_command(tmp_path):
    np.save(tmp_path / "cube.npy", np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32))
    zoo.save(zoo.create("morpmamba_houston", bands=4, dim=8, state=8), tmp_path / "mine")
    words = [str(tmp_path / "mine"), str(tmp_path / "cube.npy"), "--map", str(tmp_path / "map.png"), "--json"]
    run = CliRunner().invoke(map_pixels, words, standalone_mode=False)
    assert run.exception is None, run.output
    assert sum(json.loads(run.output)["counts"].values()) == 30


def test_documentation_snippet(tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    text = (ROOT / "docs" / "remote_sensing.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/remote_sensing.md", "exec"), {})
    assert {p.name for p in tmp_path.iterdir()} == {"examples", "change.tif", "change.png", "change.json"}
