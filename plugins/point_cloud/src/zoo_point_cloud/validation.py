"""How good a model is on labelled clouds: what ``zoo validate`` runs for classes of clouds and labels of points."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .files import Cloud
from .labelled import Classes, class_folders, clouds_in, kind_of, read_each, sub_folders
from .measures import PointMeasure, accuracies, confusion
from .pipelines import CloudClassification, CloudSegmentation, shapes_of


def score_classes(
    pipe: CloudClassification, clouds: Iterable[Any], classes: Sequence[int], batch_size: int = 32, advance: Any = None
) -> np.ndarray:
    """The confusion table of ``clouds`` (files, or clouds in memory) of these classes."""
    count = int(pipe.model.num_classes)  # type: ignore[arg-type]
    answers = []
    for found in pipe.stream(list(clouds), batch_size=batch_size):
        answers.append(found.indices[0])  # type: ignore[attr-defined]
        if advance is not None:
            advance()
    return confusion(np.asarray(classes), np.asarray(answers), count)


def validate_classes(
    model: nn.Module,
    data: str | Path,
    *,
    invalid: str = "error",
    batch_size: int = 32,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """OA (overall accuracy) and mAcc (the mean of the classes' recalls) of clouds DATA/CLASS/CLOUD.

    DATA has one sub-folder for each class with cloud files in it, of any format that the pipeline reads. Sub-folders
    are matched to the classes by name; if none has a class's name and their number is the model's, in sorted order.
    ``invalid``: points that are no numbers are an "error", or are left out ("drop"). ``limit``: at most so many clouds,
    spread over the classes.
    """
    data, began = Path(data), time.perf_counter()
    pipe = CloudClassification(model, invalid=invalid)
    count = int(model.num_classes)  # type: ignore[arg-type]
    names, notes = [pipe._name(i) for i in range(count)], "sub-folders matched to the classes by name"
    folders = sub_folders(data)
    if not set(folders) & set(names) and len(folders) == count:
        names, notes = folders, f"{count} sub-folders taken as the classes in sorted order (no name is a class's)"
    _, files, classes = class_folders(data, names)
    if limit is not None and limit < len(files):
        chosen = np.linspace(0, len(files) - 1, limit).astype(int)
        files, classes = [files[i] for i in chosen], [classes[i] for i in chosen]
    with progress_bar(progress and sys.stderr.isatty(), len(files), pipe.name) as advance:
        table = score_classes(pipe, files, classes, batch_size, advance)
    recall = {names[i]: {"recall": float(row[i] / row.sum())} for i, row in enumerate(table) if row.sum()}
    return Measured(
        model=pipe.name, data=str(data), samples=len(files), metrics=accuracies(table),
        seconds=time.perf_counter() - began, per_class=recall, notes=notes,
    )  # fmt: skip


def points_pipes(model: nn.Module, kinds: Iterable[str], **options: Any) -> dict[str, CloudSegmentation]:
    """A pipeline for each kind of object; one model, whatever their number. Raises BadArgument for an unknown kind."""
    told = shapes_of(model) > 0
    return {kind: CloudSegmentation(model, shape=(kind or None) if told else None, **options) for kind in kinds}


def score_points(
    pipes: Mapping[str, CloudSegmentation], clouds: Iterable[tuple[Cloud, np.ndarray, str]], advance: Any = None
) -> PointMeasure:
    """Measure ``clouds``: (the cloud, the classes of its points, its kind), in the pipeline of its kind."""
    pipe = next(iter(pipes.values()))
    names = [pipe._name(i) for i in range(pipe.model.num_classes)]  # type: ignore[arg-type]
    measure = PointMeasure(names, objects=not pipe.settings.get("voxel"))
    for cloud, truth, kind in clouds:
        measure.update(truth, pipes[kind](cloud).labels, kind)
        if advance is not None:
            advance()
    return measure


def validate_points(
    model: nn.Module,
    data: str | Path,
    *,
    block_points: int | None = None,
    overlap: float = 0.125,
    invalid: str = "error",
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """OA, mAcc and mIoU of points with labels; for objects also instance mIoU and class mIoU, as ShapeNetPart's.

    DATA is a folder of clouds with a label for every point: ply, pcd or las with a field ``label``, ``class``,
    ``classification`` or ``semantic``; text and npy with the label in the last column; npz with ``points`` and
    ``labels``. Labels are numbers of the model's classes; of models that `zoo train-points` trained, those of the
    training files. Points with other labels are left out. Objects lie in one sub-folder for each kind (chair, lamp
    ...), which models of parts need to know. ``block_points``, ``overlap``, ``invalid``: as in the pipeline; ``limit``:
    at most so many clouds.
    """
    data, began = Path(data), time.perf_counter()
    files = clouds_in(data)[:limit]
    kinds = [kind_of(file, data) for file in files]
    pipes = points_pipes(model, kinds, block_points=block_points, overlap=overlap, invalid=invalid)
    pipe = pipes[kinds[0]]
    classes = Classes(list(pipe.settings.get("label_values") or range(model.num_classes)), [])  # type: ignore[arg-type]
    clouds = (cloud for _, cloud in read_each(files, invalid, labels=True))
    labelled = ((cloud, classes.of(cloud), kind) for cloud, kind in zip(clouds, kinds, strict=True))
    with progress_bar(progress and sys.stderr.isatty(), len(files), pipe.name) as advance:
        measure = score_points(pipes, labelled, advance)
    return Measured(
        model=pipe.name, data=str(data), samples=len(files), metrics=measure.compute(),
        seconds=time.perf_counter() - began, per_class=measure.per_class(), notes="samples are clouds",
    )  # fmt: skip
