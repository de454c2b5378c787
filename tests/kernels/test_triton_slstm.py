"""The Triton sLSTM in the interpreter: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, kernel_test, kinds, poisoned  # noqa: F401

from zoo_kernels import slstm

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def problem(batch, length, heads, headdim):
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    state = r(4, batch, heads, headdim)
    state[2] = state[2].abs() + 0.5  # n is a sum of positive numbers
    return {
        "gates": r(batch, length, 4, heads, headdim), "recurrent": 0.3 * r(heads, headdim, 4, headdim),
        "bias": r(heads, 4, headdim), "initial_state": state,
    }  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "dtype"), kinds([(1, 0, 1, 3), (1, 1, 2, 4), (2, 7, 2, 5), (17, 3, 1, 4), (1, 4, 1, 70)])
)
def test_plain(shape, dtype):
    agrees(slstm, problem(*shape), {"return_final_state": True}, dtype, TOLERANCE[dtype], ("initial_state",))


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bare", [False, True])
def test_path_lengths_and_resets(bare):
    t = problem(3, 9, 2, 4)
    if bare:
        del t["bias"], t["initial_state"]
    options = {
        "path": torch.stack([torch.randperm(9)[:8] for _ in range(3)]), "lengths": torch.tensor([8, 0, 3]),
        "resets": torch.rand(3, 9) < 0.3, "reverse": True, "return_final_state": not bare,
    }  # fmt: skip
    agrees(slstm, t, options)
