"""Mamba-3's scan: the chunked form against the recurrence, and the originals' numbers through a block around it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import LIMIT, agree, golden, metadata

from zoo_kernels import mamba3_scan, mamba3_step
from zoo_kernels.ops._walk import walk_order
from zoo_kernels.ops.mamba3_scan import mamba3_reference


def block(name):
    """The mixer of the sheet around the scan: output, final state, its parameters, and what the scan was given."""
    g, config = golden(name), json.loads(metadata(name)["config"])
    par = {k.removeprefix("state/"): v.clone().requires_grad_() for k, v in g.items() if k.startswith("state/")}
    u, E, P, N = g["in/u"], 2 * config["d_model"], config["headdim"], config["d_state"]
    mimo, G, H = config.get("is_mimo", False), config.get("ngroups", 1), E // P
    R = config["mimo_rank"] if mimo else 1
    S = int(N * config["rope_fraction"]) // 2
    sizes = [E, E, N * G * R, N * G * R, H, H, H, S]
    z, x, B, C, dt, A, trap, angles = (u @ par["in_proj.weight"].t()).split(sizes, -1)
    A = -torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0))).clamp(min=1e-4)
    x, z = x.unflatten(-1, (H, P)), z.unflatten(-1, (H, P))
    B, C = (
        F.rms_norm(t.unflatten(-1, (R, G, N)), (N,), par[w], 1e-5)
        for t, w in ((B, "B_norm.weight"), (C, "C_norm.weight"))
    )
    options = {"B_bias": par["B_bias"], "C_bias": par["C_bias"]}
    if mimo:
        options |= {k: par[k] for k in ("mimo_x", "mimo_z", "mimo_o")}
    else:
        B, C = B[:, :, 0], C[:, :, 0]
    norm = config.get("is_outproj_norm", False)
    tensors = [x, F.softplus(dt + par["dt_bias"]), A, B, C, trap, angles, par["D"]]
    y, state = mamba3_scan(*tensors, None if norm else z, **options, return_final_state=True)
    if norm:
        y = F.rms_norm(y, (P,), None, 1e-5) * par["norm.weight"].view(H, P) * F.silu(z)
    return g, y.flatten(2) @ par["out_proj.weight"].t(), state, par, tensors, z, options


@pytest.mark.parametrize("name", ["mamba3__siso", "mamba3__mimo", "mamba3__siso_outnorm_groups"])
def test_golden_blocks(name):
    g, y, _state, par, tensors, z, options = block(name)
    agree(y, g["out/y"], 1e-4)
    wanted = [k.removeprefix("grad/") for k in g if k.startswith("grad/")]
    grads = torch.autograd.grad(y.pow(2).mean(), [par[k] for k in wanted], retain_graph=True)
    for key, grad in zip(wanted, grads, strict=True):
        agree(grad, g["grad/" + key], 1e-4)
    if "out/step_y" not in g:
        return
    for found, kind in zip(_state, ("angle", "ssm", "k", "v"), strict=True):
        agree(found, g[f"out/{kind}_state"], 1e-4)
    state = tuple(torch.zeros_like(s) for s in _state)
    steps = [
        mamba3_step(*(t[:, i] for t in tensors[:7]), tensors[7], z[:, i], **options, state=state)
        for i in range(y.shape[1])
    ]
    agree(torch.stack(steps, 1).flatten(2) @ par["out_proj.weight"].t(), g["out/step_y"], 1e-4)


def problem(ranks=0, batch=2, length=20, heads=4, headdim=3, groups=2, state=8, angles=2, dtype=torch.float64):
    r = torch.randn
    wide = (batch, length, ranks, groups, state) if ranks else (batch, length, groups, state)
    tensors = [r(batch, length, heads, headdim), torch.rand(batch, length, heads), -torch.rand(batch, length, heads)]
    tensors += [r(wide), r(wide), r(batch, length, heads), r(batch, length, angles), r(heads)]
    R = ranks or 1
    options = {"B_bias": r(heads, R, state), "C_bias": r(heads, R, state)}
    if ranks:
        options["mimo_x"] = r(heads, R, headdim)
    return [t.to(dtype) for t in tensors], {k: v.to(dtype) for k, v in options.items()}


@settings(max_examples=40)
@given(
    ranks=st.sampled_from([0, 1, 3]), length=st.sampled_from([0, 1, 2, 20, 65]), halves=st.booleans(),
    walk=st.sampled_from(["plain", "reverse", "path"]), lengths=st.booleans(), resets=st.booleans(),
    given_state=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_chunked_equals_recurrent(ranks, length, halves, walk, lengths, resets, given_state, seed):
    torch.manual_seed(seed)
    tensors, options = problem(ranks, length=length)
    R = ranks or 1
    state = None
    if given_state:
        sizes = ((2, 4, 2), (2, 4, 3, 8), (2, R, 4, 8), (2, 4, 3))
        state = tuple(torch.randn(s, dtype=torch.float64) for s in sizes)
    path = torch.randperm(length)[: max(length - 3, 0)] if walk == "path" else None
    steps = length if path is None else len(path)
    count = torch.randint(0, steps + 1, (2,)) if lengths else None
    drop = torch.rand(2, length) < 0.15 if resets else None
    leaves = [t.requires_grad_() for t in [*tensors, *options.values(), *(state or ())]]
    y, end = mamba3_scan(
        *tensors, **options, rotate_halves=halves, path=path, reverse=walk == "reverse", lengths=count, resets=drop,
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    order = walk_order(path, walk == "reverse", count, batch=2, length=length, device=y.device)
    B, C = (t if ranks else t[:, :, None] for t in tensors[3:5])
    exact, last = mamba3_reference(
        *tensors[:3],
        B,
        C,
        *tensors[5:],
        options["B_bias"],
        options["C_bias"],
        options.get("mimo_x"),
        halves,
        state,
        drop,
        order,
    )
    exact = exact if ranks else exact[:, :, 0]
    for a, b in zip([y, *end], [exact, *last], strict=True):
        agree(a, b, 1e-10)
    if not steps:
        return  # nothing is walked: the state is what was given
    weights = [torch.randn_like(t) for t in (exact, *last)]
    found = torch.autograd.grad([y, *end], leaves, weights, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad([exact, *last], leaves, weights, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, true, strict=True):
        agree(a, b, 1e-9)


@pytest.mark.parametrize("ranks", [0, 3])
def test_step_and_cut_equal_whole(ranks):
    tensors, options = problem(ranks)
    D = tensors.pop()
    whole, last = mamba3_scan(*tensors, D, **options, return_final_state=True)
    a, mid = mamba3_scan(*(t[:, :7] for t in tensors), D, **options, return_final_state=True)
    b, end = mamba3_scan(*(t[:, 7:] for t in tensors), D, **options, initial_state=mid, return_final_state=True)
    agree(torch.cat([a, b], 1), whole, 1e-11)
    state = tuple(torch.zeros_like(t) for t in last)
    steps = [mamba3_step(*(t[:, i] for t in tensors), D, **options, state=state) for i in range(20)]
    agree(torch.stack(steps, 1), whole, 1e-11)
    for x, y, z in zip(last, end, state, strict=True):
        agree(y, x, 1e-11)
        agree(z, x, 1e-11)


@pytest.mark.parametrize("dtype", [d for d in LIMIT if d != torch.float64])
def test_dtypes(dtype):
    tensors, options = problem(3, length=70, dtype=dtype)
    wide = {k: v.double() for k, v in options.items()}
    exact, _ = mamba3_scan(*(t.double() for t in tensors), **wide)
    y, _ = mamba3_scan(*tensors, **options)
    assert y.dtype == dtype
    agree(y, exact, LIMIT[dtype])


def test_gradcheck_and_compile():
    tensors, _ = problem(0, 1, 4, 2, 2, 1, 4, 1)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: mamba3_scan(*a)[0], leaves)
    compiled = torch.compile(lambda *a: mamba3_scan(*a)[0], fullgraph=True, backend="aot_eager")
    agree(compiled(*leaves), mamba3_scan(*leaves)[0], 1e-12)


def test_errors_say_what_is_wrong():
    tensors, options = problem(3)
    with pytest.raises(ValueError, match="mimo_o"):
        mamba3_scan(*tensors, torch.zeros(2, 20, 4, 3).double(), **options)
    with pytest.raises(ValueError, match="angles"):
        mamba3_scan(*tensors[:6], torch.zeros(2, 20, 5).double())
    with pytest.raises(ValueError, match="trap has shape"):
        mamba3_scan(*tensors[:5], torch.zeros(2, 20, 3).double(), tensors[6])
