"""The CPU path of one step: ``kernels/native/state_step.cpp``."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from zoo_kernels import _native


@functools.lru_cache(16)
def bits(x: float) -> int:
    """A double as the 64-bit integer that the C++ struct reads it from."""
    number: int = struct.unpack("q", struct.pack("d", x))[0]
    return number


def unavailable() -> str | None:
    return _native.missing("ssd_step")


def unsupported(*arguments) -> str | None:
    state = arguments[9]
    if state.dtype not in (torch.float32, torch.float64) or not state.is_contiguous():
        return "the state must be contiguous float32 or float64 to be updated in place natively"
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_scale", "state")
    return _native.wrong_dtypes(names, arguments[:10])


def forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, state, dt_softplus, low, high, *, save=False) -> Tensor:
    work = state.dtype
    batch, heads, headdim = x.shape
    # mostly nothing to convert: each is a check of a flag
    tensors = [
        t if t is None or (t.dtype == work and t.is_contiguous()) else t.to(work).contiguous()
        for t in (x, dt, A, B, C, D, z, dt_bias, dt_scale)
    ]
    y = torch.empty(batch, heads, headdim, dtype=work)
    _native.function("ssd_step")(
        batch, heads, headdim, B.shape[1], B.shape[2], _native.threads(), int(work == torch.float64), int(dt_softplus),
        bits(low), bits(high), *(0 if t is None else t.data_ptr() for t in tensors), state.data_ptr(), y.data_ptr(),
        int(D is not None and D.dim() == 2),
    )  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype)
