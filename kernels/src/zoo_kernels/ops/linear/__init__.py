"""``x @ weight.T`` for the few rows of a decoding step, with float, bfloat16, float16 or int8 weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["linear"]

NAME = "linear"
FEW = 4  # up to so many rows reading the weights is what takes the time; beyond, torch's matrix product is as good
SMALL = 1 << 16  # weights of so few numbers lie in a cache, and the call itself is what takes the time


def _fake(x, weight, bias, scale, *, save):
    return (x.new_empty(x.shape[0], weight.shape[0]),)


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for rows, features, out in ((1, 40, 17), (3, 7, 5)):
        x, bias = torch.randn(rows, features, device=device).to(dtype), torch.randn(out, device=device).to(dtype)
        yield (x, torch.randn(out, features, device=device).to(dtype), bias, None)
        weight = torch.randint(-127, 128, (out, features), device=device, dtype=torch.int8)
        yield (x, weight, None, torch.rand(out, device=device) / 127)


_linear = Operator(
    NAME,
    package=__name__,
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor? scale",
    outputs=("y",),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
    """``y = x @ weight.T * scale + bias`` for the few rows of decoding, accumulated in float32 (float64 for float64).

    x: (..., features); weight: (out, features), float32, float64, bfloat16, float16, or int8 with ``scale`` (out,), one
    factor for each output row; bias: (out,). Returns (..., out) in x's dtype. The weights are read once as they are
    stored; with more than 4 rows, small weights, or where gradients are needed, torch's own product serves (on
    dequantised weights).
    Raises ValueError naming the argument, what it is and what it must be.

    Example::

        scale = weight.abs().amax(1) / 127
        y = linear(x, (weight / scale[:, None]).round().to(torch.int8), scale=scale)
    """
    checks.is_tensor(NAME, "x", x)
    checks.has_dtype(NAME, "x", x)
    checks.has_shape(NAME, "weight", weight, [("out", None), ("features", x.shape[-1] if x.dim() else 1)], x)
    checks.has_dtype(NAME, "weight", weight, (*checks.FLOATS, torch.int8))
    if (weight.dtype == torch.int8) != (scale is not None):
        needed = "given, one factor for each row," if scale is None else "None"
        raise ValueError(f"{NAME}: scale must be {needed} where weight is {str(weight.dtype).removeprefix('torch.')}")
    for name, value in (("bias", bias), ("scale", scale)):
        if value is not None:
            checks.has_shape(NAME, name, value, [("out", weight.shape[0])], x)
            checks.has_dtype(NAME, name, value)
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, scale))
    small = weight.numel() <= SMALL and scale is None and not _linear.forced()
    if rows.shape[0] > FEW or small or learns or _linear.exporting():
        from .reference import forward

        y = forward(rows, weight, bias, scale)
    else:
        y = _linear(rows, weight, bias, scale)
    return y.reshape(*lead, weight.shape[0])
