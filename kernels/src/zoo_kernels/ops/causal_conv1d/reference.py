"""The definition of the causal depthwise convolution along a path, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels._walk import put_sum, take, walk

from . import several


@several.forward
def forward(
    x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths, *, save=False
) -> tuple[Tensor, Tensor]:
    """Canonical arguments; see :func:`zoo_kernels.causal_conv1d`. path (1 or batch, 1, steps), reverse one flag."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    rows, walked = walk(path, reverse, lengths, batch=batch, length=length, device=x.device)
    steps = rows.shape[2]
    seen = take(x[:, :, None], rows)[:, 0].to(work)  # (batch, steps, channels)
    before = x.new_zeros(batch, width, channels, dtype=work) if initial_state is None else initial_state.to(work)
    full = torch.cat([before, seen], dim=1)  # step t is at width + t
    segment = None
    if resets is not None:
        started = resets[torch.arange(batch, device=x.device)[:, None], rows[:, 0]].long().cumsum(1)
        segment = torch.cat([started.new_zeros(batch, width), started], dim=1)
    y = torch.zeros((), dtype=work, device=x.device)
    for w in range(width):
        tap = full[:, w + 1 : w + 1 + steps]
        if segment is not None:
            same = segment[:, w + 1 : w + 1 + steps] == segment[:, width:]
            tap = torch.where(same[..., None], tap, torch.zeros((), dtype=work, device=x.device))
        y = y + weight[:, w].to(work) * tap
    if bias is not None:
        y = y + bias.to(work)
    if silu:
        y = F.silu(y)
    y = put_sum(y[:, None], rows, walked, length).to(x.dtype)
    if not return_final_state:
        return y, full.new_empty(0)
    if lengths is None:
        final, mark = full[:, steps:], None if segment is None else segment[:, steps:]
    else:
        last = lengths[:, None] + torch.arange(width, device=x.device)[None]
        b = torch.arange(batch, device=x.device)[:, None]
        final, mark = full[b, last], None if segment is None else segment[b, last]
    if mark is not None:
        final = torch.where((mark == mark[:, -1:])[..., None], final, torch.zeros((), dtype=work, device=x.device))
    return y, final.clone()
