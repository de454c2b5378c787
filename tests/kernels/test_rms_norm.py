"""RMS normalisation, plain, gated, grouped and centred: every back end against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import zoo_kernels
from zoo_kernels import gated_rms_norm, rms_norm
from zoo_kernels.ops.rms_norm import _norm

LIMIT = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
native = pytest.mark.skipif(_norm.unavailable("native") is not None, reason=str(_norm.unavailable("native")))


def results(backend, tensors, dy, **options):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    with zoo_kernels.backend(backend):
        y = gated_rms_norm(*leaves, **options)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))
    return [y.detach(), *grads]


@native
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(LIMIT)),
    rows=st.sampled_from([0, 1, 3, 33]),
    size=st.sampled_from([4, 16, 37, 128]),
    groups=st.sampled_from([1, 2, 5]),
    gate=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    before=st.booleans(),
    centred=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_equals_the_reference(dtype, rows, size, groups, gate, weight, bias, before, centred, strided, seed):
    g = torch.Generator().manual_seed(seed)
    dim = size * groups

    def r(*shape):
        wide = torch.randn(*shape[:-1], shape[-1] + 5, dtype=torch.float64, generator=g).to(dtype)
        return wide[..., 2:-3] if strided else wide[..., 2:-3].contiguous()

    tensors = [r(rows, dim), r(rows, dim) if gate else None, r(dim) if weight else None, r(dim) if bias else None]
    dy = torch.randint(-4, 5, (rows, dim), generator=g).double() / 2
    options = {"groups": groups, "norm_before_gate": before, "centred": centred, "eps": 1e-5}
    exact = results("reference", [None if t is None else t.double() for t in tensors], dy, **options)
    found = results("native", tensors, dy, **options)
    assert found[0].dtype == dtype
    for f, e in zip(found, exact, strict=True):
        if e.numel():
            error = float((f.double() - e).abs().max()) / max(float(e.abs().max()), 1e-3)
            assert error <= LIMIT[dtype], error


def test_against_torch():
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 6, 24), torch.randn(24), torch.randn(24)
    assert torch.allclose(rms_norm(x, w, eps=1e-6), F.rms_norm(x, (24,), w, 1e-6), atol=1e-6)
    assert torch.allclose(gated_rms_norm(x, None, w, b, centred=True), F.layer_norm(x, (24,), w, b), atol=1e-5)
    z = torch.randn(4, 6, 24)
    assert torch.allclose(gated_rms_norm(x, z, w), rms_norm(x * F.silu(z), w), atol=1e-6)
    assert torch.allclose(gated_rms_norm(x, z, w, norm_before_gate=True), rms_norm(x, w) * F.silu(z), atol=1e-6)
    grouped = torch.cat([rms_norm(x[..., :12]), rms_norm(x[..., 12:])], -1)
    assert torch.allclose(rms_norm(x, groups=2), grouped, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native), "export"])
@pytest.mark.parametrize("before", [False, True])
def test_gradcheck(backend, before):
    torch.manual_seed(0)
    x, z = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with zoo_kernels.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *t: gated_rms_norm(*t, groups=2, norm_before_gate=before, centred=True), (x, z, w, b)
        )


@native
def test_opcheck_and_compile():
    x, w = torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(_norm.op, (x, None, w, None, 1e-5, 1, False, False, False, ""))
    model = torch.compile(lambda x, w: rms_norm(x * 2, w), fullgraph=True, backend="aot_eager")
    assert torch.allclose(model(x, w), rms_norm(x * 2, w))


@native
def test_rows_do_not_mix_and_threads_do_not_matter():
    x = torch.randn(50, 32, requires_grad=True)
    bad = x.detach().clone()
    bad[7, 3] = torch.nan
    y = rms_norm(bad)
    assert torch.isnan(y[7]).all()
    assert torch.equal(torch.isnan(y).any(1), torch.arange(50) == 7)
    w = torch.randn(32, requires_grad=True)
    before = torch.get_num_threads()
    try:
        grads = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            grads.append(torch.autograd.grad(rms_norm(x, w).sum(), (x, w)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 6), "groups": 4}, "divide the 6 channels"),
        ({"x": torch.zeros(2, 6), "weight": torch.zeros(5)}, "weight has shape"),
        ({"x": torch.zeros(2, 6), "z": torch.zeros(2, 5)}, "as x is"),
        ({"x": torch.zeros(2, 6, dtype=torch.int32)}, "x is int32"),
        ({"x": torch.zeros(2, 6), "eps": -1.0}, "not be negative"),
        ({"x": torch.zeros(())}, "no axes"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**({"z": None} | arguments))
