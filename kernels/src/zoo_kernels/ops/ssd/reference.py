"""The definition in plain torch: one step after the other, any real dtype, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels.ops._walk import gather_rows, scatter_rows


def forward(
    v: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    k: Tensor,
    q: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    resets: Tensor | None,
    order: Tensor | None,
    strict: bool,
    *,
    save: bool = False,
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(decay_t) h_{t-1} + weight_t v_t k_t^T``, ``y_t = h_t q_t + D v_t`` (strict: ``h_{t-1}`` decayed,
    for h_t).

    v (batch, length, heads, headdim); decay, weight (batch, length, heads); k, q (batch, length, groups, state);
    D (heads,) or (heads, headdim); state (batch, heads, headdim, state); resets (batch, length) bool by row;
    order (1 or batch, steps) from :func:`zoo_kernels.ops._walk.walk_order`. Returns y like v and the last state.
    """
    batch, length, heads, headdim = v.shape
    work = torch.promote_types(v.dtype, torch.float32)
    repeat = heads // k.shape[2] if k.shape[2] else 1
    vs, ks, qs = (gather_rows(t, order).to(work) for t in (v, k, q))
    ks, qs = (t.repeat_interleave(repeat, dim=2) for t in (ks, qs))  # head h reads group h // repeat
    a = None if decay is None else gather_rows(decay, order).to(work)
    w = None if weight is None else gather_rows(weight, order).to(work)
    r = None if resets is None else gather_rows(resets, order)
    steps = vs.shape[1]
    h = v.new_zeros(batch, heads, headdim, k.shape[3], dtype=work) if state is None else state.to(work, copy=True)
    rows = []
    for t in range(steps):
        if r is not None:  # the old state is dropped before the input of this step is added
            h = torch.where(r[:, t, None, None, None], torch.zeros_like(h), h)
        if a is not None:
            h = torch.exp(a[:, t])[..., None, None] * h
        before = h
        u = vs[:, t] if w is None else w[:, t, :, None] * vs[:, t]
        h = h + u[..., None] * ks[:, t, :, None, :]
        rows.append(((before if strict else h) * qs[:, t, :, None, :]).sum(-1))
    y = torch.stack(rows, dim=1) if rows else torch.zeros_like(vs)
    if D is not None:
        y = y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * vs
    if order is not None:  # a step that visits nothing must not write
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(v.dtype).contiguous(), h.contiguous()
