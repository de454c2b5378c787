"""The definition of a step through a stack of blocks, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from . import MambaBlock, MambaStep, Matrix


def apply(matrix: Matrix, x: Tensor) -> Tensor:
    y = F.linear(x, matrix.dense())
    return y if matrix.bias is None else y + matrix.bias


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def convolve(block: MambaBlock, x: Tensor, window: Tensor) -> Tensor:
    window.copy_(torch.cat([window[1:], x[None].to(window.dtype)]))
    y = (window.float() * block.conv).sum(0)
    return F.silu(y if block.conv_bias is None else y + block.conv_bias)


def mamba(block: MambaBlock, u: Tensor, window: Tensor, state: Tensor) -> Tensor:
    assert block.x_proj is not None
    assert block.dt_proj is not None
    x, z = apply(block.in_proj, u).chunk(2)
    x = convolve(block, x, window)
    dt, B, C = apply(block.x_proj, x).split([block.rank, block.states, block.states])
    dt = F.softplus(apply(block.dt_proj, dt))[:, None]
    state.copy_((dt * block.A).exp() * state + dt * x[:, None] * B)
    return (state @ C + block.skip * x) * F.silu(z)


def mamba2(block: MambaBlock, u: Tensor, window: Tensor, state: Tensor) -> Tensor:
    assert block.dt_bias is not None
    inner, N = block.inner, block.groups * block.states
    z, xBC, dt = apply(block.in_proj, u).split([inner, inner + 2 * N, block.heads])
    x, B, C = convolve(block, xBC, window).split([inner, N, N])
    dt = F.softplus(dt + block.dt_bias).clamp(*block.dt_limit)
    repeat = block.heads // block.groups
    B, C = (t.unflatten(0, (block.groups, block.states)).repeat_interleave(repeat, 0) for t in (B, C))  # (H, N)
    h = state.view(block.heads, -1, block.states)
    drive = (dt[:, None] * x.unflatten(0, (block.heads, -1)))[..., None] * B[:, None]
    h.copy_((dt * block.A).exp()[:, None, None] * h + drive)
    y = (h @ C[..., None]).flatten() + block.skip * x
    gate = F.silu(z)
    if block.gate_norm is None:
        return y * gate
    y = y if block.norm_before_gate else y * gate
    weight = block.gate_norm.unflatten(0, (block.groups, -1))
    y = rms(y.unflatten(0, (block.groups, -1)), weight, block.gate_eps).flatten()
    return y * gate if block.norm_before_gate else y


def step(stack: MambaStep, token: int, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    x = stack.embedding[token].float()
    for block, (window, state) in zip(stack.blocks, states, strict=True):
        mixer = mamba2 if block.heads else mamba
        x = x + apply(block.out_proj, mixer(block, rms(x, block.norm, block.norm_eps), window, state))
    return apply(stack.head, rms(x, stack.norm, stack.eps))
