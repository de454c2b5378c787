"""One decoding step of the linear scan."""

from __future__ import annotations

import torch
from torch import Tensor


def step(x: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """See :func:`zoo_kernels.linear_scan_step`. Two torch operators, both in place: nothing to fuse."""
    if state.shape != x.shape:
        raise ValueError(
            f"linear_scan_step: state has shape {tuple(state.shape)}; it must be {tuple(x.shape)}, as x is"
        )
    if state.dtype != torch.promote_types(state.dtype, torch.promote_types(x.dtype, a.dtype)):
        raise ValueError(
            f"linear_scan_step: state is {state.dtype}; it must be able to hold a ({a.dtype}) times x ({x.dtype})"
        )
    state.mul_(a).add_(x)
    return state.to(torch.promote_types(x.dtype, a.dtype) if a.is_complex() else x.dtype, copy=True)
