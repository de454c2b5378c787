"""Decoding steps of linear attention, the mLSTM and Mamba-3: against their definitions, and as torch operators."""

from __future__ import annotations

import pytest
import torch
from recurrences import LIMIT, agree

import zoo_kernels
from zoo_kernels import _native
from zoo_kernels.ops.linear_attention.step import _step as attention
from zoo_kernels.ops.mamba3_scan.step import _step as mamba3
from zoo_kernels.ops.mlstm.step import _step as mlstm

OPERATORS = {"linear_attention": attention, "mamba3": mamba3, "mlstm": mlstm}
native = pytest.mark.skipif(_native.unavailable() is not None, reason=str(_native.unavailable()))


def copied(arguments, dtype=None):
    """Own tensors; in ``dtype``, states staying at least float32."""
    return [
        x if not isinstance(x, torch.Tensor) else x.clone() if dtype is None else x.to(dtype).clone() for x in arguments
    ]


def states(operator, arguments):
    return [arguments[operator.arguments.index(name)] for name in operator.mutates]


@native
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", LIMIT)
def test_native_equals_the_definition(name, dtype):
    operator = OPERATORS[name]
    keep = torch.float64 if dtype == torch.float64 else torch.float32
    for case in operator.cases(torch.device("cpu"), torch.float32):
        low, wide = copied(case, dtype), copied(copied(case, dtype), torch.float64)
        for mutated in operator.mutates:
            i = operator.arguments.index(mutated)
            low[i], wide[i] = (None, None) if case[i] is None else (case[i].to(keep), case[i].double())
        for _ in range(3):
            found = operator.module("native").forward(*low, save=False)
            exact = operator.module("reference").forward(*wide, save=False)
            assert found.dtype == dtype
            agree(found, exact, LIMIT[dtype])
            for a, b in zip(states(operator, low), states(operator, wide), strict=True):
                if a is not None:
                    agree(a, b, LIMIT[dtype])


@native
@pytest.mark.parametrize("name", OPERATORS)
def test_wide_states_are_shared_by_threads_with_the_same_bits(name):
    """States of half a MiB and more wake the threads."""
    r = torch.randn
    state = [r(1, 40, 64, 70)]
    calls = {
        "linear_attention": lambda: [
            r(1, 40, 64), -r(1, 40, 70).abs(), r(1, 8, 70), r(1, 8, 70), *state, None, 1.0, False, 0.0,
        ],
        "mlstm": lambda: [
            r(1, 40, 70), r(1, 40, 70), r(1, 40, 64), r(1, 40), r(1, 40), *state, r(1, 40, 70), r(1, 40), 0.1, 1e-6,
        ],
        "mamba3": lambda: [
            r(1, 40, 64), r(1, 40).abs(), -r(1, 40).abs(), r(1, 1, 8, 70), r(1, 1, 8, 70), r(1, 40), r(1, 20), r(40),
            r(1, 40, 64), *[None] * 5, r(1, 40, 20), *state, r(1, 1, 40, 70), r(1, 40, 64), False, True,
        ],
    }  # fmt: skip
    operator, case = OPERATORS[name], calls[name]()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        arguments = copied(case)
        y = operator.module("native").forward(*arguments, save=False)
        results.append([y, *(s for s in states(operator, arguments) if s is not None)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    exact = operator.module("reference").forward(*copied(case, torch.float64), save=False)
    agree(results[0][0], exact, 2e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator = OPERATORS[name]
    for case in operator.cases(torch.device("cpu"), torch.float32):
        torch.library.opcheck(operator.op, (*copied(case), False, ""), test_utils=("test_schema", "test_faketensor"))


def test_steps_compile_whole():
    q, k, v, gate = (torch.randn(2, 3, n) for n in (5, 5, 9, 5))
    gates = torch.randn(2, 2, 3)
    start = torch.randn(2, 3, 9, 5)

    def step(state, C, n, m):
        y = zoo_kernels.linear_attention_step(q, k, v, -gate.abs(), state=state)
        return y + zoo_kernels.mlstm_step(q, k, v, gates[0], gates[1], state=(C, n, m))

    made = [[start.clone(), start.clone(), torch.ones(2, 3, 5), torch.zeros(2, 3)] for _ in range(2)]
    plain = step(*made[0])
    agree(torch.compile(step, fullgraph=True, backend="aot_eager")(*made[1]), plain, 1e-6)
    for a, b in zip(*made, strict=True):
        agree(b, a, 1e-6)


def test_a_back_end_that_cannot_serve_says_so():
    q, v = torch.randn(1, 1, 4), torch.randn(1, 1, 3)
    state = torch.zeros(1, 1, 4, 3).transpose(2, 3)  # not contiguous: the reference serves
    y = zoo_kernels.linear_attention_step(q, q, v, state=state)
    agree(y, v * (q * q).sum(), 1e-5)
    if _native.unavailable() is None:
        with zoo_kernels.backend("native"), pytest.raises(zoo_kernels.BackendError, match="contiguous"):
            zoo_kernels.linear_attention_step(q, q, v, state=state)


def test_errors_say_what_is_wrong():
    r = torch.zeros
    with pytest.raises(ValueError, match="decay has shape"):
        zoo_kernels.linear_attention_step(r(2, 1, 4), r(2, 1, 4), r(2, 3, 5), r(2, 4), state=r(2, 3, 5, 4))
    with pytest.raises(ValueError, match="state has shape"):
        zoo_kernels.linear_attention_step(r(2, 1, 4), r(2, 1, 4), r(2, 3, 5), state=r(2, 3, 4, 5))
    with pytest.raises(ValueError, match="triple"):
        zoo_kernels.mlstm_step(r(2, 3, 4), r(2, 3, 4), r(2, 3, 5), r(2, 3), r(2, 3), state=r(2, 3, 5, 4))
    rows = (r(2, 3, 5), r(2, 3), r(2, 3), r(2, 2, 1, 4), r(2, 2, 1, 4), r(2, 3), r(2, 2))
    state = (r(2, 3, 2), r(2, 3, 5, 4), r(2, 2, 3, 4), r(2, 3, 5))
    with pytest.raises(ValueError, match="mimo_o"):
        zoo_kernels.mamba3_step(*rows, None, r(2, 3, 5), state=state)
    with pytest.raises(ValueError, match="mimo_z has shape"):
        zoo_kernels.mamba3_step(*rows, None, r(2, 3, 5), mimo_z=r(3, 2, 4), mimo_o=r(3, 2, 5), state=state)
