"""Annotations in COCO's format: read, checked, completed where other tools leave something out, and measured with
pycocotools.

Source: Lin et al., "Microsoft COCO", arXiv 1405.0312; https://cocodataset.org/#format-data. pycocotools takes
everything on trust: an annotation with the number 0 counts as missed, of two with one number the later is taken twice,
and objects of images that are not in the file are left out in silence. So files are looked through before.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.files import read_json
from zoo_registry import errors, optional

_LISTS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
#: pycocotools' first six numbers
PRECISIONS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def pycocotools(module: str) -> Any:
    """``pycocotools.<module>``. Raises ``zoo.errors.MissingExtra``."""
    return optional(f"pycocotools.{module}", "measuring on COCO's annotations", "ssm-zoo-vision[coco]")


def read_coco(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The lists ``images``, ``annotations`` and ``categories`` of a file of COCO's format.

    Annotations are numbered anew from 1; where one has no ``iscrowd`` it is none, where it has no ``area`` that of its
    box is taken. Raises ``zoo.errors.BadArgument`` for a file of another format, for entries that lack what they need,
    for images or categories of one number, and for annotations of categories that the file does not have.
    """
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), list) for k in _LISTS):
        raise _bad(f"{path} is no file of COCO's format; expected a table with the lists {', '.join(_LISTS)}")
    for kind, wanted in _LISTS.items():
        for i, entry in enumerate(table[kind]):
            lacking = [k for k in wanted if k not in entry] if isinstance(entry, dict) else list(wanted)
            if lacking:
                raise _bad(f"entry {i} of {kind} in {path} has no {lacking[0]}; expected {', '.join(wanted)}")
        if not table[kind]:
            raise _bad(f"the list {kind} of {path} is empty; nothing can be measured on it")
    for kind, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
        value, count = Counter(str(entry[key]) for entry in table[kind]).most_common(1)[0]
        if count > 1:
            raise _bad(f"{count} {kind} in {path} have the {key} {value}; expected another for each")
    for kind in ("images", "categories"):
        kinds = {type(entry["id"]) for entry in table[kind]}
        if len(kinds) > 1 or not kinds <= {int, str}:
            said = " and ".join(sorted(k.__name__ for k in kinds))
            raise _bad(f"the ids of {kind} in {path} are of type {said}; expected whole numbers, or texts alone")
    categories, images = {c["id"] for c in table["categories"]}, {e["id"] for e in table["images"]}
    annotations = []
    for i, entry in enumerate(table["annotations"]):
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
            raise _bad(f"entry {i} of annotations in {path} has the bbox {box!r}; expected [left, top, width, height]")
        if not isinstance(entry["category_id"], (int, str)) or entry["category_id"] not in categories:
            raise _bad(
                f"entry {i} of annotations in {path} has the category_id {entry['category_id']!r}, which none of its "
                "categories has"
            )
        usual = {"iscrowd": 0, "area": box[2] * box[3]}
        annotations.append(usual | entry | {"id": i + 1})
    if not any(entry["image_id"] in images for entry in annotations if isinstance(entry["image_id"], (int, str))):
        raise _bad(
            f"no annotation of {path} belongs to one of its images: the first is of image_id "
            f"{annotations[0]['image_id']!r}, the first image has the id {table['images'][0]['id']!r}"
        )
    return {"images": table["images"], "annotations": annotations, "categories": table["categories"]}


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation has run lengths, or polygons of three points or more each."""
    given = annotation.get("segmentation")
    if isinstance(given, dict):
        return {"size", "counts"} <= set(given)
    return isinstance(given, list) and bool(given) and all(isinstance(p, list) and len(p) >= 6 for p in given)


def average_precisions(
    table: Mapping[str, list[dict[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    image_ids: Sequence[Any],
    *,
    masks: bool,
) -> dict[str, float | None]:
    """:data:`PRECISIONS` of detections on the images ``image_ids``, None where the file has no such object.

    ``table``: as :func:`read_coco` gives it, every image with ``width`` and ``height`` if ``masks``. ``rows``: entries
    of COCO's results format whose ``category_id`` is the file's; with ``masks``, run lengths that are not compressed
    are compared, and small and large go by the mask's area, else by the box's.
    """
    coco, evaluation = pycocotools("coco"), pycocotools("cocoeval")
    found = []
    for number, row in enumerate(rows, 1):
        one = {k: row[k] for k in ("image_id", "category_id", "score")} | {"id": number, "iscrowd": 0}
        if masks:
            compressed = pycocotools("mask").frPyObjects(row["segmentation"], *row["segmentation"]["size"])
            one |= {"segmentation": compressed, "area": float(pycocotools("mask").area(compressed))}
        else:
            one |= {"bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3]}
        found.append(one)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        sides = []
        for annotations in (table["annotations"], found):
            side = coco.COCO()
            side.dataset = {**table, "annotations": [dict(a) for a in annotations]}  # which pycocotools writes into
            side.createIndex()
            sides.append(side)
        measured = evaluation.COCOeval(*sides, "segm" if masks else "bbox")
        measured.params.imgIds = list(image_ids)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    values = measured.stats[: len(PRECISIONS)].tolist()
    return {k: v if v >= 0 else None for k, v in zip(PRECISIONS, values, strict=True)}  # -1: no such object


def _bad(words: str) -> errors.BadArgument:
    return errors.BadArgument(words, argument="data", accepted=[])
