"""The CPU path of several linear maps side by side: kernels/native/path_linear.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("path_linear")


def unsupported(x, weight) -> str | None:
    return native.wrong_dtypes(("x", "weight"), (x, weight))


def forward(x, weight, *, save) -> Tensor:
    work = checks.state_dtype(x.dtype)
    wide, weight = native.rows(x.to(work)), weight.to(work).contiguous()
    y = torch.empty(*x.shape[:3], weight.shape[1], dtype=work)
    if y.numel():
        native.function("path_linear")(
            *x.shape, weight.shape[1], native.threads(), int(work == torch.float64), wide.data_ptr(),
            *wide.stride()[:3], weight.data_ptr(), y.data_ptr(),
        )  # fmt: skip
    return y.to(x.dtype)
