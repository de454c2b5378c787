"""zoo train-detector: COCO's annotations to a saved detector that pipelines and zoo validate agree on."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, fit
from zoo_registry import errors
from zoo_vision.detection.building import retinanet
from zoo_vision.objects import ObjectDetection, run_lengths
from zoo_vision.training import detect

pytest.importorskip("pycocotools")
MODEL = "vmamba_micro_mask_rcnn"
TINY = {"dims": 8, "neck_channels": 16, "box_width": 24}
SET = [word for k, v in TINY.items() for word in ("--set", f"{k}={v}")]
SIZE = 64


def squares(folder: Path, count: int = 6, seed: int = 0, change=lambda table: None) -> Path:
    """Red and blue rectangles with polygons, ids from 0, categories 0 and 7; picture 0 is empty, the second has a
    crowd, a box that reaches beyond it and one outside."""
    r = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        picture = Image.new("RGB", (SIZE, SIZE), (120, 120, 120))
        boxes = [] if i == 0 else [(float(r.integers(4, 30)), float(r.integers(4, 30)), 24.0, 20.0)]
        for x, y, w, h in boxes:
            kind = int(r.integers(2))
            ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), fill=((220, 40, 40), (40, 40, 220))[kind])
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"image_id": i, "category_id": kind * 7, "bbox": [x, y, w, h], "segmentation": [polygon]}
            )
        if i == 1:
            ImageDraw.Draw(picture).rectangle((50, 50, 90, 90), fill=(220, 40, 40))
        picture.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
    crowd = {"size": [SIZE, SIZE], "counts": run_lengths(np.ones((SIZE, SIZE), dtype=bool))}
    box = [50.0, 50.0, 40.0, 40.0]
    more = [
        {"bbox": [0, 0, SIZE, SIZE], "iscrowd": 1, "segmentation": crowd},
        {"bbox": box, "segmentation": [[50, 50, 90, 50, 90, 90, 50, 90]]},
        {"bbox": [70, 2, 10, 10], "segmentation": [[70, 2, 80, 2, 80, 12]]},
    ]
    annotations += [{"image_id": 1, "category_id": 0} | one for one in more]
    table = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "blue"}, {"id": 0, "name": "red"}],
    }
    change(table)
    (folder / "instances.json").write_text(json.dumps(table))
    return folder


def trained(data: Path, out: Path, *words: str, name: str = MODEL, quick=("--steps", "1", "--batch-size", "2")) -> int:
    return run(["train-detector", name, str(data), "--out", str(out), "--size", str(SIZE), *quick, *SET, *words])


def each(key, *value):
    """A change of every annotation: ``key`` set to ``value``, or taken away."""

    def change(table):
        for entry in table["annotations"]:
            entry.update({key: value[0]}) if value else entry.pop(key)

    return change


def test_annotations_become_targets(tmp_path):
    data = squares(tmp_path / "data")
    found = detect.Annotations(*detect.annotations_of(data, None))
    assert found.names == ["red", "blue"]  # in the order of the ids 0 and 7
    assert found.classes == {0: 0, 7: 1}
    assert found.left_out == 2
    assert len(found.pictures[0].labels) == 0
    assert found.pictures[1].boxes[-1].tolist() == [50, 50, 64, 64]  # cut at the border
    assert len(found.pictures[1].boxes) == 2
    assert found.has_masks()
    mask = found.pictures[1].masks((SIZE * 2, SIZE * 2))[-1]
    assert mask[100:, 100:].all()
    assert mask.sum() == 28 * 28


def test_run_lengths_and_polygons_are_the_same_masks(tmp_path):
    def packed(table):
        from pycocotools import mask as tools

        for entry in table["annotations"][:-3]:
            whole = tools.merge(tools.frPyObjects(entry["segmentation"], SIZE, SIZE))
            plain = {"size": [SIZE, SIZE], "counts": run_lengths(tools.decode(whole).astype(bool))}
            entry["segmentation"] = whole | {"counts": whole["counts"].decode()} if entry["image_id"] % 2 else plain

    first = detect.Annotations(*detect.annotations_of(squares(tmp_path / "a"), None))
    second = detect.Annotations(*detect.annotations_of(squares(tmp_path / "b", change=packed), None))
    for a, b in zip(first.pictures, second.pictures, strict=True):
        assert np.array_equal(a.masks((SIZE, SIZE)), b.masks((SIZE, SIZE)))
        one, other = (found.masks((SIZE // 2, SIZE * 2)) for found in (a, b))
        assert (one ^ other).sum() <= 0.12 * one.sum()  # borders between pixels


def test_batches_hold_what_the_picture_shows(tmp_path):
    """Boxes and masks lie on the coloured rectangles, whatever the scale and however they are flipped and padded."""
    found = detect.Annotations(*detect.annotations_of(squares(tmp_path / "data", 8), None))
    pipe = ObjectDetection(zoo.create(MODEL, num_classes=2, **TINY), short_side=SIZE)
    batch = detect.Batches(found.pictures[2:], pipe, masks=True, batch_size=12, scales=(0.5, 1.5), jitter=0.0)
    x, targets, sizes = batch(0)
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0
    assert len(set(sizes)) > 3
    pixels = x * pipe.std + pipe.mean
    corners = set()
    for picture, target, (h, w) in zip(pixels, targets, sizes, strict=True):
        assert (picture[:, h:] - pipe.mean).abs().max() < 1e-6 or h == x.shape[2]
        (mask,), (box,), (label,) = target["masks"], target["boxes"], target["labels"]
        coloured = (picture[0] - picture[2]) * (1 if label == 0 else -1) > 0.35  # red or blue
        coloured[h:], coloured[:, w:] = False, False
        both, either = (coloured & mask).sum(), (coloured | mask).sum()
        assert both / either > 0.85
        rows, columns = torch.where(mask)
        around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (around - box).abs().max() <= 1.5
        corners.add(round(float(box[0] / w), 2))
    assert len(corners) > 6  # flipped ones begin elsewhere
    again = batch(0)[0]
    assert torch.equal(x, again)
    assert not torch.equal(x[:, :, :32, :32], batch(1)[0][:, :, :32, :32])


def test_it_learns_and_the_saved_folder_says_the_same(tmp_path, capsys):
    """From a detector of six other classes; ids from 0, an empty picture, a crowd, a box that reaches beyond."""
    data, held = squares(tmp_path / "data", 12), squares(tmp_path / "held", 6, seed=1)
    words = ("--start", f"{MODEL}.shapes", "--validation", str(held), "--scale", "1", "1.2", "--score-every", "14")
    given = ["train-detector", MODEL, str(data), "--out", str(tmp_path / "out"), "--size", "64", "--steps", "28"]
    assert run([*given, "--rate", "4e-3", "--batch-size", "4", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == ["red", "blue"]
    assert said["masks"]
    assert said["metrics"]["box AP50"] > 0.3  # of new heads before training: 0
    assert said["metrics"]["mask AP50"] > 0.3
    found = zoo.validate(tmp_path / "out", held / "instances.json")
    assert {k: v for k, v in found.metrics.items() if v is not None} == said["metrics"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["preprocess"]["short_side"] == 64
    assert config["labels"] == ["red", "blue"]


def test_boxes_alone_where_there_are_no_masks(tmp_path):
    """Weights with masks, data without: Faster R-CNN, which is saved and loaded again."""
    data = squares(tmp_path / "data", change=each("segmentation"))
    assert run(["train-detector", MODEL, str(data), "--out", str(tmp_path / "out"), "--steps", "1", "--batch-size", "2",
                "--start", f"{MODEL}.shapes"]) == 0  # fmt: skip
    saved = zoo.load(tmp_path / "out")
    assert not saved.has_masks
    assert ObjectDetection(saved).short_side == 96  # as the weights it began with
    before = zoo.load(f"{MODEL}.shapes").state_dict()
    changed = (
        saved.state_dict()["backbone.patch_embed.conv1.weight"] - before["backbone.patch_embed.conv1.weight"]
    ).abs()
    assert changed.max() < 1e-3  # of one small step


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_any_backbone_is_saved_and_loaded(tmp_path, capsys, name):
    sizes = {"neck_channels": 16} | ({"head_depth": 1, "head_width": 16} if name == "retinanet" else {"box_width": 24})
    words = [word for k, v in (sizes | {"in_chans": 1}).items() for word in ("--set", f"{k}={v}")]
    data = squares(tmp_path / "data", 3)
    assert run(["train-detector", name, str(data), "--out", str(tmp_path / "out"), "--size", "64", "--steps", "1",
                "--batch-size", "2", "--start", "vmamba_micro.digits", *words]) == 0  # fmt: skip
    saved = zoo.load(tmp_path / "out")
    assert (saved.num_classes, saved.has_masks, saved.in_chans) == (2, name != "retinanet", 1)
    assert saved.zoo_info.config["backbone"] == "vmamba_micro"
    assert run(capsys.readouterr().out.splitlines()[-1].split("zoo ")[1].split()) == 0


def test_an_interrupted_run_goes_on(tmp_path):
    found = detect.Annotations(*detect.annotations_of(squares(tmp_path / "data"), None))

    def train(run, report):
        torch.manual_seed(0)
        model = zoo.create(MODEL, num_classes=2, **TINY)
        batch = detect.Batches(found.pictures, ObjectDetection(model, short_side=SIZE), masks=True, batch_size=2)
        fit(model, batch, detect.loss, Settings(steps=4), run=run, report=report)
        return model

    zoo.testing.check_resume(train, tmp_path)


def _outside(table):
    table["annotations"][0]["bbox"] = [-5, -5, 2, 2]


def test_a_picture_whose_boxes_all_lie_outside_is_empty(tmp_path):
    data = squares(tmp_path / "data", 3, change=_outside)
    assert trained(data, tmp_path / "out") == 0


def _one_without_mask(table):
    del table["annotations"][1]["segmentation"]


def _other_size(table):
    table["images"][2]["width"] = 50


def _other_mask(table):
    table["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": [0, 81]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_without_mask, "annotations have no mask (polygons or run lengths)"),
        (_other_size, "2.png has 64 x 64 pixels (upright), its annotations in"),
        (_other_mask, "has the size (height, width) [9, 9]"),
        (each("category_id", 3), "category_id 3, which none of its categories has"),
        (lambda table: table["images"][1].update(file_name="no.png"), "no.png is no picture that can be read"),
    ],
)
def test_annotations_are_looked_through_before_training(tmp_path, capsys, change, message):
    data = squares(tmp_path / "data", 3, change=change)
    assert trained(data, tmp_path / "out") != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refused(tmp_path, capsys):
    data = squares(tmp_path / "data", 3)
    (data / "other.json").write_text("{}")
    assert trained(data, tmp_path / "out") == 2
    assert "holds 2 .json files; expected one" in capsys.readouterr().err
    renamed = squares(tmp_path / "held", 3, change=lambda t: t["categories"][1].update(name="green"))
    with pytest.raises(errors.BadArgument, match="has the category 'green', which is not trained"):
        detect.Annotations(renamed / "instances.json", renamed, ["red", "blue"])
    assert trained(data / "instances.json", tmp_path / "out", name="vim_micro") == 2
    assert "vim_micro is for image-classification" in capsys.readouterr().err


def test_norms_of_maps_that_retinanet_leaves_out_are_named():
    body = zoo.create("vmamba_tiny", features_only=True, dims=8, depths=[1, 1, 1, 1])
    model = retinanet(body, num_classes=2, neck_channels=16, head_depth=1, head_width=16).train()
    target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    sum(model.loss(torch.rand(1, 3, 64, 64), [target]).values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["backbone.out_norms.0.weight", "backbone.out_norms.0.bias"]
    assert model.unused_parameters == ("backbone.out_norms.0.",)


@pytest.mark.parametrize("command", ["detect", "classify"])
def test_answers_before_a_damaged_file_are_written(tmp_path, capsys, command):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.open("examples/objects/objects_0.jpg").save(files[-1])
    files[2].write_bytes(b"no picture")
    name, option, table = {
        "detect": (f"{MODEL}.shapes", "--coco", tmp_path / "found.json"),
        "classify": ("vim_micro.digits", "--csv", tmp_path / "found.csv"),
    }[command]
    assert run([command, name, *map(str, files), option, str(table)]) != 0
    assert "2.png is not an image that can be read" in capsys.readouterr().err
    text = table.read_text()
    assert "0.png" in text
    assert "1.png" in text
    before = copy.copy(text)
    assert run([command, name, str(files[2]), option, str(table)]) != 0
    assert table.read_text() == before  # nothing was answered: what was there stays
