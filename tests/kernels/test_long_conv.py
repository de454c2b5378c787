"""Long convolutions, and the kernels of S4 and S4D: against their sums written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo_kernels
from zoo_kernels import (
    cauchy,
    kernel_spectrum,
    long_conv,
    long_conv_nd,
    long_conv_step,
    unit_roots,
    vandermonde_kernel,
)
from zoo_kernels.ops.cauchy import _sum
from zoo_kernels.ops.long_conv.reference import fast_length

native = pytest.mark.skipif(_sum.unavailable("native") is not None, reason=str(_sum.unavailable("native")))


def direct(x, kernel, D=None, back=None, gap=1):
    """The definition: (batch, length, channels) and (heads, channels, taps) to (batch, length, heads, channels)."""
    batch, length, channels = x.shape
    y = torch.zeros(batch, length, kernel.shape[0], channels, dtype=kernel.dtype)
    for t in range(length):
        for j in range(min(kernel.shape[-1], t + 1)):
            y[:, t] += kernel[:, :, j] * x[:, t - j, None]
        for j in range(back.shape[-1] if back is not None else 0):
            if t + gap + j < length:
                y[:, t] += back[:, :, j] * x[:, t + gap + j, None]
    return y if D is None else y + D * x[:, :, None]


@settings(max_examples=60, deadline=None)
@given(
    length=st.sampled_from([0, 1, 2, 13, 40]),
    taps=st.sampled_from([1, 2, 7, 40, 55]),
    back=st.sampled_from([0, 1, 5, 60]),
    gap=st.integers(0, 1),
    complex_kernel=st.booleans(),
    chunk=st.sampled_from([None, 1, 6, 100]),
    ready=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_definition(length, taps, back, gap, complex_kernel, chunk, ready, seed):
    g = torch.Generator().manual_seed(seed)
    kind = torch.complex128 if complex_kernel else torch.float64
    x = torch.randn(2, length, 3, dtype=torch.float64, generator=g)
    kernel, D = torch.randn(2, 3, taps, dtype=kind, generator=g), torch.randn(2, 3, dtype=torch.float64, generator=g)
    behind = torch.randn(2, 3, back, dtype=kind, generator=g) if back else None
    expected = direct(x, kernel, D, behind, gap)
    if ready:
        spectrum = kernel_spectrum(kernel, length, back_kernel=behind, gap=gap, chunk=chunk)
        y, _ = long_conv(x, spectrum, D, chunk=chunk)
    else:
        y, _ = long_conv(x, kernel, D, back_kernel=behind, gap=gap, chunk=chunk)
    assert y.dtype == kind
    assert torch.allclose(y, expected, atol=1e-10)


def test_pieces_steps_paths_and_lengths():
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    D = torch.randn(3, dtype=torch.float64)
    whole, final = long_conv(x, kernel, D, return_final_state=True)
    assert whole.shape == (2, 30, 3)
    state = None
    pieces = []
    for part in x.split([4, 1, 25], dim=1):
        y, state = long_conv(part, kernel, D, initial_state=state, return_final_state=True)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole)
    assert torch.equal(state, final)
    assert torch.equal(state, x[:, -8:])
    state = torch.zeros(2, 8, 3, dtype=torch.float64)
    steps = [long_conv_step(x[:, t], kernel, D, state=state) for t in range(30)]
    assert torch.allclose(torch.stack(steps, 1), whole)
    assert torch.equal(state, final)
    assert torch.allclose(long_conv(x, kernel, D, reverse=True)[0], long_conv(x.flip(1), kernel, D)[0].flip(1))
    path = torch.randperm(30)
    along = torch.empty_like(x)
    along[:, path] = long_conv(x[:, path], kernel, D)[0]
    assert torch.allclose(long_conv(x, kernel, D, path=path)[0], along)
    short, ends = long_conv(x, kernel, D, lengths=torch.tensor([11, 30]), return_final_state=True)
    assert torch.allclose(short[0, :11], whole[0, :11])
    assert not short[0, 11:].any()
    assert torch.equal(ends[0], x[0, 3:11])


@pytest.mark.parametrize("length", [65_537, 70_000])
def test_long_inputs_in_chunks(length):
    torch.manual_seed(0)
    x, kernel = torch.randn(1, length, 2), torch.randn(2, 100)
    y, _ = long_conv(x, kernel)  # chosen by itself
    once, _ = long_conv(x, kernel, chunk=length)
    assert torch.allclose(y, once, atol=1e-4)
    for t in (0, 99, 32_768, length - 1):
        seen = x[0, max(t - 99, 0) : t + 1].flip(0).double()
        exact = (kernel[:, : len(seen)].double().t() * seen).sum(0)
        assert torch.allclose(y[0, t].double(), exact, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 20, 3).to(dtype), torch.randn(1, 3, 20).to(dtype)
    y, _ = long_conv(x, kernel)
    assert y.dtype == dtype
    expected = direct(x.double(), kernel.double())
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert float((y - expected).abs().max()) < limit * float(expected.abs().max())


def test_gradients_and_compile():
    torch.manual_seed(0)
    tensors = [
        t.requires_grad_()
        for t in (
            torch.randn(1, 7, 2, dtype=torch.float64),
            torch.randn(2, 5, dtype=torch.float64),
            torch.randn(2, 3, dtype=torch.float64),
        )
    ]
    assert torch.autograd.gradcheck(lambda x, k, b: long_conv(x, k, back_kernel=b)[0], tensors)

    def model(x, k, b):
        return long_conv(x, k, back_kernel=b, lengths=torch.tensor([5]))[0]

    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(*tensors), model(*tensors))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    taps=st.integers(1, 6),
    two_sided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_several_axes(sizes, taps, two_sided, seed):
    g = torch.Generator().manual_seed(seed)

    def kernels(n):
        return [torch.randn(2, 2, 3, n, dtype=torch.float64, generator=g) for _ in sizes]  # ranks, heads, channels

    x = torch.randn(2, *sizes, 3, dtype=torch.float64, generator=g)
    front, back = kernels(taps), kernels(4) if two_sided else None
    y = long_conv_nd(x, front, back_kernels=back)
    expected = torch.zeros(2, *sizes, 2, 3, dtype=torch.float64)
    for rank in range(2):  # axis after axis
        part = x[..., None, :].expand(*x.shape[:-1], 2, 3)
        for i, size in enumerate(sizes):
            line = part.movedim(i + 1, 1)
            shape = line.shape
            flat = line.reshape(2, size, -1, 2, 3).permute(0, 2, 1, 3, 4).reshape(-1, size, 6)
            k = front[i][rank].reshape(1, 6, -1)
            b = None if back is None else back[i][rank].reshape(1, 6, -1)
            flat = direct(flat, k, None, b)[:, :, 0]
            line = flat.reshape(2, -1, size, 2, 3).permute(0, 2, 1, 3, 4).reshape(shape)
            part = line.movedim(1, i + 1)
        expected += part
    assert torch.allclose(y, expected, atol=1e-10)
    single = long_conv_nd(x, [k[0, 0] for k in front], D=torch.ones(3, dtype=torch.float64))
    assert single.shape == x.shape


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 1000])
@pytest.mark.parametrize("real", [False, True])
def test_vandermonde_sums(length, real):
    torch.manual_seed(0)
    coefficients = torch.randn(2, 3, 4, dtype=torch.float64 if real else torch.complex128)
    decay = -torch.rand(3, 4, dtype=torch.float64) * 0.1
    decay = decay if real else torch.complex(decay, torch.randn(3, 4, dtype=torch.float64))
    steps = torch.arange(length, dtype=torch.float64)
    terms = 2 * (coefficients[..., None] * torch.exp(decay[..., None] * steps)).sum(-2)
    K = vandermonde_kernel(coefficients, decay, length)
    assert torch.allclose(K, terms if real else terms.real, atol=1e-11)
    single = vandermonde_kernel(coefficients.to(torch.float32 if real else torch.complex64), decay, length)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), K, atol=1e-5)


def test_vandermonde_gradients():
    torch.manual_seed(0)
    c = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    d = torch.complex(-torch.rand(2, 3), torch.randn(2, 3)).to(torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, d: vandermonde_kernel(c, d, 11), (c, d))


@pytest.mark.parametrize("length", [1, 2, 9, 16, 4096])
def test_unit_roots(length):
    w = torch.exp(-2j * torch.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)
    p, q = unit_roots(length, dtype=torch.complex128)
    assert torch.allclose(p, 2 * (1 - w), atol=1e-14)
    assert torch.allclose(q, 1 + w, atol=1e-14)
    if length % 2 == 0:
        assert q[-1] == 0


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5, 33), (5, 3, 4, 64), (9, 2, 3, 7)])
def test_cauchy_sums(backend, dtype, sizes):
    heads, channels, N, length = sizes
    torch.manual_seed(0)
    v = torch.randn(heads, channels, N, dtype=torch.complex128)
    a = torch.complex(-torch.rand(channels, N) - 0.1, torch.randn(channels, N)).to(torch.complex128)
    p, q = unit_roots(length, dtype=torch.complex128)
    g = torch.randn(heads, channels, p.shape[0], dtype=torch.complex128)

    def results(v, a, p, q, g, function):
        v, a = v.clone().requires_grad_(), a.clone().requires_grad_()
        r = function(v, a, p, q)
        return [r.detach(), *torch.autograd.grad(r, [v, a], g)]

    def definition(v, a, p, q):
        terms = v[..., None] / (p - a[..., None] * q) + v.conj()[..., None] / (p - a.conj()[..., None] * q)
        return 2 * terms.sum(-2)

    exact = results(v, a, p, q, g, definition)
    with zoo_kernels.backend(backend):
        found = results(*(t.to(dtype) for t in (v, a, p, q, g)), cauchy)
    limit = 1e-12 if dtype == torch.complex128 else 3e-5
    for f, e in zip(found, exact, strict=True):
        assert float((f - e).abs().max()) <= limit * float(e.abs().max())


@native
def test_cauchy_opcheck_and_threads():
    torch.manual_seed(0)
    p, q = unit_roots(20)
    v = torch.randn(2, 3, 4, dtype=torch.complex64, requires_grad=True)
    a = torch.complex(-torch.rand(3, 4), torch.randn(3, 4)).requires_grad_()
    torch.library.opcheck(_sum.op, (v, a, p, q, False, ""))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(cauchy(v, a, p, q).abs().sum(), (v, a)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_fast_lengths():
    for n in (1, 2, 3, 7, 31, 97, 1009, 65_537):
        best = fast_length(n)
        rest = best
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert best >= n
        assert best % 2 == 0
        assert rest == 1
        assert best <= max(2, 1.25 * n + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k: long_conv(x[0], k), r"\(batch, length, channels\)"),
        (lambda x, k: long_conv(x, k[:2]), "channels 3"),
        (lambda x, k: long_conv(x, k.long()), "kernel is int64"),
        (lambda x, k: long_conv(x, k, gap=2), "gap is 2"),
        (lambda x, k: long_conv(x, k, torch.zeros(4)), "D has shape"),
        (lambda x, k: long_conv(x, k, back_kernel=k[None]), "those of kernel"),
        (lambda x, k: long_conv(x, k, back_kernel=k, return_final_state=True), "no state"),
        (lambda x, k: long_conv(x, k, initial_state=torch.zeros(2, 3, 3)), "taps - 1 4"),
        (lambda x, k: long_conv(x, k, chunk=0), "chunk is 0"),
        (lambda x, k: long_conv(x, kernel_spectrum(k, 7)), "made for 7 steps"),
        (lambda x, k: long_conv(x, kernel_spectrum(k, 6), back_kernel=k), "give it to kernel_spectrum"),
        (lambda x, k: long_conv(x, k, lengths=torch.tensor([1, 99])), "within 0 to 6"),
        (lambda x, k: long_conv_nd(x, [k, k]), "one kernel for each size"),
        (lambda x, k: long_conv_nd(x, [k[:2]]), "kernels\\[0\\] has shape"),
        (lambda x, k: vandermonde_kernel(k, k[:2], 3), "channels, N"),
        (lambda x, k: vandermonde_kernel(k, k, -1), "length is -1"),
        (lambda x, k: cauchy(k[None], k, k[0], k[0]), "v is float32"),
        (lambda x, k: long_conv_step(x[:, 0], k, state=torch.zeros(2, 5, 3)), "state has shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 6, 3), torch.zeros(3, 5))
