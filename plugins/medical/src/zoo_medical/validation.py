"""Measuring a segmentation network on labelled scans, with MONAI's Dice and Hausdorff distance."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .dicom import bad_file
from .pipelines import MedicalSegmentation
from .scans import NIFTI, PICTURES, is_picture, read_nifti


def validate_cases(
    model: nn.Module,
    folder: str | Path,
    *,
    overlap: float = 0.5,
    mirror: bool | None = None,
    patch: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    orientation: str | None = "card",
    crop: bool | None = None,
    normalisation: str | Sequence[float] | None = None,
    fit: bool | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Dice and the 95th percentile of the Hausdorff distance (mm) of each label, in each scan's own space.

    The folder is laid out as nnU-Net's raw data: ``imagesTr/CASE_0000.nii.gz`` (``_0001`` and so on for further
    channels) and ``labelsTr/CASE.nii.gz``; or ``images/`` and ``labels/`` with equal file names. For networks of two
    dimensions both may be pictures, the labels with their numbers as grey values (or 0 and 255); distances are pixels
    then. ``limit``: at most so many cases; all other options are the pipeline's. A label counts in the cases that
    hold it.

    Raises ``zoo.errors.BadArgument`` when the folder is not laid out so, ``BadFile`` for files that do not fit.
    """
    cases = find_cases(Path(folder))[:limit]
    pipe = MedicalSegmentation(
        model, spacing, orientation, crop, patch, overlap, mirror, normalisation=normalisation, fit=fit
    )
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(cases), pipe.name) as advance:
        metrics, per_class = measure(pipe, cases, advance=advance)
    return Measured(
        model=pipe.name,
        data=str(folder),
        samples=len(cases),
        metrics=metrics,
        seconds=time.perf_counter() - began,
        per_class=per_class,
        notes="Means over labels; a label counts in the cases that hold it, its distance where it was found at all. "
        "Not for clinical use.",
    )


def classes_of(model: nn.Module) -> int:
    """How many labels a network tells apart: one class has a background, too."""
    return max(int(getattr(model, "num_classes", 2)), 2)


def measure(
    pipe: MedicalSegmentation,
    cases: Sequence[tuple[Any, Path]],
    *,
    distances: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> tuple[dict[str, float | None], dict[str, dict[str, float]]]:
    """(mean figures, figures of each label) of the pipeline's answers on ``cases`` (see :func:`find_cases`).

    ``distances``: Hausdorff distances, too, which take long. ``advance`` is called after each case.
    """
    classes, names = classes_of(pipe.model), pipe.labels() or []
    rows: list[list[dict[str, float]]] = []
    flat = False
    for images, truth in cases:
        answer = pipe(images)
        assert answer.labels is not None
        assert answer.affine is not None
        voxel = (1.0, 1.0) if answer.flat else answer.spacing
        known = read_labels(truth, answer.labels.shape, None if answer.flat else answer.affine, classes)
        rows.append(compare(answer.labels, known, voxel, classes, distances=distances))
        flat = answer.flat
        advance()
    distance = "hd95_px" if flat else "hd95_mm"
    per_class = {}
    for index in range(1, classes):
        found = [row[index] for row in rows if not math.isnan(row[index]["dice"])]
        if found:
            far = [f["hd95_mm"] for f in found if math.isfinite(f["hd95_mm"])]
            per_class[names[index] if index < len(names) else f"label {index}"] = {
                "dice": statistics.fmean(f["dice"] for f in found),
                **({distance: statistics.fmean(far)} if far else {}),
                "cases": float(len(found)),
            }
    dice = [row["dice"] for row in per_class.values()]
    metrics: dict[str, float | None] = {"mean_dice": statistics.fmean(dice) if dice else None}
    if distances:
        far = [row[distance] for row in per_class.values() if distance in row]
        metrics[f"mean_{distance}"] = statistics.fmean(far) if far else None
    return metrics, per_class


def compare(
    found: Any, truth: Any, spacing: tuple[float, ...], classes: int, *, distances: bool = True
) -> list[dict[str, float]]:
    """Dice and Hausdorff distance of every class of two label maps (i, j, k) or (i, j); not a number where the truth
    has none, and for distances that are not asked for."""
    from monai.metrics import compute_dice, compute_hausdorff_distance

    a, b = (_one_hot(np.asarray(m), classes) for m in (found, truth))
    dice = compute_dice(a, b)[0].tolist()
    rows = []
    for index in range(classes):
        distance = math.nan
        if distances and index and a[:, index].any() and b[:, index].any():
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
    there: dict[str, list[Path]] = {}
    for image in sorted((folder / images).iterdir()):
        there.setdefault(case_of(image), []).append(image)
    cases: list[tuple[Any, Path]] = []
    for truth in sorted((folder / labels).iterdir()):
        if not (case := case_of(truth)):
            continue
        channels = [stem for stem in there if re.fullmatch(re.escape(case) + r"_\d{4}", stem)] or [case]
        files = [path for stem in channels for path in there.get(stem, [])]
        if not files:
            raise errors.BadArgument(
                f"{truth}: there is no {folder / images / case}_0000.nii.gz or {truth.name} for these labels",
                argument="folder", accepted=[],
            )  # fmt: skip
        if len(files) != len(channels):
            raise errors.BadArgument(
                f"{files[0]} and {files[1].name} are the same image twice; remove one of them",
                argument="folder", accepted=[],
            )  # fmt: skip
        cases.append((files[0] if len(files) == 1 else tuple(files), truth))
    if not cases:
        raise errors.BadArgument(f"{folder / labels} holds no NIfTI files or pictures", argument="folder", accepted=[])
    return cases


def case_of(path: Path) -> str:
    """A file's name without the ending of a scan or a picture; "" for other files."""
    for ending in sorted((*NIFTI, *PICTURES), key=len, reverse=True):
        if path.name.lower().endswith(ending) and path.name[0] != ".":
            return path.name[: -len(ending)]
    return ""


def read_labels(path: Path, shape: tuple[int, ...], affine: np.ndarray | None, classes: int | None) -> np.ndarray:
    """int64 label numbers on the grid of their scan, which has this shape and affine: (i, j, k), or (height, width) of
    a picture, which has no affine. ``classes``: how many labels there may be (None: up to 65535).

    Raises BadFile for labels on another grid, and for other labels.
    """
    labels, own = _read_mask(path, classes) if is_picture(path) else read_nifti(path)
    if affine is None and not is_picture(path):
        labels = labels[..., 0]
    if len(labels) != 1 or labels.shape[1:] != shape:
        raise bad_file(f"{path}: labels of shape {labels.shape[1:]}, but its scan has {shape}")
    if affine is not None:
        far = _corner_distance(own, affine, shape)
        if far > 0.5 * np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).min():
            raise bad_file(
                f"{path}: lies on another grid than its scan, up to {far:.1f} mm away; resample it to the scan's"
            )
    if not np.isfinite(labels).all() or (labels != np.rint(labels)).any():
        raise bad_file(f"{path}: holds values that are no whole numbers; expected labels")
    if labels.min() < 0 or labels.max() >= (classes or 2**16):
        has = "are 0 to 65535" if classes is None else f"the model has 0 to {classes - 1}"
        raise bad_file(f"{path}: labels {labels.min():g} to {labels.max():g}; {has}")
    return labels[0].astype(np.int64)


def _read_mask(path: Path, classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(1, height, width) label numbers from a picture; of two classes also 0 and 255. Raises BadFile."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image if image.mode != "RGBA" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise bad_file(f"{path}: is no picture that can be read ({error})") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise bad_file(f"{path}: is a colour picture; expected one band of label numbers")
        values = values[..., 0]
    if classes == 2 and set(np.unique(values).tolist()) <= {0, 255}:
        values = values > 0
    return values[None].astype(np.float32), np.eye(4)


def _corner_distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart, in mm, two affines put a corner of a grid at most."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], float)
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def _one_hot(labels: np.ndarray, classes: int) -> Tensor:
    """(1, classes, i, j, k)."""
    return torch.from_numpy(np.stack([labels == c for c in range(classes)]))[None]
