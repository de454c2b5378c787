"""The sLSTM as ordinary torch operators in a loop (:mod:`zoo_kernels._loop`), for ONNX and other exporters."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._loop import loop
from zoo_kernels.ops._walk import gather_rows, scatter_rows

from .reference import advance


def slstm_export(gates, recurrent, bias, state, resets, order) -> tuple[Tensor, Tensor]:
    """The arguments of ``reference.forward``; y and the last state."""
    batch, length, _, heads, headdim = gates.shape
    work = torch.promote_types(gates.dtype, torch.float32)
    inputs = gather_rows(gates, order).to(work)
    if bias is not None:
        inputs = inputs + bias.to(work).transpose(0, 1)
    rows = [inputs]
    if resets is not None:
        rows.append(gather_rows(resets, order))
    if order is not None:
        rows.append((order >= 0).expand(batch, -1))

    def step(state, now, constants):
        raw, *flags = now
        before = state
        if resets is not None:
            before = tuple(torch.where(flags[0][:, None, None], torch.zeros_like(s), s) for s in state)
        _, new = advance(raw, before, *constants)
        if order is not None:
            new = tuple(torch.where(flags[-1][:, None, None], a, b) for a, b in zip(new, before, strict=True))
        return new, new[0].clone()

    first = [inputs.new_zeros(batch, heads, headdim)] * 4 if state is None else state.to(work).unbind(0)
    last, y = loop(step, first, rows, [recurrent.to(work)], axis=1)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(gates.dtype), torch.stack(last)
