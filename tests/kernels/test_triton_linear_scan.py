"""The Triton linear scan, real and complex, in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, difference, kernel_test, kinds, poisoned  # noqa: F401

import zoo_kernels
from zoo_kernels import linear_scan

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def problem(batch, length, channels, shared=(False, False), complex_=False):
    g = torch.Generator().manual_seed(0)
    kind = torch.complex64 if complex_ else torch.float32
    a = torch.randn(1 if shared[0] else batch, 1 if shared[1] else length, channels, dtype=kind, generator=g)
    return {
        "x": torch.randn(batch, length, channels, dtype=kind, generator=g), "a": a / (1 + a.abs()),
        "initial_state": torch.randn(batch, channels, dtype=kind, generator=g),
    }  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), kinds([(2, 0, 3), (1, 1, 5), (2, 7, 3)]))
@pytest.mark.parametrize("reverse", [False, True])
def test_real(shape, dtype, reverse):
    agrees(linear_scan, problem(*shape), {"reverse": reverse, "return_final_state": True}, dtype, TOLERANCE[dtype])


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
def test_paths_lengths_resets_and_shared_factors(complex_, shared):
    t = problem(3, 67, 2, shared, complex_)
    if shared[0]:
        t["a"] = t["a"][0]
    if shared == (True, True):
        t["a"] = t["a"][0]
    options = {
        "path": torch.stack([torch.randperm(67)[:65] for _ in range(3)]), "lengths": torch.tensor([65, 0, 20]),
        "resets": torch.rand(3, 67) < 0.1, "reverse": True, "return_final_state": True,
    }  # fmt: skip
    agrees(linear_scan, t, options)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("complex_", [False, True])
def test_segments_agree_with_one_walk(complex_):
    from zoo_kernels.ops.linear_scan import gpu

    t = problem(2, 70, 2, (False, False), complex_)
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[0, 66] = True
    args = (t["x"], t["a"], None, False, t["initial_state"], True, resets, torch.tensor([70, 30]))
    results = []
    for split in (1, 2):
        h, final, borders = gpu.forward(*args, save=True, split=split)
        g = (torch.ones_like(h).cumsum(1).sin(), final.sin())
        results.append([h, final, *gpu.backward(g, args, (borders,), [True] * 3, split=split)])
    for one, many in zip(*results, strict=True):
        assert difference(many, one) < 2e-6


@kernel_test
def test_a_reset_drops_an_infinite_state():
    t = problem(1, 9, 3)
    t["x"][0, 2, 1] = float("inf")
    resets = torch.zeros(1, 9, dtype=torch.bool)
    resets[0, 5] = True
    with zoo_kernels.backend("triton"):
        h, _ = linear_scan(t["x"], t["a"], resets=resets)
    assert h[0, 5:].isfinite().all()
    assert h[0, :, [0, 2]].isfinite().all()
