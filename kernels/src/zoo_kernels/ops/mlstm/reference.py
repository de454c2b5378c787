"""The definition of the mLSTM in plain torch: the stabilised recurrence, one step after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels.ops._walk import gather_rows, scatter_rows


def mlstm_reference(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, scale: float, eps: float, state, resets, order
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See :func:`zoo_kernels.mlstm`; ``order`` from :func:`zoo_kernels.ops._walk.walk_order`."""
    batch, length, heads, headdim = v.shape
    work = torch.promote_types(v.dtype, torch.float32)
    qs, ks, vs, gi, gf = (gather_rows(t, order).to(work) for t in (q, k, v, i, f))
    r = None if resets is None else gather_rows(resets, order)
    size = q.shape[3]
    if state is None:
        C = v.new_zeros(batch, heads, headdim, size, dtype=work)
        n, m = C.new_zeros(batch, heads, size), C.new_zeros(batch, heads)
    else:
        C, n, m = (t.to(work) for t in state)
    rows = []
    for t in range(qs.shape[1]):
        on = None if order is None else order[:, t] >= 0
        if r is not None:
            drop = r[:, t]
            C, n, m = (x.masked_fill(drop.reshape(-1, *[1] * (x.dim() - 1)), 0) for x in (C, n, m))
        logf = F.logsigmoid(gf[:, t])
        m_new = torch.maximum(logf + m, gi[:, t])
        keep, add = torch.exp(logf + m - m_new), torch.exp(gi[:, t] - m_new)
        C_new = keep[..., None, None] * C + add[..., None, None] * vs[:, t, :, :, None] * ks[:, t, :, None, :]
        n_new = keep[..., None] * n + add[..., None] * ks[:, t]
        read = (C_new * qs[:, t, :, None]).sum(-1) * scale
        total = (n_new * qs[:, t]).sum(-1) * scale
        rows.append(read / (torch.maximum(total.abs(), torch.exp(-m_new)) + eps)[..., None])
        if on is None:
            C, n, m = C_new, n_new, m_new
        else:
            on = on.expand(batch)
            C, n, m = (
                torch.where(on.reshape(-1, *[1] * (x.dim() - 1)), new, x)
                for x, new in ((C, C_new), (n, n_new), (m, m_new))
            )
    y = torch.stack(rows, dim=1) if rows else vs
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(v.dtype), (C, n, m)
