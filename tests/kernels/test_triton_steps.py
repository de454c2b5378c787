"""The Triton decoding steps of ssd and the selective scan, and the linear map, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import difference, interpreted

import zoo_kernels
from zoo_kernels import linear, selective_scan_step, ssd_step

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def r(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(function, tensors, state, options, dtype):
    """Outputs and updated states of three steps: triton in ``dtype`` against the reference in float64."""
    low = {name: t.to(dtype) for name, t in tensors.items()}
    wide = {name: t.double() for name, t in low.items()}
    states = {"reference": state.double(), "triton": state.clone()}
    for _ in range(3):
        results = []
        for name, arguments in (("reference", wide), ("triton", low)):
            with zoo_kernels.backend(name):
                results.append(function(**arguments, state=states[name], **options))
        assert difference(results[1], results[0]) < TOLERANCE[dtype]
        assert results[1].dtype == dtype
        assert difference(states["triton"], states["reference"]) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan_step(dtype, groups):
    t = {
        "u": r(2, 70), "dt": r(2, 70, seed=1), "A": -r(70, 3).abs(), "B": r(2, groups, 3), "C": r(2, groups, 3, seed=2),
        "D": r(70), "z": r(2, 70, seed=3), "dt_bias": r(70, seed=4),
    }  # fmt: skip
    compare(selective_scan_step, t, r(2, 70, 3), {"dt_softplus": True}, dtype)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("full", [False, True])
def test_ssd_step(dtype, full):
    t = {
        "x": r(2, 4, 9), "dt": r(2, 4).abs(), "A": -r(4).abs(), "B": r(2, 2, 5), "C": r(2, 2, 5, seed=1),
    }  # fmt: skip
    if full:
        t |= {"D": r(4, 9), "z": r(2, 4, 9, seed=2), "dt_bias": r(4, seed=3), "dt_scale": r(2, 4, seed=4).abs()}
    compare(ssd_step, t, r(2, 4, 9, 5), {"dt_softplus": full, "dt_limit": (0.1, 2.0)}, dtype)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear(dtype, rows):
    x, bias = r(rows, 700).to(dtype), r(17).to(dtype)
    whole = torch.randint(-127, 128, (17, 700), dtype=torch.int8)
    for weight, scale in ((r(17, 700).to(dtype), None), (whole, torch.rand(17) / 127)):
        with zoo_kernels.backend("triton"):
            y = linear(x, weight, bias, scale=scale)
        want = x.double() @ (weight.double() if scale is None else weight.double() * scale.double()[:, None]).t()
        assert difference(y, want + bias.double()) < TOLERANCE[dtype]
