"""How good a model is on labelled pairs and hyperspectral scenes: what ``zoo validate`` runs for these tasks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from zoo.files import existing
from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from . import metrics
from .folders import AFTER, BEFORE, files_of, find_folder, together
from .palettes import Colour, colours
from .pipelines import ChangeDetection, DamageAssessment, SemanticChangeDetection
from .rasters import GEOTIFFS, NO_DATA, bad_input, open_raster

#: names of the folders of labels
CHANGE = ("GT", "label", "GT_CD", "OUT")
LABEL_BEFORE, LABEL_AFTER = ("GT_T1", "labelA", "label1"), ("GT_T2", "labelB", "label2")


def read_label(path: Path, palette: Sequence[Colour] | None = None) -> np.ndarray:
    """(H, W) class numbers from a file of one band, or of a label set's colours (``palette``).

    Raises BadArgument for a colour that is none of the palette's, BadFile for what cannot be read.
    """
    if path.suffix.lower() in GEOTIFFS:
        with open_raster(path) as file:
            values = file.read().transpose(1, 2, 0)
    else:
        try:
            with Image.open(existing(path, "a picture of labels")) as image:
                plain = image.mode in ("L", "P", "RGB", "1") or image.mode.startswith("I")  # 16 bits: class numbers
                values = np.asarray(image if plain else image.convert("RGB"))
        except errors.ZooError:
            raise
        except (OSError, SyntaxError) as error:
            raise errors.BadFile(f"{path} is no picture that can be read ({error})", path=str(path)) from error
    values = values if values.ndim == 3 else values[..., None]
    if values.shape[2] < 3:
        return values[..., 0].astype(np.int64)
    if (values[..., :1] == values[..., :3]).all() and not palette:
        return values[..., 0].astype(np.int64)
    if not palette:
        raise bad_input(f"{path} is a colour image; expected one band of class numbers", "data")
    codes = (values[..., :3].astype(np.int64) * np.array([65536, 256, 1])).sum(-1)
    known = {r * 65536 + g * 256 + b: i for i, (r, g, b) in enumerate(palette)}
    known.setdefault(0xFFFFFF, 0)  # SECOND and others draw "unchanged" in white
    result = np.full(codes.shape, -1, np.int64)
    for code, index in known.items():
        result[codes == code] = index
    if (result < 0).any():
        code = int(codes[result < 0][0])
        raise bad_input(
            f"{path} holds the colour {(code >> 16, code >> 8 & 255, code & 255)}, which is no class of the label set; "
            f"expected class numbers or {', '.join(map(str, palette))}",
            "data",
        )
    return result


def binary(values: np.ndarray) -> np.ndarray:
    """A change label in 0 and 1, or 0 and 255, as 0 and 1. Raises ValueError for other values."""
    found = set(np.unique(values).tolist())
    if not (found <= {0, 1} or found <= {0, 255}):
        raise ValueError(f"the change label holds {sorted(found)[:5]}; expected 0 and 1, or 0 and 255")
    return (values > 0).astype(np.int64)


def known(found: dict[str, float]) -> dict[str, float | None]:
    """None for measures without a meaning, as kappa where truth and map hold one and the same class."""
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _run(
    pipe: ChangeDetection, samples: Sequence[tuple[str, Any]], progress: bool
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """(the sample's files, the model's likeliest classes for its first two) one after the other."""
    with progress_bar(progress and sys.stderr.isatty(), len(samples), pipe.name) as advance:
        for name, files in samples:
            pair = pipe.read((files[0], files[1]))
            maps: dict[str, np.ndarray] = {}
            for (top, left, height, width), part in pipe.outputs(pair):
                for key, values in part.items():
                    whole = maps.setdefault(key, np.empty((pair[0].height, pair[0].width), np.uint8))
                    whole[top : top + height, left : left + width] = values
            for scene in pair:
                scene.close()
            try:
                yield files, maps
            except ValueError as error:
                error.add_note(f"while measuring {name}")
                raise
            advance()


def validate_binary(
    model: nn.Module,
    data: str | Path,
    *,
    tile: int = 512,
    overlap: int = 64,
    bands: Sequence[int] | None = None,
    value_range: Sequence[float] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """OA, kappa, precision, recall, F1, IoU and mIoU of change maps.

    DATA is a folder with the earlier images in T1 (or A, im1), the later ones in T2 (B, im2) and the change labels in
    GT (label): files of equal names, PNG, JPG or GeoTIFF; labels 0 and 255, or 0 and 1. ``tile``, ``overlap``,
    ``bands`` and ``value_range`` are those of the pipeline; ``limit``: at most so many pairs.
    """
    data, began = Path(data), time.perf_counter()
    folders = [find_folder(data, names) for names in (BEFORE, AFTER, CHANGE)]
    samples = together([f for f in folders if f is not None], limit)
    pipe = ChangeDetection(model, tile, overlap, bands=bands, value_range=value_range)
    measure = metrics.BinaryChange()
    for files, maps in _run(pipe, samples, progress):
        measure.update(binary(read_label(files[2])), maps["change"])
    return Measured(
        model=pipe.name, data=str(data), samples=len(samples), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def validate_semantic(
    model: nn.Module,
    data: str | Path,
    *,
    codes: str | None = None,
    tile: int = 512,
    overlap: int = 64,
    bands: Sequence[int] | None = None,
    value_range: Sequence[float] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """OA, kappa, F1, IoU, mIoU, F_scd and SeK of semantic change maps.

    DATA is a folder with the images in T1 and T2 (or A and B, im1 and im2) and the land cover labels in GT_T1 and GT_T2
    (labelA and labelB, label1 and label2): class numbers with 0 for unchanged, or the label set's colours. A change
    label in GT_CD is used where it is there; otherwise a pixel is changed where either label is not 0.
    ``codes``: "pairs" scores from-to codes, as ChangeMamba does; "dates" scores the classes of both dates as samples of
    their own, as Mamba-FCS does (default: what the model's authors do). ``limit``: at most so many pairs.
    """
    data, began = Path(data), time.perf_counter()
    folders = [find_folder(data, names) for names in (BEFORE, AFTER, LABEL_BEFORE, LABEL_AFTER)]
    folders.append(find_folder(data, ("GT_CD",), needed=False))
    samples = together([f for f in folders if f is not None], limit)
    pipe = SemanticChangeDetection(model, tile, overlap, bands=bands, value_range=value_range)
    card = pipe.info.card if pipe.info is not None else None
    codes = codes or ("dates" if card is not None and card.system == "mamba_fcs" else "pairs")
    names = pipe.layers["after"]
    measure = metrics.SemanticChange(len(names), codes)
    for files, maps in _run(pipe, samples, progress):
        truth = [read_label(path, colours(names)) for path in files[2:4]]
        moved = binary(read_label(files[4])) if len(files) > 4 else (truth[0] > 0) | (truth[1] > 0)
        truth = [t * (moved > 0) for t in truth]
        measure.update(truth, [maps[key] * (maps["change"] > 0) for key in ("before", "after")])
    return Measured(
        model=pipe.name, data=str(data), samples=len(samples), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, notes=f"scored on the codes of {codes}",
    )  # fmt: skip


def validate_damage(
    model: nn.Module,
    data: str | Path,
    *,
    tile: int = 512,
    overlap: int = 64,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """xBD's scores (0.3 F1_loc + 0.7 F1_clf, and both), and OA, kappa, IoU of buildings, mIoU of the damage grades.

    DATA is a folder like xBD's: ``images/NAME_pre_disaster.png`` and ``images/NAME_post_disaster.png`` with the labels
    in ``masks`` under the same names, or in ``targets`` under NAME_pre_disaster_target.png and
    NAME_post_disaster_target.png: buildings 0 and 1, damage 0 to 4. ``limit``: at most so many pairs.
    """
    data, began = Path(data), time.perf_counter()
    images = find_folder(data, ("images",))
    labels = find_folder(data, ("masks", "targets"))
    assert images is not None
    assert labels is not None
    pictures, masks = files_of(images), files_of(labels)
    tail = "_target" if labels.name == "targets" else ""
    samples = []
    for stem in [s for s in pictures if s.split("_")[-2:] == ["pre", "disaster"]][:limit]:
        dates = (stem, stem.replace("_pre_disaster", "_post_disaster"))
        files = [*(pictures.get(s) for s in dates), *(masks.get(s + tail) for s in dates)]
        if None in files:
            raise bad_input(f"{data}: {stem} lacks its later image or one of its labels", "data")
        samples.append((stem, files))
    if not samples:
        raise bad_input(f"{images} holds no NAME_pre_disaster image", "data")
    pipe = DamageAssessment(model, tile, overlap)
    names = pipe.layers["after"]
    measure = metrics.Damage(names)
    for paths, maps in _run(pipe, samples, progress):
        building, damage = (read_label(path) for path in paths[2:4])
        measure.update(binary(building), damage, maps["building"], maps["damage"])
    return Measured(
        model=pipe.name, data=str(data), samples=len(samples), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, per_class=measure.per_class(),
        notes="grades are scored where a building truly stands",
    )  # fmt: skip


def validate_pixels(model: nn.Module, data: str | Path, *, rows: int = 16, progress: bool = True) -> Measured:
    """OA, AA (mean recall of the classes), kappa, F1 and mIoU of the class map of a hyperspectral scene.

    DATA is a folder with one cube (.npy, .mat or ENVI) and its labels (a name that ends in _gt or _labels; .npy, .mat
    or a picture): (H, W), 0 for unlabelled, then 1 for the first class. The score covers every labelled pixel, those
    that the model was trained on included. ``rows``: image rows at a time.
    """
    from .hyperspectral import PixelClassification, cube_files, read_labels

    data, began = Path(data), time.perf_counter()
    pipe = PixelClassification(model, rows)
    cubes, labels = cube_files(data)
    names = pipe.class_names
    measure = metrics.Classes(names)
    found = pipe(cubes).classes
    truth = read_labels(labels)
    if truth.shape != found.shape:
        raise bad_input(f"{labels} has {truth.shape} pixels and {cubes} {found.shape}; expected as many", "data")
    measure.update(np.where((truth == 0) | (found == NO_DATA), metrics.IGNORE, truth - 1), found)
    return Measured(
        model=pipe.name, data=str(data), samples=int((truth > 0).sum()), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, per_class=measure.per_class(), notes="samples are labelled pixels",
    )  # fmt: skip
