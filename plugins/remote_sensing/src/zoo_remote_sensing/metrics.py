"""Measures of maps against labels, collected pair by pair: torchmetrics' where it has them, and the field's own.

OA, kappa, precision, recall, F1, IoU and mIoU are torchmetrics' (extra ``[validate]``). SeK, F_scd and the score of xBD
are not there: they are put together here from its parts. Maps and labels are integer arrays or tensors of one shape;
255 in a label is ignored. Fractions, not percentages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo_registry import optional

IGNORE = 255


def require_torchmetrics() -> Any:
    """torchmetrics.classification, or ``MissingExtra`` saying how to get it."""
    return optional("torchmetrics.classification", "measuring maps", "ssm-zoo-remote-sensing[validate]")


def as_labels(values: Any) -> Tensor:
    """Flat int64."""
    return torch.as_tensor(np.asarray(values).astype(np.int64)).flatten()


def checked(truth: Any, predicted: Any, classes: int) -> tuple[Tensor, Tensor]:
    """Flat (truth, prediction) without ignored pixels. Raises ValueError for other shapes and unknown labels."""
    if np.shape(truth) != np.shape(predicted):
        raise ValueError(
            f"the truth has shape {np.shape(truth)}, the prediction {np.shape(predicted)}; expected one shape"
        )
    t, p = as_labels(truth), as_labels(predicted)
    kept = t != IGNORE
    t, p = t[kept], p[kept]
    for name, values in (("truth", t), ("prediction", p)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(f"the {name} holds {values.min()} to {values.max()}; expected 0 to {classes - 1}")
    return t, p


class BinaryChange:
    """OA, kappa, precision, recall, F1 and IoU of the class "changed" (1), and mIoU of both classes."""

    def __init__(self) -> None:
        c = require_torchmetrics()
        self.measures = {
            "OA": c.BinaryAccuracy(), "kappa": c.BinaryCohenKappa(), "precision": c.BinaryPrecision(),
            "recall": c.BinaryRecall(), "F1": c.BinaryF1Score(), "IoU": c.BinaryJaccardIndex(),
            "mIoU": c.MulticlassJaccardIndex(2, average="macro"),
        }  # fmt: skip

    def update(self, truth: Any, predicted: Any) -> None:
        t, p = checked(truth, predicted, 2)
        if t.numel():
            for measure in self.measures.values():
                measure.update(p, t)

    def compute(self) -> dict[str, float]:
        return {name: float(measure.compute()) for name, measure in self.measures.items()}


class Classes:
    """OA, AA (mean recall of the classes that occur), kappa, mean F1 and mIoU of a map of classes; F1 and IoU of each.

    Classes that occur neither in the labels nor in the maps are left out of the means.
    """

    def __init__(self, names: Sequence[str]) -> None:
        c, n = require_torchmetrics(), len(names)
        self.names = list(names)
        self.whole = {"OA": c.MulticlassAccuracy(n, average="micro"), "kappa": c.MulticlassCohenKappa(n)}
        self.each = {
            "accuracy": c.MulticlassAccuracy(n, average="none"), "F1": c.MulticlassF1Score(n, average="none"),
            "IoU": c.MulticlassJaccardIndex(n, average="none"),
        }  # fmt: skip
        self.truths = torch.zeros(n, dtype=torch.int64)
        self.found = torch.zeros(n, dtype=torch.int64)

    def update(self, truth: Any, predicted: Any) -> None:
        t, p = checked(truth, predicted, len(self.names))
        if t.numel():
            for measure in (*self.whole.values(), *self.each.values()):
                measure.update(p, t)
            self.truths += t.bincount(minlength=len(self.names))
            self.found += p.bincount(minlength=len(self.names))

    def compute(self) -> dict[str, float]:
        each = {name: measure.compute() for name, measure in self.each.items()}
        seen, occurs = self.truths > 0, (self.truths + self.found) > 0
        whole = {name: float(measure.compute()) for name, measure in self.whole.items()}
        return {
            "OA": whole["OA"], "AA": float(each["accuracy"][seen].mean()), "kappa": whole["kappa"],
            "F1": float(each["F1"][occurs].mean()), "mIoU": float(each["IoU"][occurs].mean()),
        }  # fmt: skip

    def per_class(self) -> dict[str, dict[str, float]]:
        """Of the classes that occur in the labels."""
        each = {name: measure.compute() for name, measure in self.each.items()}
        return {
            label: {name: float(values[i]) for name, values in each.items()}
            for i, label in enumerate(self.names)
            if self.truths[i] > 0
        }


class SemanticChange:
    """OA, kappa, F1, IoU, mIoU, F_scd and SeK of semantic change maps, as the SECOND benchmark scores them.

    Every pixel has a code, 0 for unchanged. ``codes``: ``"pairs"`` are ``(before - 1) (classes - 1) + after``, as
    ChangeMamba measures; ``"dates"`` are the classes of both dates, each a sample of its own, as Mamba-FCS measures.

    - ``F1``, ``IoU``: of "changed" against "unchanged"; ``mIoU``: the mean of the IoU of both.
    - ``F_scd``: harmonic mean of the precision and the recall of the codes on changed pixels.
    - ``SeK``: ``kappa_0 exp(IoU - 1)``, kappa_0 over the pixels that are not unchanged in both truth and map.

    Source: Yang et al., arXiv 2010.05687, section V; MambaCD ``mcd_utils.py``, ``train_MambaSCD.py``.
    """

    def __init__(self, classes: int, codes: str = "pairs") -> None:
        if codes not in ("pairs", "dates"):
            raise ValueError(f"codes is {codes!r}; expected 'pairs' or 'dates'")
        c = require_torchmetrics()
        self.classes, self.codes = classes, codes
        self.count = (classes - 1) ** 2 + 1 if codes == "pairs" else classes
        self.accuracy = c.MulticlassAccuracy(self.count, average="micro")
        self.all_pixels, self.without_unchanged = (c.MulticlassCohenKappa(self.count) for _ in range(2))
        self.changed = {"F1": c.BinaryF1Score(), "IoU": c.BinaryJaccardIndex()}
        self.mean_iou = c.MulticlassJaccardIndex(2, average="macro")
        self.hits = self.found = self.present = 0

    def update(self, truth: Sequence[Any], predicted: Sequence[Any]) -> None:
        """``truth``, ``predicted``: (before, after) class maps, 0 at both dates where nothing changed."""
        pairs = [checked(t, p, self.classes) for t, p in zip(truth, predicted, strict=True)]
        if self.codes == "pairs":
            (t1, p1), (t2, p2) = pairs
            if t1.shape != t2.shape:
                raise ValueError("the labels of the two dates ignore different pixels; expected 255 at both dates")
            pairs = [(self._code(t1, t2), self._code(p1, p2))]
        for t, p in pairs:
            if not t.numel():
                continue
            self.accuracy.update(p, t)
            self.all_pixels.update(p, t)
            for measure in (*self.changed.values(), self.mean_iou):
                measure.update((p > 0).long(), (t > 0).long())
            rest = (t > 0) | (p > 0)
            if rest.any():
                self.without_unchanged.update(p[rest], t[rest])
            self.hits += int(((t == p) & (t > 0)).sum())
            self.found += int((p > 0).sum())
            self.present += int((t > 0).sum())

    def _code(self, before: Tensor, after: Tensor) -> Tensor:
        """A pair of classes as one number; 0 where either class is 0 (unchanged)."""
        known = (before > 0) & (after > 0)
        return torch.where(known, (before - 1) * (self.classes - 1) + after, 0)

    def compute(self) -> dict[str, float]:
        iou = float(self.changed["IoU"].compute())
        some = self.found > 0 and self.present > 0
        precision, recall = (self.hits / self.found, self.hits / self.present) if some else (0.0, 0.0)
        kappa_0 = float(self.without_unchanged.compute()) if self.found or self.present else 0.0
        kappa_0 = 0.0 if math.isnan(kappa_0) else kappa_0  # one code everywhere: chance explains it
        return {
            "OA": float(self.accuracy.compute()), "kappa": float(self.all_pixels.compute()),
            "F1": float(self.changed["F1"].compute()), "IoU": iou, "mIoU": float(self.mean_iou.compute()),
            "F_scd": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "SeK": kappa_0 * math.exp(iou - 1),
        }  # fmt: skip


class Damage:
    """The scores of xBD: ``F1 = 0.3 F1_loc + 0.7 F1_clf``, and what they are made of.

    ``F1_loc``: F1 of building pixels at the earlier date. ``F1_clf``: harmonic mean of the F1 of the damage grades 1
    to 4, counted on pixels where a building truly stands. ``OA``, ``kappa`` and ``mIoU`` (of the grades) likewise.
    Source: Gupta et al., arXiv 1911.09296; MambaCD ``train_MambaBDA.py``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        c = require_torchmetrics()
        self.location = c.BinaryF1Score()
        self.overlap = c.BinaryJaccardIndex()
        self.grades = Classes(names)

    def update(self, building: Any, damage: Any, found_building: Any, found_damage: Any) -> None:
        """Truth (building 0 or 1, damage 0 to 4), then the maps; damage grades before they are cut by buildings."""
        t, p = checked(building, found_building, 2)
        if t.numel():
            self.location.update(p, t)
            self.overlap.update(p, t)
        inside = np.asarray(building) == 1
        self.grades.update(np.asarray(damage)[inside], np.asarray(found_damage)[inside])

    def compute(self) -> dict[str, float]:
        located = float(self.location.compute())
        each = self.grades.each["F1"].compute()[1:]
        graded = float(len(each) / (1 / each).sum()) if bool((each > 0).all()) else 0.0
        rest = self.grades.compute()
        return {
            "F1": 0.3 * located + 0.7 * graded, "F1_loc": located, "F1_clf": graded,
            "IoU": float(self.overlap.compute()),
            **{k: rest[k] for k in ("OA", "kappa", "mIoU")},
        }  # fmt: skip

    def per_class(self) -> dict[str, dict[str, float]]:
        return self.grades.per_class()
