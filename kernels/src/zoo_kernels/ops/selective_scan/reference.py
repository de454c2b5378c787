"""The definition of the selective scan in plain torch: any dtype, one step after another, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels._walk import put_sum, take, walk

from . import empty_borders, work_dtype
from .low_rank import product


def forward(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    path,
    reverse,
    initial_state,
    return_final_state,
    resets,
    lengths,
    dt_proj=None,
    *,
    save,
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical arguments of :func:`zoo_kernels.selective_scan`.

    u (batch, length, 1 or K, channels); dt (batch, length, K, channels); A (K, channels, state);
    B, C (batch, length, K, groups, state); D, dt_bias (K, channels); z (batch, length, channels);
    path (1 or batch, K, steps); reverse K flags; initial_state (batch, K, channels, state);
    dt_proj (K, channels, rank), and dt (batch, length, K, rank), or None.
    """
    batch, length = u.shape[:2]
    K, channels, N = A.shape
    work = work_dtype(u, A)
    real = work.to_real() if work.is_complex else work
    rows, walked = walk(path, reverse, lengths, batch=batch, length=length, device=u.device)
    steps = rows.shape[2]
    if dt_proj is not None:
        dt = product(dt, dt_proj, real)
    x = take(u, rows).to(real)  # (batch, K, steps, channels)
    d = take(dt, rows).to(real)
    if dt_bias is not None:
        d = d + dt_bias[:, None].to(real)
    if dt_softplus:
        d = F.softplus(d)
    b, c = (take(t, rows).to(work) for t in (B, C))  # (batch, K, steps, groups, state)
    repeat = channels // B.shape[3]
    drop = None if resets is None else resets[torch.arange(batch, device=u.device)[:, None, None], rows]
    h = u.new_zeros(batch, K, channels, N, dtype=work) if initial_state is None else initial_state.to(work)
    A = A.to(work)
    zero = torch.zeros((), dtype=work, device=u.device)
    outputs = []
    for t in range(steps):
        old = h if drop is None else torch.where(drop[:, :, t, None, None], zero, h)
        decay = torch.exp(d[:, :, t, :, None] * A)
        put = (d[:, :, t] * x[:, :, t])[..., None] * b[:, :, t].repeat_interleave(repeat, dim=2)
        new = decay * old + put
        h = new if walked is None else torch.where(walked[:, t, None, None, None], new, h)
        outputs.append((h * c[:, :, t].repeat_interleave(repeat, dim=2)).sum(-1))
    y = torch.stack(outputs, dim=2) if outputs else x.to(work)
    if work.is_complex:
        y = 2 * y.real  # conjugate pairs, as the original does for complex A
    if D is not None:
        y = y + D[:, None].to(real) * x
    y = put_sum(y, rows, walked, length)
    if z is not None:
        y = y * F.silu(z.to(real))
    final = h.clone() if return_final_state else h.new_empty(0)
    return y.to(u.dtype), final, empty_borders(u, A, path, save).zero_()
