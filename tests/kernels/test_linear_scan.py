"""The linear scan: every back end against the float64 reference, and the laws of the recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo_kernels
from zoo_kernels import linear_scan, linear_scan_step
from zoo_kernels.ops.linear_scan import _scan

LIMIT = {
    torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5, torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}  # fmt: skip
native = pytest.mark.skipif(_scan.unavailable("native") is not None, reason=str(_scan.unavailable("native")))


def double(x):
    return None if x is None else x.to(torch.complex128 if x.is_complex() else torch.float64)


def results(backend, x, a, init, seed, **options):
    """Output, final state and the gradients of a fixed random projection of both."""
    leaves = [t.clone().requires_grad_() for t in (x, a, init) if t is not None]
    start = leaves[2] if init is not None else None
    with zoo_kernels.backend(backend):
        h, final = linear_scan(leaves[0], leaves[1], initial_state=start, return_final_state=True, **options)
        g = torch.Generator().manual_seed(seed)
        # Halves are exact in every dtype, so that the gradients coming in are the same for all.
        weights = [torch.randint(-4, 5, t.shape, generator=g).to(torch.float64) / 2 for t in (h, final)]
        grads = torch.autograd.grad(
            [h, final], leaves, [w.to(t.dtype) for w, t in zip(weights, (h, final), strict=True)]
        )
    return [h.detach(), final.detach(), *grads]


def agree(found, exact, limit):
    for i, (f, e) in enumerate(zip(found, exact, strict=True)):
        if e.numel():
            error = float((f.to(e.dtype) - e).abs().max()) / max(float(e.abs().max()), 1e-3)
            assert error <= limit, f"result {i} differs by {error:.2g}, allowed {limit:.2g}"


@native
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(LIMIT)),
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 63, 64, 65, 130]),
    channels=st.sampled_from([1, 3, 16, 33]),
    shared=st.sampled_from(["full", "length", "channels", "batch"]),
    walk=st.sampled_from(["plain", "reverse", "path", "paths", "part"]),
    resets=st.booleans(),
    lengths=st.booleans(),
    init=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_equals_the_reference(
    dtype, batch, length, channels, shared, walk, resets, lengths, init, strided, seed
):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        kind = torch.complex128 if dtype.is_complex else torch.float64
        wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=kind, generator=g).to(dtype)
        return wide[..., 2:-1] if strided else wide[..., 2:-1].contiguous()

    x = r(batch, length, channels)
    shape = {"full": (batch, length), "length": (length,), "channels": (), "batch": (batch, 1)}[shared]
    a = r(*shape, channels) * 0.6
    options = {"reverse": walk == "reverse"}
    if walk == "path":
        options["path"] = torch.randperm(length, generator=g)
    elif walk == "paths":
        options["path"] = torch.stack([torch.randperm(length, generator=g) for _ in range(batch)]) if batch else None
    elif walk == "part":
        options["path"] = torch.randperm(length, generator=g)[: length // 2]
        options["reverse"] = True
    steps = length if options.get("path") is None else options["path"].shape[-1]
    if resets:
        options["resets"] = torch.rand(batch, length, generator=g) > 0.8
    if lengths:
        options["lengths"] = torch.randint(0, steps + 1, (batch,), generator=g)
    start = r(batch, channels).to(torch.promote_types(dtype, torch.float32)) if init else None
    exact = results("reference", double(x), double(a), double(start), seed, **options)
    found = results("native", x, a, start, seed, **options)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.promote_types(dtype, torch.float32)
    agree(found, exact, LIMIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native), "export"])
def test_gradcheck(dtype, backend):
    torch.manual_seed(0)
    x, a = torch.randn(2, 70, 2, dtype=dtype), torch.rand(70, 2, dtype=dtype) * 0.7
    init = torch.randn(2, 2, dtype=dtype)
    resets = torch.rand(2, 70) > 0.9
    tensors = [t.requires_grad_() for t in (x, a, init)]

    path = torch.randperm(70)

    def run(x, a, init):
        return linear_scan(x, a, initial_state=init, return_final_state=True, resets=resets, path=path)

    with zoo_kernels.backend(backend):
        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_opcheck(dtype):
    x = torch.randn(2, 66, 5, dtype=dtype, requires_grad=True)
    a = (torch.randn(1, 1, 5, dtype=dtype) * 0.5).requires_grad_()
    args = (x, a, None, False, None, True, None, None, True, "")
    torch.library.opcheck(_scan.op, args)


@native
def test_a_long_walk():
    torch.manual_seed(0)
    x, a = torch.randn(1, 65_537, 3), torch.rand(1, 65_537, 3) ** 0.01
    h, final = linear_scan(x, a, return_final_state=True)
    exact = torch.zeros(3, dtype=torch.float64)
    picked = {}
    for t in range(65_537):
        exact = a[0, t].double() * exact + x[0, t].double()
        if t in (0, 999, 65_536):
            picked[t] = exact.clone()
    for t, e in picked.items():
        assert torch.allclose(h[0, t].double(), e, rtol=1e-5, atol=1e-4)
    assert torch.equal(final, h[:, -1])


@native
@pytest.mark.parametrize(
    ("dtype", "channels", "shared"),
    [(torch.float32, 1, False), (torch.float32, 40, True), (torch.float64, 9, True), (torch.complex64, 9, False),
     (torch.complex64, 3, True), (torch.bfloat16, 20, False)],
)  # fmt: skip
def test_a_long_walk_of_few_channels_is_cut_into_pieces(dtype, channels, shared):
    """Few channels and many steps: the native scan takes pieces of the length side by side."""
    length = 8300
    kind = torch.complex64 if dtype.is_complex else torch.float32
    x = torch.randn(1, length, channels, dtype=kind).to(dtype)
    a = (0.5 + 0.499 * torch.rand(*([] if shared else [1, length]), channels)).to(dtype)
    init = torch.randn(1, channels, dtype=torch.float64 if dtype == torch.float64 else kind)
    resets = torch.zeros(1, length, dtype=torch.bool)
    resets[0, [100, 4000, 4001, 8000]] = True
    for options in ({"resets": resets}, {"reverse": True, "lengths": torch.tensor([8000])}):
        exact = results("export", double(x), double(a), double(init), 1, **options)
        agree(results("native", x, a, init, 1, **options), exact, LIMIT[dtype])


@native
def test_pieces_have_the_same_bits_for_any_number_of_threads_and_keep_infinity():
    x, a = torch.randn(2, 9000, 7), torch.rand(2, 9000, 7) * 0.5
    x[0, 50, 3] = torch.inf  # still infinite pieces later, where the product of a has long underflowed
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results("native", x, a, torch.ones(2, 7), 3))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(p, q) or torch.equal(p.isnan(), q.isnan()) for p, q in zip(found[0], other, strict=True))
    with zoo_kernels.backend("reference"):
        exact, _ = linear_scan(x, a)
    assert torch.equal(found[0][0].isinf(), exact.isinf())
    assert bool(exact[0, -1, 3].isinf())


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native), "export"])
def test_laws(backend):
    torch.manual_seed(1)
    x, a = torch.randn(2, 131, 2, 3, dtype=torch.float64), torch.rand(2, 131, 2, 3, dtype=torch.float64)
    path = torch.randperm(131)
    with zoo_kernels.backend(backend):
        whole, final = linear_scan(x, a, return_final_state=True)
        assert torch.allclose(linear_scan(x, a, reverse=True)[0], linear_scan(x.flip(1), a.flip(1))[0].flip(1))
        along = torch.empty_like(x)
        along[:, path] = linear_scan(x[:, path], a[:, path])[0]
        assert torch.allclose(linear_scan(x, a, path=path)[0], along)
        # in pieces
        first, state = linear_scan(x[:, :70], a[:, :70], return_final_state=True)
        second, state = linear_scan(x[:, 70:], a[:, 70:], initial_state=state, return_final_state=True)
        assert torch.allclose(torch.cat([first, second], 1), whole)
        assert torch.allclose(state, final)
        # a reset starts anew
        resets = torch.zeros(2, 131, dtype=torch.bool)
        resets[:, 40] = True
        cut = linear_scan(x, a, resets=resets)[0]
        assert torch.allclose(cut[:, :40], whole[:, :40])
        assert torch.allclose(cut[:, 40:], linear_scan(x[:, 40:], a[:, 40:])[0])
        # lengths
        lengths = torch.tensor([5, 131])
        short, ends = linear_scan(x, a, lengths=lengths, return_final_state=True)
        assert torch.allclose(short[0, :5], whole[0, :5])
        assert not short[0, 5:].any()
        assert torch.allclose(ends[0], whole[0, 4])


def test_step_by_step():
    torch.manual_seed(2)
    x, a = torch.randn(3, 20, 4), torch.rand(4)
    whole, _ = linear_scan(x, a)
    state = torch.zeros(3, 4)
    steps = torch.stack([linear_scan_step(x[:, t], a, state=state) for t in range(20)], 1)
    assert torch.allclose(steps, whole, atol=1e-6)
    complex_state = torch.zeros(3, 4, dtype=torch.complex64)
    assert linear_scan_step(x[:, 0], a * 1j, state=complex_state).is_complex()
    with pytest.raises(ValueError, match="able to hold"):
        linear_scan_step(x[:, 0], a * 1j, state=state)
    with pytest.raises(ValueError, match="state has shape"):
        linear_scan_step(x[:, 0], a, state=state[:2])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_not_a_number_stays_where_it_is(backend):
    x, a = torch.zeros(1, 30, 4), torch.full((1, 30, 4), 0.5)
    x[0, 10, 2] = torch.nan
    resets = torch.zeros(1, 30, dtype=torch.bool)
    resets[0, 20] = True
    with zoo_kernels.backend(backend):
        h, _ = linear_scan(x, a, resets=resets)
    bad = torch.isnan(h[0])
    assert bad[10:20, 2].all()
    assert int(bad.sum()) == 10


@native
def test_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(3)
    x, a = torch.randn(2, 300, 50), torch.rand(2, 300, 50)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results("native", x, a, None, 0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


def test_compiles_and_exports_whole():
    def model(x, a):
        h, final = linear_scan(x, torch.sigmoid(a), return_final_state=True)
        return h * 2, final

    x, a = torch.randn(2, 9, 3, requires_grad=True), torch.randn(2, 9, 3, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, exact in zip(compiled(x, a), model(x, a), strict=True):
        assert torch.allclose(found, exact)
    assert torch.allclose(
        torch.autograd.grad(compiled(x, a)[0].sum(), a)[0], torch.autograd.grad(model(x, a)[0].sum(), a)[0]
    )

    class Module(torch.nn.Module):
        def forward(self, x, a):
            return model(x, a)

    program = torch.export.export(Module(), (x.detach(), a.detach()), strict=False)
    assert torch.allclose(program.module()(x, a)[0], model(x, a)[0])


def test_autocast_keeps_the_accumulation_in_float32():
    x, a = torch.randn(1, 40, 3), torch.rand(1, 40, 3)
    plain, _ = linear_scan(x, a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = linear_scan(x, a)
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\)"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x is int64"),
        ({"x": 3}, "x is int"),
        ({"a": torch.zeros(2, 4, 3)}, r"a has shape \(2, 4, 3\)"),
        ({"a": torch.zeros(2, 2, 5, 3)}, "a has shape"),
        ({"initial_state": torch.zeros(2, 4)}, r"it must be \(2, 3\)"),
        ({"path": torch.zeros(6, dtype=torch.int64)}, "at most length 5"),
        ({"path": torch.tensor([0, 9])}, "within 0 to 4"),
        ({"lengths": torch.tensor([1, 9])}, "within 0 to 5"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths is float32"),
        ({"resets": torch.zeros(2, 5)}, "resets is float32"),
        ({"reverse": "yes"}, "True or False"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "a": torch.zeros(2, 5, 3)} | change
    with pytest.raises(ValueError, match=message):
        linear_scan(arguments.pop("x"), arguments.pop("a"), **arguments)
