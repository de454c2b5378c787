"""Detection from pictures: boxes and masks in pixels, files, COCO's measure, the command and the demo."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import recipe
from torch import nn

import zoo
from zoo.cli import run
from zoo_registry import errors, read_labels
from zoo_vision.detection import Detections
from zoo_vision.objects import Found, ObjectDetection, Objects, run_lengths
from zoo_vision.validation import validate_coco


class Dark(nn.Module):
    """A made-up detector: one object around the dark pixels of each picture, of class 1."""

    in_chans, num_classes, has_masks = 3, 2, True

    def detect(self, x, sizes):
        found = []
        for image, (height, width) in zip(x, sizes, strict=True):
            assert image.shape[1] % 32 == image.shape[2] % 32 == 0
            rows, columns = torch.where(image[:, :height, :width].mean(0) < -1)
            box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
            half = torch.cat([torch.ones(1, 28, 14), torch.zeros(1, 28, 14)], dim=2)
            found.append(Detections(box, torch.tensor([0.75]), torch.tensor([1]), half))
        return found


def spot(width: int = 120, height: int = 60) -> Image.Image:
    """White, with a black rectangle from (30, 15) to (60, 45)."""
    values = np.full((height, width, 3), 255, np.uint8)
    values[15:45, 30:60] = 0
    return Image.fromarray(values)


def test_boxes_and_masks_are_in_pixels_of_the_picture(tmp_path):
    pipe = ObjectDetection(Dark(), short_side=100)
    spot().save(tmp_path / "dark spot.png")
    found = pipe(tmp_path / "dark spot.png")
    (one,) = found.objects
    assert one.box == pytest.approx((30, 15, 60, 45), abs=1)
    assert (one.label, one.index, one.score, found.summary()) == ("class 1", 1, 0.75, "1 class 1")
    mask = one.whole_mask(found.size)
    assert mask.shape == (60, 120)
    assert mask[20:40, 32:44].all()
    assert not mask[:, 46:].any()
    assert found.picture().size[0] > 480
    assert json.dumps(found.to_dict())
    (row,) = json.loads(found.save(tmp_path / "out" / "a.json").read_text())
    assert row["image_id"] == "dark spot.png"
    assert row["bbox"] == pytest.approx([30, 15, 30, 30], abs=1)
    numbers = np.asarray(Image.open(found.save(tmp_path / "out" / "a.png")))
    assert np.array_equal(numbers == 1, mask)
    assert pipe.size_of(1000, 500) == (83, 166)  # the longer side is reached first: 100 x 1333 / 800
    with pytest.raises(errors.BadArgument, match=r"expected \.json, \.png"):
        found.save(tmp_path / "a.jpg")
    assert ObjectDetection(Dark(), 0.8, short_side=100)(spot()).summary() == "nothing found"


def test_run_lengths_are_coco_s():
    masks = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for shape in ((7, 5), (1, 9), (6, 1)):
        for share in (0.0, 0.3, 1.0):
            mask = generator.random(shape) < share
            counts = run_lengths(mask)
            assert sum(counts) == mask.size
            packed = masks.frPyObjects({"size": list(shape), "counts": counts}, *shape)
            assert np.array_equal(masks.decode(packed), mask)


def test_without_masks_a_box_is_its_pixels():
    one = Found(label="a", index=0, score=0.5, box=(1.2, 2.0, 4.0, 3.6))
    assert np.argwhere(one.whole_mask((6, 5))).tolist() == [[r, c] for r in (2, 3) for c in (1, 2, 3)]
    two = Found(label="b", index=1, score=0.4, box=(0.0, 0.0, 6.0, 5.0))
    numbers = Objects(objects=[one, two], size=(6, 5)).numbers()
    assert (numbers == 1).sum() == 6
    assert (numbers == 2).sum() == 24


def test_coco_has_its_names():
    names = read_labels(zoo.info("mambavision_tiny_cascade_mask_rcnn").card)
    assert len(names) == 80
    assert (names[0], names[1], names[-1]) == ("person", "bicycle", "toothbrush")


def test_what_is_no_picture_or_no_detector(tmp_path):
    with pytest.raises(errors.BadArgument, match="a tensor was given"):
        ObjectDetection(Dark())(torch.zeros(3, 8, 8))
    with pytest.raises(errors.BadArgument, match="has no detect"):
        ObjectDetection(zoo.create("vim_micro"))
    with pytest.raises(errors.BadArgument, match="min_score is 2; expected 0 to 1"):
        ObjectDetection(Dark(), min_score=2)


def test_measuring_on_coco_s_annotations(tmp_path):
    pytest.importorskip("pycocotools")
    spot().save(tmp_path / "a.png")
    mask = np.zeros((60, 120), bool)
    mask[15:45, 30:45] = True
    table = {
        "images": [{"id": 7, "file_name": "a.png", "width": 120, "height": 60}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 9, "iscrowd": 0, "bbox": [30, 15, 30, 30], "area": 450,
            "segmentation": {"size": [60, 120], "counts": run_lengths(mask)}}],
        "categories": [{"id": 9, "name": "spot"}, {"id": 4, "name": "star"}],
    }  # fmt: skip
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(table))
    found = validate_coco(Dark(), file, progress=False)
    assert found.metrics["box AP50"] == found.metrics["mask AP50"] == pytest.approx(1)
    assert found.metrics["box AP"] > 0.8
    assert found.metrics["box AP large"] is None
    assert found.notes == "categories matched in the order of their ids"  # 4, then 9: the model's class 1
    file.write_text(json.dumps({**table, "categories": [{"id": 9, "name": "spot"}]}))
    with pytest.raises(errors.BadArgument, match="1 categories, the model 2 classes; the model has no 'spot'"):
        validate_coco(Dark(), file, progress=False)
    file.write_text(json.dumps({**table, "images": [{"id": 7, "file_name": "b.png"}]}))
    with pytest.raises(errors.BadArgument, match=r"1 of 1 pictures are not in .*b\.png; give their folder"):
        validate_coco(Dark(), file, progress=False)
    file.write_text("[1, 2]")
    with pytest.raises(errors.BadArgument, match="no file of COCO's format; expected a table with the lists images"):
        validate_coco(Dark(), file, progress=False)


def test_command(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.open(Path(__file__).parents[2] / "examples" / "objects" / "objects_0.jpg").save(tmp_path / "in" / "one.png")
    (tmp_path / "in" / "two.png").write_text("no picture")
    words = ["detect", "vmamba_micro_mask_rcnn.shapes", str(tmp_path / "in"), "--coco", str(tmp_path / "found.json")]
    words += ["--save-picture", str(tmp_path / "drawn"), "--numbers", str(tmp_path / "numbers")]
    words += ["--keep-going", "--json"]
    assert run(words) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["objects"]
    assert all(one["score"] >= 0.3 for one in first["objects"])
    assert len(json.loads((tmp_path / "found.json").read_text())) == len(first["objects"])
    assert Image.open(first["numbers"]).size == (96, 96)
    assert Image.open(first["picture"]).size[0] > 480
    assert "not an image" in second["message"]
    assert run([*words[:3], "--coco", str(tmp_path / "a.txt")]) == 2
    assert not (tmp_path / "a.txt").exists()


def test_the_demo_checkpoint_is_what_its_card_says():
    """The recipe's own scenes and measure, on a quarter of the held-out ones."""
    pytest.importorskip("pycocotools")
    card = zoo.info("vmamba_micro_mask_rcnn.shapes").weights
    measured = recipe("vision", "train_detector").measure(zoo.load("vmamba_micro_mask_rcnn.shapes"), 50)
    for metric in card.metrics:
        assert abs(100 * measured[metric.name] - metric.value) < 8, metric.name
