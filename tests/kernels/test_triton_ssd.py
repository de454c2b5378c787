"""The Triton scan with one decay per head in the interpreter: ssd, linear attention, mLSTM and Mamba-3 on it."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, kernel_test, kinds, poisoned  # noqa: F401

from zoo_kernels import _gpu, linear_attention, mlstm, ssd
from zoo_kernels.ops.ssd.core import scan

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def problem(batch, length, heads, headdim, groups, state):
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "v": r(batch, length, heads, headdim), "decay": -torch.rand(batch, length, heads, generator=g),
        "weight": torch.rand(batch, length, heads, generator=g), "k": r(batch, length, groups, state),
        "q": r(batch, length, groups, state), "D": r(heads), "state": r(batch, heads, headdim, state),
    }  # fmt: skip


def core(v, k, q, decay=None, weight=None, D=None, state=None, resets=None, order=None, strict=False):
    return scan(v, decay, weight, k, q, D, state, resets, order, strict)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    kinds([(1, 0, 2, 4, 1, 4), (1, 1, 2, 4, 2, 3), (2, 7, 4, 5, 2, 16), (1, 65, 2, 70, 1, 66), (1, 130, 1, 3, 1, 4)]),
)
def test_core(shape, dtype):
    keep = ("decay", "weight", "D", "state")
    agrees(core, problem(*shape), {}, dtype, TOLERANCE[dtype], keep)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hopper", [False, True])
def test_core_in_the_tiles_of_either_device(dtype, hopper, monkeypatch):
    monkeypatch.setattr(_gpu, "warpgroups", lambda tensor: hopper)
    keep = ("decay", "weight", "D", "state")
    agrees(core, problem(1, 70, 2, 40, 1, 36), {}, dtype, TOLERANCE[dtype], keep)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("strict", [False, True])
def test_core_along_an_order_with_resets(strict):
    t = problem(2, 75, 3, 4, 1, 4)
    t["D"] = torch.randn(3, 4)
    order = torch.stack([torch.randperm(75)[:71] for _ in range(2)])
    order[1, 66:] = -1
    agrees(core, t, {"order": order, "resets": torch.rand(2, 75) < 0.05, "strict": strict})


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_core_bare():
    t = problem(1, 66, 2, 4, 1, 4)
    agrees(core, {name: t[name] for name in ("v", "k", "q")}, {"order": torch.arange(66)[None].flip(1)})


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_strong_decays_keep_their_accuracy():
    """Sums of decays reach thousands inside a chunk; the last steps do not decay."""
    t = problem(1, 64, 2, 4, 1, 4)
    t["decay"] = torch.cat([torch.full((1, 32, 2), -300.0), -1e-3 * torch.rand(1, 32, 2)], dim=1)
    agrees(core, t, {}, tolerance=1e-5)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("paths", [1, 2])
def test_ssd(paths):
    g = torch.Generator().manual_seed(0)
    many = () if paths == 1 else (paths,)
    t = {
        "x": torch.randn(2, 9, 2, 4, generator=g), "dt": torch.randn(2, 9, *many, 2, generator=g),
        "A": -torch.rand(*many, 2, generator=g), "B": torch.randn(2, 9, *many, 1, 3, generator=g),
        "C": torch.randn(2, 9, *many, 1, 3, generator=g), "D": torch.randn(*many, 2, generator=g),
        "z": torch.randn(2, 9, 2, 4, generator=g), "dt_bias": torch.randn(*many, 2, generator=g),
        "dt_scale": torch.rand(2, 9, *many, 2, generator=g),
    }  # fmt: skip
    agrees(ssd, t, {"dt_softplus": True, "reverse": True, "lengths": torch.tensor([9, 4]), "dt_limit": (0.01, 5.0)})


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_linear_attention_and_mlstm():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, 9, 2, 4, generator=g) for _ in range(2))
    v = torch.randn(2, 9, 2, 5, generator=g)
    agrees(linear_attention, {"q": q, "k": k, "v": v}, {"normalize": True})
    i, f = (torch.randn(2, 9, 2, generator=g) for _ in range(2))

    def outputs(**arguments):
        y, state = mlstm(**arguments, return_final_state=True)
        return (y, *state)

    agrees(outputs, {"q": q, "k": k, "v": v, "i": 5 * i, "f": f}, {"reverse": True}, tolerance=5e-5)
