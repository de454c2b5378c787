"""One index tensor for path, direction and lengths: the rows that a walk visits, in order.

The operators built on matrix products see a walk only through it, so every back end handles paths in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._memory import empty

#: Log decays of chunked forms are no smaller: its exp is 0 in every type, and differences of running sums stay numbers
#: (those of minus infinity, which forgets all, would not).
LEAST = -1e4


def walk_order(
    path: Tensor | None, reverse: bool, lengths: Tensor | None, *, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Rows in visiting order, (1 or batch, steps) int64, -1 where nothing is visited; None for the plain order.

    path: None, (steps,), (1 or batch, steps); lengths: None or (batch,), how many steps of the path are walked; a
    reversed walk starts at its own end.
    """
    if path is None and not reverse and lengths is None:
        return None
    if path is None:
        order = torch.arange(length, device=device)[None]
    else:
        order = path.long() if path.dim() == 2 else path.long()[None]
    steps = order.shape[1]
    if lengths is None:
        return order.flip(1) if reverse else order
    t = torch.arange(steps, device=device)[None]
    count = lengths.to(device=device, dtype=torch.int64)[:, None]
    position = count - 1 - t if reverse else t.expand(batch, -1)
    rows = order.expand(batch, -1).gather(1, position.clamp(min=0, max=max(steps - 1, 0)))
    return torch.where(t < count, rows, rows.new_full((), -1))


def new_rows(*shape: int, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """A new CPU tensor (batch, length, ...) whose rows a walk along ``order`` writes; zeros where it leaves some."""
    if order is None or (order.shape[1] == shape[1] and bool((order[:, -1:] >= 0).all())):
        return empty(*shape, dtype=dtype)  # no row is visited twice, so all are
    return torch.zeros(shape, dtype=dtype)


def gather_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """Rows of ``x`` (batch, length, ...) along ``order``: (batch, steps, ...), zeros where nothing is visited."""
    if order is None:
        return x
    batch = x.shape[0]
    index = order.expand(batch, -1)
    rows = torch.arange(batch, device=x.device)[:, None]
    picked = x[rows, index.clamp(min=0)]
    absent = (index < 0).reshape(index.shape + (1,) * (x.dim() - 2))
    return picked.masked_fill(absent, 0)


def scatter_rows(y: Tensor, order: Tensor | None, length: int) -> Tensor:
    """The inverse of :func:`gather_rows`: (batch, length, ...), zeros at rows not visited."""
    if order is None:
        return y
    batch, steps = y.shape[:2]
    index = order.expand(batch, -1)
    out = y.new_zeros(batch, length + 1, *y.shape[2:])  # the last row collects the steps that visit nothing
    rows = torch.arange(batch, device=y.device)[:, None].expand(batch, steps)
    out = out.index_put((rows, torch.where(index < 0, index.new_full((), length), index)), y)
    return out[:, :length]


def resets_of_segments(segments: Tensor, order: Tensor | None) -> Tensor:
    """Per row: whether its segment index differs from that of the row visited before it, (batch, length) bool."""
    walked = gather_rows(segments, order)
    changed = torch.zeros_like(walked, dtype=torch.bool)
    changed[:, 1:] = walked[:, 1:] != walked[:, :-1]
    return scatter_rows(changed, order, segments.shape[1])
