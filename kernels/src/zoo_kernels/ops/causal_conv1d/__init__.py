"""Causal depthwise convolution of short width, along a path, with a decoding step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d", "causal_conv1d_step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolution that looks only backwards along the walk.

    ``y_t = act(bias + sum_w weight[:, w] * x_{t - (W - 1) + w})``; rows before the start are ``initial_state`` or 0.

    x: (batch, length, channels); weight: (channels, width), width 2 to 8, the last column meets the newest row;
    bias: (channels,); activation: None or "silu"; path: (steps,) or (batch, steps); reverse: walk from the end;
    initial_state, final state: (batch, width, channels): the last ``width`` rows of the walk, newest last (one more
    than a step needs, so that the originals' caches convert without loss). resets: (batch, length) bool, rows before a
    reset are not seen. lengths: (batch,) steps to walk; rows not visited give 0.
    Returns ``(y, final_state)``, y like x. Source: Dao-AILab/causal-conv1d ``causal_conv1d_ref``.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    rows = torch.arange(batch, device=x.device)[:, None]
    order = torch.arange(length, device=x.device)[None] if path is None else (path.long() if path.dim() == 2 else path.long()[None])
    order = order.expand(batch, -1)
    steps = order.shape[1]
    count = torch.full((batch,), steps, device=x.device) if lengths is None else lengths.to(x.device)
    t = torch.arange(steps, device=x.device)[None].expand(batch, -1)
    position = count[:, None] - 1 - t if reverse else t
    valid = t < count[:, None]
    order = order.gather(1, position.clamp(min=0, max=max(steps - 1, 0)))
    work = torch.promote_types(x.dtype, torch.float32)
    walk = torch.where(valid[..., None], x[rows, order].to(work), torch.zeros((), dtype=work, device=x.device))
    before = x.new_zeros(batch, width, channels, dtype=work) if initial_state is None else initial_state.to(work)
    full = torch.cat([before, walk], dim=1)  # (batch, width + steps, channels); step t is at width + t
    segment = None
    if resets is not None:
        started = resets[rows, order].long().cumsum(1)
        segment = torch.cat([started.new_zeros(batch, width), started], dim=1)
    y = torch.zeros(batch, steps, channels, dtype=work, device=x.device)
    for w in range(width):
        offset = w + 1  # row index of tap w for step 0
        tap = full[:, offset : offset + steps]
        if segment is not None:
            same = segment[:, offset : offset + steps] == segment[:, width:]
            tap = torch.where(same[..., None], tap, torch.zeros_like(tap))
        y = y + weight[:, w].to(work) * tap
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    elif activation is not None:
        raise ValueError(f"activation is {activation!r}; expected None or 'silu'")
    y = torch.where(valid[..., None], y, torch.zeros_like(y))
    out = torch.zeros(batch, length, channels, dtype=work, device=x.device).index_put((rows, order), y, accumulate=True)
    final = None
    if return_final_state:
        last = count[:, None] + torch.arange(width, device=x.device)[None]
        final = full[rows, last]
        if segment is not None:
            same = segment[rows, last] == segment[rows, count[:, None] + width - 1]
            final = torch.where(same[..., None], final, torch.zeros_like(final))
    return out.to(x.dtype), final


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor, activation: str | None = None
) -> Tensor:
    """One step of :func:`causal_conv1d`: x (batch, channels); ``state`` (batch, width, channels) updated in place."""
    state.copy_(torch.cat([state[:, 1:], x[:, None].to(state.dtype)], dim=1))
    y = (state.to(torch.promote_types(x.dtype, torch.float32)) * weight.t()).sum(1)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
