"""The Triton causal convolution in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, difference, kernel_test, kinds, poisoned  # noqa: F401

import zoo_kernels
from zoo_kernels import causal_conv1d, causal_conv1d_step

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(batch, length, channels, width):
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, length, channels, generator=g), "weight": torch.randn(channels, width, generator=g),
        "bias": torch.randn(channels, generator=g), "initial_state": torch.randn(batch, width, channels, generator=g),
    }  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), kinds([(2, 0, 3, 4), (1, 1, 5, 2), (2, 7, 129, 3), (1, 65, 3, 8)]))
@pytest.mark.parametrize("reverse", [False, True])
def test_plain(shape, dtype, reverse):
    options = {"activation": "silu", "reverse": reverse, "return_final_state": True}
    agrees(causal_conv1d, problem(*shape), options, dtype, TOLERANCE[dtype])


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_path_lengths_and_resets(reverse, state):
    t = problem(3, 21, 4, 4)
    if not state:
        del t["initial_state"], t["bias"]
    options = {
        "path": torch.stack([torch.randperm(21)[:19] for _ in range(3)]), "lengths": torch.tensor([19, 2, 0]),
        "resets": torch.rand(3, 21) < 0.2, "reverse": reverse, "return_final_state": state,
    }  # fmt: skip
    agrees(causal_conv1d, t, options)


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_several_paths():
    t = problem(2, 13, 5, 4)
    t |= {"weight": torch.randn(2, 5, 4), "bias": torch.randn(2, 5), "initial_state": torch.randn(2, 2, 4, 5)}
    options = {"activation": "silu", "reverse": [False, True], "return_final_state": True}
    agrees(causal_conv1d, t, options)


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_step(dtype):
    t = problem(2, 1, 130, 4)
    results = []
    for name, kind in (("reference", torch.float64), ("triton", dtype)):
        args = [v.to(dtype).to(kind) for v in (t["x"][:, 0], t["weight"], t["bias"])]
        state = t["initial_state"].double() if name == "reference" else t["initial_state"].clone()
        with zoo_kernels.backend(name):
            results.append((causal_conv1d_step(*args, state=state, activation="silu"), state))
    for want, got in zip(*results, strict=True):
        assert difference(got, want) < TOLERANCE[dtype]
