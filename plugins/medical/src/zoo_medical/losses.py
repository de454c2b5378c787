"""The loss that this field trains segmentation with: MONAI's Dice and cross-entropy, put together as nnU-Net does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deep_supervision_weights(outputs: int) -> list[float]:
    """nnU-Net's weights of ``outputs`` resolutions, full size first: 1, 1/2, 1/4, ..., the last 0, summing to 1."""
    if outputs < 1:
        raise ValueError(f"outputs is {outputs}; expected one or more")
    weights = [0.5**i for i in range(outputs)]
    if outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


class DiceCE(nn.Module):
    """Soft Dice plus cross-entropy for networks that give logits at one size or, deeply supervised, at several.

    ``loss(logits, target)``: logits (batch, classes, *size), or a list of ``outputs`` of them, full size first; target
    (batch, 1, *size), class indices of any type. Labels for coarser outputs are those of the nearest voxels.
    ``batch_dice``: one Dice over the batch, else the mean over its volumes. ``include_background``: whether class 0
    counts in the Dice (it always counts in the cross-entropy).
    Source: Isensee et al., "nnU-Net", Nature Methods 18 (2021), training; arXiv 2401.04722, section 4.
    """

    def __init__(self, outputs: int = 1, *, batch_dice: bool = True, include_background: bool = False) -> None:
        from monai.losses import DeepSupervisionLoss, DiceCELoss

        super().__init__()
        one = DiceCELoss(
            include_background=include_background, to_onehot_y=True, softmax=True, batch=batch_dice,
            smooth_nr=1e-5, smooth_dr=1e-5,
        )  # fmt: skip
        self.outputs = outputs
        self.loss = DeepSupervisionLoss(one, weights=deep_supervision_weights(outputs))

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        given = 1 if isinstance(logits, Tensor) else len(logits)
        if given != self.outputs:
            raise ValueError(f"the network gave {given} outputs, this loss was built for outputs={self.outputs}")
        first = logits if isinstance(logits, Tensor) else logits[0]
        if target.shape != (first.shape[0], 1, *first.shape[2:]):
            raise ValueError(
                f"the target has shape {tuple(target.shape)}; expected class indices of shape "
                f"{(first.shape[0], 1, *first.shape[2:])}"
            )
        return self.loss(logits if isinstance(logits, Tensor) else list(logits), target.to(first.dtype))


class ProbabilityLoss(nn.Module):
    """Binary cross-entropy plus soft Dice for networks of one class that give its probability (VM-UNet).

    ``loss(probability, target)``: both (batch, 1, *size); target holds 0 and 1, of any type. The Dice of each image is
    smoothed by 1. Source: JCruan519/VM-UNet ``utils.py``, ``BceDiceLoss`` with weights 1 and 1.
    """

    def forward(self, probability: Tensor, target: Tensor) -> Tensor:
        if probability.shape != target.shape or probability.shape[1] != 1:
            raise ValueError(
                f"the probability has shape {tuple(probability.shape)} and the target {tuple(target.shape)}; expected "
                "(batch, 1, *size) of both"
            )
        with torch.autocast(probability.device.type, enabled=False):  # which has no cross-entropy of probabilities
            p, t = probability.float().flatten(1), target.float().flatten(1)
            dice = (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
            return F.binary_cross_entropy(p, t) + 1 - dice.mean()
