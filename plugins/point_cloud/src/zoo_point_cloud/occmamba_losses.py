"""OccMamba's training losses on the coarse and the fine answer of its head.

Four terms with weight 1 each: cross entropy, the scene-class and the geometric affinity losses of MonoScene (arXiv
2112.00726, section 3.4) and the Lovász-softmax loss (arXiv 1705.08790). Original: USTCLH/OccMamba @ 7dc5781
(dense_heads/occmamba_head.py ``loss``, utils/semkitti.py), MIT. Differs from the original: every sample's fine points
are compared with its own labels (there with the first sample's, at its batch size of 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
#: Points of each class of nuScenes-Occupancy (empty first), as the original counts them.
NUSCENES_FREQUENCIES = (
    2242961742295, 25985376, 1561108, 28862014, 196106643, 15920504, 2158753, 26539491, 4004729, 34838681, 75173306,
    2255027978, 50959399, 646022466, 869055679, 1446141335, 1724391378,
)  # fmt: skip


def class_weights(frequencies: Sequence[float] = NUSCENES_FREQUENCIES) -> Tensor:
    """``1 / log(frequency + 0.001)`` (classes,) float32."""
    return (1 / (torch.tensor(frequencies, dtype=torch.float64) + 0.001).log()).float()


def coarse_labels(labels: Tensor, ratio: int, empty: int = 0) -> Tensor:
    """Labels (B, rW, rH, rD) of the fine grid to (B, W, H, D): the commonest label of each block that is not empty.

    As published, a block is empty where its labels add up to ``empty``, the empty voxels of other blocks do not count,
    the smallest of equally common labels wins, and a block in which no label occurs twice is ignored (255) when it
    holds an empty voxel.
    """
    if ratio == 1:
        return labels.long()
    if any(n % ratio for n in labels.shape[1:]):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected multiples of {ratio} in W, H and D")
    blocks = labels.long()
    for axis in (1, 3, 5):
        blocks = blocks.unflatten(axis, (-1, ratio))
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    # Empty voxels get numbers that no other voxel has, so that they are the mode only where no label occurs twice.
    alone = -1 - torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks)
    found = torch.where(blocks == 0, alone, blocks).mode(dim=-1).values
    found = torch.where(found < 0, IGNORE, found)
    return torch.where(blocks.sum(-1) == empty, empty, found)


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes, ...) or (points, classes) and labels alike to the rows (n, classes), (n,) that count."""
    if logits.dim() > 2:
        logits = logits.movedim(1, -1).flatten(0, -2)
    labels = labels.reshape(-1).long()
    counted = labels != IGNORE
    return logits[counted], labels[counted]


def _toward_one(value: Tensor) -> Tensor:
    return F.binary_cross_entropy(value.clamp(max=1), torch.ones_like(value))  # sums may round to just above 1


def geometric_affinity(logits: Tensor, labels: Tensor, empty: int = 0) -> Tensor:
    """Precision, recall and specificity of being occupied, as cross entropies against 1. As published, what has no case
    to be measured on (no empty voxel at all) counts as 0, a cross entropy of 100 that no gradient can change."""
    logits, labels = _rows(logits, labels)
    free = logits.softmax(-1)[:, empty]
    occupied, truth = 1 - free, (labels != empty).to(logits.dtype)
    hit, eps = (truth * occupied).sum(), 1e-5
    precision, recall = hit / (occupied.sum() + eps), hit / (truth.sum() + eps)
    specificity = ((1 - truth) * free).sum() / ((1 - truth).sum() + eps)
    return _toward_one(precision) + _toward_one(recall) + _toward_one(specificity)


def class_affinity(logits: Tensor, labels: Tensor) -> Tensor:
    """Precision, recall and specificity of each class that occurs, as cross entropies against 1; mean over classes."""
    logits, labels = _rows(logits, labels)
    probability = logits.softmax(-1)
    total, count = logits.sum() * 0, 0
    for k in labels.unique().tolist():
        p, truth = probability[:, k], (labels == k).to(logits.dtype)
        hit, others = (p * truth).sum(), 1 - truth
        if bool(p.sum() > 0):
            total = total + _toward_one(hit / p.sum())
        total = total + _toward_one(hit / truth.sum())
        if bool(others.sum() > 0):
            total = total + _toward_one(((1 - p) * others).sum() / others.sum())
        count += 1
    return total / max(count, 1)


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """The Lovász extension of one minus the IoU of each class that occurs; mean over classes."""
    logits, labels = _rows(logits, labels)
    probability = logits.softmax(-1)
    losses = []
    for k in labels.unique().tolist():
        truth = (labels == k).to(logits.dtype)
        error, order = (truth - probability[:, k]).abs().sort(descending=True)
        truth = truth[order]
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
        losses.append((error * torch.cat([jaccard[:1], jaccard.diff()])).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def voxel_losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None, empty: int = 0) -> dict[str, Tensor]:
    """The four terms for logits (B, classes, W, H, D) or (points, classes) and labels alike; 255 is ignored."""
    rows, truth = _rows(logits, labels)
    if weights is not None:
        if weights.shape != rows.shape[1:]:
            raise ValueError(f"weights have shape {tuple(weights.shape)}; the answer has {rows.shape[1]} classes")
        weights = weights.to(rows)
    return {
        "ce": F.cross_entropy(rows, truth, weight=weights) if len(rows) else rows.sum() * 0,
        "sem_scal": class_affinity(rows, truth),
        "geo_scal": geometric_affinity(rows, truth, empty),
        "lovasz": lovasz_softmax(rows, truth),
    }


def occupancy_losses(
    output: Mapping[str, Any], labels: Tensor, weights: Tensor | None = None, empty: int = 0
) -> dict[str, Tensor]:
    """Every term of the head's ``output`` against labels (B, rW, rH, rD) of the fine grid; their sum is the loss.

    ``weights`` (classes,): of the cross entropy on grids (:func:`class_weights`); points of the cascade are not
    weighted, as published. Keys: ``coarse_ce`` ... and, with a fine answer, ``fine_ce`` ...
    Raises ValueError where the labels do not fit the answer.
    """
    coarse = output["coarse"]
    ratio = labels.shape[1] // coarse.shape[2] if labels.dim() == 4 else 0
    if ratio < 1 or labels.shape != (coarse.shape[0], *(ratio * n for n in coarse.shape[2:])):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected (batch, W, H, D) in a multiple of the coarse answer's "
            f"grid {tuple(coarse.shape[2:])}"
        )
    found = {
        f"coarse_{k}": v for k, v in voxel_losses(coarse, coarse_labels(labels, ratio, empty), weights, empty).items()
    }
    fine = output.get("fine")
    if isinstance(fine, Tensor):
        fine_labels = coarse_labels(labels, labels.shape[1] // fine.shape[2], empty)
        found |= {f"fine_{k}": v for k, v in voxel_losses(fine, fine_labels, weights, empty).items()}
    elif fine is not None:
        for sample, answer in enumerate(fine):
            x, y, z = answer["coords"].unbind(1)
            for k, v in voxel_losses(answer["logits"], labels[sample, x, y, z], None, empty).items():
                found[f"fine_{k}"] = found.get(f"fine_{k}", 0) + v / len(fine)
    return found
