"""docs/point_cloud.md: its Python runs, its commands are typed."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click import Command

import zoo
from zoo.cli import run
from zoo.cli.predict import predict
from zoo_point_cloud.commands import label_points, pretrain_points
from zoo_registry import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "point_cloud.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    return [
        shlex.split(line.partition("#")[0])[3:] for line in re.findall(r"^    (uv run zoo .*)$", text, re.MULTILINE)
    ]


TRAINING = re.findall(r"^## Train on your own data\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[0]
COMMANDS = [words for words in commands(PAGE) if words not in commands(TRAINING)]
VERBS: dict[str, Command] = {"predict": predict, "label-points": label_points, "pretrain-points": pretrain_points}
OCCUPANCY = resolve("occmamba_lidar").card.tiny | {"num_classes": 17}
TRUNK = {"embed_dim": 24, "depth": 3}
#: Smaller models and fewer steps than printed, which changes nothing but the time.
SMALLER = (
    ('checkpoint="mine.safetensors"', f'checkpoint="mine.safetensors", **{OCCUPANCY}'),
    ('zoo.create("pointmamba_pretrain"', f'zoo.create("pointmamba_pretrain", **{TRUNK}'),
    ('zoo.create("pointmamba_modelnet"', f'zoo.create("pointmamba_modelnet", **{TRUNK}'),
    ("points=1024, batch=32", "points=256, batch=2"),
    ("steps=5000", "steps=2"),
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder that the page is read in, with its examples."""
    shutil.copytree(ROOT / "examples" / "shapes", tmp_path / "examples" / "shapes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippets_run(index, checkout, capsys):
    code = SNIPPETS[index]
    for printed, smaller in SMALLER:
        code = code.replace(printed, smaller)
    names: dict = {"files": sorted(Path("examples/shapes").glob("*.ply"))}
    if "sweep.bin" in code:
        zoo.save(zoo.create("occmamba_lidar", **OCCUPANCY), "mine")
        shutil.copy("mine/model.safetensors", "mine.safetensors")
        np.random.default_rng(0).uniform(-4, 4, (500, 5)).astype(np.float32).tofile("sweep.bin")
    exec(compile(code, f"point_cloud.md, snippet {index + 1}", "exec"), names)
    if "parts" in names:
        assert "chair" in capsys.readouterr().out
        assert all(Path(name).stat().st_size > 1000 for name in ("chair_labels.laz", "chair_labels.png"))
    if "occupancy" in names:
        assert Path("sweep.ply").stat().st_size > 1000
    if "rebuilt" in names:
        assert all(Path(name).stat().st_size > 1000 for name in ("rebuilt.ply", "rebuilt.png"))
    if "classifier" in names:
        assert len(names["losses"]) == 2
        trunk = names["autoencoder"].trunk.state_dict()
        own = names["classifier"].state_dict()
        assert all(torch.equal(own[name], value) for name, value in trunk.items())


@pytest.mark.parametrize("words", [w for w in COMMANDS if "_micro" in w[1]], ids=" ".join)
def test_demo_commands_run(words, checkout, capsys):
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "chair" in said
    if words[0] == "label-points":
        assert list(checkout.glob("labelled/*.ply"))
        assert list(checkout.glob("labelled/*.png"))
    else:
        assert len(list(checkout.glob("out/*.png"))) == len(list(checkout.glob("examples/shapes/*")))


@pytest.mark.parametrize("words", [w for w in COMMANDS if "_micro" not in w[1]], ids=" ".join)
def test_options_of_the_other_commands(words, checkout):
    """Of checkpoints and clouds that the reader has: the models exist, and the options are those of the command."""
    Path("finetune_modelnet.pth").touch()
    options = [w for w in words[1:] if w not in ("--device", "cuda")]  # which is asked for at once
    context = VERBS[words[0]].make_context(words[0], options)
    assert resolve(context.params["name"]).card.domain == "point_cloud"
    assert len(context.params["inputs"]) == 1


#: What makes the models of the section on training small, by their names.
LITTLE = {
    "pcm_micro": {"embed_dim": 8},
    "pcm_micro_parts": {"embed_dim": 8},
    "pcm_s3dis": {"embed_dim": 8, "decoder_channels": [8, 8, 8, 8]},
    "pointmamba_modelnet": {},
}


def test_commands_of_training_run(checkout, capsys):
    """One after the other on clouds of its layout: only models and steps are smaller than printed."""
    r = np.random.default_rng(0)
    for name in ("flat", "long"):
        for folder, width in (("clouds", 3), ("labelled", 4)):
            (checkout / folder / name).mkdir(parents=True)
            for i in range(3):
                points = r.normal(size=(300, 3)) * ([1, 1, 0.1] if name == "flat" else [0.1, 0.1, 1])
                rows = np.concatenate([points, points[:, :1] > 0], axis=1)[:, :width]
                np.savetxt(checkout / folder / name / f"{i}.txt", rows, fmt="%.4f")
    (checkout / "tiles").mkdir()
    for i in range(2):
        points = r.uniform(0, 20, (700, 3)) * [1, 1, 0.1]
        np.save(checkout / "tiles" / f"{i}.npy", np.concatenate([points, points[:, 2:] > 1], axis=1))
    Path("names.txt").write_text("left\nright\n")
    trunk = {"embed_dim": 24, "depth": 1, "group_size": 8}
    zoo.save(zoo.create("pointmamba_pretrain", **trunk, decoder_depth=1), "pretrained")
    for words in commands(TRAINING):
        if words[0] == "train-points":
            small = [f"--set={k}={v}" for k, v in LITTLE[words[1]].items()]
            words = [w.replace("8192", "400") for w in words] + ["--steps", "1", "--batch-size", "2", *small]
        assert run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "try: zoo predict ./shapes CLOUD" in said
    assert "try: zoo label-points ./parts CLOUD --out labelled" in said
    assert zoo.load("./parts").zoo_info.folder_config["labels"] == ["left", "right"]
    assert zoo.load("./tuned").embed_dim == 24


def test_the_page_has_what_is_tested():
    assert [words[0] for words in commands(TRAINING)] == (
        ["train-points", "predict", "train-points", "validate", "train-points", "train-points"]
    )
    assert len(SNIPPETS) == 4
    assert {words[0] for words in COMMANDS} == set(VERBS)
    assert sum("_micro" in words[1] for words in COMMANDS) == 2
