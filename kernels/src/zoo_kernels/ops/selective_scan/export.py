"""The selective scan as ordinary torch operators of logarithmic depth, for ONNX and other exporters.

The recurrence h_t = a_t h_{t-1} + x_t is associative in pairs (a, x): doubling the distance log2(steps) times (Hillis
and Steele, 1986) replaces the loop over time. It stores (batch, K, steps, channels, state), which no other form does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels._walk import put_sum, take, walk

from . import work_dtype
from .low_rank import product


def selective_scan_export(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The canonical arguments of ``reference.forward``; A real."""
    batch, length = u.shape[:2]
    channels = A.shape[1]
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
    repeat = channels // B.shape[3]
    if repeat > 1:
        b, c = (t.repeat_interleave(repeat, dim=3) for t in (b, c))
    a = torch.exp(d[..., None] * A[:, None].to(work))  # (batch, K, steps, channels, state)
    h = (d * x)[..., None] * b
    if resets is not None:
        drop = resets[:, None] if rows is None else resets[torch.arange(batch, device=u.device)[:, None, None], rows]
        a = torch.where(drop[..., None, None], torch.zeros_like(a), a)
    if walked is not None:  # a step that is not walked keeps the state
        keep = walked[:, None, :, None, None]
        a, h = torch.where(keep, a, torch.ones_like(a)), torch.where(keep, h, torch.zeros_like(h))
    if initial_state is not None and h.shape[2]:
        first = h[:, :, :1] + a[:, :, :1] * initial_state[:, :, None].to(work)
        h = torch.cat([first, h[:, :, 1:]], dim=2)
    shift, steps = 1, h.shape[2]
    while shift < steps:
        h = torch.cat([h[:, :, :shift], h[:, :, shift:] + a[:, :, shift:] * h[:, :, :-shift]], dim=2)
        if 2 * shift < steps:
            a = torch.cat([a[:, :, :shift], a[:, :, shift:] * a[:, :, :-shift]], dim=2)
        shift *= 2
    y = (h * c).sum(-1)
    if D is not None:
        y = y + D[:, None].to(work) * x
    y = y[:, 0] if rows is None else put_sum(y, rows, walked, length)
    if z is not None:
        y = y * F.silu(z.to(work))
    final = h.new_empty(0)
    if return_final_state:
        if steps:
            final = h[:, :, -1]
        else:
            final = h.sum(2) if initial_state is None else initial_state.to(work)  # no step: zero
    return y.to(u.dtype), final
