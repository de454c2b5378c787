"""Images of any size through networks that halve their sides or cut them into windows: pad by reflection, crop."""

from __future__ import annotations

import torch
from torch import Tensor


def check_image(system: str, x: Tensor, channels: int) -> Tensor:
    """x itself. Raises ValueError unless it is (batch, channels, height, width) with sides of 1 or more."""
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(
            f"{system}: the input has shape {tuple(x.shape)}; expected (batch, {channels} channels, height, width)"
        )
    return x


def mirrored(length: int, total: int, device: torch.device) -> Tensor:
    """Positions 0 .. length-1 and behind them their mirror images, as often as it takes: (total,) int64.

    The edge is not repeated (``reflect``), but unlike torch's padding any number of positions may follow.
    """
    period = max(2 * (length - 1), 1)
    steps = torch.arange(total, device=device) % period
    return torch.where(steps < length, steps, period - steps)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x (..., height, width) mirrored at its lower and right edge until both sides are multiples of ``multiple``."""
    for axis in (-2, -1):
        length = x.shape[axis]
        total = -(-length // multiple) * multiple
        if total != length:
            x = x.index_select(x.dim() + axis, mirrored(length, total, x.device))
    return x
