"""One decoding step of linear attention with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor,
    normalizer: Tensor | None = None,
    scale: float = 1.0,
    strict: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """One step of :func:`zoo_kernels.linear_attention`; ``state`` (and ``normalizer``) are updated in place.

    q, k: (batch, groups, state); v: (batch, heads, headdim); decay: None, (heads,), (batch, heads) or (batch, heads,
    state);
    state: (batch, heads, headdim, state); normalizer: (batch, heads, state), given exactly when the whole form
    normalises.
    Returns y: (batch, heads, headdim), v's dtype. Raises ValueError on wrong shapes.
    """
    name = "linear_attention_step"
    _checks.has_shape(name, "v", v, [("batch", None), ("heads", None), ("headdim", None)])
    batch, heads, headdim = v.shape
    _checks.has_shape(name, "k", k, [("batch", batch), ("groups", None), ("state", None)], v)
    groups, size = k.shape[1:]
    _checks.has_shape(name, "q", q, [("batch", batch), ("groups", groups), ("state", size)], v)
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: k has {groups} groups; it must be a divisor of the {heads} heads of v")
    axes = [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", size)]
    _checks.has_shape(name, "state", state, axes, v)
    if normalizer is not None:
        _checks.has_shape(name, "normalizer", normalizer, [axes[0], axes[1], axes[3]], v)
    work = state.dtype
    ks, qs = (t.to(work).repeat_interleave(heads // groups, dim=1) for t in (k, q))
    old, old_n = state, normalizer
    if decay is not None:
        factor = torch.exp(decay.to(work))
        if decay.dim() == 3:
            old = old * factor[:, :, None]
        else:
            factor = factor.expand(batch, heads)[..., None]
            old = old * factor[..., None]
        if old_n is not None:
            old_n = old_n * factor
    new = old + v.to(work)[..., None] * ks[:, :, None]
    y = scale * ((old if strict else new) * qs[:, :, None]).sum(-1)
    if normalizer is not None:
        assert old_n is not None
        new_n = old_n + ks
        total = scale * ((old_n if strict else new_n) * qs).sum(-1)
        y = y / (total + eps)[..., None]
        normalizer.copy_(new_n)
    state.copy_(new)
    return y.to(v.dtype)
