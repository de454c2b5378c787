"""One decoding step of the mLSTM with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One step of :func:`zoo_kernels.mlstm`; the tensors of ``state`` (C, n, m) are updated in place.

    q, k: (batch, heads, state); v: (batch, heads, headdim); i, f: (batch, heads). Returns y: (batch, heads, headdim),
    v's dtype. Raises ValueError as :func:`zoo_kernels.mlstm`.
    """
    from . import check
    from .reference import mlstm_reference

    q, k, v, i, f = (t[:, None] for t in (q, k, v, i, f))
    check("mlstm_step", q, k, v, i, f, state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        y, new = mlstm_reference(q, k, v, i, f, scale, eps, state, None, None)
        for kept, value in zip(state, new, strict=True):
            kept.copy_(value)
    return y[:, 0]
