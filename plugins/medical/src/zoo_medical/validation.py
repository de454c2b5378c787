"""Measuring a segmentation network on labelled scans, with MONAI's Dice and Hausdorff distance."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .dicom import bad_file
from .pipelines import MedicalSegmentation, Segmentation
from .scans import NIFTI, read_nifti


def validate_cases(
    model: nn.Module,
    folder: str | Path,
    *,
    overlap: float = 0.5,
    mirror: bool | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Dice and the 95th percentile of the Hausdorff distance (mm) of each label, in each scan's own space.

    The folder is laid out as nnU-Net's raw data: ``imagesTr/CASE_0000.nii.gz`` (``_0001`` and so on for further
    channels) and ``labelsTr/CASE.nii.gz``; or ``images/`` and ``labels/`` with equal file names. ``overlap`` and
    ``mirror`` are the pipeline's; ``limit``: at most so many cases. A label counts in the cases that hold it.

    Raises ``zoo.errors.BadArgument`` when the folder is not laid out so, ``BadFile`` for files that do not fit.
    """
    cases = find_cases(Path(folder))[:limit]
    pipe = MedicalSegmentation(model, overlap=overlap, mirror=mirror)
    classes = int(getattr(model, "num_classes", 2))
    classes = 2 if classes == 1 else classes
    names = pipe.labels() or []
    rows: list[list[dict[str, float]]] = []
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(cases), pipe.name) as advance:
        for images, truth in cases:
            answer = pipe(images)
            rows.append(compare(answer.labels, _truth(truth, answer, classes), answer.spacing, classes))
            advance()
    per_class = {}
    for index in range(1, classes):
        found = [row[index] for row in rows if not math.isnan(row[index]["dice"])]
        if found:
            distances = [f["hd95_mm"] for f in found if math.isfinite(f["hd95_mm"])]
            per_class[names[index] if index < len(names) else f"label {index}"] = {
                "dice": statistics.fmean(f["dice"] for f in found),
                **({"hd95_mm": statistics.fmean(distances)} if distances else {}),
                "cases": float(len(found)),
            }
    measured = [row["hd95_mm"] for row in per_class.values() if "hd95_mm" in row]
    return Measured(
        model=pipe.name,
        data=str(folder),
        samples=len(cases),
        metrics={
            "mean_dice": statistics.fmean(row["dice"] for row in per_class.values()) if per_class else None,
            "mean_hd95_mm": statistics.fmean(measured) if measured else None,
        },
        seconds=time.perf_counter() - began,
        per_class=per_class,
        notes="Means over labels; a label counts in the cases that hold it, its distance where it was found at all. "
        "Not for clinical use.",
    )


def compare(found: Any, truth: Any, spacing: tuple[float, ...], classes: int) -> list[dict[str, float]]:
    """Dice and Hausdorff distance of every class of two label maps (i, j, k); not a number where the truth has none."""
    from monai.metrics import compute_dice, compute_hausdorff_distance

    a, b = (_one_hot(np.asarray(m), classes) for m in (found, truth))
    dice = compute_dice(a, b)[0].tolist()
    rows = []
    for index in range(classes):
        distance = math.nan
        if index and a[:, index].any() and b[:, index].any():
            one, other = (m[:, index : index + 1] for m in (a, b))
            with warnings.catch_warnings():  # one part of MONAI calls another by an argument that it deprecates
                warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges", FutureWarning)
                distance = float(
                    compute_hausdorff_distance(
                        one, other, include_background=True, percentile=95, spacing=list(spacing)
                    )
                )
        rows.append({"dice": dice[index], "hd95_mm": distance})
    return rows


def find_cases(folder: Path) -> list[tuple[Any, Path]]:
    """(image file or tuple of channel files, label file) of every case."""
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"), ("images", "labels")):
        if (folder / images).is_dir() and (folder / labels).is_dir():
            break
    else:
        raise errors.BadArgument(
            f"{folder} holds no imagesTr and labelsTr (nnU-Net's raw data), and no images and labels",
            argument="folder", accepted=["imagesTr/", "labelsTr/", "images/", "labels/"],
        )  # fmt: skip
    cases: list[tuple[Any, Path]] = []
    for truth in sorted(p for p in (folder / labels).iterdir() if p.name.endswith(NIFTI) and p.name[0] != "."):
        case = truth.name.partition(".nii")[0]
        channels = sorted((folder / images).glob(f"{case}_[0-9][0-9][0-9][0-9].nii*"))
        if not channels:
            channels = [p for p in (folder / images).glob(f"{case}.nii*") if p.name.endswith(NIFTI)]
        if not channels:
            raise errors.BadArgument(
                f"{truth}: there is no {folder / images / case}_0000.nii.gz or {case}.nii.gz for these labels",
                argument="folder", accepted=[],
            )  # fmt: skip
        if len({c.name.partition(".nii")[0] for c in channels}) != len(channels):
            raise errors.BadArgument(
                f"{channels[0]} and {channels[1].name} are the same image twice; remove one of them",
                argument="folder", accepted=[],
            )  # fmt: skip
        cases.append((channels[0] if len(channels) == 1 else tuple(channels), truth))
    if not cases:
        raise errors.BadArgument(f"{folder / labels} holds no NIfTI files", argument="folder", accepted=[])
    return cases


def _truth(path: Path, answer: Segmentation, classes: int) -> np.ndarray:
    """(i, j, k) int64 on the grid of the scan. Raises BadFile for labels on another grid, and for other labels."""
    labels, affine = read_nifti(path)
    assert answer.labels is not None
    assert answer.affine is not None
    if len(labels) != 1 or labels.shape[1:] != answer.labels.shape:
        raise bad_file(f"{path}: labels of shape {labels.shape[1:]}, but its scan has {answer.labels.shape}")
    far = _corner_distance(affine, answer.affine, labels.shape[1:])
    if far > 0.5 * min(answer.spacing):
        raise bad_file(
            f"{path}: lies on another grid than its scan, up to {far:.1f} mm away; resample it to the scan's"
        )
    if not np.isfinite(labels).all() or (labels != np.rint(labels)).any():
        raise bad_file(f"{path}: holds values that are no whole numbers; expected labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise bad_file(f"{path}: labels {labels.min():g} to {labels.max():g}; the model has 0 to {classes - 1}")
    return labels[0].astype(np.int64)


def _corner_distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart, in mm, two affines put a corner of a grid at most."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], float)
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def _one_hot(labels: np.ndarray, classes: int) -> Tensor:
    """(1, classes, i, j, k)."""
    return torch.from_numpy(np.stack([labels == c for c in range(classes)]))[None]
