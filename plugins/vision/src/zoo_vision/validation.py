"""Measuring a classifier on a folder of images, with timm's transforms and loader; a detector on COCO's
annotations, with pycocotools."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from zoo.images import EXTENSIONS, open_image
from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from .coco import average_precisions, has_mask, pycocotools, read_coco
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

    Raises ``zoo.errors.BadArgument`` when the folder holds no images, a damaged one, or classes that cannot be matched
    to the model's.
    """
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        at_least(name, value, least)
    pipe = ImageClassification(model)
    wanted, matching = match_classes(class_folders(folder), pipe)
    data = LabelledPictures(Path(folder), wanted, pipe.in_chans, upright=bool(pipe.preprocess.get("upright", False)))
    if not len(data):
        raise errors.BadArgument(
            f"{folder} holds no images; expected {folder}/CLASS/IMAGE ({', '.join(EXTENSIONS)})",
            argument="folder",
            accepted=[],
        )
    if limit is not None and limit < len(data):
        # spread over the classes, which come one after the other
        chosen = torch.linspace(0, len(data) - 1, limit).long().tolist()
        data.samples = [data.samples[i] for i in chosen]
    began = time.perf_counter()
    metrics = accuracies(pipe, data, batch_size=batch_size, workers=workers, progress=progress)
    return Measured(
        model=pipe.name, data=str(folder), samples=len(data), metrics=metrics, seconds=time.perf_counter() - began,
        notes=matching,
    )  # fmt: skip


def class_folders(folder: str | Path) -> list[str]:
    """The names of FOLDER's sub-folders, sorted. Raises BadArgument for a file."""
    if not Path(folder).is_dir():
        raise errors.BadArgument(
            f"{folder} is a file; expected a folder FOLDER/CLASS/IMAGE", argument="folder", accepted=[]
        )
    return sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))


def accuracies(
    pipe: ImageClassification,
    data: LabelledPictures,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, float | None]:
    """``top1`` and ``top5`` (None for five classes or fewer) of the pictures. Raises BadArgument for a damaged one."""
    from timm.data import create_loader

    settings = {k: v for k, v in pipe.settings.items() if k != "input_size"}
    loader = create_loader(
        data, pipe.settings["input_size"], batch_size, is_training=False, use_prefetcher=False,
        num_workers=workers, pin_memory=False, persistent_workers=False, device=torch.device("cpu"), **settings,
    )  # fmt: skip
    right1 = right5 = outputs = 0
    with progress_bar(progress and sys.stderr.isatty(), len(data), pipe.name) as advance, torch.inference_mode():
        for images, targets in loader:
            if (damaged := targets[targets < 0]).numel():
                data.read(-1 - int(damaged[0]))  # here, so that its error is not a worker's
            logits = pipe.model(pipe._to_model(images)).float().cpu()
            outputs = logits.shape[-1]
            best = logits.topk(min(5, outputs), dim=-1).indices
            hits = best == targets[:, None]
            right1 += int(hits[:, 0].sum())
            right5 += int(hits.any(dim=1).sum())
            for _ in range(len(targets)):
                advance()
    return {"top1": right1 / len(data), "top5": right5 / len(data) if outputs > 5 else None}


class LabelledPictures:
    """Pictures of FOLDER/CLASS/... and their classes, as timm's loader takes a data set.

    Read as timm reads them (not turned by their EXIF data, transparency left out), so that figures compare with
    published ones; but greys of 16 bits and floats, which it would make nearly all white, as :func:`open_image` does.
    timm's own data set would leave out other formats than PNG and JPEG, and measure the next picture twice in place of
    one that is damaged. ``upright``: turned by their EXIF data after all, as :func:`open_image` does (models trained by
    ``zoo train-classifier``).
    """

    def __init__(self, folder: Path, classes: dict[str, int], channels: int, *, upright: bool = False) -> None:
        self.channels, self.upright = channels, upright
        self.transform: Any = None  # set by the loader
        self.samples: list[tuple[str, int]] = []
        for name, index in classes.items():
            files = (str(Path(at, f)) for at, _, names in os.walk(folder / name, followlinks=True) for f in names)
            fitting = (f for f in files if f.lower().endswith(EXTENSIONS) and not Path(f).name.startswith("."))
            self.samples += [(file, index) for file in sorted(fitting)]

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, numbers: Sequence[int]) -> LabelledPictures:
        """The samples ``numbers`` alone."""
        found = LabelledPictures(Path(), {}, self.channels, upright=self.upright)
        found.samples = [self.samples[i] for i in numbers]
        return found

    def read(self, index: int) -> Image.Image:
        """Raises ``zoo.errors.BadArgument`` for a damaged file."""
        file = self.samples[index][0]
        if self.upright:
            return open_image(file, self.channels)
        with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(file) as image:
            if not image.mode.startswith(("I", "F")):
                return image.convert("L" if self.channels == 1 else "RGB")
        return open_image(file, self.channels)  # or what is wrong with it

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A picture, transformed, and its class; of a damaged one something grey, and -1 - index."""
        try:
            return self.transform(self.read(index)), self.samples[index][1]
        except errors.BadArgument:
            return self.transform(Image.new("L" if self.channels == 1 else "RGB", (8, 8))), -1 - index


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise BadArgument for a ``value`` below ``least``; None is allowed."""
    if value is not None and value < least:
        raise errors.BadArgument(f"{name} is {value}; expected {least} or more", argument=name, accepted=[])


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
    name, else, if their number is the model's, in the order of their ids. ``limit``: the first so many images. Masks
    are measured if every object has one (polygons or run lengths). Pictures count as upright. The measure is
    pycocotools' (Lin et al., arXiv 1405.0312): the mean over thresholds of 0.5 to 0.95 of the overlap, and over
    categories.

    Raises ``zoo.errors.BadArgument`` for a file of another format, missing pictures or pictures of another size, and
    categories that do not fit; ``MissingExtra`` without pycocotools.
    """
    at_least("limit", limit, 1)
    pycocotools("cocoeval")  # or say what lacks, before hours of work
    table = read_coco(annotations)
    began = time.perf_counter()
    pipe = ObjectDetection(model, min_score=0.0, short_side=short_side)
    used = {entry["category_id"] for entry in table["annotations"]}
    ids, matching = match_categories([c for c in table["categories"] if c["id"] in used], table["categories"], pipe)
    folder = _pictures_of(Path(annotations), images)
    entries = sorted(table["images"], key=lambda entry: entry["id"])[:limit]
    if missing := [e["file_name"] for e in entries if not (folder / e["file_name"]).is_file()]:
        raise errors.BadArgument(
            f"{len(missing)} of {len(entries)} pictures are not in {folder}, the first {missing[0]}; give their folder "
            "as images=",
            argument="images",
            accepted=[],
        )
    bare = 0
    if masks := bool(getattr(model, "has_masks", False)):
        measured = {entry["id"] for entry in entries}
        objects = [a for a in table["annotations"] if a["image_id"] in measured]
        bare = sum(not has_mask(a) for a in objects)
        matching += f"; masks not measured: {bare} of {len(objects)} annotations have none" if bare else ""
    metrics = precisions(
        pipe, table, entries, folder, ids, masks=masks and not bare, batch_size=batch_size, progress=progress
    )
    return Measured(
        model=pipe.name, data=str(annotations), samples=len(entries), metrics=metrics,
        seconds=time.perf_counter() - began, notes=matching,
    )  # fmt: skip


def precisions(
    pipe: ObjectDetection,
    table: dict[str, list[dict[str, Any]]],
    entries: Sequence[dict[str, Any]],
    folder: Path,
    ids: dict[int, Any],
    *,
    masks: bool,
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, float | None]:
    """Average precisions on the images ``entries`` of ``table`` (see :func:`~zoo_vision.coco.read_coco`), whose files
    lie in ``folder``, of boxes and, with ``masks``, of masks. ``ids``: from the model's class to the category's id.
    Raises BadArgument for a picture of another size than its entry says."""
    rows: list[dict[str, Any]] = []
    found = pipe.stream([folder / e["file_name"] for e in entries], batch_size=batch_size)
    with progress_bar(progress and sys.stderr.isatty(), len(entries), pipe.name) as advance:
        for entry, result in zip(entries, found, strict=True):
            size = result.size  # type: ignore[attr-defined]
            if (said := (entry.get("width", size[0]), entry.get("height", size[1]))) != size:
                raise errors.BadArgument(
                    f"{result.source} has {size[0]} x {size[1]} pixels (upright), its annotations are for {said[0]} x "
                    f"{said[1]}; give the folder of the pictures that were annotated as images=",
                    argument="images",
                    accepted=[],
                )
            entry |= {"width": size[0], "height": size[1]}
            rows += result.coco(entry["id"])  # type: ignore[attr-defined]
            advance()
    rows = [row | {"category_id": ids[row["category_id"]]} for row in rows if row["category_id"] in ids]
    chosen = [entry["id"] for entry in entries]
    metrics = {f"box {k}": v for k, v in average_precisions(table, rows, chosen, masks=False).items()}
    if masks:
        metrics |= {f"mask {k}": v for k, v in average_precisions(table, rows, chosen, masks=True).items()}
    return metrics


def upright_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture that is turned as its EXIF data says, from its header. Raises BadFile."""
    try:
        with Image.open(file) as image:
            return image.size[::-1] if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise errors.BadFile(
            f"{file} is no picture that can be read ({error}); mend or remove it", path=str(file)
        ) from error


def match_categories(
    used: list[dict[str, Any]], categories: list[dict[str, Any]], pipe: ObjectDetection
) -> tuple[dict[int, Any], str]:
    """From the model's class to the file's category id, and in words how they were matched. ``used``: those of the
    file's ``categories`` that have objects; the model need not know the others (they have no precision)."""
    names = [n.casefold() for n in pipe.names or []]
    by_name = {c["name"].casefold(): c["id"] for c in categories}
    known = {i: by_name[n] for i, n in enumerate(names) if n in by_name}
    lacking = sorted({c["name"] for c in used if c["name"].casefold() not in names})
    if not lacking:
        return known, "categories matched by name"
    if (count := int(getattr(pipe.model, "num_classes", 0))) == len(categories) and not known:
        return dict(enumerate(sorted(by_name.values()))), "categories matched in the order of their ids"
    raise errors.BadArgument(
        f"the file has {len(categories)} categories, the model {count} classes; the model has no {lacking[0]!r}. "
        "Expected equal names, or equal numbers of classes without a name in common",
        argument="data",
        accepted=[],
    )


def _pictures_of(annotations: Path, images: str | Path | None) -> Path:
    if images is not None:
        return Path(images)
    own = annotations.stem.split("_")[-1]
    near = [annotations.parent / own, annotations.parent.parent / own]
    return next((folder for folder in near if folder.is_dir()), annotations.parent)
