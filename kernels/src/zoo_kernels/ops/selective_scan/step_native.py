"""The CPU path of one step of the selective scan: kernels/native/selective_scan_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _native as native

from . import work_dtype


def unavailable() -> str | None:
    return native.missing("selective_scan_step")


def unsupported(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus) -> str | None:
    if state.dtype != work_dtype(u, A):
        return (
            f"state is {str(state.dtype).removeprefix('torch.')}; the native step updates {work_dtype(u, A)} in place"
        )
    if not state.is_contiguous():
        return "state is not contiguous; the native step updates it in place"
    return native.wrong_dtypes(
        ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state"), (u, dt, A, B, C, D, z, dt_bias, state)
    )


def forward(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus, *, save) -> Tensor:
    u, dt, A, B, C = (native.rows(x) for x in (u, dt, A, B, C))
    z, D, dt_bias = (None if x is None else native.rows(x) for x in (z, D, dt_bias))
    y = torch.empty(u.shape, dtype=u.dtype)
    kind = native.DTYPES

    def pair(x: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if x is None else (x.data_ptr(), kind[x.dtype], x.stride(0) if x.dim() == 2 else 0)

    native.function("selective_scan_step")(
        u.shape[0], u.shape[1], B.shape[1], A.shape[1], int(dt_softplus), native.threads(),
        int(state.dtype == torch.float64), *pair(u), *pair(dt), *pair(z), *pair(D), *pair(dt_bias),
        A.data_ptr(), kind[A.dtype], A.stride(0), B.data_ptr(), kind[B.dtype], B.stride(0), B.stride(1),
        C.data_ptr(), kind[C.dtype], C.stride(0), C.stride(1), state.data_ptr(), y.data_ptr(), kind[y.dtype],
    )  # fmt: skip
    return y
