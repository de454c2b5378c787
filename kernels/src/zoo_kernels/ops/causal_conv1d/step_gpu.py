# mypy: ignore-errors
"""One step of the causal convolution in one launch, its window of rows shifted in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import program, sigmoid

BC = 128


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    if not arguments[3].is_contiguous():
        return "the state is not contiguous"
    return _gpu.unsupported(arguments)


@triton.jit(do_not_specialize=["total"])
def step_kernel(x, weight, bias, state, y, x_b, channels, total, W: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr):
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        b = work // blocks
        c = (work % blocks) * BC + tl.arange(0, BC)
        cm = c < channels
        sums = tl.zeros([BC], tl.float32)
        if bias is not None:
            sums += tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        for k in tl.static_range(W):
            # The window moves by one: row k takes row k + 1, which is read before it is written.
            if k < W - 1:
                row = tl.load(state + (b * W + k + 1) * channels + c, mask=cm, other=0.0)
            else:
                row = tl.load(x + b * x_b + c, mask=cm, other=0.0).to(state.dtype.element_ty)
            tl.store(state + (b * W + k) * channels + c, row, mask=cm)
            sums += row.to(tl.float32) * tl.load(weight + c * W + k, mask=cm, other=0.0).to(tl.float32)
        if SILU:
            sums = sums * sigmoid(sums)
        tl.store(y + b * channels + c, sums.to(y.dtype.element_ty), mask=cm)


def forward(x, weight, bias, state, silu, *, save=False):
    """See :func:`zoo_kernels.causal_conv1d_step`."""
    x = _gpu.rows(x)
    batch, channels = x.shape
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    with _gpu.guard(x):
        _gpu.launch(
            step_kernel, batch * triton.cdiv(channels, BC), x, weight.contiguous(), bias, state, y, x.stride(0),
            channels, W=weight.shape[1], SILU=silu, BC=BC,
        )  # fmt: skip
    return y
