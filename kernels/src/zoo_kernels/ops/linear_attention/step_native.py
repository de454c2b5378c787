"""The CPU path of one step: ``kernels/native/attention_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _native
from zoo_kernels.ops.ssd.step_native import bits


def unavailable() -> str | None:
    return _native.missing("linear_attention_step")


def unsupported(v, decay, k, q, state, normalizer, scale, strict, eps) -> str | None:
    for name, t in (("state", state), ("normalizer", normalizer)):
        if t is not None and (t.dtype != state.dtype or not t.is_contiguous()):
            return f"the {name} must be contiguous and of the state's dtype to be updated in place natively"
    if state.dtype not in (torch.float32, torch.float64):
        return "the state must be float32 or float64 to be updated in place natively"
    return _native.wrong_dtypes(("v", "decay", "k", "q", "state"), (v, decay, k, q, state))


def forward(v, decay, k, q, state, normalizer, scale, strict, eps, *, save=False) -> Tensor:
    work = state.dtype
    batch, heads, headdim = v.shape
    # mostly nothing to convert: each is a check of a flag
    v_, k, q = (t.detach().to(work).contiguous() for t in (v, k, q))
    strides = [0, 0, 0]
    if decay is not None:
        decay = _native.rows(decay.detach().to(work))
        strides = [0 if size == 1 else step for size, step in zip(decay.shape, decay.stride(), strict=True)]
    y = torch.empty(batch, heads, headdim, dtype=work)
    _native.function("linear_attention_step")(
        batch, heads, k.shape[1], headdim, k.shape[2], int(strict), _native.threads(), int(work == torch.float64),
        bits(scale), bits(eps), *(t.data_ptr() for t in (v_, k, q)), _native.pointer(decay), *strides,
        state.data_ptr(), _native.pointer(normalizer), y.data_ptr(),
    )  # fmt: skip
    return y.to(v.dtype)
