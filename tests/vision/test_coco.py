"""Annotations in COCO's format as people's tools write them, and the measure on them."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo_registry import errors
from zoo_vision.coco import average_precisions, has_mask, read_coco
from zoo_vision.objects import ObjectDetection, run_lengths

pytest.importorskip("pycocotools")
MODEL = "vmamba_micro_mask_rcnn.shapes"


@pytest.fixture(scope="module")
def model():
    return zoo.load(MODEL)


@pytest.fixture(scope="module")
def table(model, tmp_path_factory):
    """The detector's own answers on two pictures as what is there: every precision must be 1."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val").mkdir()
    pipe = ObjectDetection(model, min_score=0.0)
    images, annotations = [], []
    for i in range(2):
        image = Image.open(f"examples/objects/objects_{i}.jpg")
        image.save(folder / "val" / f"{i}.png")
        images.append({"id": i + 5, "file_name": f"{i}.png", "width": image.width, "height": image.height})
        for one in pipe(folder / "val" / f"{i}.png").objects:
            left, top, right, bottom = one.box
            mask = one.whole_mask(image.size)
            if one.score < 0.5:
                continue
            annotations.append({
                "id": len(annotations) + 1, "image_id": i + 5, "category_id": one.index * 3 + 2, "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top], "area": int(mask.sum()),
                "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
            })  # fmt: skip
    categories = [{"id": i * 3 + 2, "name": name} for i, name in enumerate(pipe.names)]
    assert len(annotations) > 6
    return folder, {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def measured(model, table):
    folder, whole = table

    def measure(change=lambda t: None, **options):
        changed = copy.deepcopy(whole)
        change(changed)
        path = folder / "instances_val.json"
        path.write_text(json.dumps(changed))
        return zoo.validate(model, path, **options)

    return measure


def _each(key, *value):
    """A change of every annotation: ``key`` set to ``value``, or taken away."""

    def change(table):
        for entry in table["annotations"]:
            entry.update({key: value[0]}) if value else entry.pop(key)

    return change


def _numbered_from_zero(table):
    for entry in table["annotations"]:
        entry["id"] -= 1


def test_what_is_found_is_found(measured):
    assert measured().metrics["box AP"] == measured().metrics["mask AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [_each("iscrowd"), _each("area"), _each("id"), _each("id", 1), _numbered_from_zero],
    ids=["no iscrowd", "no area", "no id", "one id", "ids from 0"],
)
def test_what_tools_leave_out_changes_no_precision(measured, change):
    # pycocotools ends with a KeyError, or counts what is found as missed
    found = measured(change).metrics
    assert found["box AP"] == found["mask AP"] == pytest.approx(1)


@pytest.mark.parametrize("change", [_each("segmentation"), _each("segmentation", [])])
def test_boxes_alone_are_measured_where_masks_lack(measured, change):
    found = measured(change)
    assert found.metrics["box AP"] == pytest.approx(1)
    assert not any(name.startswith("mask") for name in found.metrics)
    assert "masks not measured" in found.notes


def test_categories_without_objects_need_no_class(measured):
    found = measured(lambda t: t["categories"].append({"id": 0, "name": "all shapes"}))
    assert found.metrics["box AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_each("category_id", 999), "category_id 999"),
        (_each("image_id", "5"), "belongs to one of its images"),
        (_each("bbox"), "entry 0 of annotations .* has no bbox"),
        (_each("bbox", [1, 2]), r"bbox \[1, 2\]"),
        (lambda t: t.update(images=[]), "images .* is empty"),
        (lambda t: t.update(images=[3]), "entry 0 of images .* has no id"),
        (lambda t: t["images"].append(t["images"][0]), "2 images .* have the id 5"),
        (lambda t: t["images"][0].update(id="a"), "ids of images .* int and str"),
        (lambda t: t["categories"][1].update(name="disc"), "2 categories .* have the name disc"),
        (lambda t: t["categories"][t["annotations"][0]["category_id"] // 3].update(name="dog"), "model has no 'dog'"),
        (lambda t: t["images"][0].update(width=50), "96 x 96 pixels .* for 50 x 96"),
    ],
)
def test_files_that_would_be_measured_wrongly_are_refused(measured, change, words):
    with pytest.raises(errors.BadArgument, match=words):
        measured(change)


def test_limits_below_one_are_refused(measured):
    with pytest.raises(errors.BadArgument, match="limit is 0"):
        measured(limit=0)


def test_no_detection_is_zero_where_there_are_objects(table):
    folder, whole = table
    (folder / "own.json").write_text(json.dumps(whole))
    found = average_precisions(read_coco(folder / "own.json"), [], [5, 6], masks=True)
    assert found["AP"] == found["AP small"] == 0
    assert found["AP large"] is None  # there is none


def test_small_and_large_masks_go_by_the_masks_area():
    """A thin diagonal has a large box (of 100 x 100 pixels) and few pixels of its own."""
    thin = np.eye(128, dtype=bool)
    thin[100:] = False
    segmentation = {"size": [128, 128], "counts": run_lengths(thin)}
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100]}
    blob = np.zeros((128, 128), dtype=bool)
    blob[:4, 100:104] = True  # what is not there: small, and surer
    wrong = {"size": [128, 128], "counts": run_lengths(blob)}
    table = {
        "images": [{"id": 1, "width": 128, "height": 128}],
        "categories": [{"id": 1, "name": "line"}],
        "annotations": [box | {"id": 1, "iscrowd": 0, "area": int(thin.sum()), "segmentation": segmentation}],
    }
    rows = [
        box | {"score": 0.9, "segmentation": segmentation},
        {"image_id": 1, "category_id": 1, "bbox": [100, 0, 100, 100], "score": 0.95, "segmentation": wrong},
    ]
    found = average_precisions(table, rows, [1], masks=True)
    assert found["AP small"] == pytest.approx(0.5)  # by its box, the wrong one would be large and not count
    assert found["AP large"] is None


def test_what_is_a_mask():
    assert has_mask({"segmentation": {"size": [1, 1], "counts": [0, 1]}})
    assert has_mask({"segmentation": [[0, 0, 1, 0, 1, 1]]})
    assert not has_mask({"segmentation": [[0, 0, 1, 1]]})  # which pycocotools takes for a box
    assert not has_mask({"segmentation": []})
    assert not has_mask({})
