"""Losses of the change detection papers: Lovasz-softmax, the totals of ChangeMamba, the SeK loss of Mamba-FCS.

Logits are (batch, classes, H, W), labels (batch, H, W) of int64; 255 is ignored everywhere. In semantic labels 0 means
"unchanged" and is ignored too (:func:`without_unchanged`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255


def without_unchanged(labels: Tensor) -> Tensor:
    """Semantic labels with 0 (unchanged) as 255 (ignored)."""
    return labels.masked_fill(labels == 0, IGNORE)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not ignored; with none left 0 (with a gradient, of zeros), as there is nothing to
    learn from a crop where nothing changed."""
    if bool((labels == IGNORE).all()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def lovasz_softmax(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """The Lovasz extension of the Jaccard loss of softmax probabilities: mean over the classes present in the labels.

    All pixels of the batch count as one set; with none left the loss is 0 (and has a gradient, of zeros).
    Source: Berman et al., arXiv 1705.08790, algorithm 1 and equation 11; MambaCD ``utils_func/lovasz_loss.py``.
    """
    probabilities = logits.softmax(1).movedim(1, -1).flatten(0, -2)
    flat = labels.flatten()
    valid = flat != ignore_index
    probabilities, flat = probabilities[valid], flat[valid]
    losses = []
    for c in flat.unique().tolist():
        inside = (flat == c).to(probabilities.dtype)
        errors, order = (inside - probabilities[:, c]).abs().sort(descending=True)
        losses.append(errors @ _jaccard_steps(inside[order]))
    return torch.stack(losses).mean() if losses else probabilities.sum() * 0.0


def _jaccard_steps(inside: Tensor) -> Tensor:
    """How much the Jaccard loss grows with each further pixel taken as wrong, in the given order."""
    total = inside.sum()
    jaccard = 1.0 - (total - inside.cumsum(0)) / (total + (1.0 - inside).cumsum(0))
    return torch.diff(jaccard, prepend=jaccard.new_zeros(1))


def similarity(before: Tensor, after: Tensor, label_before: Tensor) -> Tensor:
    """Mean squared difference of the two softmax maps where ``label_before`` is 255 (unchanged), over all elements."""
    mask = (label_before == IGNORE).unsqueeze(1).to(before.dtype)
    return F.mse_loss(before.softmax(1) * mask, after.softmax(1) * mask)


def bcd_loss(change: Tensor, label: Tensor) -> Tensor:
    """ChangeMamba, binary: CE + 0.75 Lovasz."""
    return cross_entropy(change, label) + 0.75 * lovasz_softmax(change, label)


def scd_loss(
    change: Tensor, before: Tensor, after: Tensor, label: Tensor, label_before: Tensor, label_after: Tensor
) -> Tensor:
    """ChangeMamba, semantic: ``CE + 0.5 (CE_1 + CE_2 + 0.5 S) + 0.75 (LV + 0.5 (LV_1 + LV_2))``."""
    label_before, label_after = without_unchanged(label_before), without_unchanged(label_after)
    entropy = cross_entropy(before, label_before) + cross_entropy(after, label_after)
    alike = similarity(before, after, label_before)
    lovasz = lovasz_softmax(before, label_before) + lovasz_softmax(after, label_after)
    return (
        cross_entropy(change, label)
        + 0.5 * (entropy + 0.5 * alike)
        + 0.75 * (lovasz_softmax(change, label) + 0.5 * lovasz)
    )


def bda_loss(building: Tensor, damage: Tensor, label_building: Tensor, label_damage: Tensor) -> Tensor:
    """ChangeMamba, building damage: ``CE_b + CE_d + 0.5 LV_b + 0.75 LV_d``; damage label 0 is ignored.

    A batch without any valid damage label has the buildings' terms alone (the original skips such batches).
    """
    label_damage = without_unchanged(label_damage)
    return (
        cross_entropy(building, label_building)
        + cross_entropy(damage, label_damage)
        + 0.5 * lovasz_softmax(building, label_building)
        + 0.75 * lovasz_softmax(damage, label_damage)
    )


class SeKLoss(nn.Module):
    """``max(0, -log(SeK + eps) - gamma log(mIoU + 1e-6))`` on soft predictions of the changed pixels.

    ``SeK = kappa * exp(beta * mIoU)``: kappa of the soft confusion matrix of the classes without ``unchanged``, mIoU of
    those classes weighted by 1 / log(count), both means over the two dates. ``legacy_eps``: the original overwrites its
    own eps (1e-7) by 1e-6 during its first call; with True this object does the same, with False ``eps`` stays.
    A negative kappa gives NaN, as in the original. Changed pixels must have labels below ``num_classes``.

    Input: logits (batch, num_classes, H, W) and labels (batch, H, W) of both dates, ``changed`` (batch, H, W), zero for
    unchanged pixels. Source: arXiv 2508.08232; MambaFCS ``utils_func/loss.py`` ``SeK_Loss``.
    """

    def __init__(
        self, num_classes: int, unchanged: int = 0, beta: float = 1.5, gamma: float = 0.5, eps: float = 1e-7,
        *, legacy_eps: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.unchanged = num_classes, unchanged
        self.beta, self.gamma, self.eps, self.legacy_eps = beta, gamma, eps, legacy_eps

    def forward(
        self, before: Tensor, after: Tensor, label_before: Tensor, label_after: Tensor, changed: Tensor
    ) -> Tensor:
        where = changed.flatten() != 0
        if not where.any():
            return before.sum() * 0.0
        eps = self.eps
        kept = [c for c in range(self.num_classes) if c != self.unchanged]
        kappas, ious = [], []
        for logits, labels in ((before, label_before), (after, label_after)):
            picked = labels.flatten()[where]
            if ((picked < 0) | (picked >= self.num_classes)).any():
                raise ValueError(
                    f"changed pixels have the labels {picked.unique().tolist()}; expected 0 to {self.num_classes - 1} "
                    "(255 only where nothing changed)"
                )
            p = logits.softmax(1).movedim(1, -1).flatten(0, -2)[where][:, kept]
            truth = F.one_hot(picked, self.num_classes).to(p.dtype)[:, kept]
            confusion = p.t() @ truth
            total = confusion.sum()
            agreed = confusion.trace() / total
            chance = (confusion.sum(1) * confusion.sum(0)).sum() / total**2
            kappas.append((agreed - chance) / (1.0 - chance + eps))
            count = truth.sum(0)
            both = (p * truth).sum(0)
            either = p.sum(0) + count - both
            weight = 1.0 / torch.log(count + 1.0 + eps)
            ious.append((weight / weight.sum() * both / (either + eps)).sum())
        iou = torch.stack(ious).mean()
        sek = torch.stack(kappas).mean() * torch.exp(self.beta * iou)
        loss = F.relu(-torch.log(sek + eps) - self.gamma * torch.log(iou + 1e-6))
        if self.legacy_eps:
            self.eps = 1e-6
        return loss


def fcs_loss(
    change: Tensor, before: Tensor, after: Tensor, label: Tensor, label_before: Tensor, label_after: Tensor,
    sek: nn.Module, *, sek_weight: float = 0.5,
) -> Tensor:  # fmt: skip
    """Mamba-FCS: ``w SeK + CE + 0.5 (CE_1 + CE_2) + 0.5 (LV_1 + LV_2 + LV) + 0.05 S``.

    ``sek``: a :class:`SeKLoss`, on the pixels whose change label is not 0; those of them without a semantic label are
    left out (the original fails there). ``sek_weight`` is 0 in the first 150000 iterations on Landsat-SCD.
    """
    label_before, label_after = without_unchanged(label_before), without_unchanged(label_after)
    semantic = ((before, label_before), (after, label_after))
    entropy = sum(cross_entropy(x, y) for x, y in semantic)
    lovasz = sum(lovasz_softmax(x, y) for x, y in semantic) + lovasz_softmax(change, label)
    alike = similarity(before, after, label_before)
    changed = (label != 0) & (label_before != IGNORE) & (label_after != IGNORE)
    kappa = sek(before, after, label_before, label_after, changed)
    return sek_weight * kappa + cross_entropy(change, label) + 0.5 * entropy + 0.5 * lovasz + 0.05 * alike
