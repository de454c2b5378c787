"""zoo train-change: labelled pairs to a saved detector that answers as it was measured."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, Shuffled, fit
from zoo_remote_sensing.labelled import labelled_pairs
from zoo_remote_sensing.losses import bda_loss, cross_entropy
from zoo_remote_sensing.palettes import COLOURS
from zoo_remote_sensing.pipelines import ChangeDetection
from zoo_remote_sensing.training import Crops, loss_of

pytest.importorskip("torchmetrics")

SMALL = {"dims": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "decoder_dim": 8, "expand": 1.0, "mlp_ratio": 1.0}
SET = [f"--set={k}={json.dumps(v)}" for k, v in SMALL.items()]
PAGE = (Path(__file__).parents[2] / "docs" / "remote_sensing.md").read_text(encoding="utf-8")
SECTION = re.findall(r"^## Train on your own data\n(.*?)^### ", PAGE, re.MULTILINE | re.DOTALL)[0]
SHORT = ["--crop=32", "--batch-size=4", "--score-every=99"]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def places(r, size):
    """Where something is new: a square of a half of the size, or (one in three) nothing."""
    where = np.zeros((size, size), bool)
    top, left = r.integers(0, size // 2, 2)
    where[top : top + size // 2, left : left + size // 2] = True
    return where


def pair(r, size):
    """Grass, and what was built on it: two pictures, and where."""
    before = r.normal([60, 110, 60], 8, (size, size, 3)).clip(0, 255)
    where = places(r, size)
    after = before + r.normal(0, 4, before.shape)
    after[where] += [120, 60, 110]
    return before, after.clip(0, 255), where


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """As LEVIR-CD: A, B, label."""
    folder, r = tmp_path_factory.mktemp("levir"), np.random.default_rng(0)
    for i in range(8):
        before, after, where = pair(r, 48)
        for name, pixels in (("A", before), ("B", after), ("label", where * 255)):
            save(folder / name / f"{i}.png", pixels)
    return folder


def train(capsys, *words, status=0):
    assert run(["train-change", *map(str, words), *(["--json"] if status == 0 else [])]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err


def validated(capsys, model, data):
    assert run(["validate", str(model), str(data), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["metrics"]


def test_it_learns_where_something_changed(binary, tmp_path, capsys):
    out = tmp_path / "out"
    found = train(
        capsys, "changemamba_micro", binary, "--out", out, *SET, *SHORT, "--steps=20", "--rate=8e-3",
        f"--validation={binary}",
    )  # fmt: skip
    assert found["figures"]["F1"] > 0.9
    assert validated(capsys, out, binary) == pytest.approx(found["figures"], abs=1e-12)
    model = zoo.load(out)
    assert {m.name: m.value for m in model.zoo_info.weights.metrics} == found["figures"]
    result = zoo.pipeline(model)((binary / "A" / "0.png", binary / "B" / "0.png"))
    truth = np.asarray(Image.open(binary / "label" / "0.png")) > 0
    assert ((result.changed > 0) == truth).mean() > 0.9
    assert result.layers["changed"] == ["unchanged", "changed"]
    again = train(
        capsys, "changemamba_micro", binary, "--out", tmp_path / "more", "--start", out, *SHORT, "--steps=1",
        "--rate=1e-9", "--held-out=0.3",
    )  # fmt: skip
    assert (again["pairs"], again["held_out"]) == (6, 2)
    assert again["figures"]["F1"] > 0.8  # it began with what it knew
    words = ["changemamba_micro", binary, "--out", tmp_path / "all", *SET, *SHORT, "--steps=1", "--held-out=0"]
    assert train(capsys, *words)["figures"] == {}


def test_land_cover_of_both_dates_in_colours(tmp_path, capsys):
    """As SECOND: colours of its classes, and classes of one's own as numbers."""
    r, data = np.random.default_rng(1), tmp_path / "second"
    palette = np.array(COLOURS["second"])
    for i in range(4):
        before, after, where = pair(r, 40)
        for name, pixels in (("im1", before), ("im2", after)):
            save(data / name / f"{i}.png", pixels)
        for name, number in (("label1", 1), ("label2", 5)):
            save(data / name / f"{i}.png", palette[where * number])
            save(tmp_path / "own" / name.replace("label", "GT_T") / f"{i}.png", where * (number % 3))
            save(tmp_path / "own" / name.replace("label", "T") / f"{i}.png", before if number == 1 else after)
    out, words = tmp_path / "out", ["--steps=1", f"--validation={data}", *SET, *SHORT]
    found = train(capsys, "changemamba_scd_tiny", data, "--out", out, *words)
    assert {"SeK", "F_scd", "F1"} <= set(found["figures"])
    assert validated(capsys, out, data) == pytest.approx(found["figures"], abs=1e-12)
    own = tmp_path / "own"
    words[1] = f"--validation={own}"
    (tmp_path / "names.txt").write_text("unchanged\nmeadow\nhouses\n")
    assert "the model has 2 classes" in train(
        capsys, "changemamba_scd_tiny", own, "--out", out, *words, "--set=semantic_classes=2", status=2
    )
    found = train(capsys, "changemamba_scd_tiny", own, "--out", out, *words, "--labels", tmp_path / "names.txt")
    assert zoo.load(out).semantic_classes == 3
    assert zoo.pipeline(str(out)).layers["before"] == ["unchanged", "meadow", "houses"]
    assert validated(capsys, out, own) == pytest.approx(found["figures"], abs=1e-12)


def test_damaged_buildings(tmp_path, capsys):
    """As xBD; a picture without buildings teaches where none stands, and nothing about damage."""
    r, data = np.random.default_rng(1), tmp_path / "xbd"
    for i in range(4):
        before, after, where = pair(r, 40)
        where = where & (i > 0)
        for date, pixels, label in (("pre", before, where), ("post", after, where * (1 + i))):
            save(data / "images" / f"{i}_{date}_disaster.png", pixels)
            save(data / "masks" / f"{i}_{date}_disaster.png", label)
    out = tmp_path / "out"
    found = train(capsys, "changemamba_bda_tiny", data, "--out", out, *SET, *SHORT, "--steps=2", f"--validation={data}")
    assert {"F1_loc", "F1_clf"} <= set(found["figures"])
    assert validated(capsys, out, data) == pytest.approx(found["figures"], abs=1e-12)


def test_bands_and_their_range_are_kept(tmp_path, capsys):
    """GeoTIFFs of 16 bits with four bands, read in windows, with pixels without data at one date."""
    rasterio = pytest.importorskip("rasterio")
    r, data, out = np.random.default_rng(2), tmp_path / "tiles", tmp_path / "out"
    for i in range(3):
        before, after, where = pair(r, 48)
        shape = {"height": 48, "width": 48, "transform": rasterio.transform.from_origin(0, 480, 10, 10), "crs": 32632}
        for name, pixels in (("T1", before), ("T2", after)):
            (data / name).mkdir(parents=True, exist_ok=True)
            bands = np.concatenate([np.zeros((1, 48, 48)), pixels.transpose(2, 0, 1) * 10 + 5]).astype(np.uint16)
            bands[:, :4] = 0
            with rasterio.open(data / name / f"{i}.tif", "w", count=4, dtype="uint16", nodata=0, **shape) as file:
                file.write(bands)
        (data / "GT").mkdir(exist_ok=True)
        with rasterio.open(data / "GT" / f"{i}.tif", "w", count=1, dtype="uint8", **shape) as file:
            file.write(where[None].astype(np.uint8))
    words = ["changemamba_micro", data, "--out", out, *SET, *SHORT, "--steps=3", f"--validation={data}"]
    assert "holds uint16; expected uint8" in train(capsys, *words, status=2)
    found = train(capsys, *words, "--bands=2,3,4", "--value-range", "0", "2550")
    settings = zoo.load(out).zoo_info.weights.preprocess
    assert (settings["bands"], settings["value_range"]) == ([2, 3, 4], [0.0, 2550.0])
    assert validated(capsys, out, data) == pytest.approx(found["figures"], abs=1e-12)
    crops = Crops(ChangeDetection(zoo.load(out)), labelled_pairs(data, "binary"), 48)
    labels = crops([0, 1, 2], r)["labels"]["change"]
    assert [(row == 255).sum().item() for row in labels] == [4 * 48] * 3


def test_crops_of_dates_and_labels_lie_together(tmp_path):
    numbers = np.arange(40 * 50, dtype=np.int64).reshape(40, 50)
    code = np.stack([numbers // 256, numbers % 256, numbers * 0], axis=-1)
    for name in ("A", "B"):
        save(tmp_path / name / "a.png", code)
    save(tmp_path / "label" / "a.png", (numbers % 7 == 0) * 255)
    pipe = ChangeDetection(zoo.create("changemamba_micro", **SMALL))
    crops, r = Crops(pipe, labelled_pairs(tmp_path, "binary"), 32), np.random.default_rng(0)
    batch = crops([0] * 64, r)
    seen = (batch["dates"][0] * pipe.std + pipe.mean).mul(255).round().long()
    which = seen[:, 0] * 256 + seen[:, 1]
    assert torch.equal(batch["dates"][0], batch["dates"][1])
    assert torch.equal(batch["labels"]["change"], (which % 7 == 0).long())
    steps = {(int(w[0, 1] - w[0, 0]), int(w[1, 0] - w[0, 0])) for w in which}
    assert steps == {
        (a, b) for a, b in ((1, 50), (1, -50), (-1, 50), (-1, -50), (50, 1), (50, -1), (-50, 1), (-50, -1))
    }


def test_it_begins_with_the_encoder_of_a_classifier(binary, tmp_path, capsys):
    kind = {"dims": [8, 12, 16, 24], "expand": 1.0, "mlp_ratio": 1.0, "gate": False}
    torch.manual_seed(5)
    detector = zoo.create("changemamba_micro", **SMALL)
    classifier = zoo.create("vmamba_tiny_s1l8", depths=[1, 1, 2, 1], **kind)
    zoo.save(classifier, tmp_path / "classifier")
    words = [binary, "--start", tmp_path / "classifier", *SHORT, "--steps=1", "--rate=1e-12"]
    train(capsys, "changemamba_micro", *words, "--out", tmp_path / "out", *SET)
    found, given = zoo.load(tmp_path / "out").encoder.state_dict(), classifier.state_dict()
    shared = [k for k in found if k in given]
    assert len(shared) > 0.8 * len(found)
    assert all(torch.allclose(found[k], given[k], atol=1e-6) for k in shared)
    assert set(found) == set(detector.encoder.state_dict())
    assert "the encoder of changemamba_micro is another" in train(
        capsys, "changemamba_micro", *words, "--out", tmp_path / "else", status=2
    )


def test_training_goes_on_after_an_interruption(binary, tmp_path):
    pairs = labelled_pairs(binary, "binary")

    def trained(run, report):
        torch.manual_seed(0)
        model = zoo.create("mamba_fcs_bcd", dims=[8, 12, 16, 24], depths=[1, 1, 1, 1], expand=1.0, mlp_ratio=1.0)
        crops, order = Crops(ChangeDetection(model), pairs, 32), Shuffled(len(pairs), 2)
        batch = lambda index: crops(order(index), order.random(index))  # noqa: E731
        fit(model, batch, loss_of(model), Settings(steps=4), run=run, report=report)
        return model

    zoo.testing.check_resume(trained, tmp_path, after=2)


def test_losses_without_a_label_to_learn_from():
    """A crop where nothing changed, or no building stands, has a loss of what it does show, with a gradient."""
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    assert cross_entropy(logits, torch.full((2, 4, 4), 255)).item() == 0
    building, none = torch.randn(2, 2, 4, 4, requires_grad=True), torch.zeros(2, 4, 4, dtype=torch.int64)
    bda_loss(building, logits, none, none).backward()
    assert building.grad.abs().sum() > 0
    assert logits.grad.abs().sum() == 0
    torch.manual_seed(0)
    model = zoo.create("mamba_fcs_scd_second", dims=[8, 12, 16, 24], depths=[1, 1, 1, 1], expand=1.0, mlp_ratio=1.0)
    labels = {"change": none[:, :1, :1].expand(2, 32, 32)}
    labels |= {"before": labels["change"], "after": labels["change"]}
    dates = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    loss = loss_of(model)(model, {"dates": dates, "labels": labels})
    assert torch.isfinite(loss)
    labels["change"] = torch.ones(2, 32, 32, dtype=torch.int64)
    labels["before"], labels["after"] = labels["change"] * 2, torch.randint(1, 7, (2, 32, 32))
    loss = loss_of(model)(model, {"dates": dates, "labels": labels})  # kappa of random weights may be below zero
    loss.backward()
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_what_is_refused(binary, tmp_path, capsys):
    def refused(*words, status=2):
        return train(capsys, *words, "--out", tmp_path / "out", "--steps=1", status=status)

    assert "trains models for binary-change-detection" in refused("rsmamba_base_uc", binary)
    assert "--crop less" in refused("changemamba_micro", binary, *SET)
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert "--labels names land cover" in refused("changemamba_micro", binary, "--labels", tmp_path / "names.txt")
    assert "has no folder T1 or A or im1" in refused("changemamba_micro", tmp_path)
    (tmp_path / "whole" / "val").mkdir(parents=True)
    assert "give its part" in refused("changemamba_micro", tmp_path / "whole")
    lone = tmp_path / "lone"
    for name in ("A", "B", "label"):
        save(lone / name / "0.png", np.zeros((40, 40) if name == "label" else (40, 40, 3)))
    assert "none can be held out" in refused("changemamba_micro", lone, "--crop=32")
    save(lone / "label" / "0.png", np.full((40, 40), 7))
    words = ["changemamba_micro", lone, "--crop=32", f"--validation={binary}"]
    assert "expected 0 and 1, or 0 and 255" in refused(*words, status=5)
    save(lone / "label" / "0.png", np.zeros((40, 41)))
    assert "(40, 41) pixels" in refused(*words)
    (lone / "A" / "0.png").write_bytes(b"nothing")
    assert "0.png is no picture" in refused(*words, status=5)
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_run(binary, tmp_path, capsys, monkeypatch):
    """One after the other on data of its layout: models, crops and steps are smaller than printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("pairs", "LEVIR-CD/train", "LEVIR-CD/val", "cover"):
        shutil.copytree(binary, name)
    for name in ("A", "B"):
        shutil.copy(f"pairs/{name}/0.png", f"pairs/{name}/one.png")
        shutil.copytree("cover/label", f"cover/label{name}")
    shutil.copy("pairs/label/0.png", "pairs/label/one.png")
    for path in Path("cover").glob("label?/*.png"):
        save(path, np.asarray(Image.open(path)) // 255)
    Path("cover.txt").write_text("unchanged\nhouses\n")
    zoo.save(zoo.create("vmamba_tiny_s2l5", dims=SMALL["dims"], expand=1.0, mlp_ratio=1.0), "classifier")
    for path in Path("pairs/A").glob("*.png"):
        for name in ("field", "town"):
            Path("scenes", name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path("scenes", name))
    Path("spectra").mkdir()
    np.save("spectra/scene.npy", np.random.default_rng(0).normal(size=(8, 9, 20)).astype(np.float32))
    np.save("spectra/scene_gt.npy", np.arange(72).reshape(8, 9) % 3)
    Path("crops.txt").write_text("wheat\nmaize\n")
    smaller = {
        "train-change": [*SET, *SHORT],
        "train-classifier": ["--set=arch=small", "--set=depth=2", "--size=32", "--batch-size=2"],
        "train-pixels": ["--set=dim=8", "--batch-size=4"],
    }
    commands = re.findall(r"^    zoo (.*)$", SECTION, re.MULTILINE)
    for line in commands:
        words = shlex.split(line.replace("vmamba_tiny_s2l5.in1k", "./classifier"))
        small = [*smaller[words[0]], "--steps=1"] if words[0] in smaller else []
        assert run(words + small) == 0, line
    said = capsys.readouterr().out
    assert "try: zoo change ./levir BEFORE AFTER" in said
    assert "try: zoo map-pixels ./pixels spectra/scene.npy" in said
    verbs = "train-change change train-change train-change validate train-classifier classify train-pixels map-pixels"
    assert [line.split()[0] for line in commands] == [*verbs.split(), "validate"]
    assert Path("change.png").stat().st_size > 500
