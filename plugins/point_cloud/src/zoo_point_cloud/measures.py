"""Measures of classes and of labelled points, as ModelNet40, ShapeNetPart and S3DIS are scored. Fractions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .labelled import NONE


def confusion(truth: np.ndarray, answers: np.ndarray, count: int) -> np.ndarray:
    """(count, count) int64: rows are true classes, columns answers; what truly is :data:`NONE` is left out."""
    known = truth != NONE
    return np.bincount(truth[known] * count + answers[known], minlength=count**2).reshape(count, count)


def accuracies(table: np.ndarray) -> dict[str, float]:
    """Overall accuracy, and the mean of the recalls of the classes that there are."""
    there = table.sum(axis=1) > 0
    recall = table.diagonal()[there] / table.sum(axis=1)[there]
    return {"OA": float(table.trace() / table.sum()), "mAcc": float(recall.mean())}


def intersections(table: np.ndarray) -> np.ndarray:
    """IoU of each class; NaN for one that neither is there nor is answered."""
    union = table.sum(axis=0) + table.sum(axis=1) - table.diagonal()
    return np.where(union > 0, table.diagonal() / np.maximum(union, 1), np.nan)


class PointMeasure:
    """OA, mAcc and mIoU of all points together; of clouds that are objects also instance and class mIoU.

    As ShapeNetPart is measured (Yi et al. 2016): an object's IoU is the mean over the parts that its kind has (1 for a
    part that it neither has nor is answered); "instance mIoU" is the mean over objects, "class mIoU" over kinds of the
    mean of their objects. Which parts a kind has is taken from the true labels of all its objects.
    """

    def __init__(self, names: Sequence[str], *, objects: bool) -> None:
        self.names, self.objects = list(names), objects
        self.table = np.zeros((len(names), len(names)), dtype=np.int64)
        self._tables: dict[str, list[np.ndarray]] = {}

    def update(self, truth: np.ndarray, answers: np.ndarray, kind: str = "") -> None:
        """The classes (N,) of one cloud's points and the answers (N,); ``kind`` of object."""
        table = confusion(truth, answers, len(self.names))
        self.table += table
        self._tables.setdefault(kind, []).append(table)

    def compute(self) -> dict[str, float]:
        """Raises ValueError where no point had a class."""
        if not self.table.sum():
            raise ValueError("no point has a label that the model knows; there is nothing to measure")
        found = accuracies(self.table) | {"mIoU": float(np.nanmean(intersections(self.table)))}
        if not self.objects:
            return found
        kinds = []
        for tables in self._tables.values():
            parts = sum(tables).sum(axis=1) > 0  # type: ignore[union-attr]
            kinds.append([float(np.nan_to_num(intersections(t)[parts], nan=1.0).mean()) for t in tables if parts.any()])
        kinds = [ious for ious in kinds if ious]
        return found | {
            "instance mIoU": float(np.mean([iou for ious in kinds for iou in ious])),
            "class mIoU": float(np.mean([np.mean(ious) for ious in kinds])),
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        each = zip(self.names, intersections(self.table), strict=True)
        return {name: {"IoU": float(iou)} for name, iou in each if not np.isnan(iou)}
