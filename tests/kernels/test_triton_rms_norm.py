"""The Triton (gated) RMS norm in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, kernel_test, kinds, poisoned  # noqa: F401

from zoo_kernels import gated_rms_norm, rms_norm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def problem(rows, dim):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, dim), "z": (rows, dim), "weight": (dim,), "bias": (dim,)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), kinds([(0, 4, 1), (1, 5, 1), (7, 37, 1), (65, 12, 3)]))
def test_gated(shape, first, centred, dtype):
    rows, dim, groups = shape
    options = {"groups": groups, "norm_before_gate": first, "centred": centred}

    def function(**arguments):
        return (gated_rms_norm(**arguments),)

    agrees(function, problem(rows, dim), options, dtype, TOLERANCE[dtype])


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("names", [("x",), ("x", "weight")])
def test_plain(names):
    t = problem(5, 33)

    def function(**arguments):
        return (rms_norm(**arguments),)

    agrees(function, {name: t[name] for name in names}, {})
