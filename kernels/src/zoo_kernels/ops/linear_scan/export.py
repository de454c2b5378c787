"""The linear scan as ordinary torch operators (for ONNX and the like).

Without a loop where the number of steps is fixed; where a tracer leaves it open, a loop (:mod:`zoo_kernels._loop`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._loop import loop
from zoo_kernels._walk import put_sum, walk

from . import state_dtype


def linear_scan_export(
    x, a, path, reverse, initial_state, return_final_state, resets, lengths
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    work = state_dtype(x)
    path = None if path is None else path[:, None]
    rows, walked = walk(path, [reverse], lengths, batch=batch, length=length, device=x.device)
    rows = rows[:, 0]
    index = rows[..., None].expand(-1, -1, channels)
    h = x.to(work).gather(1, index)
    decay = a.to(work).expand(batch, length, channels).gather(1, index)
    if resets is not None:
        decay = decay.masked_fill(resets.gather(1, rows)[..., None], 0)
    if walked is not None:  # an idle step changes nothing
        h = h.masked_fill(~walked[..., None], 0)
        decay = decay.masked_fill(~walked[..., None], 1)
    start = None if initial_state is None else initial_state.to(work)
    form = _doubled if isinstance(rows.shape[1], int) else _looped
    h, final = form(h, decay, start)
    out = put_sum(h[:, None], rows[:, None], walked, length)
    return out.to(x.dtype), final


def _looped(h: Tensor, decay: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states (batch, steps, channels), and the last."""

    def step(state, now):
        (before,), (x, a) = state, now
        return (before * a + x,), before * a + x

    first = torch.zeros_like(h[:, 0]) if start is None else start
    (last,), h = loop(step, [first], [h, decay], axis=1)
    return h, last


def _doubled(h: Tensor, decay: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by doubling (Hillis and Steele): after round i every step holds the sum over its last 2^i steps."""
    steps = h.shape[1]
    if start is not None and steps:
        h = torch.cat([h[:, :1] + decay[:, :1] * start[:, None], h[:, 1:]], dim=1)
    span = 1
    while span < steps:
        h = torch.cat([h[:, :span], h[:, span:] + decay[:, span:] * h[:, :-span]], dim=1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], dim=1)
        span *= 2
    if steps:
        return h, h[:, -1]
    return h, h.new_zeros(h.shape[0], h.shape[2]) if start is None else start
