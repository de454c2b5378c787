"""sLSTM: the native walk against the definition and the original's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import LIMIT, agree, equal_to_definition, golden, results

from zoo_kernels import slstm, slstm_step
from zoo_kernels.ops.slstm import _cases, _slstm


def problem(batch=2, length=9, heads=3, headdim=5):
    gates, recurrent = torch.randn(batch, length, 4, heads, headdim), 0.3 * torch.randn(heads, headdim, 4, headdim)
    return {"gates": gates, "recurrent": recurrent, "bias": torch.randn(heads, 4, headdim)}


def state(batch=2, heads=3, headdim=5):
    return torch.rand(4, batch, heads, headdim) + 0.3


def test_golden_cell():
    g = golden("bio_xlstm__slstm_cell")
    gates = g["in/gates"].view(2, 7, 4, 2, 4)
    for start, end in ((None, ""), (g["in/initial_state"].view(4, 2, 2, 4), "_with_state")):
        y, last = slstm(
            gates, g["mid/recurrent_kernel_ext"], g["mid/bias_ext"], initial_state=start, return_final_state=True
        )
        agree(y.transpose(1, 2), g["out/y" + end], 1e-4)
        agree(last.view(4, 2, 8), g["out/final_state" + end], 1e-4)


@settings(max_examples=50)
@given(
    batch=st.sampled_from([0, 1, 2, 7]), length=st.sampled_from([0, 1, 2, 9, 30]), headdim=st.sampled_from([1, 5, 16,
    33]),
    walk=st.sampled_from(["plain", "reverse", "path"]), lengths=st.booleans(), resets=st.booleans(),
    given_state=st.booleans(),
    bias=st.booleans(), dtype=st.sampled_from(list(LIMIT)), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_definition(batch, length, headdim, walk, lengths, resets, given_state, bias, dtype, seed):
    torch.manual_seed(seed)
    tensors = problem(batch, length, 2, headdim)
    tensors["recurrent"] = tensors["recurrent"] / headdim**0.5
    if not bias:
        tensors["bias"] = None
    options = {"return_final_state": True, "reverse": walk == "reverse"}
    if walk == "path":
        options["path"] = torch.randperm(length)[: max(length - 2, 0)]
    if lengths and walk != "path":
        options["lengths"] = torch.randint(0, length + 1, (batch,))
    if resets:
        options["resets"] = torch.rand(batch, length) < 0.2
    if given_state:
        tensors["initial_state"] = state(batch, 2, headdim)
    equal_to_definition(slstm, tensors, options, dtype, states=("initial_state", "recurrent", "bias"), factor=2)


def test_step_and_cut_equal_whole():
    t = {k: v.double() for k, v in problem(2, 20).items()}
    whole, last = slstm(**t, return_final_state=True)
    a, mid = slstm(**(t | {"gates": t["gates"][:, :7]}), return_final_state=True)
    b, end = slstm(**(t | {"gates": t["gates"][:, 7:]}), initial_state=mid, return_final_state=True)
    agree(torch.cat([a, b], 1), whole, 1e-12)
    agree(end, last, 1e-12)
    carried = torch.zeros_like(last)
    steps = [slstm_step(t["gates"][:, i], t["recurrent"], t["bias"], state=carried) for i in range(20)]
    agree(torch.stack(steps, 1), whole, 1e-12)
    agree(carried, last, 1e-12)


def test_reverse_is_flip():
    t = {k: v.double() for k, v in problem().items()}
    agree(slstm(**t, reverse=True)[0], slstm(**(t | {"gates": t["gates"].flip(1)}))[0].flip(1), 1e-12)


@pytest.mark.parametrize("size", [50.0, 2000.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_extreme_gates_stay_finite(size, backend):
    t = problem(2, 20)
    t["gates"] = t["gates"] * size
    outputs, grads = results(slstm, t, {}, backend, torch.float32)
    assert all(x.isfinite().all() for x in [*outputs, *grads])


def test_rows_of_a_batch_do_not_meet():
    t = problem(7, 9)
    y, _ = slstm(**t)
    gates = t["gates"].clone()
    gates[3, 4, :, 1, 2] = float("nan")
    other, _ = slstm(**(t | {"gates": gates}))
    good = torch.ones_like(y, dtype=torch.bool)
    good[3, 4:, 1] = False
    assert torch.equal(y[good], other[good])


def test_equal_bits_for_any_number_of_threads(native):
    t = problem(13, 12, 4, 20)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs, grads = results(slstm, t, {"return_final_state": True}, "native", torch.float32)
            found.append([*outputs, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradcheck_opcheck_and_compile():
    t = {k: v.double().requires_grad_() for k, v in problem(1, 4, 2, 2).items()}
    assert torch.autograd.gradcheck(lambda *a: slstm(*a)[0], [*t.values()])
    compiled = torch.compile(lambda *a: slstm(*a)[0], fullgraph=True, backend="aot_eager")
    agree(compiled(*t.values()), slstm(*t.values())[0], 1e-12)
    for args in _cases("cpu", torch.float32):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(_slstm.op, (*args, True, ""))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gates", torch.zeros(2, 9, 3, 3, 5), "gates has shape"),
        ("recurrent", torch.zeros(3, 4, 5, 5), "recurrent has shape"),
        ("bias", torch.zeros(4, 3, 5), "bias has shape"),
        ("initial_state", torch.zeros(2, 3, 5), "initial_state has shape"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(name, value, message):
    with pytest.raises(ValueError, match=message):
        slstm(**(problem() | {name: value}))
