"""The Triton Cauchy sums in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, kernel_test, poisoned  # noqa: F401

from zoo_kernels import cauchy, unit_roots


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("heads", "channels", "N", "length"), [(1, 1, 1, 1), (2, 3, 5, 16), (1, 2, 33, 301)])
def test_sums(heads, channels, N, length):
    g = torch.Generator().manual_seed(0)
    a = torch.complex(-torch.rand(channels, N, generator=g) - 0.1, torch.randn(channels, N, generator=g))
    v = torch.randn(heads, channels, N, dtype=torch.complex64, generator=g)
    p, q = unit_roots(length, dtype=torch.complex64)

    def function(v, a):
        return (cauchy(v, a, p.to(v.dtype), q.to(v.dtype)),)

    agrees(function, {"v": v, "a": a}, {})
