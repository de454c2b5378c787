"""The CPU path of one step: ``kernels/native/state_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _native
from zoo_kernels.ops.ssd.step_native import bits


def unavailable() -> str | None:
    return _native.missing("mlstm_step")


def unsupported(q, k, v, i, f, C, n, m, scale, eps) -> str | None:
    if C.dtype not in (torch.float32, torch.float64):
        return "the state must be float32 or float64 to be updated in place natively"
    if any(t.dtype != C.dtype or not t.is_contiguous() for t in (C, n, m)):
        return "the tensors of the state must be contiguous and of one dtype to be updated in place natively"
    return _native.wrong_dtypes(("q", "k", "v", "i", "f", "state"), (q, k, v, i, f, C))


def forward(q, k, v, i, f, C, n, m, scale, eps, *, save=False) -> Tensor:
    work = C.dtype
    batch, heads, headdim = v.shape
    tensors = [t.detach().to(work).contiguous() for t in (q, k, v, i, f)]
    y = torch.empty(batch, heads, headdim, dtype=work)
    _native.function("mlstm_step")(
        batch, heads, headdim, q.shape[2], _native.threads(), int(work == torch.float64), bits(scale), bits(eps),
        *(t.data_ptr() for t in (*tensors, C, n, m)), y.data_ptr(),
    )  # fmt: skip
    return y.to(v.dtype)
