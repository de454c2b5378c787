"""Augmentations of touch for training without labels: mirrored and turned arrays, reversed time.

Source: neuroagents-lab/2025-tactile-whisking ``utils/input_transform.py`` (SSLTransform); arXiv 2505.18361. One draw
holds for the whole batch, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .recordings import VALUES


def turned(x: Tensor, quarters: int) -> Tensor:
    """The last two axes turned counter-clockwise by ``quarters`` of a circle about their centre, the size kept: what
    turns out of the map is lost, what turns in is zero. Raises ValueError for an odd turn of an odd and an even side.
    """
    quarters %= 4
    if quarters in (0, 2):
        return x.rot90(quarters, (-2, -1))
    high, broad = x.shape[-2:]
    if (high - broad) % 2:
        raise ValueError(f"a map of {high} x {broad} has no quarter turn: its sides are odd and even")
    y = x.rot90(quarters, (-2, -1))  # (broad, high): cut and filled to (high, broad) about the same centre
    out = torch.zeros_like(x)
    own, new = min(high, broad), abs(high - broad) // 2
    rows = slice(new, new + own) if broad > high else slice(None)
    columns = slice(new, new + own) if high > broad else slice(None)
    back_rows = slice(new, new + own) if high > broad else slice(None)
    back_columns = slice(new, new + own) if broad > high else slice(None)
    out[..., back_rows, back_columns] = y[..., rows, columns]
    return out


def reversed_time(x: Tensor, values: int = VALUES) -> Tensor:
    """(batch, time, step * values, rows, columns) with all samples in the reverse order and the values negated."""
    samples = x.unflatten(2, (-1, values)).flatten(1, 2)
    return -samples.flip(1).unflatten(1, (x.shape[1], -1)).flatten(2, 3)


class TouchAugmentation:
    """A random view of a batch (batch, time, step * 6, rows, columns).

    With probability a half the horizontal, else the vertical mirror is drawn, which itself acts with a half; a turn by
    90, 180, 270 or 360 degrees; with ``temporal``, with a half, time runs backwards and the values are negated.
    generator: where the random numbers come from.
    """

    def __init__(self, temporal: bool = True, generator: torch.Generator | None = None) -> None:
        self.temporal, self.generator = temporal, generator

    def _half(self) -> bool:
        return bool(torch.rand((), generator=self.generator) < 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        axis = -1 if self._half() else -2
        if self._half():
            x = x.flip(axis)
        x = turned(x, int(torch.randint(1, 5, (), generator=self.generator)))
        if self.temporal and self._half():
            x = reversed_time(x)
        return x
