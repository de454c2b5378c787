"""The Triton selective scan in the interpreter: against the float64 reference, over paths, lengths, dtypes,
segments."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import agrees, difference, kernel_test, poisoned  # noqa: F401

import zoo_kernels
from zoo_kernels import selective_scan

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(batch, length, channels, state, K=1, groups=1, shared=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    single = K == 1
    paths = () if single else (K,)
    B = (batch, length, *paths, *((groups,) if groups > 1 else ()), state)
    return {
        "u": r(batch, length, *(() if shared or single else (K,)), channels), "dt": r(batch, length, *paths, channels),
        "A": -2 * torch.rand(*paths, channels, state, generator=g), "B": r(*B), "C": r(*B), "D": r(*paths, channels),
        "z": r(batch, length, channels), "dt_bias": r(*paths, channels), "initial_state": r(batch, *paths, channels,
        state),
    }  # fmt: skip


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 0, 4, 2), torch.float32),
        ((2, 1, 5, 3), torch.float32),
        ((1, 7, 33, 16), torch.float32),
        ((1, 65, 3, 4), torch.float32),
        ((2, 7, 6, 4), torch.bfloat16),
        ((2, 7, 6, 4), torch.float16),
        ((1, 5, 8, 1, 1, 4), torch.float32),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_one_path(shape, dtype, reverse):
    t = problem(*shape)
    options = {"dt_softplus": True, "reverse": reverse, "return_final_state": True}
    agrees(selective_scan, t, options, dtype, TOLERANCE[dtype])


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_paths(shared, dtype):
    t = problem(2, 6, 4, 3, K=4, groups=2, shared=shared)
    t.pop("initial_state")
    path = torch.stack([torch.randperm(6) for _ in range(4)])
    options = {"dt_softplus": True, "path": path, "reverse": [False, True, False, True]}
    agrees(selective_scan, t, options, dtype, TOLERANCE[dtype])


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_partial_paths_lengths_and_resets():
    t = problem(3, 9, 4, 2, K=2)
    path = torch.stack([torch.stack([torch.randperm(9)[:7] for _ in range(2)]) for _ in range(3)])
    options = {
        "path": path, "lengths": torch.tensor([7, 0, 4]), "resets": torch.rand(3, 9) < 0.3, "reverse": [True, False],
        "return_final_state": True, "dt_softplus": True,
    }  # fmt: skip
    agrees(selective_scan, t, options)


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("K", [1, 2])
def test_dt_as_a_product(K):
    t = problem(2, 7, 6, 3, K=K)
    t["dt"], t["dt_proj"] = t["dt"][..., :2], t["dt_bias"][..., None] * torch.tensor([0.5, -0.3])
    agrees(selective_scan, t, {"dt_softplus": True})


@kernel_test
@pytest.mark.usefixtures("poisoned")
def test_bare_arguments():
    t = {name: v for name, v in problem(1, 5, 4, 2).items() if name in ("u", "dt", "A", "B", "C")}
    t["dt"] = t["dt"].abs()
    agrees(selective_scan, t, {})


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, torch.tensor([65, 30])])
def test_segments_of_the_length_agree_with_one_walk(lengths):
    """Cut into two segments or not, the numbers agree."""
    from zoo_kernels.ops.selective_scan import gpu

    t = problem(2, 70, 4, 2)
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[0, 66] = resets[1, 20] = True
    args = [
        t["u"][:, :, None], t["dt"][:, :, None], t["A"][None], t["B"][:, :, None, None], t["C"][:, :, None, None],
        t["D"][None], t["z"], t["dt_bias"][None], True, None, [True], t["initial_state"][:, None], True, resets,
        lengths, None,
    ]  # fmt: skip
    results = []
    for split in (1, 2):
        y, final, borders = gpu.forward(*args, save=True, split=split)
        grads = (torch.ones_like(y).cumsum(1).sin(), final.sin())
        *found, of_dt_proj = gpu.backward(grads, args, (borders,), [True] * 10, split=split)
        assert of_dt_proj is None  # there is none
        results.append([y, final, *found])
    for one, many in zip(*results, strict=True):
        assert difference(many, one) < 2e-6


@kernel_test
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [1, 2])
def test_every_shape_of_the_tile_agrees(sets):
    """Longer than an iteration of either walk, and channels that fill no block."""
    from zoo_kernels.ops.selective_scan import gpu

    t = problem(1, 21, 19, 3)
    args = [
        t["u"][:, :, None], t["dt"][:, :, None], t["A"][None], t["B"][:, :, None, None], t["C"][:, :, None, None],
        t["D"][None], t["z"], t["dt_bias"][None], True, None, [False], None, True, None, None, None,
    ]  # fmt: skip
    results = []
    for config in (gpu.FORWARD[0], gpu.Config(16, 4, 1)):
        y, final, borders = gpu.forward(*args, save=True, config=config)
        config = gpu.Config(16, 4, 2, sets) if results else gpu.Config(32, 2, 1)
        found = gpu.backward((y.sin(), final.cos()), args, (borders,), [True] * 10, config=config)
        results.append([y, final, *found[:8]])
    for one, other in zip(*results, strict=True):
        assert difference(other, one) < 2e-6


@kernel_test
def test_strided_inputs_are_read_in_place_and_left_alone():
    t = problem(2, 5, 4, 2)
    wide = torch.randn(2, 5, 3 * 4)
    t["u"], t["z"], t["dt"] = wide.split(4, dim=2)
    before = wide.clone()
    with zoo_kernels.backend("triton"):
        y, _ = selective_scan(**t, dt_softplus=True)
    with zoo_kernels.backend("reference"):
        want, _ = selective_scan(**{k: v.double() for k, v in t.items()}, dt_softplus=True)
    assert torch.equal(wide, before)
    assert difference(y, want) < 1e-6


@kernel_test
def test_offsets_beyond_two_to_the_31():
    """Rows 2^30 elements apart: the third is beyond what 32 bits reach. Memory that is not touched costs nothing."""
    apart = 1 << 30
    t = problem(1, 3, 4, 2)
    far = torch.empty(2 * apart + 8, dtype=torch.float16).as_strided((1, 3, 4), (1, apart, 1))
    t = {name: v.half() if name in ("u", "dt", "z") else v for name, v in t.items()}
    want_args = {name: v.double() for name, v in t.items()}
    far.copy_(t["u"])
    with zoo_kernels.backend("triton"):
        y, _ = selective_scan(**{**t, "u": far}, dt_softplus=True)
    with zoo_kernels.backend("reference"):
        want, _ = selective_scan(**want_args, dt_softplus=True)
    assert difference(y, want) < 2e-3


@kernel_test
def test_nan_stays_in_its_channel():
    t = problem(1, 6, 4, 2)
    t["u"][0, 2, 1] = float("nan")
    with zoo_kernels.backend("triton"):
        y, _ = selective_scan(**t, dt_softplus=True)
    assert y[0, 2:, 1].isnan().all()
    y[0, 2:, 1] = 0
    assert y.isfinite().all()


@kernel_test
def test_repeats_bit_by_bit():
    t = {name: v.requires_grad_() for name, v in problem(2, 7, 40, 2).items()}
    runs = []
    for _ in range(2):
        with zoo_kernels.backend("triton"):
            y, _ = selective_scan(**t, dt_softplus=True)
            runs.append(torch.autograd.grad(y.square().sum(), [v for k, v in t.items() if k != "initial_state"]))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@kernel_test
def test_more_programs_than_an_axis_of_the_grid(monkeypatch):
    from zoo_kernels import _gpu

    t = problem(7, 2, 3, 2)
    with zoo_kernels.backend("triton"):
        want, _ = selective_scan(**t, dt_softplus=True)
        monkeypatch.setattr(_gpu, "GRID_FOLD", 3)
        got, _ = selective_scan(**t, dt_softplus=True)
    assert torch.equal(got, want)
