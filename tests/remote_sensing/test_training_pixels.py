"""zoo train-pixels: a labelled hyperspectral scene to a saved classifier of its pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, Shuffled, fit
from zoo_remote_sensing.hyperspectral import labelled_scene
from zoo_remote_sensing.pixels import HIDDEN_DECAY, Pixels, pixel_loss

pytest.importorskip("torchmetrics")

SMALL = {"bands": 4, "dim": 8, "state": 8}
SET = [f"--set={k}={v}" for k, v in SMALL.items()]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Three fields side by side whose spectra differ, a corner without labels and some pixels without data."""
    folder, r = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    truth = np.repeat([1, 2, 3], 8)[None].repeat(20, axis=0)
    spectra = r.normal(size=(3, 12))
    cube = spectra[truth - 1] + r.normal(0, 0.5, (20, 24, 12))
    cube[0, :3] = np.nan
    truth[-4:, -6:] = 0
    np.save(folder / "scene.npy", cube.astype(np.float32))
    np.save(folder / "scene_gt.npy", truth)
    return folder


def train(capsys, *words, status=0):
    assert run(["train-pixels", *map(str, words), *(["--json"] if status == 0 else [])]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err


def test_it_learns_a_scene(scene, tmp_path, capsys):
    out, names = tmp_path / "out", tmp_path / "names.txt"
    names.write_text("wheat\nmaize\nwood\n")
    found = train(
        capsys, "morpmamba_houston", scene, "--out", out, *SET, "--labels", names, "--steps=60", "--batch-size=32",
        "--rate=1e-2", "--held-out=0.6", "--seed=3", "--score-every=30",
    )  # fmt: skip
    assert found["pixels"] + found["held_out"] == 20 * 24 - 24 - 3
    assert found["held_out"] == pytest.approx(0.6 * (20 * 24 - 27), abs=2)
    assert found["figures"]["OA"] > 0.8
    words = ["validate", str(out), str(scene), "-o", "held_out=0.6", "-o", "seed=3", "--json"]
    assert run(words) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["metrics"] == pytest.approx(found["figures"], abs=1e-6)
    assert measured["samples"] == found["held_out"]
    assert set(measured["per_class"]) == {"wheat", "maize", "wood"}
    assert zoo.pipeline(str(out))(scene / "scene.npy").counts.keys() == {"wheat", "maize", "wood"}


def test_pixels_have_the_windows_that_the_map_is_made_of(scene):
    cube, truth = labelled_scene(scene)
    assert set(np.unique(truth)) == {0, 1, 2, 255}
    assert (truth[0, :3] == 255).all()
    pixels = Pixels(cube, truth, 4, 4)
    model = zoo.create("morpmamba_houston", num_classes=3, **SMALL).eval()
    found = zoo.pipeline(model)(cube).classes
    assert np.array_equal(pixels.classes, truth[truth != 255])
    with torch.no_grad():
        answers = model(pixels(range(len(pixels)))[0]).argmax(-1).numpy()
    assert (answers == found[truth != 255]).mean() > 0.99  # but for rounding


def test_training_goes_on_after_an_interruption(scene, tmp_path):
    pixels = Pixels(*labelled_scene(scene), 4, 4)
    order = Shuffled(len(pixels), 16)

    def trained(run, report):
        torch.manual_seed(0)
        model = zoo.create("morpmamba_houston", num_classes=3, **SMALL)
        fit(model, lambda i: pixels(order(i)), pixel_loss, Settings(steps=4), run=run, report=report)
        return model

    zoo.testing.check_resume(trained, tmp_path, after=2)


def test_the_hidden_layer_decays(scene):
    pixels = Pixels(*labelled_scene(scene), 4, 4)
    model = zoo.create("morpmamba_houston", num_classes=3, drop=0.0, **SMALL)
    values, classes = pixels([0, 5, 9])
    expected = torch.nn.functional.cross_entropy(model(values), classes) + HIDDEN_DECAY * (model.hidden.weight**2).sum()
    torch.testing.assert_close(pixel_loss(model, (values, classes)), expected)


def test_what_is_refused(scene, tmp_path, capsys):
    def refused(*words):
        return train(capsys, *words, "--out", tmp_path / "out", "--steps=1", status=2)

    assert "trains models for pixel-classification" in refused("changemamba_micro", scene)
    assert "the model needs at least 15 bands" in refused("morpmamba_houston", scene)
    (tmp_path / "names.txt").write_text("one\n")
    assert "has 1 names, and" in refused("morpmamba_houston", scene, *SET, "--labels", tmp_path / "names.txt")
    assert "0 cubes and 0 files of labels" in refused("morpmamba_houston", tmp_path)
    np.save(tmp_path / "a.npy", np.load(scene / "scene.npy"))
    np.save(tmp_path / "a_gt.npy", np.ones((20, 24), int))
    assert "two classes or more" in refused("morpmamba_houston", tmp_path, *SET)
    assert not (tmp_path / "out").exists()
