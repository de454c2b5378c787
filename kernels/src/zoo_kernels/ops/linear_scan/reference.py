"""The definition of the linear scan in plain torch: one step after the other, any dtype, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._walk import walk

from . import CHUNK, empty_borders, state_dtype


def forward(x, a, path, reverse, initial_state, return_final_state, resets, lengths, *, save) -> tuple[Tensor, ...]:
    """x: (batch, length, channels); a: (batch or 1, length or 1, channels); see :func:`zoo_kernels.linear_scan`."""
    batch, length, channels = x.shape
    work = state_dtype(x)
    path = None if path is None else path[:, None]
    rows, walked = walk(path, [reverse], lengths, batch=batch, length=length, device=x.device)
    rows = rows[:, 0]
    b = torch.arange(batch, device=x.device)
    borders = empty_borders(x, path, save)
    h = x.new_zeros(batch, channels, dtype=work) if initial_state is None else initial_state.to(work)
    zero = torch.zeros((), dtype=work, device=x.device)
    states = []
    for t in range(rows.shape[1]):
        if save and t % CHUNK == 0:
            borders[:, t // CHUNK] = h
        row = rows[:, t]
        decay = a[b if a.shape[0] != 1 else 0, row if a.shape[1] != 1 else 0].to(work)
        old = h if resets is None else torch.where(resets[b, row][:, None], zero, h)
        new = decay * old + x[b, row].to(work)
        h = new if walked is None else torch.where(walked[:, t, None], new, h)
        states.append(h if walked is None else torch.where(walked[:, t, None], h, zero))
    out = torch.zeros(batch, length, channels, dtype=work, device=x.device)
    if states:
        out = out.index_put((b[:, None], rows), torch.stack(states, 1), accumulate=True)
    final = h.clone() if return_final_state else x.new_empty(0, dtype=work)
    return out.to(x.dtype), final, borders
