"""ssd, its time-aware and tree forms, and its step: against the definition, and the laws of the recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import LIMIT, agree, equal_to_definition, golden, results, strided

import zoo_kernels
from zoo_kernels import (
    ancestor_windows,
    causal_conv1d_tree,
    ssd,
    ssd_replay,
    ssd_step,
    ssd_tree,
    tree_mask,
)
from zoo_kernels.ops.ssd import chunked, core, export, native, reference

BACKENDS = ["auto", "export"]


def problem(batch=2, length=70, heads=4, headdim=6, groups=2, state=5, wide_D=False):
    r = torch.randn
    return {
        "x": r(batch, length, heads, headdim), "dt": r(batch, length, heads), "A": -torch.rand(heads) - 0.1,
        "B": r(batch, length, groups, state), "C": r(batch, length, groups, state),
        "D": r(heads, headdim) if wide_D else r(heads), "z": r(batch, length, heads, headdim), "dt_bias": r(heads),
    }  # fmt: skip


def full(**tensors):
    return ssd(**tensors, dt_softplus=True, return_final_state=True)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 70, 4, 6, 2, 5), (1, 0, 2, 3, 1, 4), (3, 1, 2, 4, 2, 3), (0, 5, 2, 3, 1, 4), (2, 64, 3, 16, 1, 16),
        (1, 129, 6, 64, 1, 33), (2, 63, 2, 1, 2, 1), (1, 66, 1, 17, 1, 130),
    ],
)  # fmt: skip
def test_equals_the_definition(shape, dtype):
    tensors = problem(*shape) | {"initial_state": torch.randn(shape[0], shape[2], shape[3], shape[5])}
    equal_to_definition(full, tensors, {}, dtype, states=("initial_state",))


@settings(max_examples=40)
@given(
    length=st.sampled_from([1, 2, 63, 65, 130]), walk=st.sampled_from(["plain", "reverse", "path", "paths"]),
    lengths=st.booleans(), resets=st.booleans(), state=st.booleans(), wide=st.booleans(), limit=st.booleans(),
    backend=st.sampled_from(BACKENDS), seed=st.integers(0, 99),
)  # fmt: skip
def test_walks_equal_the_definition(length, walk, lengths, resets, state, wide, limit, backend, seed):
    torch.manual_seed(seed)
    tensors = problem(2, length, 4, 6, 2, 5, wide)
    options = {"dt_softplus": True, "return_final_state": True, "reverse": walk == "reverse"}
    steps = max(length - 3, 1)
    if walk == "path":
        options["path"] = torch.randperm(length)[:steps]
    if walk == "paths":
        options["path"] = torch.stack([torch.randperm(length)[:steps] for _ in range(2)])
        options["reverse"] = True
    if lengths:
        options["lengths"] = torch.randint(0, (steps if "path" in options else length) + 1, (2,))
    if resets:
        options["resets"] = torch.rand(2, length) < 0.1
    if limit:
        options["dt_limit"] = (0.3, 1.1)
    if state:
        tensors["initial_state"] = torch.randn(2, 4, 6, 5)
    equal_to_definition(ssd, tensors, options, torch.float64, states=("initial_state",), backend=backend)


def test_strides_do_not_matter():
    tensors = problem()
    plain, _ = full(**tensors)
    other, _ = full(**{k: strided(v) if v.dim() >= 3 else v for k, v in tensors.items()})
    agree(other, plain, 1e-6)  # torch's own softplus of dt rounds differently on strided tensors


def test_chunked_equals_whole_step_by_step_and_in_torch():
    tensors = {k: v.double() for k, v in problem(2, 100).items()}
    whole, last = full(**tensors)
    cut = {k: v for k, v in tensors.items() if v.dim() < 3}
    parts, state = [], None
    for a, b in ((0, 37), (37, 38), (38, 100)):
        y, state = full(**cut, **{k: v[:, a:b] for k, v in tensors.items() if v.dim() >= 3}, initial_state=state)
        parts.append(y)
    agree(torch.cat(parts, 1), whole, 1e-12)
    agree(state, last, 1e-12)
    state = torch.zeros_like(last)
    steps = [
        ssd_step(**cut, **{k: v[:, t] for k, v in tensors.items() if v.dim() >= 3}, state=state, dt_softplus=True)
        for t in range(100)
    ]
    agree(torch.stack(steps, 1), whole, 1e-12)
    agree(state, last, 1e-12)


def test_reverse_is_flip_and_path_is_permutation():
    tensors = {k: v.double() for k, v in problem().items()}
    flip = {k: v.flip(1) if v.dim() >= 3 else v for k, v in tensors.items()}
    y, last = ssd(**tensors, dt_softplus=True, reverse=True, return_final_state=True)
    expected, state = full(**flip)
    agree(y, expected.flip(1), 1e-12)
    agree(last, state, 1e-12)
    order = torch.randperm(70)
    y, _ = ssd(**tensors, dt_softplus=True, path=order)
    walked, _ = full(**{k: v[:, order] if v.dim() >= 3 else v for k, v in tensors.items()})
    agree(y[:, order], walked, 1e-12)


def test_resets_and_segments_restart():
    tensors = {k: v.double() for k, v in problem(1, 90).items()}
    index = torch.tensor([0] * 30 + [1] * 5 + [7] * 55)[None]
    resets = torch.zeros(1, 90, dtype=torch.bool)
    resets[0, [30, 35]] = True
    y, _ = ssd(**tensors, dt_softplus=True, seq_idx=index)
    agree(ssd(**tensors, dt_softplus=True, resets=resets)[0], y, 0)
    for a, b in ((0, 30), (30, 35), (35, 90)):
        part, _ = full(**{k: v[:, a:b] if v.dim() >= 3 else v for k, v in tensors.items()})
        agree(y[:, a:b], part, 1e-12)
    back, _ = ssd(**tensors, dt_softplus=True, seq_idx=index, reverse=True)
    part, _ = ssd(**{k: v[:, 30:35] if v.dim() >= 3 else v for k, v in tensors.items()}, dt_softplus=True, reverse=True)
    agree(back[:, 30:35], part, 1e-12)


def test_several_paths_add_up():
    K, batch, length, heads = 3, 2, 40, 2
    x, z = torch.randn(batch, length, heads, 4).double(), torch.randn(batch, length, heads, 4).double()
    dt, A, D = (
        torch.randn(batch, length, K, heads).double(),
        -torch.rand(K, heads).double(),
        torch.randn(K, heads, 4).double(),
    )
    B, C = torch.randn(2, batch, length, K, 1, 5).double()
    path = torch.stack([torch.randperm(length) for _ in range(K)])
    flags = [False, True, False]
    y, state = ssd(x, dt, A, B, C, D, z, dt_softplus=True, path=path, reverse=flags, return_final_state=True)
    parts = [
        ssd(x, dt[:, :, k], A[k], B[:, :, k], C[:, :, k], D[k], dt_softplus=True, path=path[k], reverse=flags[k],
            return_final_state=True)
        for k in range(K)
    ]  # fmt: skip
    agree(y, sum(p[0] for p in parts) * F.silu(z), 1e-12)
    agree(state, torch.stack([p[1] for p in parts], 1), 1e-12)


def test_time_aware_form_scales_dt_before_bias_and_softplus():
    tensors = problem()
    scale = torch.randn_like(tensors["dt"])
    y, _ = ssd(**tensors, dt_softplus=True, dt_scale=scale)
    agree(y, ssd(**(tensors | {"dt": tensors["dt"] * scale}), dt_softplus=True)[0], 1e-6)


def test_gradcheck():
    tensors = {k: v.double().requires_grad_() for k, v in problem(1, 5, 2, 3, 1, 2).items()}
    names = list(tensors)
    options = {"dt_softplus": True, "resets": torch.tensor([[False, False, False, True, False]])}
    assert torch.autograd.gradcheck(
        lambda *a: ssd(**dict(zip(names, a, strict=True)), **options)[0], [*tensors.values()]
    )


@pytest.mark.parametrize("module", [chunked, export])
def test_the_torch_forms_equal_the_definition(module):
    for args in core._cases("cpu", torch.float64):
        args = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        for found, exact in zip(module.forward(*args), reference.forward(*args), strict=True):
            agree(found, exact, 1e-12)
        if module is chunked:
            dy, ds = (torch.randn_like(t) for t in reference.forward(*args))
            for g, n in zip(
                chunked.backward((dy, ds), args, (), [True] * 7),
                native.backward((dy, ds), args, (), [True] * 7),
                strict=True,
            ):
                assert (g is None) == (n is None)
                if g is not None:
                    agree(g, n, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [50.0, 5000.0])
def test_strong_decay_stays_finite(strength, backend):
    tensors = problem(1, 130) | {"dt": torch.rand(1, 130, 4) * strength}
    with torch.no_grad():
        y, last = ssd(**tensors, return_final_state=True)
    assert y.isfinite().all()
    assert last.isfinite().all()
    tensors["D"] = tensors["z"] = tensors["dt_bias"] = None
    outputs, grads = results(ssd, tensors, {"return_final_state": True}, backend, torch.float32)
    assert all(g.isfinite().all() for g in grads)
    exact = results(ssd, tensors, {"return_final_state": True}, "reference", torch.float64)
    for found, true in zip([*outputs, *grads], [*exact[0], *exact[1]], strict=True):
        agree(found, true, 2e-5)


def test_zero_dt_keeps_the_state():
    tensors = problem(1, 70) | {"dt": torch.zeros(1, 70, 4), "dt_bias": None, "D": None, "z": None}
    state = torch.randn(1, 4, 6, 5)
    _, last = ssd(**tensors, initial_state=state, return_final_state=True)
    assert torch.equal(last, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel_and_later_steps(value, native):
    tensors = problem(1, 150) | {"z": None}
    clean, _ = ssd(**tensors, dt_softplus=True)
    x = tensors["x"].clone()
    x[0, 70, 1, 2] = value
    resets = torch.zeros(1, 150, dtype=torch.bool)
    resets[0, 90] = True
    expected, _ = ssd(**tensors, dt_softplus=True, resets=resets)
    y, _ = ssd(**(tensors | {"x": x}), dt_softplus=True, resets=resets)
    good = torch.ones_like(y, dtype=torch.bool)
    good[0, 70:90, 1, 2] = False
    assert torch.equal(y[good], expected[good])
    assert torch.equal(y[:, :70], clean[:, :70])
    assert not y[0, 70:90, 1, 2].isfinite().any()


def test_equal_bits_for_any_number_of_threads(native):
    tensors = problem(1, 200, 16, 20, 1, 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, grads = results(full, tensors, {}, "native", torch.float32)
            found.append([*outputs, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_long_sequence():
    length = 65_537
    x, dt = torch.randn(1, length, 2, 4), torch.rand(1, length, 2) * 0.1
    B, C = torch.randn(2, 1, length, 1, 3)
    A = torch.tensor([-1.0, -0.01])
    y, _ = ssd(x, dt, A, B, C)
    at = 65_000
    _, state = ssd(
        *(t[:, :at].double() for t in (x, dt)),
        A.double(),
        B[:, :at].double(),
        C[:, :at].double(),
        return_final_state=True,
    )
    with zoo_kernels.backend("reference"):
        tail, _ = ssd(
            *(t[:, at:].double() for t in (x, dt)),
            A.double(),
            B[:, at:].double(),
            C[:, at:].double(),
            initial_state=state,
        )
    agree(y[:, at:], tail, 2e-5)


def test_opcheck_and_compile():
    for args in core._cases("cpu", torch.float32):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(core.scan.op, (*args, False, ""))
    tensors = problem()
    compiled = torch.compile(lambda t: ssd(**t, dt_softplus=True)[0], fullgraph=True, backend="aot_eager")
    leaf = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    y = compiled(leaf)
    agree(y, full(**tensors)[0], 1e-6)
    y.sum().backward()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in leaf.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dt", torch.zeros(2, 70, 3), r"dt has shape \(2, 70, 3\)"), ("A", torch.zeros(3), "A has shape"),
        ("B", torch.zeros(2, 70, 3, 5), "C has shape|3 groups"), ("x", torch.zeros(2, 70, 4), "x has shape"),
        ("x", torch.zeros(2, 70, 4, 6, dtype=torch.int32), "x is int32"), ("D", torch.zeros(5), "D has shape"),
        ("path", torch.tensor([0, 99]), "rows 0 to 99"), ("path", torch.tensor([0.5]), "path is float32"),
        ("lengths", torch.tensor([3, 71]), "lengths has values"), ("dt_limit", (2.0, 1.0), "dt_limit"),
        ("seq_idx", torch.zeros(2, 3, dtype=torch.int32), "seq_idx has shape"),
        ("initial_state", torch.zeros(2, 4, 5, 6), "initial_state"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(name, value, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(problem() | {name: value}))


# -- trees -----------------------------------------------------------------------------------------------------------


def test_golden_tree():
    g = golden("stree__tree9_g1")
    o = {k.removeprefix("in/op."): v for k, v in g.items() if k.startswith("in/op.")}
    args = (o["x"], o["dt"], o["A"], o["B"], o["C"], o["D"], None, o["dt_bias"])
    assert torch.equal(tree_mask(o["parents"]), o["mask"][0].bool())
    y, states = ssd_tree(
        *args, mask=o["mask"], dt_softplus=True, initial_state=o["initial_states"], return_node_states=True
    )
    agree(y, g["out/op.y"], 1e-4)
    agree(states, g["out/op.node_states"], 1e-4)
    for node in range(9):
        state = ssd_replay(
            o["x"], o["dt"], o["A"], o["B"], o["dt_bias"], accepted=o["mask"][:, node],
            initial_state=o["initial_states"], dt_softplus=True,
        )  # fmt: skip
        agree(state, g["out/op.node_states"][:, node], 1e-4)
    assert torch.equal(ancestor_windows(g["in/conv.mask"], 4), g["out/conv.ancestor_index"])
    y = causal_conv1d_tree(
        g["in/conv.x"].transpose(1, 2), g["in/conv.weight"], g["in/conv.bias"], mask=g["in/conv.mask"],
        state=g["in/conv.state"].transpose(1, 2), activation="silu",
    )  # fmt: skip
    agree(y.transpose(1, 2), g["out/conv.y"], 1e-4)


def test_a_chain_is_the_ordinary_scan_and_branches_do_not_meet():
    tensors = {k: v.double() for k, v in problem(2, 9).items()}
    state = torch.randn(2, 4, 6, 5).double()
    chain = tree_mask(torch.arange(9) - 1)
    y, _ = ssd_tree(**tensors, mask=chain, dt_softplus=True, initial_state=state)
    agree(y, ssd(**tensors, dt_softplus=True, initial_state=state)[0], 1e-12)
    parents = torch.tensor([-1, 0, 0, 1, 2, 3, 3, 4, 0])
    y, _ = ssd_tree(**tensors, mask=tree_mask(parents), dt_softplus=True, initial_state=state)
    for leaf in (5, 6, 7, 8):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, int(parents[path[0]]))
        along, _ = ssd(**tensors, dt_softplus=True, path=torch.tensor(path), initial_state=state)
        agree(y[:, path], along[:, path], 1e-12)


def test_a_tree_out_of_order_is_refused():
    with pytest.raises(ValueError, match="earlier node"):
        tree_mask(torch.tensor([-1, 2, 0]))
