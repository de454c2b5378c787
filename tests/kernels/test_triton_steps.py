"""The Triton decoding steps and the linear map, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import difference, kernel_test

import zoo_kernels
from zoo_kernels import linear, linear_attention_step, mamba3_step, mlstm_step, selective_scan_step, ssd_step

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def r(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(function, tensors, state, options, dtype):
    """Outputs and updated states of three steps: triton in ``dtype`` against the reference in float64.

    ``state``: one tensor, several, or {argument: tensor}.
    """
    low = {name: t.to(dtype) for name, t in tensors.items()}
    wide = {name: t.double() for name, t in low.items()}
    kept = state if isinstance(state, dict) else {"state": state}

    def copied(wider):
        copies = {
            n: [p.double() if wider else p.clone() for p in (t if isinstance(t, tuple) else (t,))]
            for n, t in kept.items()
        }
        return {n: tuple(parts) if isinstance(kept[n], tuple) else parts[0] for n, parts in copies.items()}

    states = {"reference": copied(True), "triton": copied(False)}
    for _ in range(3):
        results = []
        for name, arguments in (("reference", wide), ("triton", low)):
            with zoo_kernels.backend(name):
                results.append(function(**arguments, **states[name], **options))
        assert difference(results[1], results[0]) < TOLERANCE[dtype]
        assert results[1].dtype == dtype
        for name in kept:
            pairs = [t if isinstance(t, tuple) else (t,) for t in (states["triton"][name], states["reference"][name])]
            assert all(difference(a, b) < TOLERANCE[dtype] for a, b in zip(*pairs, strict=True))


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan_step(dtype, groups):
    t = {
        "u": r(2, 70), "dt": r(2, 70, seed=1), "A": -r(70, 3).abs(), "B": r(2, groups, 3), "C": r(2, groups, 3, seed=2),
        "D": r(70), "z": r(2, 70, seed=3), "dt_bias": r(70, seed=4),
    }  # fmt: skip
    compare(selective_scan_step, t, r(2, 70, 3), {"dt_softplus": True}, dtype)


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("full", [False, True])
def test_ssd_step(dtype, full):
    t = {
        "x": r(2, 4, 9), "dt": r(2, 4).abs(), "A": -r(4).abs(), "B": r(2, 2, 5), "C": r(2, 2, 5, seed=1),
    }  # fmt: skip
    if full:
        t |= {"D": r(4, 9), "z": r(2, 4, 9, seed=2), "dt_bias": r(4, seed=3), "dt_scale": r(2, 4, seed=4).abs()}
    compare(ssd_step, t, r(2, 4, 9, 5), {"dt_softplus": full, "dt_limit": (0.1, 2.0)}, dtype)


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("decay", "normalize", "strict"),
    [("none", False, True), ("constant", True, False), ("head", False, False), ("channel", True, True)],
)
def test_linear_attention_step(dtype, decay, normalize, strict):
    t = {"q": r(2, 2, 5).abs(), "k": r(2, 2, 5, seed=1).abs(), "v": r(2, 4, 9)}
    if decay != "none":
        t["decay"] = -r(*{"constant": (4,), "head": (2, 4), "channel": (2, 4, 5)}[decay], seed=2).abs()
    state = {"state": r(2, 4, 9, 5)} | ({"normalizer": r(2, 4, 5).abs() + 1} if normalize else {})
    compare(linear_attention_step, t, state, {"scale": 0.5, "strict": strict, "eps": 0.1}, dtype)


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("ranks", [0, 2, 3])
def test_mamba3_step(dtype, halves, ranks):
    """Without ranks, with ranks summed, and (3) with ranks returned."""
    inner = (2, ranks, 2, 8) if ranks else (2, 2, 8)
    t = {
        "x": r(2, 4, 9), "dt": r(2, 4).abs(), "A": -r(2, 4, seed=1).abs(), "B": r(*inner), "C": r(*inner, seed=1),
        "trap": r(2, 4, seed=2), "angles": r(2, 3), "D": r(4), "B_bias": r(4, max(ranks, 1), 8),
    }  # fmt: skip
    if ranks != 3:
        t["z"] = r(2, 4, 9, seed=3)
    for name in {0: (), 2: ("mimo_x", "mimo_z", "mimo_o"), 3: ("mimo_x",)}[ranks]:
        t[name] = r(4, ranks, 9, seed=len(name))
    state = (r(2, 4, 3), r(2, 4, 9, 8), r(2, max(ranks, 1), 4, 8), r(2, 4, 9, seed=5))
    compare(mamba3_step, t, state, {"rotate_halves": halves}, dtype)


@kernel_test
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mlstm_step(dtype):
    t = {"q": r(2, 3, 5), "k": r(2, 3, 5, seed=1), "v": r(2, 3, 9), "i": 3 * r(2, 3), "f": 3 * r(2, 3, seed=1)}
    compare(mlstm_step, t, (r(2, 3, 9, 5), r(2, 3, 5, seed=2), r(2, 3, seed=2)), {}, dtype)


@kernel_test
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
