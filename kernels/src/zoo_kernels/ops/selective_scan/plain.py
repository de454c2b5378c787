"""The usual call on a CPU, straight to the library: one path through all rows, float32, nothing but y wanted.

A scan leaves the processor's caches full of its tensors, so that Python has to be fetched from memory anew at the next
call: views, checks and the choice of a back end then take 0.2 ms, a seventh of a layer of Mamba at 1024 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _backends
from zoo_kernels import _native as native
from zoo_kernels._memory import empty

from .native import MOST_COLUMNS, _flags, unavailable

# Signatures (zoo_kernels._checks.signature) that have passed the public function's checks, and whether they are served.
_SERVED: dict[tuple[Any, ...], bool] = {}


def serves(u: Tensor, A: Tensor, B: Tensor, dt_proj: Tensor | None, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether tensors of this kind, already checked against each other, are."""
    return (
        unavailable() is None
        and A.dim() == 2
        and B.dim() == 3
        and min(u.shape) > 0
        and min(A.shape) > 1
        and (dt_proj is None or 1 < dt_proj.shape[1] <= MOST_COLUMNS)
        and all(t is None or (t.is_cpu and t.dtype == torch.float32) for t in tensors)
    )


def plain(u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, dt_proj, signature) -> Tensor | None:
    """y, or None where the call has to take the long way. ``signature``: of the tensors, which have passed the checks,
    as has the path, (length,) or None."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, dt_proj)
    served = _SERVED.get(signature)
    if served is None:
        if len(_SERVED) >= 4096:
            _SERVED.clear()
        served = _SERVED[signature] = serves(u, A, B, dt_proj, tensors)
    if not served or _backends.forced() not in ("", "native"):
        return None
    (u_b, u_l, u_c), (dt_b, dt_l, dt_c) = u.stride(), dt.stride()
    (B_b, B_l, B_n), (C_b, C_l, C_n) = B.stride(), C.stride()
    z_b, z_l, z_c = (0, 0, 1) if z is None else z.stride()
    if not u_c == dt_c == B_n == C_n == z_c == 1:
        return None
    if (D is not None and D.stride(0) != 1) or (dt_bias is not None and dt_bias.stride(0) != 1):
        return None
    batch, length, channels = u.shape
    rank, proj, (proj_c, proj_r) = (
        (0, 0, (0, 0)) if dt_proj is None else (dt_proj.shape[1], dt_proj.data_ptr(), dt_proj.stride())
    )
    y = empty(batch, length, channels, dtype=torch.float32)
    native.function("selective_scan_forward")(
        batch, length, length, 1, channels, 1, A.shape[1], dt_softplus, torch.get_num_threads(), 0,
        u.data_ptr(), 0, u_b, u_l, 0, 0, dt.data_ptr(), 0, dt_b, dt_l, 0, 0,
        B.data_ptr(), 0, B_b, B_l, 0, 0, C.data_ptr(), 0, C_b, C_l, 0, 0,
        0 if z is None else z.data_ptr(), 0, z_b, z_l, 0, 0,
        A.data_ptr(), 0, *A.stride(), 0 if D is None else D.data_ptr(), 0 if dt_bias is None else dt_bias.data_ptr(),
        0 if path is None else path.data_ptr(), 0, 0, _flags((reverse,)).data_ptr(), 0, 0, 0,
        y.data_ptr(), 0, 0, 0, rank, proj, 0, proj_c, proj_r,
    )  # fmt: skip
    return y
