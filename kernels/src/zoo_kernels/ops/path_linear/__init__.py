"""Several linear maps side by side: each path's rows times its own matrix, without copying them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["path_linear"]

NAME = "path_linear"


def _fake(x, weight, *, save):
    return (x.new_empty(*x.shape[:3], weight.shape[1]),)


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for batch, length, paths, features, out in ((2, 130, 2, 40, 70), (1, 3, 3, 7, 5)):
        x = torch.randn(batch, length, paths, features, device=device).to(dtype)
        yield x, torch.randn(paths, out, features, device=device).to(dtype)


_linear = Operator(
    NAME,
    package=__name__,
    arguments="Tensor x, Tensor weight",
    outputs=("y",),
    backends={"reference": ".reference", "native": ".native"},
    fake=_fake,
    cases=_cases,
)


def path_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``y[:, :, k] = x[:, :, k] @ weight[k].T`` for every path k. For inference; no gradient.

    x: (batch, length, paths, features), as :func:`zoo_kernels.causal_conv1d` gives it; weight: (paths, out, features),
    of x's dtype. Returns (batch, length, paths, out) in x's dtype; sums are in float32 or better.
    Raises ValueError naming the argument, what it is and what it must be, and where gradients are needed.
    """
    checks.has_shape(NAME, "x", x, [("batch", None), ("length", None), ("paths", None), ("features", None)])
    checks.has_dtype(NAME, "x", x)
    paths, features = x.shape[2:]
    checks.has_shape(NAME, "weight", weight, [("paths", paths), ("out", None), ("features", features)], x)
    checks.has_dtype(NAME, "weight", weight, (x.dtype,))
    for name, value in (("x", x), ("weight", weight)):
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(
                f"{NAME}: {name} needs a gradient, which this operator has not; call it under torch.no_grad()"
            )
    return _linear(x, weight)
