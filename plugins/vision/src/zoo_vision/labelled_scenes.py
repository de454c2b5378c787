"""Pictures with label maps: which files belong together, which value is which class, and how a model does on them.

A label map is a PNG of the picture's size (grey or indexed, 8 or 16 bits) that holds a value for every pixel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from zoo.files import read_text
from zoo.images import EXTENSIONS
from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from .scenes import SemanticSegmentation
from .validation import at_least, upright_size

#: class of pixels that do not count
IGNORED = -1
_UNKNOWN = -2
#: modes of pictures that hold one whole number for each pixel
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class Pair:
    picture: Path
    labels: Path


def pairs(folder: str | Path, maps: str | Path | None = None) -> list[Pair]:
    """The pictures of FOLDER/images, searched with its sub-folders, and their label maps: the PNG of the same name in
    FOLDER/labels. ``maps``: another folder of label maps; FOLDER is then that of the pictures.

    Raises BadArgument for folders of another form and for pictures without a label map.
    """
    folder = Path(folder)
    inside, beside = (folder / "images", folder / "labels") if maps is None else (folder, Path(maps))
    for one in (inside, beside):
        if not one.is_dir():
            raise errors.BadArgument(
                f"there is no folder {one}; expected {folder}/images with pictures and {folder}/labels with a PNG of "
                "the same name for each, or the two folders (maps: that of the label maps)",
                argument="data",
                accepted=[],
            )
    files = sorted(
        f for f in inside.rglob("*")
        if f.suffix.lower() in EXTENSIONS and not f.name.startswith(".") and f.is_file()
    )  # fmt: skip
    if not files:
        raise errors.BadArgument(
            f"{inside} holds no pictures; expected {', '.join(EXTENSIONS)}", argument="data", accepted=[]
        )
    found = [Pair(f, beside / f.relative_to(inside).with_suffix(".png")) for f in files]
    if lacking := [p for p in found if not p.labels.is_file()]:
        raise errors.BadArgument(
            f"{len(lacking)} of {len(found)} pictures have no label map: there is no {lacking[0].labels} for "
            f"{lacking[0].picture}",
            argument="data",
            accepted=[],
        )
    return found


def values_of(file: Path) -> np.ndarray:
    """What a label map holds: (H, W), whole numbers. Raises BadFile."""
    try:
        with Image.open(file) as image:
            if image.mode in _MODES:
                return np.asarray(image).astype(np.int64)
            found = f"is a picture in {image.mode}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        found = f"cannot be read ({error})"
    raise errors.BadFile(
        f"the label map {file} {found}; expected a PNG with one number for each pixel (grey or indexed, 8 or 16 bits)",
        path=str(file),
    )


@dataclass(frozen=True)
class Values:
    """What the values of label maps mean: ``classes[i]`` is class i, those of ``ignored`` do not count."""

    classes: tuple[int, ...]
    ignored: tuple[int, ...] = (255,)

    @classmethod
    def counted(cls, number: int, ignored: Collection[int]) -> Values:
        """``number`` classes: the first values from 0 on that are not ignored."""
        every = range(number + len(ignored))
        return cls(tuple(v for v in every if v not in ignored)[:number], tuple(sorted(ignored)))

    @classmethod
    def of_model(cls, pipe: SemanticSegmentation, ignore_zero: bool | None = None) -> Values:
        """As the model was trained (``zoo train-segmenter``), else 255 ignored and, of ADE20K, whose maps count classes
        from 1, 0 too. ``ignore_zero``: whether the maps do so."""
        own = pipe.preprocess
        if ignore_zero is None and "label_values" in own:
            return cls(tuple(own["label_values"]), tuple(own.get("ignored_values", ())))
        weights = pipe.info.weights if pipe.info is not None else None
        if ignore_zero is None:
            ignore_zero = weights is not None and weights.labels == "ade20k"
        count = getattr(pipe.model, "num_classes", None)
        if not isinstance(count, int):
            raise errors.BadArgument(
                f"{pipe.name} does not say how many classes it has; give it an attribute num_classes",
                argument="model",
                accepted=[],
            )
        return cls.counted(count, {0, 255} if ignore_zero else {255})

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(1 << 16, _UNKNOWN, dtype=np.int64)
        table[[v for v in self.ignored if v >= 0]] = IGNORED
        table[list(self.classes)] = range(len(self.classes))
        return table

    def read(self, file: Path) -> np.ndarray:
        """A label map's classes (H, W), :data:`IGNORED` for pixels that do not count. Raises BadFile."""
        values = values_of(file)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        classes = self._table[values] if low >= 0 and high < len(self._table) else np.full(values.shape, _UNKNOWN)
        if (unknown := values[classes == _UNKNOWN]).size:
            raise errors.BadFile(
                f"the label map {file} has the value {int(unknown[0])}; expected one of the {len(self.classes)} "
                f"classes' ({_shortly(self.classes)}), or one to ignore ({_shortly(self.ignored)})",
                path=str(file),
            )
        return classes


def _shortly(values: Sequence[int]) -> str:
    if len(values) > 6 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values)) or "none"


def read_names(file: Path) -> list[str]:
    """Names of classes, one a line. Raises BadFile for fewer than two, or the same twice."""
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise errors.BadFile(
            f"{file} names {len(names)} classes, {len(set(names))} different ones; expected two or more, one a line",
            path=str(file),
        )
    return names


def check_sizes(data: Sequence[Pair]) -> dict[int, int]:
    """Open every picture, read every label map, and count the pictures of each value. Raises BadFile for one that
    cannot be read, and for a map of another size than its picture, upright."""
    counts: dict[int, int] = {}
    for pair in data:
        values = values_of(pair.labels)
        size = upright_size(pair.picture)
        if size != values.shape[::-1]:
            raise errors.BadFile(
                f"{pair.picture} has {size[0]} x {size[1]} pixels (upright), its label map {pair.labels} "
                f"{values.shape[1]} x {values.shape[0]}",
                path=str(pair.labels),
            )
        for value in np.unique(values).tolist():
            counts[value] = counts.get(value, 0) + 1
    return counts


# -- the measure -----------------------------------------------------------------------------------------------------


def confusion(
    pipe: SemanticSegmentation, data: Sequence[Pair], values: Values, *, batch_size: int = 1, progress: bool = False
) -> np.ndarray:
    """Pixels (classes, classes) of each class, in rows, that were taken for each. Raises BadFile."""
    count = len(values.classes)
    both = np.zeros((count, count), dtype=np.int64)
    answers = pipe.stream([pair.picture for pair in data], batch_size=batch_size)
    with progress_bar(progress and sys.stderr.isatty(), len(data), pipe.name) as advance:
        for pair, answer in zip(data, answers, strict=True):
            found, wanted = answer.classes, values.read(pair.labels)  # type: ignore[attr-defined]
            if found.shape != wanted.shape:
                raise errors.BadFile(
                    f"{pair.picture} has {found.shape[1]} x {found.shape[0]} pixels (upright), its label map "
                    f"{pair.labels} {wanted.shape[1]} x {wanted.shape[0]}",
                    path=str(pair.labels),
                )
            counted = wanted != IGNORED
            cells = wanted[counted] * count + found[counted]
            both += np.bincount(cells, minlength=both.size).reshape(both.shape)
            advance()
    return both


def scores(both: np.ndarray, names: Sequence[str]) -> tuple[dict[str, float | None], dict[str, dict[str, float]]]:
    """Figures of :func:`confusion`, and for each class: intersection over union and accuracy, as mmsegmentation's
    ``IoUMetric`` takes them over all pictures together. Classes that are neither there nor found are left out of means.
    """
    hit, there, union = np.diag(both), both.sum(axis=1), both.sum(axis=0) + both.sum(axis=1) - np.diag(both)
    per_class: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        if union[i]:
            per_class[name] = {"IoU": float(hit[i] / union[i])}
        if there[i]:
            per_class[name]["accuracy"] = float(hit[i] / there[i])
    ious = [row["IoU"] for row in per_class.values()]
    accuracies = [row["accuracy"] for row in per_class.values() if "accuracy" in row]
    return {
        "mIoU": float(np.mean(ious)) if ious else None,
        "pixel accuracy": float(hit.sum() / both.sum()) if both.sum() else None,
        "mean accuracy": float(np.mean(accuracies)) if accuracies else None,
    }, per_class


def validate_scenes(
    model: nn.Module,
    data: str | Path,
    *,
    maps: str | Path | None = None,
    ignore_zero: bool | None = None,
    short_side: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Intersection over union of a segmentor's classes with label maps, at the pictures' own sizes.

    DATA: a folder with ``images``, pictures with sub-folders or without, and ``labels``, a PNG of the same name and
    size for each, which holds the class's number at every pixel. ``maps``: the folder of the label maps where it is
    another; DATA is then that of the pictures. 255 is ignored. ``ignore_zero``: 0 is ignored and 1 the first class, as
    in ADE20K (default: where the model's classes are ADE20K's); models of ``zoo train-segmenter`` know the values that
    they were trained on. ``short_side``: pixels of resized pictures' shorter sides. ``limit``: so many pictures, evenly
    spread.

    Metrics are mmsegmentation's mIoU, aAcc (here ``pixel accuracy``) and mAcc (``mean accuracy``), over all pictures
    together. Raises ``zoo.errors.BadArgument`` for a folder of another form, ``BadFile`` for a damaged file, a map of
    another size than its picture and values that are no class.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        at_least(name, value, 1)
    pipe = SemanticSegmentation(model, short_side=short_side)
    values = Values.of_model(pipe, ignore_zero)
    found = pairs(data, maps)
    if limit is not None and limit < len(found):
        found = [found[i] for i in np.linspace(0, len(found) - 1, limit).astype(int)]
    began = time.perf_counter()
    names = pipe.names or [f"class {i}" for i in range(len(values.classes))]
    metrics, per_class = scores(confusion(pipe, found, values, batch_size=batch_size, progress=progress), names)
    return Measured(
        model=pipe.name, data=str(data), samples=len(found), metrics=metrics, per_class=per_class,
        seconds=time.perf_counter() - began,
        notes=f"values of the label maps: classes {_shortly(values.classes)}; ignored {_shortly(values.ignored)}",
    )  # fmt: skip
