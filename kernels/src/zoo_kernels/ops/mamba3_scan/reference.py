"""The definition of Mamba-3's recurrence in plain torch: one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels.ops._walk import gather_rows, scatter_rows


def rotate(x: Tensor, theta: Tensor, halves: bool) -> Tensor:
    """Rotate channel pairs of x (..., state) by theta (..., angles), as many pairs as there are angles.

    halves: channel i with i + state / 2; else neighbours. The other channels pass.
    """
    cos, sin = theta.cos(), theta.sin()
    angles = theta.shape[-1]
    if halves:
        half = x.shape[-1] // 2
        a, b = x[..., :angles], x[..., half : half + angles]
        parts = [a * cos - b * sin, x[..., angles:half], a * sin + b * cos, x[..., half + angles :]]
        return torch.cat(parts, dim=-1)
    a, b = x[..., : 2 * angles].unflatten(-1, (angles, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * angles :]], dim=-1)


def mamba3_reference(x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, halves, state, resets, order):
    """See :func:`zoo_kernels.mamba3_scan`; B and C (batch, length, rank, groups, state).

    Returns the rank outputs (batch, length, rank, heads, headdim) before gate and contraction, and the last state.
    """
    batch, length, heads, headdim = x.shape
    rank, groups, size = B.shape[2:]
    work = torch.promote_types(x.dtype, torch.float32)
    xs, d, a, bs, cs, lam, ang = (gather_rows(t, order).to(work) for t in (x, dt, A, B, C, trap, angles))
    r = None if resets is None else gather_rows(resets, order)
    lam = torch.sigmoid(lam)
    bs, cs = (t.repeat_interleave(heads // groups, dim=3) for t in (bs, cs))
    if B_bias is not None:
        bs = bs + B_bias.to(work).transpose(0, 1)
    if C_bias is not None:
        cs = cs + C_bias.to(work).transpose(0, 1)
    gain = x.new_ones(rank, heads, headdim, dtype=work) if mimo_x is None else mimo_x.to(work).transpose(0, 1)
    if state is None:
        state = (
            x.new_zeros(batch, heads, angles.shape[-1], dtype=work),
            x.new_zeros(batch, heads, headdim, size, dtype=work),
            x.new_zeros(batch, rank, heads, size, dtype=work),
            x.new_zeros(batch, heads, headdim, dtype=work),
        )
    theta, h, k_last, v_last = (t.to(work) for t in state)
    rows = []
    for t in range(xs.shape[1]):
        before = (theta, h, k_last, v_last)
        if r is not None:
            drop = r[:, t]
            theta, h, k_last, v_last = (
                s.masked_fill(drop.reshape(-1, *[1] * (s.dim() - 1)), 0) for s in (theta, h, k_last, v_last)
            )
        theta = theta + torch.pi * torch.tanh(ang[:, t, None]) * d[:, t, :, None]
        K, Q = (rotate(s[:, t], theta[:, None], halves) for s in (bs, cs))  # (batch, rank, heads, state)
        alpha = torch.exp(a[:, t] * d[:, t])
        beta, gamma = (1 - lam[:, t]) * d[:, t] * alpha, lam[:, t] * d[:, t]
        v, old = xs[:, t, None] * gain, v_last[:, None] * gain  # (batch, rank, heads, headdim)
        h = alpha[..., None, None] * h
        h = h + beta[..., None, None] * torch.einsum("brhp,brhn->bhpn", old, k_last)
        h = h + gamma[..., None, None] * torch.einsum("brhp,brhn->bhpn", v, K)
        y = torch.einsum("bhpn,brhn->brhp", h, Q)
        if D is not None:
            y = y + D.to(work)[:, None] * v
        rows.append(y)
        k_last, v_last = K, xs[:, t]
        if order is not None:
            on = (order[:, t] >= 0).expand(batch)
            theta, h, k_last, v_last = (
                torch.where(on.reshape(-1, *[1] * (s.dim() - 1)), s, s_before)
                for s, s_before in zip((theta, h, k_last, v_last), before, strict=True)
            )
    y = torch.stack(rows, dim=1) if rows else xs.new_zeros(batch, 0, rank, heads, headdim)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None, None], 0)
    return scatter_rows(y, order, length), (theta, h, k_last, v_last)
