"""The linear scan as ordinary torch operators (for ONNX and the like).

Without a loop where the number of steps is fixed; where a tracer leaves it open, a loop (:mod:`zoo_kernels._loop`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo_kernels._loop import loop
from zoo_kernels._walk import put_sum, walk

from . import state_dtype

Times = Callable[[Tensor, Tensor], Tensor]


def linear_scan_export(
    x, a, path, reverse, initial_state, return_final_state, resets, lengths
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    work = state_dtype(x)
    path = None if path is None else path[:, None]
    rows, walked = walk(path, [reverse], lengths, batch=batch, length=length, device=x.device)
    rows = rows[:, 0]
    # Complex numbers as twice as many real ones: ONNX has few operators on them.
    times = _times_complex if work.is_complex else torch.mul
    h, decay = (_real(t.to(work)) for t in (x, a.expand(batch, length, channels)))
    index = rows[..., None].expand(-1, -1, h.shape[2])
    h, decay = h.gather(1, index), decay.gather(1, index)
    if resets is not None:
        decay = decay.masked_fill(resets.gather(1, rows)[..., None], 0)
    if walked is not None:  # an idle step changes nothing
        h = h.masked_fill(~walked[..., None], 0)
        decay = torch.where(walked[..., None], decay, _real(x.new_ones(channels, dtype=work)))
    start = None if initial_state is None else _real(initial_state.to(work))
    form = _doubled if isinstance(rows.shape[1], int) else _looped
    h, final = form(h, decay, start, times)
    out = put_sum(h[:, None], rows[:, None], walked, length)
    if work.is_complex:
        out, final = (torch.complex(*t.chunk(2, -1)) for t in (out, final))
    return out.to(x.dtype), final


def _real(x: Tensor) -> Tensor:
    """Real parts of the last axis, then imaginary ones; real numbers as they are."""
    return torch.cat([x.real, x.imag], dim=-1) if x.is_complex() else x


def _times_complex(x: Tensor, y: Tensor) -> Tensor:
    (a, b), (c, d) = x.chunk(2, -1), y.chunk(2, -1)
    return torch.cat([a * c - b * d, a * d + b * c], dim=-1)


def _looped(h: Tensor, decay: Tensor, start: Tensor | None, times: Times) -> tuple[Tensor, Tensor]:
    """All states (batch, steps, channels), and the last."""

    def step(state, now, _):
        (before,), (x, a) = state, now
        after = times(before, a) + x
        return (after,), after.clone()

    first = torch.zeros_like(h[:, 0]) if start is None else start
    (last,), h = loop(step, [first], [h, decay], axis=1)
    return h, last


def _doubled(h: Tensor, decay: Tensor, start: Tensor | None, times: Times) -> tuple[Tensor, Tensor]:
    """The same by doubling (Hillis and Steele): after round i every step holds the sum over its last 2^i steps."""
    steps = h.shape[1]
    if start is not None and steps:
        h = torch.cat([h[:, :1] + times(decay[:, :1], start[:, None]), h[:, 1:]], dim=1)
    span = 1
    while span < steps:
        h = torch.cat([h[:, :span], h[:, span:] + times(decay[:, span:], h[:, :-span])], dim=1)
        decay = torch.cat([decay[:, :span], times(decay[:, span:], decay[:, :-span])], dim=1)
        span *= 2
    if steps:
        return h, h[:, -1]
    return h, h.new_zeros(h.shape[0], h.shape[2]) if start is None else start
