"""Linear attention with a decay per key channel in a loop (:mod:`zoo_kernels._loop`), for ONNX and other exporters."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._loop import loop
from zoo_kernels.ops._walk import gather_rows, scatter_rows


def linear_attention_export(v, decay, k, q, state, resets, order, strict) -> tuple[Tensor, Tensor]:
    """See :func:`zoo_kernels.ops.linear_attention.reference.forward`; the same arguments and results."""
    batch, length, heads, headdim = v.shape
    work = torch.promote_types(v.dtype, torch.float32)
    rows = [gather_rows(t, order).to(work) for t in (v, decay, k, q)]
    if resets is not None:
        rows.append(gather_rows(resets, order))

    def step(state, now, _):
        (h,) = state
        v, decay, k, q, *drop = now
        if drop:
            h = torch.where(drop[0][:, None, None, None], torch.zeros_like(h), h)
        before = torch.exp(decay)[:, :, None] * h
        h = before + v[..., None] * k[:, :, None]
        return (h,), ((before if strict else h) * q[:, :, None]).sum(-1)

    first = v.new_zeros(batch, heads, headdim, k.shape[3], dtype=work) if state is None else state.to(work)
    (last,), y = loop(step, [first], rows, axis=1)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(v.dtype), last
