"""The CPU path of one step: ``kernels/native/mamba3_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _native

TENSORS = (
    "x", "dt", "A", "B", "C", "trap", "angles", "D", "z", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "theta",
    "h", "last_K", "last_x",
)  # fmt: skip


def unavailable() -> str | None:
    return _native.missing("mamba3_step")


def unsupported(*arguments) -> str | None:
    states = arguments[14:18]
    if states[1].dtype not in (torch.float32, torch.float64):
        return "the state must be float32 or float64 to be updated in place natively"
    if any(t.dtype != states[1].dtype or not t.is_contiguous() for t in states):
        return "the tensors of the state must be contiguous and of one dtype to be updated in place natively"
    return _native.wrong_dtypes(TENSORS, arguments[:18])


def forward(*arguments, save=False) -> Tensor:
    *tensors, halves, contract = arguments
    x, work = tensors[0], tensors[15].dtype
    batch, heads, headdim = x.shape
    ranks, groups, states = tensors[3].shape[1:]
    # mostly nothing to convert: each is a check of a flag
    tensors = [None if t is None else t.detach().to(work).contiguous() for t in tensors[:14]] + tensors[14:]
    y = torch.empty((batch, heads, headdim) if contract else (batch, ranks, heads, headdim), dtype=work)
    _native.function("mamba3_step")(
        batch, heads, groups, headdim, states, ranks, tensors[6].shape[1], int(halves), int(contract),
        _native.threads(), int(work == torch.float64), *(_native.pointer(t) for t in tensors), y.data_ptr(),
    )  # fmt: skip
    return y.to(x.dtype)
