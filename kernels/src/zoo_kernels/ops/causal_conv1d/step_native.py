"""The CPU path of one step of the causal convolution: kernels/native/causal_conv1d.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("causal_conv1d_step")


def unsupported(x, weight, bias, state, silu) -> str | None:
    work = checks.state_dtype(x.dtype)
    if state.dtype != work:
        return f"state is {str(state.dtype).removeprefix('torch.')}; the native step updates {work} in place"
    if not state.is_contiguous():
        return "state is not contiguous; the native step updates it in place"
    return native.wrong_dtypes(("x", "weight", "bias", "state"), (x, weight, bias, state))


def forward(x, weight, bias, state, silu, *, save) -> Tensor:
    x = native.rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    kind = native.DTYPES
    native.function("causal_conv1d_step")(
        x.shape[0], x.shape[1], weight.shape[1], int(silu), native.threads(), int(state.dtype == torch.float64),
        x.data_ptr(), kind[x.dtype], x.stride(0), weight.data_ptr(), kind[weight.dtype], weight.stride(0),
        weight.stride(1), native.pointer(bias), 0 if bias is None else kind[bias.dtype], state.data_ptr(),
        y.data_ptr(), kind[y.dtype],
    )  # fmt: skip
    return y
