"""Predictions on images larger than the patch a network was trained on: overlapping windows, Gaussian weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_weights(patch: Sequence[int], sigma_scale: float = 0.125) -> Tensor:
    """A Gaussian bump of the patch's shape, largest value 1, deviation ``sigma_scale`` of each side, nowhere 0.

    Source: Isensee et al., "nnU-Net", Nature Methods 18 (2021), inference: centre voxels weigh more than borders.
    """
    weights = torch.ones(())
    for side in patch:
        where = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        bump = torch.exp(-0.5 * (where / (sigma_scale * side)) ** 2)
        weights = weights[..., None] * bump
    weights = weights / weights.max()
    return weights.clamp(min=float(weights[weights > 0].min()))


def starts(length: int, patch: int, overlap: float) -> list[int]:
    """First positions of windows that cover 0..length evenly, each at most (1 - overlap) patches behind the last."""
    if length <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    count = -(-(length - patch) // step) + 1
    return [round(i * (length - patch) / (count - 1)) for i in range(count)]


def sliding_window(
    image: Tensor,
    predict: Callable[[Tensor], Tensor],
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    mirror: bool = False,
) -> Tensor:
    """image (channels, *size) to scores (classes, *size), the Gaussian mean of ``predict`` over all windows.

    ``predict`` takes (1, channels, *patch) and returns (1, classes, *patch). ``mirror``: each window is the mean over
    all flips of its axes. An image smaller than the patch is padded with zeros and cut again.
    """
    dims, size = len(patch), tuple(image.shape[1:])
    if len(size) != dims:
        raise ValueError(f"the image has {len(size)} axes of size, the patch {tuple(patch)} has {dims}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected a share of the patch, 0 or more and below 1")
    missing = [max(0, p - s) for p, s in zip(patch, size, strict=True)]
    padding = [n for m in reversed(missing) for n in (m // 2, m - m // 2)]
    padded = F.pad(image, padding)
    weights = gaussian_weights(patch).to(image.device)
    axes = range(2, 2 + dims)
    flips = [c for n in range(dims + 1) for c in itertools.combinations(axes, n)] if mirror else [()]
    total: Tensor | None = None
    norm = torch.zeros(padded.shape[1:], device=image.device)
    grid = [starts(s, p, overlap) for s, p in zip(padded.shape[1:], patch, strict=True)]
    for corner in itertools.product(*grid):
        where = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        window = padded[(slice(None), *where)][None]
        scores = sum(predict(window.flip(f)).flip(f) for f in flips) / len(flips)
        assert isinstance(scores, Tensor)
        if total is None:
            total = torch.zeros(scores.shape[1], *padded.shape[1:], device=image.device)
        total[(slice(None), *where)] += scores[0].float() * weights
        norm[where] += weights
    assert total is not None
    total = total / norm
    return total[(slice(None), *(slice(m // 2, m // 2 + s) for m, s in zip(missing, size, strict=True)))]
