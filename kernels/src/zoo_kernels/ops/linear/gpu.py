# mypy: ignore-errors
"""The Triton path of the linear map for a few rows: the weights are read once, as they are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import program

BO, BF = 8, 512


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


@triton.jit(do_not_specialize=["total"])
def linear_kernel(
    x, weight, bias, scale, y, x_r, w_o, features, out, total, R: tl.constexpr, BO: tl.constexpr, BF: tl.constexpr
):
    work = program()
    if work < total:
        o = work * BO + tl.arange(0, BO)
        om = o < out
        # One accumulator for each row of x; sums along the features are taken once, at the end.
        sums = ()
        for _r in tl.static_range(R):
            sums += (tl.zeros([BO, BF], tl.float32),)
        for first in range(0, features, BF):
            f = first + tl.arange(0, BF)
            fm = f < features
            w = tl.load(weight + o[:, None] * w_o + f[None, :], mask=om[:, None] & fm[None, :], other=0).to(tl.float32)
            more = ()
            for r in tl.static_range(R):
                row = tl.load(x + r * x_r.to(tl.int64) + f, mask=fm, other=0.0).to(tl.float32)
                more += (sums[r] + w * row[None, :],)
            sums = more
        for r in tl.static_range(R):
            value = tl.sum(sums[r], 1)
            if scale is not None:
                value = value * tl.load(scale + o, mask=om, other=0.0).to(tl.float32)
            if bias is not None:
                value += tl.load(bias + o, mask=om, other=0.0).to(tl.float32)
            tl.store(y + r * out.to(tl.int64) + o, value.to(y.dtype.element_ty), mask=om)


def forward(x, weight, bias, scale, *, save=False):
    """See :func:`zoo_kernels.linear`; x (rows, features), 1 to 4 rows."""
    x, weight = _gpu.rows(x), _gpu.rows(weight)
    rows, features = x.shape
    out = weight.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if rows:
        with _gpu.guard(x):
            _gpu.launch(
                linear_kernel, triton.cdiv(out, BO), x, weight, bias, scale, y, x.stride(0), weight.stride(0), features,
                out, R=rows, BO=BO, BF=min(BF, _gpu.power_of_two(features)), num_warps=4,
            )  # fmt: skip
    return y
