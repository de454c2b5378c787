"""The CPU path of the linear map for a few rows: kernels/native/linear.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("linear")


def unsupported(x, weight, bias, scale) -> str | None:
    return native.wrong_dtypes(("x", "weight", "bias", "scale"), (x, weight, bias, scale))


def forward(x, weight, bias, scale, *, save) -> Tensor:
    work = checks.state_dtype(x.dtype)
    wide = x.to(work).contiguous()
    weight = native.rows(weight)
    bias, scale = (None if p is None else p.to(work).contiguous() for p in (bias, scale))
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    native.function("linear")(
        x.shape[0], x.shape[1], weight.shape[0], native.threads(), int(work == torch.float64), wide.data_ptr(),
        weight.data_ptr(), native.DTYPES[weight.dtype], weight.stride(0), native.pointer(bias), native.pointer(scale),
        y.data_ptr(), native.DTYPES[y.dtype],
    )  # fmt: skip
    return y
