"""The definition of one step of the scan with one decay per head."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, state, dt_softplus, low, high, *, save=False) -> Tensor:
    """x, z (batch, heads, headdim); dt, dt_scale (batch, heads); B, C (batch, groups, state); state is overwritten."""
    from . import discretise, gate

    work = state.dtype
    d = discretise(dt, dt_scale, dt_bias, dt_softplus, (low, high), work)
    repeat = x.shape[1] // B.shape[1]
    b, c = (t.to(work).repeat_interleave(repeat, dim=1) for t in (B, C))
    xs = x.to(work)
    new = torch.exp(d * A.to(d.dtype)).to(work)[..., None, None] * state
    new = new + (d.to(work)[..., None] * xs)[..., None] * b[:, :, None]
    state.copy_(new)
    y = (new * c[:, :, None]).sum(-1)
    if D is not None:
        y = y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * xs
    y = y.to(x.dtype)
    return y if z is None else gate(y, z)
