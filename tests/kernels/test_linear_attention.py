"""linear_attention: against the definition for every kind of decay, and the laws of the recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import LIMIT, agree, equal_to_definition, golden, results

import zoo_kernels
from zoo_kernels import _native, linear_attention, linear_attention_step
from zoo_kernels.ops.linear_attention import _cases, _gated

KINDS = ["none", "constant", "head", "channel"]


def problem(kind="head", batch=2, length=40, heads=4, headdim=6, groups=2, state=5):
    r = torch.randn
    decay = {
        "none": None, "constant": -torch.rand(heads), "head": -torch.rand(batch, length, heads),
        "channel": -torch.rand(batch, length, heads, state) * 3,
    }[kind]  # fmt: skip
    q, k = r(batch, length, groups, state), r(batch, length, groups, state)
    return {"q": q, "k": k, "v": r(batch, length, heads, headdim), "decay": decay}


def test_golden_ssd_minimal():
    g = golden("mamba2__ssd_minimal")
    y, state = linear_attention(g["in/C"], g["in/B"], g["in/X"], g["in/A"], return_final_state=True)
    agree(y, g["out/Y"], 1e-4)
    agree(state, g["out/final_state"], 1e-4)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), length=st.sampled_from([0, 1, 2, 15, 17, 65]), strict=st.booleans(),
    walk=st.sampled_from(["plain", "reverse", "path"]), lengths=st.booleans(), resets=st.booleans(),
    dtype=st.sampled_from(list(LIMIT)), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_definition(kind, length, strict, walk, lengths, resets, dtype, seed):
    torch.manual_seed(seed)
    tensors = problem(kind, 2, length)
    options = {"strict": strict, "scale": 0.5, "return_final_state": True, "reverse": walk == "reverse"}
    if walk == "path" and length:
        options["path"] = torch.randperm(length)[: max(length - 2, 1)]
    if lengths and walk != "path":
        options["lengths"] = torch.randint(0, length + 1, (2,))
    if resets:
        options["resets"] = torch.rand(2, length) < 0.1
    tensors["initial_state"] = torch.randn(2, 4, 6, 5)
    equal_to_definition(linear_attention, tensors, options, dtype, states=("initial_state",))


@pytest.mark.parametrize("kind", KINDS)
def test_is_masked_attention(kind):
    t = {k: None if v is None else v.double() for k, v in problem(kind).items()}
    q, k = (x.repeat_interleave(2, 2) for x in (t["q"], t["k"]))
    decay = t["decay"] if t["decay"] is not None else torch.zeros(4).double()
    if decay.dim() == 1:
        decay = decay.expand(2, 40, 4)
    c = (decay if decay.dim() == 4 else decay[..., None]).cumsum(1)
    below = torch.ones(40, 40, dtype=torch.bool).tril()[None, :, :, None, None]
    pairs = (c[:, :, None] - c[:, None]).masked_fill(~below, -torch.inf).exp()
    scores = (q[:, :, None] * k[:, None] * pairs).sum(-1)
    agree(linear_attention(**t)[0], torch.einsum("btsh,bshp->bthp", scores, t["v"]), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_step_by_step_and_cut_equal_whole(kind, strict, normalize):
    t = {k: None if v is None else v.double() for k, v in problem(kind).items()}
    t["q"], t["k"] = t["q"].abs(), t["k"].abs()
    options = {"strict": strict, "normalize": normalize, "scale": 0.3, "eps": 1e-6}
    whole, last = linear_attention(**t, **options, return_final_state=True)

    def cut(x, a, b):
        return x if x is None or x.dim() == 1 else x[:, a:b]

    state, parts = None, []
    for a, b in ((0, 17), (17, 40)):
        y, state = linear_attention(
            **{k: cut(v, a, b) for k, v in t.items()}, **options, initial_state=state, return_final_state=True
        )
        parts.append(y)
    agree(torch.cat(parts, 1), whole, 1e-12)
    S, n = last if normalize else (last, None)
    carried = torch.zeros_like(S)
    keys = torch.zeros_like(n) if normalize else None
    for i in range(40):
        y = linear_attention_step(
            *(t[x][:, i] for x in "qkv"), cut(t["decay"], i, i + 1) if kind in ("none",
            "constant") else t["decay"][:, i],
            state=carried, normalizer=keys, scale=0.3, strict=strict, eps=1e-6,
        )  # fmt: skip
        agree(y, whole[:, i], 1e-12)
    agree(carried, S, 1e-12)
    if normalize:
        agree(keys, n, 1e-12)


def test_strict_first_row_is_exactly_zero():
    t = problem("none")
    assert torch.equal(linear_attention(**t, strict=True)[0][:, 0], torch.zeros(2, 4, 6))


@pytest.mark.parametrize("strength", [30.0, 3000.0])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_strong_decay_stays_finite(kind, strength):
    t = problem(kind)
    t["decay"] = t["decay"] * strength
    exact = results(linear_attention, t, {}, "reference", torch.float64)
    found = results(linear_attention, t, {}, "auto", torch.float32)
    for f, e in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
        agree(f, e, 2e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "headdim", "state"), [(530, 70, 37), (40, 3, 130), (21, 16, 16)])
def test_channel_decay_over_several_blocks_and_chunks(length, headdim, state, dtype, strict):
    torch.manual_seed(length)
    t = problem("channel", 1, length, 2, headdim, 1, state)
    t["decay"] = t["decay"] * 0.2
    t["initial_state"] = torch.randn(1, 2, headdim, state)
    resets = torch.zeros(1, length, dtype=torch.bool)
    resets[:, [0, length // 3, length // 3 + 1]] = True
    options = {"strict": strict, "resets": resets, "reverse": True, "return_final_state": True}
    equal_to_definition(linear_attention, t, options, dtype, states=("initial_state",))


def test_channel_decay_has_the_same_bits_for_any_number_of_threads():
    t = {k: v.requires_grad_() for k, v in problem("channel", 1, 70, 3, 70, 1, 20).items()}
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, final = linear_attention(**t, return_final_state=True)
        found.append([y, final, *torch.autograd.grad(y.square().sum() + final.sum(), [*t.values()])])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_channel_decay_keeps_nan_in_its_channel_until_a_reset(bad, native):
    t = problem("channel", 1, 60, 1, 21, 1, 5)
    clean, _ = linear_attention(**t)
    t["v"][0, 10, 0, 3] = bad
    resets = torch.zeros(1, 60, dtype=torch.bool)
    resets[0, 40] = True
    with zoo_kernels.backend("reference"):
        exact, _ = linear_attention(**t, resets=resets)
    y, _ = linear_attention(**t, resets=resets)
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert not y[0, 10:40, 0, 3].isfinite().any()
    others = [p for p in range(21) if p != 3]
    agree(y[:, :40, :, others], clean[:, :40, :, others], 1e-6)


@pytest.mark.parametrize("backend", ["native", "reference", "chunked"])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_decay_of_minus_infinity_forgets(kind, backend, monkeypatch):
    """Chunked: what serves on a CPU where the library is not built."""
    t = problem(kind, 1, 30, 2, 5, 1, 4)
    t["decay"][0, 12, 0] = -torch.inf
    after = {name: value[:, 12:] for name, value in t.items()}
    with zoo_kernels.backend("reference"):
        first = linear_attention(**{name: value[:, :12] for name, value in t.items()})[0]
        forgotten = linear_attention(**after)[0]
    if backend == "chunked":
        monkeypatch.setattr(_native, "missing", lambda *names: "the native library is not built")
    leaves = {name: value.requires_grad_() for name, value in t.items()}
    with zoo_kernels.backend("native" if backend == "chunked" else backend):
        y = linear_attention(**leaves)[0]
    agree(y[:, :12], first, 1e-6)
    agree(y[:, 12:, 0], forgotten[:, :, 0], 1e-6)
    if kind == "head":
        with torch.no_grad(), zoo_kernels.backend("export"):
            agree(linear_attention(**t)[0], y, 1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), [*leaves.values()]))


def test_gradcheck_opcheck_and_compile():
    for kind in ("head", "channel"):
        t = {k: v.double().requires_grad_() for k, v in problem(kind, 1, 5, 2, 3, 1, 2).items()}
        assert torch.autograd.gradcheck(lambda *a: linear_attention(*a)[0], [*t.values()])
        compiled = torch.compile(lambda *a: linear_attention(*a)[0], fullgraph=True, backend="aot_eager")
        agree(compiled(*t.values()), linear_attention(*t.values())[0], 1e-12)
    for args in _cases("cpu", torch.float32):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(_gated.op, (*args, False, ""))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", torch.zeros(2, 40, 3, 5), "3 groups|q has shape"), ("q", torch.zeros(2, 40, 2, 4), "q has shape"),
        ("decay", torch.zeros(2, 40, 3), "decay has shape"), ("v", torch.zeros(2, 40, 4), "v has shape"),
        ("initial_state", torch.zeros(2, 4, 5, 6), "initial_state has shape"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(name, value, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**(problem() | {name: value}))
    with pytest.raises(ValueError, match="pair"):
        linear_attention(**problem(), normalize=True, initial_state=torch.zeros(2, 4, 6, 5))


def test_the_back_end_can_be_forced():
    with zoo_kernels.backend("reference"):
        exact = linear_attention(**problem())[0]
    assert exact.shape == (2, 40, 4, 6)
