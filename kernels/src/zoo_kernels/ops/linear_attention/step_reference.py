"""The definition of one step of linear attention."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(v, decay, k, q, state, normalizer, scale, strict, eps, *, save=False) -> Tensor:
    """See :func:`zoo_kernels.linear_attention_step`; decay (batch or 1, heads, 1 or state), or None."""
    work = state.dtype
    heads, groups = v.shape[1], k.shape[1]
    ks, qs = (t.to(work).repeat_interleave(heads // groups, dim=1) for t in (k, q))
    old, old_n = state, normalizer
    if decay is not None:
        factor = torch.exp(decay.to(work))
        old = old * factor[:, :, None]
        old_n = None if old_n is None else old_n * factor
    new = old + v.to(work)[..., None] * ks[:, :, None]
    y = scale * ((old if strict else new) * qs[:, :, None]).sum(-1)
    if old_n is not None:
        new_n = old_n + ks
        y = y / (scale * ((old_n if strict else new_n) * qs).sum(-1) + eps)[..., None]
        normalizer.copy_(new_n)
    state.copy_(new)
    return y.to(v.dtype)
