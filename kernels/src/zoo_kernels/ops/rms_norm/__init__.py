"""RMS normalisation, plain and gated, over groups of channels; also its centred form (layer normalisation)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["gated_rms_norm", "rms_norm"]


def _fake(x, z, weight, bias, eps, groups, norm_before_gate, centred, *, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    yield r(5, 37), None, r(37), None, 1e-5, 1, False, False
    yield r(7, 48), r(7, 48), r(48), r(48), 1e-6, 3, True, False
    yield r(7, 48), r(7, 48), r(48), None, 1e-5, 2, False, False
    yield r(3, 20), None, None, None, 1e-5, 1, False, True
    yield r(3, 20), r(3, 20), r(20), r(20), 1e-5, 1, False, True


_norm = Operator(
    "rms_norm",
    package=__name__,
    arguments=(
        "Tensor x, Tensor? z, Tensor? weight, Tensor? bias, float eps, int groups, bool norm_before_gate, bool centred"
    ),
    outputs=("y",),
    differentiable=("x", "z", "weight", "bias"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
)


def _apply(name, x, z, weight, bias, eps, groups, norm_before_gate, centred) -> Tensor:
    checks.is_tensor(name, "x", x)
    checks.has_dtype(name, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has no axes; it must be (..., dim)")
    dim = x.shape[-1]
    if z is not None:
        checks.is_tensor(name, "z", z, x)
        if z.shape != x.shape:
            raise ValueError(f"{name}: z has shape {tuple(z.shape)}; it must be {tuple(x.shape)}, as x is")
        checks.has_dtype(name, "z", z)
    for label, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.has_shape(name, label, value, [("dim", dim)], x)
            checks.has_dtype(name, label, value)
    if groups < 1 or dim % groups:
        raise ValueError(f"{name}: groups is {groups}; it must divide the {dim} channels of x")
    if not eps >= 0:
        raise ValueError(f"{name}: eps is {eps}; it must not be negative")
    if _norm.exporting():
        from .reference import normalise

        return normalise(x, z, weight, bias, eps, groups, norm_before_gate, centred)
    flat = None if z is None else z.reshape(-1, dim)
    y = _norm(x.reshape(-1, dim), flat, weight, bias, float(eps), int(groups), bool(norm_before_gate), bool(centred))
    return y.reshape(x.shape)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, groups: int = 1
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight + bias``, the mean over each group of neighbouring channels.

    x: (..., dim); weight, bias: (dim,) or None; groups divides dim. Statistics in float32 (float64 if x is); the result
    has x's shape and dtype. There is no state: the result is one tensor.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """
    return _apply("rms_norm", x, None, weight, bias, eps, groups, False, False)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    centred: bool = False,
) -> Tensor:
    """Normalisation with a SiLU gate: ``norm(x * silu(z))``, or with ``norm_before_gate`` ``norm(x) * silu(z)``.

    ``norm`` is :func:`rms_norm` with ``weight`` and ``bias``; ``centred`` subtracts the mean of each group first, which
    makes it layer normalisation. x, z: (..., dim), z None for no gate; weight, bias: (dim,) or None; groups
    divides dim. Statistics in float32 (float64 if x is); the result has x's shape and dtype.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Dao and Gu, arXiv 2405.21060, section 7; state-spaces/mamba ``ops/triton/layernorm_gated.py``.
    """
    return _apply("gated_rms_norm", x, z, weight, bias, eps, groups, norm_before_gate, centred)
