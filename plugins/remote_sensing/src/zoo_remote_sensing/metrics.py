"""Measures of maps against labels, from one confusion matrix (rows: truth, columns: prediction).

OA, kappa, precision, recall, F1 and IoU are functions of a matrix; SeK, F_scd and the semantic mIoU are those of the
SECOND benchmark (Yang et al., arXiv 2010.05687), as ChangeMamba and Mamba-FCS report them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def confusion(truth: Any, predicted: Any, classes: int, ignore: int | None = 255) -> np.ndarray:
    """(classes, classes) counts, row truth, column prediction; where the truth is ``ignore`` nothing is counted.

    Raises ValueError for shapes that differ and for labels outside 0 to classes - 1.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(f"the truth has shape {truth.shape}, the prediction {predicted.shape}; expected one shape")
    kept = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    t, p = truth[kept].astype(np.int64), predicted[kept].astype(np.int64)
    for name, values in (("truth", t), ("prediction", p)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"the {name} holds {values.min()} to {values.max()}; expected 0 to {classes - 1}")
    return np.bincount(t * classes + p, minlength=classes**2).reshape(classes, classes)


def _ratio(a: Any, b: Any) -> Any:
    """a / b, 0 where b is 0."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.divide(a, b, out=np.zeros_like(a * b), where=b != 0)


def overall_accuracy(matrix: np.ndarray) -> float:
    return float(_ratio(np.trace(matrix), matrix.sum()))


def average_accuracy(matrix: np.ndarray) -> float:
    """Mean over the classes present in the truth of the share of their pixels that were found."""
    rows = matrix.sum(1)
    return float(_ratio(np.diag(matrix), rows)[rows > 0].mean()) if (rows > 0).any() else 0.0


def kappa(matrix: np.ndarray) -> float:
    """Cohen's kappa; 0 where chance alone would agree everywhere."""
    total = matrix.sum()
    if not total:
        return 0.0
    agreed, chance = np.trace(matrix) / total, float(matrix.sum(0) @ matrix.sum(1)) / float(total) ** 2
    return float(_ratio(agreed - chance, 1 - chance))


def iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class; 0 for a class that occurs nowhere."""
    hit = np.diag(matrix)
    return _ratio(hit, matrix.sum(0) + matrix.sum(1) - hit)


def f1(matrix: np.ndarray) -> np.ndarray:
    """F1 of each class; 0 for a class that occurs nowhere."""
    return _ratio(2 * np.diag(matrix), matrix.sum(0) + matrix.sum(1))


def binary_change(truth: Any, predicted: Any) -> dict[str, float]:
    """OA, kappa, precision, recall, F1 and IoU of the class "changed" (1)."""
    m = confusion(truth, predicted, 2)
    return {
        "OA": overall_accuracy(m), "kappa": kappa(m), "precision": float(_ratio(m[1, 1], m[:, 1].sum())),
        "recall": float(_ratio(m[1, 1], m[1].sum())), "F1": float(f1(m)[1]), "IoU": float(iou(m)[1]),
    }  # fmt: skip


def semantic_change(matrix: np.ndarray) -> dict[str, float]:
    """OA, mIoU, F_scd, SeK of a matrix of from-to codes whose class 0 is "unchanged".

    ``SeK = kappa_0 exp(IoU_changed - 1)``, kappa_0 of the matrix without its cell (0, 0); mIoU is the mean of the IoU
    of "unchanged" and of "changed" (any change counts as found if any was there); F_scd the harmonic mean of precision
    and recall of the codes on changed pixels.
    """
    total, hit = matrix.sum(), np.diag(matrix)
    unchanged = float(_ratio(matrix[0, 0], matrix[0].sum() + matrix[:, 0].sum() - matrix[0, 0]))
    changed = float(_ratio(matrix[1:, 1:].sum(), total - matrix[0, 0]))
    rest = matrix.astype(float).copy()
    rest[0, 0] = 0
    precision = float(_ratio(hit[1:].sum(), matrix[:, 1:].sum()))
    recall = float(_ratio(hit[1:].sum(), matrix[1:].sum()))
    return {
        "OA": overall_accuracy(matrix), "mIoU": (unchanged + changed) / 2,
        "F_scd": float(_ratio(2 * precision * recall, precision + recall)),
        "SeK": kappa(rest) * math.exp(changed - 1),
    }  # fmt: skip


def from_to_codes(before: Any, after: Any, changed: Any, classes: int) -> np.ndarray:
    """0 where unchanged, else ``(before - 1) * (classes - 1) + after``, with classes from 1 on at both dates."""
    before, after = np.asarray(before).astype(np.int64), np.asarray(after).astype(np.int64)
    return np.where(np.asarray(changed) != 0, np.maximum((before - 1) * (classes - 1) + after, 0), 0)


def damage_score(building: np.ndarray, damage: np.ndarray) -> dict[str, float]:
    """xBD's scores: ``0.3 F1_loc + 0.7 F1_clf``, F1_clf the harmonic mean over the damage grades 1 to 4.

    ``building``: (2, 2) matrix of localisation; ``damage``: (5, 5) matrix of pixels where a building truly is.
    """
    localisation = float(f1(building)[1])
    grades = f1(damage)[1:]
    classified = float(len(grades) / (1 / grades).sum()) if (grades > 0).all() else 0.0
    return {"F1_loc": localisation, "F1_clf": classified, "F1": 0.3 * localisation + 0.7 * classified}
