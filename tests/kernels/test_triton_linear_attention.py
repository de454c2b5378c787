"""The Triton linear attention with a decay per key channel, in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, kernel_test, kinds, poisoned  # noqa: F401

from zoo_kernels import linear_attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def problem(batch, length, heads, headdim, state):
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "q": r(batch, length, heads, state), "k": r(batch, length, heads, state), "v": r(batch, length, heads, headdim),
        "decay": -torch.rand(batch, length, heads, state, generator=g), "initial_state": r(batch, heads, headdim,
        state),
    }  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "dtype"), kinds([(1, 0, 1, 3, 2), (1, 1, 2, 4, 3), (2, 7, 2, 5, 4), (1, 9, 1, 33, 65)])
)
@pytest.mark.parametrize("strict", [False, True])
def test_plain(shape, dtype, strict):
    options = {"strict": strict, "return_final_state": True}
    agrees(linear_attention, problem(*shape), options, dtype, TOLERANCE[dtype], ("decay", "initial_state"))


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("strict", [False, True])
def test_path_lengths_and_resets(strict):
    options = {
        "path": torch.stack([torch.randperm(9)[:8] for _ in range(3)]), "lengths": torch.tensor([8, 0, 3]),
        "resets": torch.rand(3, 9) < 0.3, "reverse": True, "return_final_state": True, "strict": strict,
    }  # fmt: skip
    agrees(linear_attention, problem(3, 9, 2, 4, 3), options)
