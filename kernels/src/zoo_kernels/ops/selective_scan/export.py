"""The selective scan as ordinary torch operators, for ONNX and other exporters.

A tracer writes it as a loop (:mod:`zoo_kernels._loop`). Elsewhere there is none: the recurrence h_t = a_t h_{t-1} + x_t
is associative in pairs (a, x), and doubling the distance log2(steps) times (Hillis and Steele, 1986) replaces it. That
stores (batch, K, steps, channels, state), which no other form does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels._loop import loop, traced
from zoo_kernels._walk import put_sum, take, walk

from . import work_dtype
from .low_rank import product


def selective_scan_export(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The canonical arguments of ``reference.forward``; A real."""
    batch, length = u.shape[:2]
    work = work_dtype(u, A)
    if dt_proj is not None:
        dt = product(dt, dt_proj, work)
    plain = path is None and lengths is None and not any(reverse) and len(reverse) == 1
    if plain:
        rows, walked = None, None
        x, d, b, c = (t.transpose(1, 2).to(work) for t in (u, dt, B, C))
    else:
        rows, walked = walk(path, reverse, lengths, batch=batch, length=length, device=u.device)
        x, d, b, c = (take(t, rows).to(work) for t in (u, dt, B, C))
    if dt_bias is not None:
        d = d + dt_bias[:, None].to(work)
    if dt_softplus:
        d = F.softplus(d)
    drop = None
    if resets is not None:
        drop = resets[:, None] if rows is None else resets[torch.arange(batch, device=u.device)[:, None, None], rows]
    start = None if initial_state is None else initial_state.to(work)
    form = _looped if traced() and x.shape[2] != 0 else _doubled
    y, last = form(x, d, b, c, A.to(work), drop, walked, start)
    if D is not None:
        y = y + D[:, None].to(work) * x
    y = y[:, 0] if rows is None else put_sum(y, rows, walked, length)
    if z is not None:
        y = y * F.silu(z.to(work))
    final = last if return_final_state else y.new_empty(0, dtype=work)
    return y.to(u.dtype), final


def _per_channel(x: Tensor, channels: int, axis: int) -> Tensor:
    """Groups as channels; one group is left to broadcasting."""
    groups = x.shape[axis]
    return x if groups == 1 else x.repeat_interleave(channels // groups, dim=axis)


def _looped(x, d, b, c, A, drop, walked, start) -> tuple[Tensor, Tensor]:
    """y (batch, K, steps, channels) and the last state, one step after the other."""
    batch, K, _, channels = x.shape
    parts = [x, d, b, c] if drop is None else [x, d, b, c, drop.expand(batch, K, -1)]
    if walked is not None:
        parts.append(walked[:, None].expand(batch, K, -1))

    def step(state, now, constants):
        (h,), (A,) = state, constants
        x, d, b, c, *rest = now
        before, b, c = h, _per_channel(b, channels, 2), _per_channel(c, channels, 2)
        if drop is not None:
            before = torch.where(rest[0][..., None, None], torch.zeros_like(h), h)
        h = torch.exp(d[..., None] * A) * before + (d * x)[..., None] * b
        y = (h * c).sum(-1)
        if walked is not None:  # a step that is not walked keeps the state
            h = torch.where(rest[-1][..., None, None], h, state[0])
        return (h,), y

    first = x.new_zeros(batch, K, channels, A.shape[2]) if start is None else start
    (last,), y = loop(step, [first], parts, [A], axis=2)
    return y, last


def _doubled(x, d, b, c, A, drop, walked, start) -> tuple[Tensor, Tensor]:
    """The same by doubling."""
    b, c = (_per_channel(t, x.shape[3], 3) for t in (b, c))
    a = torch.exp(d[..., None] * A[:, None])  # (batch, K, steps, channels, state)
    h = (d * x)[..., None] * b
    if drop is not None:
        a = torch.where(drop[..., None, None], torch.zeros_like(a), a)
    if walked is not None:  # a step that is not walked keeps the state
        keep = walked[:, None, :, None, None]
        a, h = torch.where(keep, a, torch.ones_like(a)), torch.where(keep, h, torch.zeros_like(h))
    if start is not None and h.shape[2]:
        h = torch.cat([h[:, :, :1] + a[:, :, :1] * start[:, :, None], h[:, :, 1:]], dim=2)
    shift, steps = 1, h.shape[2]
    while shift < steps:
        h = torch.cat([h[:, :, :shift], h[:, :, shift:] + a[:, :, shift:] * h[:, :, :-shift]], dim=2)
        if 2 * shift < steps:
            a = torch.cat([a[:, :, :shift], a[:, :, shift:] * a[:, :, :-shift]], dim=2)
        shift *= 2
    y = (h * c).sum(-1)
    if steps:
        return y, h[:, :, -1]
    return y, h.sum(2) if start is None else start  # no step: zero
