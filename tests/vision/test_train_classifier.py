"""zoo train-classifier: folders of pictures to a saved classifier that pipelines and zoo validate agree on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo import catalog
from zoo.cli import run
from zoo.cli import training as shared
from zoo.training import Settings, fit
from zoo_registry import errors
from zoo_vision.pipelines import ImageClassification
from zoo_vision.training import classify
from zoo_vision.training.augment import jittered, mixed, window

SMALL = {"img_size": 16, "depth": 2, "embed_dim": 16}
SET = [word for k, v in SMALL.items() for word in ("--set", f"{k}={v}")]


def stripes(folder: Path, count: int = 12, seed: int = 0, kind: str = "L") -> Path:
    """Pictures of upright and lying stripes, noisy, of sizes of their own."""
    r = np.random.default_rng(seed)
    for name, axis in (("lying", 0), ("upright", 1)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = r.integers(18, 30, 2)
            waves = np.sin(np.indices(size)[axis] / r.uniform(0.8, 1.6) + r.uniform(0, 6))
            values = (waves + r.normal(0, 0.3, size) + 2) / 4
            if kind == "16 bits":
                image = Image.fromarray((values * 9000).clip(0, 9000).astype(np.uint16))
            else:
                image = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8)).convert(kind)
            image.save(folder / name / f"{i}.png")
    return folder


def trained(tmp_path: Path, *words: str, name: str = "vim_micro", folder: Path | None = None) -> int:
    folder = folder or stripes(tmp_path / "data")
    quick = [] if "--steps" in words else ["--steps", "2"]
    return run(["train-classifier", name, str(folder), "--out", str(tmp_path / "out"), *quick, *SET, *words])


def test_it_learns_and_the_saved_folder_says_the_same(tmp_path, capsys):
    held = stripes(tmp_path / "held", 20, seed=1)
    words = ("--steps", "80", "--rate", "4e-3", "--batch-size", "16", "--validation", str(held), "--crop", "0.8")
    assert trained(tmp_path, *words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == ["lying", "upright"]
    assert said["metrics"]["top1"] >= 0.95
    assert (said["pictures"], said["measured"]) == (24, 40)
    assert zoo.validate(tmp_path / "out", held).metrics["top1"] == said["metrics"]["top1"]
    answers = zoo.pipeline(tmp_path / "out")(str(held))
    assert np.mean([Path(a.source).parent.name == a.label for a in answers]) == said["metrics"]["top1"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["labels"] == ["lying", "upright"]
    (metric,) = config["pretrained_cfg"]["metrics"]
    assert (metric["dataset"], metric["split"]) == ("held", "validation")
    assert not (tmp_path / "out" / "training.run").exists()


def test_a_part_is_held_out_and_the_next_command_runs(tmp_path, capsys):
    assert trained(tmp_path, "--held-out", "0.25") == 0
    said = capsys.readouterr().out
    assert "18 pictures of 2 classes to train on, 6 to measure on" in said
    command = said.splitlines()[-1].split("zoo ")[1].split()
    assert run(command) == 0


def test_size_and_licence_are_those_of_the_saved_folder(tmp_path):
    """A network without a size of its own: what --size says is kept for pipelines."""
    words = ("--size", "32", "--start", "vmamba_micro.digits", "--held-out", "0")
    assert run(["train-classifier", "vmamba_micro", str(stripes(tmp_path / "data")), "--out", str(tmp_path / "out"),
                "--steps", "1", *words]) == 0  # fmt: skip
    pipe = zoo.pipeline(tmp_path / "out")
    assert pipe.prepare(Image.new("L", (50, 40))).shape == (1, 32, 32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["licence"] == "Apache-2.0"
    assert "metrics" not in config["pretrained_cfg"]
    assert config["pretrained_cfg"]["preprocess"]["mean"] == [0.5]


def test_frozen_weights_stay(tmp_path):
    assert run(["train-classifier", "vim_micro", str(stripes(tmp_path / "data")), "--out", str(tmp_path / "out"),
                "--start", "vim_micro.digits", "--freeze", "--steps", "2"]) == 0  # fmt: skip
    before, after = (zoo.load(name).state_dict() for name in ("vim_micro.digits", tmp_path / "out"))
    changed = {k for k, v in after.items() if v.shape != before[k].shape or not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("name", "kind", "channels"),
    [
        ("vim_tiny", "RGB", 3),
        ("vmamba_tiny", "16 bits", 1),
        ("res_vmamba", "L", 3),
        ("a2mamba_nano", "RGB", 1),
        ("vim2_tiny", "RGB", 3),
        ("efficientvim_m1", "16 bits", 3),
        ("mambavision_tiny", "RGB", 3),
        ("mambaout_femto", "L", 1),
    ],
)
def test_every_classifier_takes_a_step(tmp_path, name, kind, channels):
    card, _ = catalog.find(name)
    settings = {k: v for k, v in card.tiny.items() if k != "num_classes"} | {"in_chans": channels}
    words = [word for k, v in settings.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    size = ["--size", str(card.tiny_input.get("shape", [3, 64, 64])[-1])] if "img_size" not in settings else []
    folder = stripes(tmp_path / "data", 4, kind=kind)
    assert run(["train-classifier", name, str(folder), "--out", str(tmp_path / "out"), "--steps", "1",
                "--batch-size", "4", *size, *words]) == 0  # fmt: skip
    saved = zoo.load(tmp_path / "out")
    assert (saved.num_classes, saved.in_chans) == (2, channels)


def test_an_interrupted_run_goes_on(tmp_path):
    folder = stripes(tmp_path / "data")

    def train(run, report):
        model = shared.begun("vim_micro", None, 0, num_classes=2, drop_path_rate=0.3, **SMALL)
        data = classify.labelled(folder, ["lying", "upright"], 1)
        batch = classify.Batches(data, ImageClassification(model), 2, batch_size=4, mixup=0.4)
        fit(model, batch, classify.Loss(0.1), Settings(steps=4), run=run, report=report)
        return model

    zoo.testing.check_resume(train, tmp_path)


def test_a_batch_is_a_function_of_its_number(tmp_path):
    data = classify.labelled(stripes(tmp_path / "data"), ["lying", "upright"], 1)
    pipe = ImageClassification(zoo.create("vim_micro", num_classes=2, **SMALL))
    batch = classify.Batches(data, pipe, 2, batch_size=4, mixup=0.4, seed=3)
    (x, shares), (again, _), (other, _) = batch(7), batch(7), batch(8)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == (4, 1, 16, 16)
    zoo.testing.assert_close(shares.sum(dim=1), torch.ones(4), tolerance=1e-6, what="shares")
    assert -1 <= x.min() < x.max() <= 1  # normalised as the pipeline does


def test_pictures_without_changes_are_the_pipelines(tmp_path):
    """The whole of a square picture, not flipped or jittered, is what the pipeline prepares without a crop."""
    values = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "0.png")
    model = zoo.load("vim_micro.digits")
    pipe = ImageClassification(model)
    data = classify.labelled(tmp_path, ["a", "b"], 1)
    batch = classify.Batches(data, pipe, 2, batch_size=2, least=1.0, flip=False, jitter=0.0)
    zoo.testing.assert_close(
        batch(0)[0][0], pipe.prepare(pipe.read(tmp_path / "a" / "0.png")), tolerance=1e-6, what="pixels"
    )


def test_pictures_are_turned_as_the_pipeline_turns_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.new("RGB", (30, 20)).save(tmp_path / name / "0.jpg", exif=turned)
    data = classify.labelled(tmp_path, ["a", "b"], 3)
    assert data.read(0).size == ImageClassification(zoo.create("vim_tiny", depth=1)).read(tmp_path / "a/0.jpg").size


def test_windows_lie_within_and_are_as_large_as_asked():
    r = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(v) for v in r.integers(20, 300, 2))
        left, top, w, h = window(r, width, height, 0.5)
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert 0.74 <= w / h <= 1.35 or w == width or h == height
    sizes = [window(r, 100, 100, 0.5)[2:] for _ in range(300)]
    assert 0.48 <= min(w * h for w, h in sizes) / 1e4 < 0.56
    assert max(w * h for w, h in sizes) / 1e4 > 0.9
    assert window(r, 1, 1, 0.1) == (0, 0, 1, 1)


def test_jitter_and_mixup_do_nothing_when_off():
    r = np.random.default_rng(0)
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(jittered(pixels, r, 0.0), pixels)
    assert not torch.equal(jittered(pixels, r, 0.5), pixels)
    x, shares = torch.rand(4, 1, 2, 2), torch.eye(4)
    assert mixed(x, shares, r, 0.0) == (x, shares)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "0.2", "--validation", "{data}"], "give one"),
        (["--freeze"], "give their weights as --start"),
        (["--start", "vmamba_micro.digits"], "is a vmamba_micro, and vim_micro is to be trained"),
        (["--crop", "0"], "0"),
        (["--size", "16"], "--set img_size: it is 16 already"),
        (["--set", "num_classes=3"], "--set num_classes: it is 2 already"),
    ],
)
def test_refused(tmp_path, capsys, words, message):
    data = stripes(tmp_path / "data", 2)
    assert trained(tmp_path, *(w.format(data=data) for w in words), folder=data) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_tasks_are_refused(tmp_path, capsys):
    assert trained(tmp_path, name="vmamba_micro_upernet") == 2
    assert "vmamba_micro_upernet is for semantic-segmentation" in capsys.readouterr().err


def test_folders_of_another_form_are_refused(tmp_path):
    data = stripes(tmp_path / "data", 2)
    with pytest.raises(errors.BadArgument, match="0 sub-folders"):
        classify.classes_in(data / "lying")
    (data / "lying").rename(data / "train")
    with pytest.raises(errors.BadArgument, match=r"has the sub-folder train, which is no class; give .*train"):
        classify.classes_in(data)
    with pytest.raises(errors.BadArgument, match="has the class upright, which is not trained"):
        classify.labelled(data, ["train", "other"], 1)
    (data / "empty").mkdir()
    with pytest.raises(errors.BadArgument, match="empty holds no pictures"):
        classify.labelled(data, ["empty", "train", "upright"], 1)


def test_a_damaged_picture_is_named_before_training(tmp_path, capsys):
    data = stripes(tmp_path / "data", 3)
    (data / "lying" / "broken.png").write_bytes(b"no picture")
    assert trained(tmp_path, folder=data) != 0
    said = capsys.readouterr()
    assert "broken.png is no picture that can be read" in said.err
    assert "step" not in said.out
    assert not (tmp_path / "out").exists()
