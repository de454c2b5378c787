"""The linear scan as ordinary torch operators without a loop over single steps (for ONNX and the like)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._walk import put_sum, walk

from . import state_dtype


def linear_scan_export(
    x, a, path, reverse, initial_state, return_final_state, resets, lengths
) -> tuple[Tensor, Tensor]:
    """Doubling (Hillis and Steele): after round i every step holds the sum over its last 2^i steps."""
    batch, length, channels = x.shape
    work = state_dtype(x)
    path = None if path is None else path[:, None]
    rows, walked = walk(path, [reverse], lengths, batch=batch, length=length, device=x.device)
    rows = rows[:, 0]
    index = rows[..., None].expand(-1, -1, channels)
    h = x.to(work).gather(1, index)
    decay = a.to(work).expand(batch, length, channels).gather(1, index)
    if resets is not None:
        decay = decay.masked_fill(resets.gather(1, rows)[..., None], 0)
    if walked is not None:  # an idle step changes nothing
        h = h.masked_fill(~walked[..., None], 0)
        decay = decay.masked_fill(~walked[..., None], 1)
    steps = rows.shape[1]
    if initial_state is not None and steps:
        h = torch.cat([h[:, :1] + decay[:, :1] * initial_state.to(work)[:, None], h[:, 1:]], dim=1)
    span = 1
    while span < steps:
        h = torch.cat([h[:, :span], h[:, span:] + decay[:, span:] * h[:, :-span]], dim=1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], dim=1)
        span *= 2
    if steps:
        final = h[:, -1]
    else:
        final = x.new_zeros(batch, channels, dtype=work) if initial_state is None else initial_state.to(work)
    out = put_sum(h[:, None], rows[:, None], walked, length)
    return out.to(x.dtype), final
