"""Label maps: zoo validate for segmentors, and zoo train-segmenter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import zoo
import zoo.testing
from zoo import catalog
from zoo.cli import run
from zoo.training import Settings, fit
from zoo_registry import errors
from zoo_vision.labelled_scenes import IGNORED, Pair, Values, check_sizes, confusion, pairs, scores, validate_scenes
from zoo_vision.scenes import SemanticSegmentation
from zoo_vision.training import segment
from zoo_vision.training.common import begun_on, preprocess_of

MODEL = "vmamba_micro_upernet"
TINY = {"dims": 8, "head_channels": 8, "auxiliary_channels": 4}
SET = [word for k, v in TINY.items() for word in ("--set", f"{k}={v}")]


def discs(
    folder: Path, count: int = 10, seed: int = 0, values: tuple[int, int, int] = (0, 1, 2), kind: str = "L"
) -> Path:
    """Red and blue discs on grey ground, pictures of sizes of their own, and label maps with ``values``."""
    r = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for i in range(count):
        size = tuple(int(v) for v in r.integers(40, 70, 2))
        picture, labels = Image.new("RGB", size, (120, 120, 120)), Image.new(kind, size, values[0])
        if kind == "P":
            labels.putpalette(list(range(256)) * 3)
        for value, colour in zip(values[1:], ((220, 40, 40), (40, 40, 220)), strict=True):
            x, y, radius = (int(v) for v in r.integers(8, 32, 3))
            for image, ink in ((picture, colour), (labels, value)):
                ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        picture.save(folder / "images" / f"{i}.png")
        labels.save(folder / "labels" / f"{i}.png")
    return folder


def trained(folder: Path, out: Path, *words: str, name: str = MODEL) -> int:
    quick = [] if "--steps" in words else ["--steps", "1", "--batch-size", "2"]
    return run(["train-segmenter", name, str(folder), "--out", str(out), "--size", "32", *quick, *SET, *words])


# -- the measure


def test_the_measure_is_counted_by_hand():
    both = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found, per_class = scores(both, ["a", "b", "c", "d"])
    assert per_class == {"a": {"IoU": 6 / 9, "accuracy": 6 / 8}, "b": {"IoU": 3 / 6, "accuracy": 3 / 4}}
    assert found == {"mIoU": (6 / 9 + 0.5) / 2, "pixel accuracy": 9 / 12, "mean accuracy": 0.75}
    both[0, 2] = 2  # found and never there
    found, per_class = scores(both, ["a", "b", "c", "d"])
    assert per_class["c"] == {"IoU": 0.0}
    assert found["mean accuracy"] == pytest.approx((6 / 10 + 3 / 4) / 2)


@pytest.fixture(scope="module")
def demo():
    return zoo.load("vmamba_micro_upernet.shapes")


@pytest.fixture
def answered(demo, tmp_path):
    """The demo's own answers as label maps: every figure must be 1."""
    pipe = SemanticSegmentation(demo)
    (tmp_path / "labels" / "inner").mkdir(parents=True)
    for i in range(3):
        picture = tmp_path / "images" / "inner" / f"{i}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(Path(f"examples/scenes/scene_{i}.jpg").read_bytes())
        Image.fromarray(pipe(picture).classes).save(tmp_path / "labels" / "inner" / f"{i}.png")
    return tmp_path


def test_what_is_found_is_found(demo, answered):
    found = zoo.validate(demo, answered)
    assert set(found.metrics.values()) == {1.0}
    assert found.per_class["ground"] == {"IoU": 1.0, "accuracy": 1.0}
    assert found.samples == 3
    assert validate_scenes(demo, answered / "images", maps=answered / "labels", limit=2).samples == 2


def test_classes_counted_from_one_and_zero_ignored(demo, answered):
    whole = zoo.validate(demo, answered)
    for file in (answered / "labels").rglob("*.png"):
        values = np.asarray(Image.open(file)) + 1
        values[:20] = 0
        Image.fromarray(values.astype(np.uint8)).save(file)
    found = zoo.validate(demo, answered, ignore_zero=True)
    assert set(found.metrics.values()) == {1.0}
    assert "classes 1 to 7; ignored 0, 255" in found.notes
    pipe = SemanticSegmentation(demo)
    counted = confusion(pipe, pairs(answered), Values.of_model(pipe, True))
    assert 0 < counted.sum() < whole.samples * 64 * 64


def test_ade20k_is_known_by_the_weights_card():
    pipe = SemanticSegmentation(zoo.create(MODEL, num_classes=4))
    assert Values.of_model(pipe) == Values((0, 1, 2, 3), (255,))
    pipe.info.weights = catalog.find("mambavision_tiny_upernet.ade20k")[1]
    assert Values.of_model(pipe) == Values((1, 2, 3, 4), (0, 255))
    assert Values.of_model(pipe, ignore_zero=False) == Values((0, 1, 2, 3), (255,))


@pytest.mark.parametrize("kind", ["L", "P", "I;16"])
def test_label_maps_of_every_kind_are_read(tmp_path, kind):
    values = np.array([[0, 7], [200, 255]], dtype=np.uint16 if kind == "I;16" else np.uint8)
    image = Image.fromarray(values)
    if kind == "P":
        image = image.convert("L")
        image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "a.png")
    assert Values((0, 7, 200)).read(tmp_path / "a.png").tolist() == [[0, 1], [2, IGNORED]]
    with pytest.raises(errors.BadFile, match=r"a.png has the value 200; expected one of the 2 classes' \(0, 7\)"):
        Values((0, 7)).read(tmp_path / "a.png")


def test_label_maps_that_are_none_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(errors.BadFile, match="is a picture in RGB; expected a PNG with one number for each pixel"):
        Values((0, 1)).read(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    with pytest.raises(errors.BadFile, match=r"b.png cannot be read"):
        Values((0, 1)).read(tmp_path / "b.png")


def test_folders_of_another_form_are_refused(demo, tmp_path):
    with pytest.raises(errors.BadArgument, match=r"there is no folder .*images; expected"):
        zoo.validate(demo, tmp_path)
    data = discs(tmp_path / "data", 2)
    (data / "labels" / "1.png").unlink()
    with pytest.raises(errors.BadArgument, match=r"1 of 2 pictures have no label map: there is no .*1\.png"):
        zoo.validate(demo, data)
    Image.new("L", (5, 5)).save(data / "labels" / "1.png")
    with pytest.raises(errors.BadFile, match=r"its label map .* 5 x 5"):
        zoo.validate(demo, data)


# -- training


def test_it_learns_and_the_saved_folder_says_the_same(tmp_path, capsys):
    """Values of label maps that are no numbers from 0 on, some of them ignored."""
    data, held = discs(tmp_path / "data", 12, values=(9, 3, 200)), discs(tmp_path / "held", 6, 1, (9, 3, 200))
    given = ["train-segmenter", MODEL, str(data), "--out", str(tmp_path / "out"), "--start", f"{MODEL}.shapes"]
    words = ["--size", "32", "--steps", "120", "--rate", "1e-2", "--batch-size", "6", "--validation", str(held)]
    assert run([*given, *words, "--scale", "0.8", "1.3", "--score-every", "60", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == ["3", "9", "200"]
    assert said["metrics"]["pixel accuracy"] > 0.85
    assert said["metrics"]["mIoU"] > 0.6  # ground alone: less than 0.3
    assert zoo.validate(tmp_path / "out", held).metrics == said["metrics"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["preprocess"]["label_values"] == [3, 9, 200]
    assert config["pretrained_cfg"]["preprocess"]["short_side"] == 32
    assert {m["name"] for m in config["pretrained_cfg"]["metrics"]} == {"mIoU", "pixel accuracy", "mean accuracy"}


def test_named_classes_and_the_next_command(tmp_path, capsys, monkeypatch):
    data = discs(tmp_path / "data", 5, values=(0, 1, 2))
    (data / "labels.txt").write_text("red\nblue\n")
    monkeypatch.chdir(tmp_path)
    assert trained(data, Path("out"), "--ignore", "0", "--held-out", "0.4") == 0
    said = capsys.readouterr().out
    assert "3 pictures of 2 classes to train on, 2 to measure on" in said
    assert run(said.splitlines()[-1].split("zoo ")[1].split()) == 0
    assert list((tmp_path / "classes").glob("*.png"))
    assert zoo.load(Path("out")).zoo_info.folder_config["labels"] == ["red", "blue"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("upernet", {"backbone": "efficientvim_m1", "embed_dim": [8, 16, 24], "depths": [1, 1, 1]}),
        ("upernet", {"backbone": "vmamba_tiny", "dims": 8, "depths": [1, 1, 1, 1], "in_chans": 1}),
        ("efficientvim_m4_semantic_fpn", {"embed_dim": [16, 24, 32], "depths": [1, 1, 1], "state_dim": [12, 9, 4],
                                          "out_channels": 16, "frozen_norms": False}),
    ],
)  # fmt: skip
def test_any_backbone_and_semantic_fpn(tmp_path, name, settings):
    heads = {"head_channels": 8} | ({"auxiliary_channels": 4} if name == "upernet" else {})
    words = [word for k, v in (settings | heads).items() for word in ("--set", f"{k}={json.dumps(v)}")]
    data = discs(tmp_path / "data", 3)
    assert run(["train-segmenter", name, str(data), "--out", str(tmp_path / "out"), "--size", "64", "--steps", "1",
                "--batch-size", "2", *words]) == 0  # fmt: skip
    scene = zoo.pipeline(tmp_path / "out")(data / "images" / "0.png")
    assert scene.names == ["0", "1", "2"]


def test_a_classifiers_weights_for_the_backbone():
    settings = {"num_classes": 3, "head_channels": 8, "auxiliary_channels": 4}
    model = begun_on("upernet", "vmamba_micro.digits", 0, in_chans=1, **settings)
    assert preprocess_of(model)["mean"] == [0.5]
    assert model.zoo_info.weights.licence == "Apache-2.0"
    digits = zoo.load("vmamba_micro.digits").state_dict()
    own = model.backbone.state_dict()
    assert all(torch.equal(v, digits[k]) for k, v in own.items() if not k.startswith("out_norms"))
    assert model.zoo_info.config["backbone"] == "vmamba_micro"
    with pytest.raises(errors.BadArgument, match="the backbone of vmamba_micro_upernet is another"):
        begun_on(MODEL, "vmamba_micro.digits", 0, num_classes=3, in_chans=1)
    with pytest.raises(errors.BadArgument, match=r"or --set backbone=vmamba_micro$"):
        begun_on("upernet", "vmamba_micro.digits", 0, backbone="vmamba_tiny", **settings)


def test_a_classifier_of_ones_own_for_the_backbone(tmp_path):
    """Its arguments are not its card's: the backbone is built with them, and the segmentor is saved with them."""
    classifier = zoo.create("vmamba_tiny", dims=8, depths=[1, 1, 1, 1], num_classes=5, in_chans=1)
    zoo.save(classifier, tmp_path / "classifier", licence="CC-BY-NC-4.0")
    data = discs(tmp_path / "data", 3)
    heads = ["--set", "head_channels=8", "--set", "auxiliary_channels=4"]
    assert run(["train-segmenter", "upernet", str(data), "--out", str(tmp_path / "out"), "--size", "64", "--steps", "1",
                "--batch-size", "2", "--start", str(tmp_path / "classifier"), *heads]) == 0  # fmt: skip
    saved = zoo.load(tmp_path / "out")
    assert (saved.in_chans, saved.num_classes) == (1, 3)
    assert saved.zoo_info.weights.licence == "CC-BY-NC-4.0"
    own, theirs = saved.backbone.state_dict(), classifier.state_dict()
    assert all((own[k] - v).abs().max() < 0.01 for k, v in theirs.items() if k in own)  # one small step away


def test_an_interrupted_run_goes_on(tmp_path):
    data = pairs(discs(tmp_path / "data", 5))

    def train(run, report):
        torch.manual_seed(0)
        model = zoo.create(MODEL, num_classes=3, **TINY)
        pipe = SemanticSegmentation(model, short_side=32)
        batch = segment.Batches(data, Values((0, 1, 2)), pipe, batch_size=2)
        fit(model, batch, segment.loss, Settings(steps=4), run=run, report=report)
        return model

    zoo.testing.check_resume(train, tmp_path)


def test_pictures_and_classes_stay_together(tmp_path, demo):
    """A sample at its own size and colours is the pipeline's; the demo knows both."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    pipe = SemanticSegmentation(demo)
    image = Image.open("examples/scenes/scene_0.jpg")
    image.save(tmp_path / "images" / "0.png")
    Image.fromarray(pipe(image).classes).save(tmp_path / "labels" / "0.png")
    data, values = pairs(tmp_path), Values(tuple(range(7)))
    batch = segment.Batches(data, values, pipe, batch_size=2, scales=(1, 1), flip=False, jitter=0.0)
    x, classes = batch(0)
    assert torch.equal(x[0], pipe.prepare(image))
    assert np.array_equal(classes[0], pipe(image).classes)
    assert segment.loss(demo, (x, classes)).item() < 0.5
    half = segment.Batches(data, values, pipe, batch_size=2, scales=(0.5, 0.5), flip=False, jitter=0.0)
    x, classes = half(0)
    assert x.shape == (2, 3, 64, 64)
    assert (classes[:, 32:] == IGNORED).all()
    assert (x[:, :, :, 32:] == 0).all()
    flipped = {torch.equal(c, batch(0)[1][0].flip(-1)) for c in
               segment.Batches(data, values, pipe, batch_size=16, scales=(1, 1))(1)[1]}  # fmt: skip
    assert flipped == {True, False}


def test_no_crop_of_one_class_alone(tmp_path, demo):
    """A corner of another class in a large picture: crops are drawn anew while one class covers too much."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    labels = np.zeros((64, 256), dtype=np.uint8)
    labels[:, 224:] = 1
    Image.new("RGB", (256, 64)).save(tmp_path / "images" / "0.png")
    Image.fromarray(labels).save(tmp_path / "labels" / "0.png")
    pipe = SemanticSegmentation(demo)
    batch = segment.Batches(pairs(tmp_path), Values((0, 1)), pipe, batch_size=32, scales=(1, 1), jitter=0.0)
    mixed = [(c == 1).float().mean() >= 0.25 for c in batch(0)[1]]
    assert sum(mixed) > 10  # of single draws about one in twelve


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "2", "0.5"], "the smaller first"),
        (["--batch-size", "1"], "1 is not in the range"),
        (["--ignore", "1", "--ignore", "2"], "the label maps hold 1 classes: the values [0, 1, 2]"),
        (["--names", "{names}"], "hold the value 2, and 2 classes are named: 0 (red) to 1 (blue)"),
        (["--names", "{same}"], "names 2 classes, 1 different ones"),
        (["--set", "num_classes=9"], "--set num_classes: it is 3 already"),
    ],
)
def test_refused(tmp_path, capsys, words, message):
    data = discs(tmp_path / "data", 2)
    (tmp_path / "names").write_text("red\nblue\n")
    (tmp_path / "same").write_text("red\nred\n")
    given = [w.format(names=tmp_path / "names", same=tmp_path / "same") for w in words]
    assert trained(data, tmp_path / "out", *given) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_masks_of_0_and_255_are_two_classes_if_nothing_is_ignored(tmp_path, capsys):
    data = discs(tmp_path / "data", 2, values=(0, 255, 255))
    assert trained(data, tmp_path / "out") == 2
    assert "(--ignore says which values do not count, --ignore -1: all do)" in capsys.readouterr().err
    assert trained(data, tmp_path / "out", "--ignore", "-1") == 0
    assert zoo.pipeline(tmp_path / "out").names == ["0", "255"]


def test_turned_pictures_have_upright_label_maps(tmp_path, demo):
    data = discs(tmp_path / "data", 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    (data / "images" / "0.png").unlink()
    Image.new("RGB", (50, 40)).save(data / "images" / "0.jpg", exif=turned)
    Image.new("L", (40, 50)).save(data / "labels" / "0.png")
    assert check_sizes(pairs(data)) == {0: 1}
    assert zoo.validate(demo, data).samples == 1
    x, classes = segment.Batches(pairs(data), Values((0, 1)), SemanticSegmentation(demo), batch_size=1, scales=(1, 1))(
        0
    )
    assert x.shape[2:] == classes.shape[1:]
    Image.new("L", (50, 40)).save(data / "labels" / "0.png")
    with pytest.raises(errors.BadFile, match=r"0\.jpg has 40 x 50 pixels \(upright\), its label map .* 50 x 40"):
        check_sizes(pairs(data))


def test_a_map_of_another_size_is_named_before_training(tmp_path, capsys):
    data = discs(tmp_path / "data", 3)
    Image.new("L", (9, 9)).save(data / "labels" / "2.png")
    assert trained(data, tmp_path / "out") != 0
    assert "2.png 9 x 9" in capsys.readouterr().err
    with pytest.raises(errors.BadFile):
        Values((0, 1)).read(Pair(data, data / "nothing.png").labels)
