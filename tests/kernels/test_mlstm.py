"""mLSTM: the parallel, chunked and recurrent forms agree, with each other and with the originals' numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import LIMIT, agree, golden

from zoo_kernels import mlstm, mlstm_step
from zoo_kernels.ops._walk import walk_order
from zoo_kernels.ops.mlstm import mlstm_reference


def problem(batch=2, length=40, heads=3, state=5, headdim=6, spread=3.0, dtype=torch.float64):
    r = torch.randn
    tensors = [r(batch, length, heads, state), r(batch, length, heads, state), r(batch, length, heads, headdim)]
    tensors += [spread * r(batch, length, heads), spread * r(batch, length, heads)]
    return [t.to(dtype) for t in tensors]


def states(batch=2, heads=3, state=5, headdim=6):
    return (
        torch.randn(batch, heads, headdim, state).double(),
        torch.randn(batch, heads, state).double(),
        torch.randn(batch, heads).double(),
    )


def parallel(q, k, v, i, f, both=False):
    """The quadratic form: decay matrix, row maximum, normaliser."""
    c = F.logsigmoid(f).cumsum(1)
    logs = c[:, :, None] - c[:, None] + i[:, None]
    below = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    if both:
        before = c - F.logsigmoid(f)
        logs = torch.where(below, logs, before[:, None] - before[:, :, None] + i[:, None])
    else:
        logs = logs.masked_fill(~below, -torch.inf)
    m = logs.amax(2, keepdim=True)
    S = torch.einsum("bthn,bshn->btsh", q, k) * q.shape[-1] ** -0.5 * (logs - m).exp()
    return (
        torch.einsum("btsh,bshp->bthp", S, v) / (torch.maximum(S.sum(2).abs(), (-m[:, :, 0]).exp()) + 1e-6)[..., None]
    )


def test_golden_kernels():
    g = golden("bio_xlstm__mlstm_kernels")
    leaves = [g["in/" + n].transpose(1, 2).clone().requires_grad_() for n in "qkvif"]
    h, (C, n, m) = mlstm(*leaves, return_final_state=True)
    for form in ("parallel", "chunkwise", "recurrent"):
        agree(h.transpose(1, 2), g["out/h_" + form], 1e-4)
    for end in ("", "_recurrent"):
        agree(C.transpose(2, 3), g["out/C" + end], 1e-4)
        agree(n, g["out/n" + end], 1e-4)
        agree(m, g["out/m" + end][..., 0], 1e-4)
    for name, grad in zip("qkvif", torch.autograd.grad(h.pow(2).mean(), leaves), strict=True):
        agree(grad.transpose(1, 2), g["grad/" + name], 1e-4)


@settings(max_examples=40)
@given(
    length=st.sampled_from([0, 1, 2, 63, 70]), walk=st.sampled_from(["plain", "reverse", "path"]),
    lengths=st.booleans(),
    resets=st.booleans(), given_state=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_chunked_equals_recurrent(length, walk, lengths, resets, given_state, seed):
    torch.manual_seed(seed)
    args = problem(length=length)
    path = torch.randperm(length)[: max(length - 3, 0)] if walk == "path" else None
    steps = length if path is None else len(path)
    count = torch.randint(0, steps + 1, (2,)) if lengths else None
    drop = torch.rand(2, length) < 0.1 if resets else None
    state = states() if given_state else None
    leaves = [t.requires_grad_() for t in [*args, *(state or ())]]
    y, end = mlstm(
        *args,
        path=path,
        reverse=walk == "reverse",
        lengths=count,
        resets=drop,
        initial_state=state,
        return_final_state=True,
    )
    order = walk_order(path, walk == "reverse", count, batch=2, length=length, device=y.device)
    exact, last = mlstm_reference(*args, 5**-0.5, 1e-6, state, drop, order)
    for a, b in zip([y, *end], [exact, *last], strict=True):
        agree(a, b, 1e-9)
    if not steps:
        return  # nothing is walked: the state is what was given
    weights = [torch.randn_like(t) for t in (exact, *last)]
    found = torch.autograd.grad([y, *end], leaves, weights, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad([exact, *last], leaves, weights, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, true, strict=True):
        agree(a, b, 1e-8)


def test_equals_the_parallel_form_both_ways():
    args = problem()
    agree(mlstm(*args)[0], parallel(*args), 2e-5)  # up to eps, which meets another stabiliser
    agree(mlstm(*args, bidirectional=True)[0], parallel(*args, both=True), 2e-5)


@pytest.mark.parametrize("dtype", [d for d in LIMIT if d != torch.float64])
def test_dtypes(dtype):
    args = problem(length=130, spread=1.0, dtype=dtype)
    exact, _ = mlstm_reference(*(t.double() for t in args), 5**-0.5, 1e-6, None, None, None)
    y, _ = mlstm(*args)
    assert y.dtype == dtype
    agree(y, exact, LIMIT[dtype])


@pytest.mark.parametrize("size", [40.0, 400.0])
def test_extreme_gates_stay_finite(size):
    args = [t.float().requires_grad_() for t in problem(length=80, spread=size)]
    y, _ = mlstm(*args)
    exact, _ = mlstm_reference(*(t.detach().double() for t in args), 5**-0.5, 1e-6, None, None, None)
    agree(y, exact, 1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), args))


def test_step_and_cut_equal_whole():
    args = problem()
    whole, last = mlstm(*args, return_final_state=True)
    a, mid = mlstm(*(t[:, :23] for t in args), return_final_state=True)
    b, end = mlstm(*(t[:, 23:] for t in args), initial_state=mid, return_final_state=True)
    agree(torch.cat([a, b], 1), whole, 1e-9)
    state = tuple(torch.zeros_like(t) for t in last)
    steps = [mlstm_step(*(t[:, j] for t in args), state=state) for j in range(40)]
    agree(torch.stack(steps, 1), whole, 1e-9)
    for x, y, z in zip(last, end, state, strict=True):
        agree(y, x, 1e-9)
        agree(z, x, 1e-9)


def test_gradcheck_and_compile():
    args = [t.requires_grad_() for t in problem(1, 4, 1, 2, 2, 1.0)]
    assert torch.autograd.gradcheck(lambda *a: mlstm(*a)[0], args)
    compiled = torch.compile(lambda *a: mlstm(*a)[0], fullgraph=True, backend="aot_eager")
    agree(compiled(*args), mlstm(*args)[0], 1e-12)


def test_errors_say_what_is_wrong():
    q, k, v, i, f = problem()
    with pytest.raises(ValueError, match="k has shape"):
        mlstm(q, k[..., :4], v, i, f)
    with pytest.raises(ValueError, match="i has shape"):
        mlstm(q, k, v, i[:, :3], f)
    with pytest.raises(ValueError, match="triple"):
        mlstm(q, k, v, i, f, initial_state=torch.zeros(2))
    with pytest.raises(ValueError, match="bidirectional"):
        mlstm(q, k, v, i, f, bidirectional=True, return_final_state=True)
