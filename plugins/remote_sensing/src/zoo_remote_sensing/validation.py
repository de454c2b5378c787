"""How good a model is on labelled pairs and hyperspectral scenes: what ``zoo validate`` runs for these tasks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from zoo.pipelines import progress_bar
from zoo.training import held_out as split
from zoo.validation import Measured

from . import metrics
from .labelled import Sample, labelled_pairs, truth
from .pipelines import ChangeDetection, DamageAssessment, SemanticChangeDetection
from .rasters import NO_DATA


def known(found: dict[str, float]) -> dict[str, float | None]:
    """None for measures without a meaning, as kappa where truth and map hold one and the same class."""
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _run(
    pipe: ChangeDetection, samples: Sequence[Sample], progress: bool
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(the true maps, the model's likeliest classes by output) of the samples, one after the other."""
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
                yield truth(pipe, files), maps
            except ValueError as error:
                error.add_note(f"while measuring {name}")
                raise
            advance()


def score_binary(pipe: ChangeDetection, samples: Sequence[Sample], progress: bool = False) -> metrics.BinaryChange:
    """What the change maps of labelled pairs are worth."""
    measure = metrics.BinaryChange()
    for true, maps in _run(pipe, samples, progress):
        measure.update(true["change"], maps["change"])
    return measure


def score_semantic(
    pipe: ChangeDetection, samples: Sequence[Sample], progress: bool = False, codes: str | None = None
) -> metrics.SemanticChange:
    """Likewise of semantic maps; ``codes``: "pairs" or "dates" (None: what the model's authors do)."""
    card = pipe.info.card if pipe.info is not None else None
    codes = codes or ("dates" if card is not None and card.system == "mamba_fcs" else "pairs")
    measure = metrics.SemanticChange(len(pipe.layers["after"]), codes)
    for true, maps in _run(pipe, samples, progress):
        measure.update(
            [true[key] for key in ("before", "after")],
            [maps[key] * (maps["change"] > 0) for key in ("before", "after")],
        )
    return measure


def score_damage(pipe: ChangeDetection, samples: Sequence[Sample], progress: bool = False) -> metrics.Damage:
    """Likewise of buildings and their damage."""
    measure = metrics.Damage(pipe.layers["after"])
    for true, maps in _run(pipe, samples, progress):
        measure.update(true["building"], true["damage"], maps["building"], maps["damage"])
    return measure


#: by kind of model
SCORES: dict[str, Callable[..., metrics.BinaryChange | metrics.SemanticChange | metrics.Damage]] = {
    "binary": score_binary, "semantic": score_semantic, "damage": score_damage,
}  # fmt: skip


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
    began, samples = time.perf_counter(), labelled_pairs(Path(data), "binary", limit)
    pipe = ChangeDetection(model, tile, overlap, bands=bands, value_range=value_range)
    measure = score_binary(pipe, samples, progress)
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
    began, samples = time.perf_counter(), labelled_pairs(Path(data), "semantic", limit)
    pipe = SemanticChangeDetection(model, tile, overlap, bands=bands, value_range=value_range)
    measure = score_semantic(pipe, samples, progress, codes)
    return Measured(
        model=pipe.name, data=str(data), samples=len(samples), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, notes=f"scored on the codes of {measure.codes}",
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
    began, samples = time.perf_counter(), labelled_pairs(Path(data), "damage", limit)
    pipe = DamageAssessment(model, tile, overlap)
    measure = score_damage(pipe, samples, progress)
    return Measured(
        model=pipe.name, data=str(data), samples=len(samples), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, per_class=measure.per_class(),
        notes="grades are scored where a building truly stands",
    )  # fmt: skip


def validate_pixels(
    model: nn.Module,
    data: str | Path,
    *,
    rows: int = 16,
    held_out: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Measured:
    """OA, AA (mean recall of the classes), kappa, F1 and mIoU of the class map of a hyperspectral scene.

    DATA is a folder with one cube (.npy, .mat or ENVI) and its labels (a name that ends in _gt or _labels; .npy, .mat
    or a picture): (H, W), 0 for unlabelled, then 1 for the first class. The score covers every labelled pixel, those
    that the model was trained on included; with ``held_out`` and ``seed`` as they were given to `zoo train-pixels`,
    the others alone. ``rows``: image rows at a time.
    """
    from .hyperspectral import PixelClassification, labelled_scene

    data, began = Path(data), time.perf_counter()
    pipe = PixelClassification(model, rows)
    cube, truth = labelled_scene(data)
    if held_out is not None:
        labelled = np.flatnonzero(truth != NO_DATA)
        learnt, _ = split(truth.flat[labelled].tolist(), held_out, seed)
        truth.flat[labelled[learnt]] = NO_DATA
    measure = metrics.Classes(pipe.class_names)
    measure.update(truth, pipe(cube).classes)
    return Measured(
        model=pipe.name, data=str(data), samples=int((truth != NO_DATA).sum()), metrics=known(measure.compute()),
        seconds=time.perf_counter() - began, per_class=measure.per_class(), notes="samples are labelled pixels",
    )  # fmt: skip
