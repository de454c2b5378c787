"""The definition of one step of the mLSTM: that of the walk, over one row."""

from __future__ import annotations

from torch import Tensor

from .reference import mlstm_reference


def forward(q, k, v, i, f, C, n, m, scale, eps, *, save=False) -> Tensor:
    """See :func:`zoo_kernels.mlstm_step`."""
    state = (C, n, m)
    rows = [t[:, None] for t in (q, k, v, i, f)]
    y, new = mlstm_reference(*[*rows, scale, eps, state, None, None])
    for kept, value in zip(state, new, strict=True):
        kept.copy_(value)
    return y[:, 0].contiguous()
