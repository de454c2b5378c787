"""Cauchy sums over conjugate pairs: the transfer function of a diagonal system, which S4's kernel is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["cauchy", "unit_roots"]

NAME = "cauchy"
COMPLEX = (torch.complex64, torch.complex128)


def _fake(v, a, p, q, *, save):
    return (v.new_empty(*v.shape[:2], p.shape[0]),)


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    work = torch.promote_types(dtype, torch.float32).to_complex()
    for length, N in ((16, 4), (33, 7)):
        v = torch.randn(3, 5, N, dtype=work, device=device)
        a = torch.complex(-torch.rand(5, N, device=device) - 0.1, torch.randn(5, N, device=device)).to(work)
        p, q = unit_roots(length, dtype=work, device=device)
        yield v, a, p, q


_sum = Operator(
    NAME,
    package=__name__,
    arguments="Tensor v, Tensor a, Tensor p, Tensor q",
    outputs=("r",),
    differentiable=("v", "a"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
)


def unit_roots(length: int, *, dtype: torch.dtype = torch.complex64, device: Any = None) -> tuple[Tensor, Tensor]:
    """``p = 2 (1 - w)`` and ``q = 1 + w`` at the unit roots ``w = exp(-2 pi i k / length)``, k = 0 .. length // 2.

    Formed in float64 without cancellation, so that they are right to the accuracy of ``dtype``; q is exactly 0 at
    w = -1.
    """
    half = torch.arange(length // 2 + 1, dtype=torch.float64, device=device) * (torch.pi / length)
    s, c = torch.sin(half), torch.cos(half)
    if length % 2 == 0:
        c[-1] = 0.0  # cos(pi / 2), which rounds to 6e-17
    # 1 - w = 2 sin^2 + 2 i sin cos and 1 + w = 2 cos^2 - 2 i sin cos of half the angle
    p = torch.complex(4 * s * s, 4 * s * c)
    q = torch.complex(2 * c * c, -2 * s * c)
    return p.to(dtype), q.to(dtype)


def cauchy(v: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``r[m, h, k] = sum_n 2 v / (p_k - a q_k) + 2 conj(v) / (p_k - conj(a) q_k)``, v = v[m, h, n], a = a[h, n].

    With p = 2 (1 - w), q = 1 + w (:func:`unit_roots`) this is ``2 / (1 + w)`` times the sum of ``v / (z - a)`` and its
    conjugate at ``z = 2 (1 - w) / (1 + w)``, and it stays finite at w = -1.

    v: (heads, channels, N); a: (channels, N), in units of the step (dt * A); p, q: (nodes,); all complex of one dtype.
    Returns (heads, channels, nodes). No tensor of size channels x N x nodes is formed by the native and Triton paths.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Gu et al., arXiv 2111.00396, appendix C.3.
    """
    checks.is_tensor(NAME, "v", v)
    checks.has_dtype(NAME, "v", v, COMPLEX)
    if v.dim() != 3:
        raise ValueError(f"{NAME}: v has shape {tuple(v.shape)}; it must be (heads, channels, N)")
    checks.has_shape(NAME, "a", a, [("channels", v.shape[1]), ("N", v.shape[2])], v)
    checks.has_shape(NAME, "p", p, [("nodes", None)], v)
    checks.has_shape(NAME, "q", q, [("nodes", p.shape[0])], v)
    for name, value in (("a", a), ("p", p), ("q", q)):
        checks.has_dtype(NAME, name, value, (v.dtype,))
    if _sum.exporting():
        from .reference import sums

        return sums(v, a, p, q)
    return _sum(v, a, p, q)
