"""Measuring a classifier on a folder of images, with timm's data set, transforms and loader; a detector on COCO's
annotations, with pycocotools."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.files import read_json
from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors, optional

from .objects import ObjectDetection
from .pipelines import ImageClassification


def validate_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Top-1 and top-5 accuracy over the images FOLDER/CLASS/IMAGE, one subfolder a class.

    Subfolders are matched to the classes by name (ImageNet's synset ids such as n01440764, or the labels); if no name
    fits and their number is the model's, in sorted order. ``workers``: processes that read files; ``limit``: at most so
    many images, spread over the classes.

    Raises ``zoo.errors.BadArgument`` when the folder holds no images or its classes cannot be matched to the model's.
    """
    from timm.data import ImageDataset, create_loader

    pipe = ImageClassification(model)
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    wanted, matching = match_classes(classes, pipe)
    try:
        data: Any = ImageDataset(str(folder), class_map=wanted, input_img_mode="L" if pipe.in_chans == 1 else "RGB")
    except RuntimeError as error:  # timm: no images
        raise errors.BadArgument(
            f"{folder} holds no images; expected {folder}/CLASS/IMAGE ({error})", argument="folder", accepted=[]
        ) from error
    if limit is not None and limit < len(data):
        # spread over the classes, which come one after the other
        chosen = torch.linspace(0, len(data) - 1, limit).long().tolist()
        data.reader.samples = [data.reader.samples[i] for i in chosen]
    settings = {k: v for k, v in pipe.settings.items() if k != "input_size"}
    loader = create_loader(
        data, pipe.settings["input_size"], batch_size, is_training=False, use_prefetcher=False,
        num_workers=workers, pin_memory=False, persistent_workers=False, device=torch.device("cpu"), **settings,
    )  # fmt: skip
    seen = right1 = right5 = 0
    outputs = 0
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(data), pipe.name) as advance, torch.inference_mode():
        for images, targets in loader:
            logits = pipe.model(pipe._to_model(images)).float().cpu()
            outputs = logits.shape[-1]
            best = logits.topk(min(5, outputs), dim=-1).indices
            hits = best == targets[:, None]
            right1 += int(hits[:, 0].sum())
            right5 += int(hits.any(dim=1).sum())
            seen += len(targets)
            for _ in range(len(targets)):
                advance()
    seconds = time.perf_counter() - began
    return Measured(
        model=pipe.name,
        data=str(folder),
        samples=seen,
        metrics={"top1": right1 / seen, "top5": right5 / seen if outputs > 5 else None},
        seconds=seconds,
        notes=matching,
    )


def match_classes(folders: list[str], pipe: ImageClassification) -> tuple[dict[str, int], str]:
    """Index of each class folder among the model's outputs, and how it was found, in words."""
    if not folders:
        raise errors.BadArgument(
            "the folder has no subfolders; expected one a class: FOLDER/CLASS/IMAGE", argument="folder", accepted=[]
        )
    for kind, names in _names(pipe):
        where = {name: i for i, name in enumerate(names)}
        if all(f in where for f in folders):
            return {f: where[f] for f in folders}, f"{len(folders)} folders matched to the classes by {kind}"
    count = int(getattr(pipe.model, "num_classes", 0))
    if len(folders) == count:
        return (
            {f: i for i, f in enumerate(folders)},
            f"{count} folders taken as the classes in sorted order (no folder name is a label)",
        )
    raise errors.BadArgument(
        f"{len(folders)} folders ({', '.join(folders[:3])} ...) fit neither the names nor the number of the model's "
        f"{count} classes; name them by label or by synset id",
        argument="folder",
        accepted=[],
    )


def _names(pipe: ImageClassification) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    weights = pipe.info.weights if pipe.info is not None else None
    if weights is not None and weights.labels is not None and weights.labels.startswith("imagenet"):
        from timm.data import ImageNetInfo

        info = ImageNetInfo(weights.labels)
        found.append(("synset id", [info.index_to_label_name(i) for i in range(info.num_classes())]))
    if pipe.names is not None:
        found.append(("label", pipe.names))
    return found


# -- detection -------------------------------------------------------------------------------------------------------

#: pycocotools' first six numbers
_PRECISIONS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def validate_coco(
    model: nn.Module,
    annotations: str | Path,
    *,
    images: str | Path | None = None,
    short_side: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Average precision of boxes, and of masks where the network has them, on a file of COCO's format.

    DATA is the annotations' .json (``instances_val2017.json``); ``images`` the folder of the pictures (default: the
    folder ``val2017`` for ``instances_val2017.json``, beside the annotations or one above, else the folder of the
    file). ``short_side``: pixels of resized pictures' shorter sides. Categories are matched to the model's labels by
    name, else, if their number is the model's, in the order of their ids. ``limit``: the first so many images. The
    measure is pycocotools' (Lin et al., arXiv 1405.0312): the mean over thresholds of 0.5 to 0.95 of the overlap, and
    over categories.

    Raises ``zoo.errors.BadArgument`` for a file of another format, missing pictures, and categories that do not fit;
    ``MissingExtra`` without pycocotools.
    """
    coco_module: Any = optional("pycocotools.coco", "measuring on COCO's annotations", "ssm-zoo-vision[coco]")
    evaluation: Any = optional("pycocotools.cocoeval", "measuring on COCO's annotations", "ssm-zoo-vision[coco]")
    table = read_json(annotations)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), list) for k in _COCO_LISTS):
        raise errors.BadArgument(
            f"{annotations} is no file of COCO's format; expected a table with the lists {', '.join(_COCO_LISTS)}",
            argument="data",
            accepted=[],
        )
    began = time.perf_counter()
    pipe = ObjectDetection(model, min_score=0.0, short_side=short_side)
    ids, matching = match_categories(table["categories"], pipe)
    folder = _pictures_of(Path(annotations), images)
    entries = sorted(table["images"], key=lambda entry: entry["id"])[:limit]
    if missing := [e["file_name"] for e in entries if not (folder / e["file_name"]).is_file()]:
        raise errors.BadArgument(
            f"{len(missing)} of {len(entries)} pictures are not in {folder}, the first {missing[0]}; give their folder "
            "as images=",
            argument="images",
            accepted=[],
        )
    rows: list[dict[str, Any]] = []
    found = pipe.stream([folder / e["file_name"] for e in entries], batch_size=batch_size)
    with progress_bar(progress and sys.stderr.isatty(), len(entries), pipe.name) as advance:
        for entry, result in zip(entries, found, strict=True):
            rows += result.coco(entry["id"])  # type: ignore[attr-defined]
            advance()
    rows = [row | {"category_id": ids[row["category_id"]]} for row in rows if row["category_id"] in ids]
    metrics: dict[str, float | None] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = coco_module.COCO()
        truth.dataset = table
        truth.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if kind == "segm" and not getattr(model, "has_masks", False):
                continue
            metrics |= {f"{name} {k}": v for k, v in _precisions(truth, rows, kind, entries, evaluation).items()}
    return Measured(
        model=pipe.name, data=str(annotations), samples=len(entries), metrics=metrics,
        seconds=time.perf_counter() - began, notes=matching,
    )  # fmt: skip


_COCO_LISTS = ("images", "annotations", "categories")


def _precisions(
    truth: Any, rows: list[dict[str, Any]], kind: str, entries: list[dict[str, Any]], evaluation: Any
) -> dict[str, float | None]:
    if not rows:
        return dict.fromkeys(_PRECISIONS, 0.0)
    if kind == "segm":
        masks: Any = optional("pycocotools.mask", "measuring masks", "ssm-zoo-vision[coco]")
        rows = [r | {"segmentation": masks.frPyObjects(r["segmentation"], *r["segmentation"]["size"])} for r in rows]
    else:
        rows = [{k: v for k, v in r.items() if k != "segmentation"} for r in rows]
    measured = evaluation.COCOeval(truth, truth.loadRes(rows), kind)
    measured.params.imgIds = [e["id"] for e in entries]
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    values = measured.stats[: len(_PRECISIONS)].tolist()
    return {k: v if v >= 0 else None for k, v in zip(_PRECISIONS, values, strict=True)}  # -1: no such object


def match_categories(categories: list[dict[str, Any]], pipe: ObjectDetection) -> tuple[dict[int, int], str]:
    """From the model's class to the file's category id, and in words how they were matched."""
    by_name = {c["name"].casefold(): int(c["id"]) for c in categories}
    names = [n.casefold() for n in pipe.names or []]
    known = {i: by_name[n] for i, n in enumerate(names) if n in by_name}
    if len(known) == len(by_name):
        return known, "categories matched by name"
    if (count := int(getattr(pipe.model, "num_classes", 0))) == len(categories) and not known:
        return dict(enumerate(sorted(by_name.values()))), "categories matched in the order of their ids"
    lacking = sorted(set(by_name) - set(names))
    raise errors.BadArgument(
        f"the file has {len(by_name)} categories, the model {count} classes; the model has no {lacking[0]!r}. Expected "
        "equal names, or equal numbers of classes without a name in common",
        argument="data",
        accepted=[],
    )


def _pictures_of(annotations: Path, images: str | Path | None) -> Path:
    if images is not None:
        return Path(images)
    own = annotations.stem.split("_")[-1]
    near = [annotations.parent / own, annotations.parent.parent / own]
    return next((folder for folder in near if folder.is_dir()), annotations.parent)
