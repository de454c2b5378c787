"""The definition with one decay per key channel: one step after the other, any real dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels.ops._walk import gather_rows, scatter_rows


def forward(
    v: Tensor,
    decay: Tensor,
    k: Tensor,
    q: Tensor,
    state: Tensor | None,
    resets: Tensor | None,
    order: Tensor | None,
    strict: bool,
    *,
    save: bool = False,
) -> tuple[Tensor, Tensor]:
    """``h_t = h_{t-1} diag(exp(decay_t)) + v_t k_t^T``, ``y_t = h_t q_t`` (strict: ``h_{t-1}`` decayed, for h_t).

    v (batch, length, heads, headdim); decay, k, q (batch, length, heads, state); state (batch, heads, headdim, state);
    resets (batch, length) bool by row; order (1 or batch, steps). Returns y like v and the last state.
    """
    batch, length, heads, headdim = v.shape
    work = torch.promote_types(v.dtype, torch.float32)
    vs, a, ks, qs = (gather_rows(t, order).to(work) for t in (v, decay, k, q))
    r = None if resets is None else gather_rows(resets, order)
    h = v.new_zeros(batch, heads, headdim, k.shape[3], dtype=work) if state is None else state.to(work, copy=True)
    rows = []
    for t in range(vs.shape[1]):
        if r is not None:
            h = torch.where(r[:, t, None, None, None], torch.zeros_like(h), h)
        before = torch.exp(a[:, t])[:, :, None] * h
        h = before + vs[:, t, :, :, None] * ks[:, t, :, None, :]
        rows.append(((before if strict else h) * qs[:, t, :, None, :]).sum(-1))
    y = torch.stack(rows, dim=1) if rows else torch.zeros_like(vs)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(v.dtype).contiguous(), h.contiguous()
