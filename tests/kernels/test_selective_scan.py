"""selective_scan: every back end against the float64 reference, and the laws that a scan must obey."""

from __future__ import annotations

import itertools

import pytest
import torch
import util
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import zoo_kernels as zk

BACKENDS = ["native", "export"]
TENSORS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def arguments(
    batch=2,
    length=37,
    channels=12,
    state=4,
    *,
    groups=None,
    paths=None,
    shared=True,
    dtype=torch.float32,
    D=True,
    z=True,
    rank=None,
) -> dict[str, Tensor | None]:
    k = () if paths is None else (paths,)
    g = () if groups is None else (groups,)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    return {
        "u": r(batch, length, *(() if shared else k), channels),
        "dt": r(batch, length, *k, rank or channels),
        "A": -torch.rand(*k, channels, state).to(dtype) * 4,
        "B": r(batch, length, *k, *g, state),
        "C": r(batch, length, *k, *g, state),
        "D": r(*k, channels) if D else None,
        "z": r(batch, length, channels) if z else None,
        "dt_bias": r(*k, channels),
        **({} if rank is None else {"dt_proj": r(*k, channels, rank) / rank**0.5}),
    }


def exact(args: dict, **options):
    """The float64 reference, in float64."""
    with zk.backend("reference"):
        return zk.selective_scan(
            **{k: util.double(v) for k, v in args.items()}, **{k: util.double(v) for k, v in options.items()}
        )


def gradients(args: dict, weights: list[Tensor], **options) -> list[Tensor]:
    """Gradients of a weighted sum of output and final state for every tensor argument."""
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if v is not None}
    init = options.pop("initial_state", None)
    if init is not None:
        leaves["initial_state"] = init.detach().requires_grad_()
    y, final = zk.selective_scan(**{**dict.fromkeys(TENSORS), **leaves}, **options)
    total = (y.double() * weights[0]).sum()
    if final is not None:
        total = total + (final.double() * weights[1]).sum()
    return list(torch.autograd.grad(total, list(leaves.values())))


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=40)
@given(data=st.data())
def test_any_shape_matches_the_reference(backend: str, data) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    length = draw(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 97, 130]))
    groups = draw(st.sampled_from([None, 1, 2, 3]))
    channels = (groups or 1) * draw(st.sampled_from([1, 5, 8, 16, 17, 33]))
    paths = draw(st.sampled_from([None, 1, 2, 4]))
    batch = draw(st.sampled_from([1, 2, 3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    state = draw(st.sampled_from([1, 2, 3, 4, 8, 13, 16, 32]))
    args = arguments(
        batch, length, channels, state, groups=groups, paths=paths, shared=draw(st.booleans()), dtype=dtype,
        D=draw(st.booleans()), z=draw(st.booleans()), rank=draw(st.sampled_from([None, None, 1, 3, 12])),
    )  # fmt: skip
    how = draw(st.integers(0, 3))
    args = {k: None if v is None else util.strided(v, how) for k, v in args.items()}
    k = paths or 1
    options: dict = {"dt_softplus": True, "return_final_state": draw(st.booleans())}
    steps = length
    kind = draw(st.sampled_from(["none", "one", "batch", "short"]))
    if kind != "none" and length:
        steps = max(1, length // 2) if kind == "short" else length
        many = batch if kind == "batch" else 1
        path = torch.stack([torch.stack([torch.randperm(length)[:steps] for _ in range(k)]) for _ in range(many)])
        if paths is None:
            path = path[:, 0]
        options["path"] = path if kind == "batch" else path[0]
    flags = [draw(st.booleans()) for _ in range(k)]
    options["reverse"] = flags if paths is not None else flags[0]
    if draw(st.booleans()):
        options["resets"] = torch.rand(batch, length) < 0.1
    if draw(st.booleans()):
        options["lengths"] = torch.randint(0, steps + 1, (batch,))
    if draw(st.booleans()):
        wide = torch.promote_types(dtype, torch.float32)
        options["initial_state"] = torch.randn(batch, *(() if paths is None else (paths,)), channels, state, dtype=wide)
    y0, h0 = exact(args, **options)
    with zk.backend(backend):
        y, h = zk.selective_scan(**args, **options)
    assert y.dtype == dtype
    util.close(y, y0)
    assert (h is None) == (h0 is None)
    if h is not None and h0 is not None:
        assert h.dtype == torch.promote_types(dtype, torch.float32)
        util.close(h, h0, dtype=dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    if backend == "native":
        weights = [
            torch.randn(y0.shape, dtype=torch.float64),
            torch.randn(h0.shape if h0 is not None else (), dtype=torch.float64),
        ]
        with zk.backend("reference"):
            wide = {k: util.double(v) for k, v in args.items()}
            g0 = gradients(wide, weights, **{k: util.double(v) for k, v in options.items()})
        with zk.backend("native"):
            g1 = gradients(args, weights, **options)
        for a, b in zip(g1, g0, strict=True):
            # Half-precision gradients round once more, in the incoming gradient.
            util.close(a, b, dtype=dtype, factor=4)


@pytest.mark.parametrize("length", [1024, 65_537])
def test_long_sequences(native, length: int) -> None:
    args = arguments(1, length, 3, 2)
    args["A"] *= 0.01  # decays near 1: errors of the exponential would pile up
    y0, h0 = exact(args, dt_softplus=True, return_final_state=True)
    with zk.backend("native"):
        y, h = zk.selective_scan(**args, dt_softplus=True, return_final_state=True)
    util.close(y, y0, factor=5)
    util.close(h, h0, factor=5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("reverse", [False, True])
def test_reverse_is_a_flip(backend: str, reverse: bool) -> None:
    args = arguments(dtype=torch.float64)
    flipped = {k: v.flip(1) if k in ("u", "dt", "B", "C", "z") else v for k, v in args.items()}
    with zk.backend(backend):
        y, h = zk.selective_scan(**args, dt_softplus=True, reverse=reverse, return_final_state=True)
        y2, h2 = zk.selective_scan(**flipped, dt_softplus=True, reverse=not reverse, return_final_state=True)
    util.close(y2.flip(1), y)
    util.close(h2, h)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_path_is_a_permutation(backend: str) -> None:
    args = arguments(dtype=torch.float64)
    path = torch.randperm(37)
    moved = {k: v[:, path] if k in ("u", "dt", "B", "C", "z") else v for k, v in args.items()}
    with zk.backend(backend):
        y, h = zk.selective_scan(**args, dt_softplus=True, path=path, return_final_state=True)
        y2, h2 = zk.selective_scan(**moved, dt_softplus=True, return_final_state=True)
    util.close(y[:, path], y2)
    util.close(h, h2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_paths_add_up(backend: str) -> None:
    args = arguments(paths=3, dtype=torch.float64, z=False)
    path = torch.stack([torch.randperm(37) for _ in range(3)])
    with zk.backend(backend):
        y, _ = zk.selective_scan(**args, dt_softplus=True, path=path, reverse=[False, True, False])
        parts = []
        for k in range(3):
            one = {
                n: v[:, :, k] if n in ("dt", "B", "C") else v[k] if n in ("A", "D", "dt_bias") else v
                for n, v in args.items()
            }
            parts.append(zk.selective_scan(**one, dt_softplus=True, path=path[k], reverse=k == 1)[0])
    util.close(y, sum(parts))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("cut", [1, 16, 36])
def test_pieces_make_the_whole(backend: str, cut: int) -> None:
    args = arguments(dtype=torch.float64)
    with zk.backend(backend):
        y, h = zk.selective_scan(**args, dt_softplus=True, return_final_state=True)
        state, out = None, []
        for part in (slice(0, cut), slice(cut, None)):
            piece = {k: v[:, part] if k in ("u", "dt", "B", "C", "z") else v for k, v in args.items()}
            o, state = zk.selective_scan(**piece, dt_softplus=True, initial_state=state, return_final_state=True)
            out.append(o)
    util.close(torch.cat(out, 1), y)
    util.close(state, h)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_by_step_is_the_whole(backend: str, groups: int | None, dtype: torch.dtype) -> None:
    args = arguments(length=9, groups=groups, dtype=dtype, state=5)
    y0, h0 = exact(args, dt_softplus=True, return_final_state=True)
    state = torch.zeros(2, 12, 5, dtype=torch.promote_types(dtype, torch.float32))
    with zk.backend(backend):
        for t in range(9):
            one = {k: v[:, t] if k in ("u", "dt", "B", "C", "z") else v for k, v in args.items()}
            y = zk.selective_scan_step(**one, state=state, dt_softplus=True)
            util.close(y, y0[:, t], factor=2)
    util.close(state, h0, factor=2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("state", [1, 3])
@pytest.mark.parametrize("rank", [None, 2])
def test_without_C_the_states_come_out(backend: str, state: int, rank: int | None) -> None:
    args = arguments(groups=2, state=state, D=False, z=False, dtype=torch.float64, rank=rank)
    path = torch.randperm(37)
    C = args.pop("C")
    init = torch.randn(2, 12, state, dtype=torch.float64)
    options = {"dt_softplus": True, "path": path, "initial_state": init, "return_final_state": True}
    with zk.backend(backend):
        h, final = zk.selective_scan(**args, C=None, **options)
        y, final2 = zk.selective_scan(**args, C=C, **options)
    assert h.shape == (2, 37, 12, state)
    util.close(torch.einsum("blgdn,blgn->blgd", h.unflatten(2, (2, 6)), C).flatten(2), y)
    util.close(final, final2)
    util.close(h[:, path[-1]], final)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_extremes(backend: str) -> None:
    """Zero and huge steps, decays of exactly 1, and overflow behave as in float64."""
    args = arguments(1, 70, 5, 3, D=False, z=False)
    args["dt_bias"] = None
    args["dt"] = args["dt"].abs()
    args["dt"][:, 10] = 0
    args["dt"][:, 20] = 1e4
    args["A"][0] = 0
    args["A"][1] = -1e-7
    args["A"][2] = -1e30
    y0, h0 = exact(args, return_final_state=True)
    with zk.backend(backend):
        y, h = zk.selective_scan(**args, return_final_state=True)
    util.close(y, y0)
    util.close(h, h0)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["u", "dt"])
def test_bad_values_stay_in_their_channel(backend: str, bad: float, where: str) -> None:
    args = arguments(2, 40, 20, 4)
    good, _ = exact(args, dt_softplus=True)
    args[where][1, 15, 3] = bad
    with zk.backend(backend):
        y, _ = zk.selective_scan(**args, dt_softplus=True)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 15:, 3] = True
    util.close(y[~touched], good[~touched])
    assert not y[1, 15, 3].isfinite()


def test_positive_A_overflows_to_infinity(native) -> None:
    args = arguments(1, 30, 4, 2, D=False, z=False)
    args = {k: None if v is None else v.abs() for k, v in args.items()}
    args["A"] = args["A"].abs() + 10
    args["dt"] = args["dt"] + 1
    with zk.backend("native"):
        y, _ = zk.selective_scan(**args)
    assert y[:, -1].isinf().all()
    assert not y.isnan().any()


def test_gradcheck(native) -> None:
    args = arguments(2, 7, 3, 2, paths=2, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in args.values()]
    path = torch.stack([torch.randperm(7), torch.randperm(7)])
    init = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(2, 7, dtype=torch.bool)
    resets[0, 3] = True
    options = {
        "dt_softplus": True,
        "path": path,
        "reverse": [False, True],
        "return_final_state": True,
        "resets": resets,
    }
    for backend in ("reference", "native"):
        with zk.backend(backend):
            assert torch.autograd.gradcheck(
                lambda *a: zk.selective_scan(*a[:-1], initial_state=a[-1], **options), [*leaves, init]
            )


def test_gradcheck_of_a_product(native) -> None:
    args = arguments(2, 7, 3, 2, paths=2, rank=2, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in args.values()]
    for backend in ("reference", "native", "export"):
        with zk.backend(backend):
            assert torch.autograd.gradcheck(
                lambda *a: zk.selective_scan(*a[:-1], dt_proj=a[-1], dt_softplus=True)[0], leaves
            )


@pytest.mark.parametrize("rank", [1, 6, 48, 128, 129])
@pytest.mark.parametrize("paths", [None, 4])
def test_a_product_is_the_same_as_its_dt(native, rank: int, paths: int | None) -> None:
    """dt_proj and a few columns, views of one projection, against dt itself; the last rank is multiplied beforehand."""
    batch, length, channels, state = 2, 75, 40, 4
    args = arguments(batch, length, channels, state, paths=paths, rank=rank)
    projected = torch.randn(batch, length, *(() if paths is None else (paths,)), rank + 2 * state)
    args["dt"], args["B"], args["C"] = projected.split([rank, state, state], dim=-1)
    whole = {**args, "dt": torch.einsum("...r,...cr->...c", args["dt"], args["dt_proj"])}
    del whole["dt_proj"]
    path = torch.randperm(length) if paths is None else torch.stack([torch.randperm(length) for _ in range(paths)])
    y, h = zk.selective_scan(**args, dt_softplus=True, path=path, return_final_state=True)
    y0, h0 = exact(whole, dt_softplus=True, path=path, return_final_state=True)
    util.close(y, y0)
    util.close(h, h0)


def test_a_product_is_not_written_out(native) -> None:
    """Four paths with dt_proj allocate the output alone, none of their steps; with a product too wide they do."""
    for rank, times in ((3, 1), (129, 4)):
        args = arguments(1, 256, 32, 4, paths=4, z=False, rank=rank)
        with zk.backend("native"):
            size = util.largest_allocation(lambda args=args: zk.selective_scan(**args))
        assert size == times * 4 * 256 * 32


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_the_usual_call_repeated(native, how: int, gate: bool, rank: int | None) -> None:
    """From the second time on it goes straight to the library: the same bits, also of views, and gradients as ever."""
    args = arguments(3, 70, 40, 5, z=gate, D=gate, rank=rank)
    args = {k: None if v is None else util.strided(v, how) for k, v in args.items()}
    y0, _ = exact(args, dt_softplus=True)
    first, second = (zk.selective_scan(**args, dt_softplus=True)[0] for _ in range(2))
    util.close(first, y0)
    assert torch.equal(first, second)
    assert second.data_ptr() != first.data_ptr()
    with zk.backend("reference"):
        util.close(zk.selective_scan(**args, dt_softplus=True)[0], y0)
    args["A"] = args["A"].requires_grad_()
    y, _ = zk.selective_scan(**args, dt_softplus=True)
    assert torch.equal(y, first)
    assert torch.autograd.grad(y.sum(), args["A"])[0].abs().sum() > 0
    with pytest.raises(ValueError, match="B has shape"):
        zk.selective_scan(**{**args, "B": args["B"][:, 1:]}, dt_softplus=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["whole", "int32", "strided", "part", "by sequence"])
def test_the_usual_call_repeated_along_a_path(native, kind: str, reverse: bool) -> None:
    args = arguments(2, 70, 40, 5)
    path = torch.randperm(70)
    if kind == "by sequence":
        path = torch.stack([path, path.flip(0)])
    elif kind == "part":
        path = path[:50]
    elif kind == "strided":
        path = path.repeat_interleave(2)[::2]
    elif kind == "int32":
        path = path.int()
    y0, _ = exact(args, dt_softplus=True, path=path, reverse=reverse)
    first, second = (zk.selective_scan(**args, dt_softplus=True, path=path, reverse=reverse)[0] for _ in range(2))
    util.close(first, y0)
    assert torch.equal(first, second)
    path[..., 3] = 70
    with pytest.raises(ValueError, match=r"path has rows \d to 70"):
        zk.selective_scan(**args, dt_softplus=True, path=path, reverse=reverse)


def test_opcheck(native) -> None:
    from zoo_kernels.ops.selective_scan import _cases, _scan

    for args, backend in itertools.product(_cases(torch.device("cpu"), torch.float32), ("native", "reference")):
        args = [a.requires_grad_() if i in _scan.differentiable and a is not None else a for i, a in enumerate(args)]
        torch.library.opcheck(_scan.op, (*args, True, backend))


def test_compile_and_export(native) -> None:
    args = arguments(2, 19, 8, 4)

    class Model(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return zk.selective_scan(u, dt, A, B, C, dt_softplus=True)[0]

    inputs = tuple(args[k] for k in ("u", "dt", "A", "B", "C"))
    y = Model()(*inputs)
    exported = torch.export.export(Model(), inputs)
    assert any("zoo_kernels.selective_scan" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*inputs), y)
    leaves = [x.clone().requires_grad_() for x in inputs]
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager", dynamic=True)(*leaves)
    assert torch.equal(compiled, y)
    compiled.sum().backward()
    plain = [x.clone().requires_grad_() for x in inputs]
    Model()(*plain).sum().backward()
    for a, b in zip(leaves, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_export_form_has_only_torch_operators() -> None:
    args = arguments(1, 13, 6, 2, D=False, z=False)

    class Model(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return zk.selective_scan(u, dt, A, B, C, dt_softplus=True, path=torch.arange(13).flip(0))[0]

    inputs = tuple(args[k] for k in ("u", "dt", "A", "B", "C"))
    with zk.backend("export"):
        exported = torch.export.export(Model(), inputs)
    assert not any("zoo_kernels" in str(node.target) for node in exported.graph.nodes)
    util.close(exported.module()(*inputs), Model()(*inputs))


def test_autocast_and_mixed_dtypes(native) -> None:
    args = arguments(2, 30, 8, 4)
    y0, _ = exact(args, dt_softplus=True)
    for backend in ("native", "reference"):
        with zk.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = zk.selective_scan(**args, dt_softplus=True)
            util.close(y, y0)  # float32 stays float32: autocast does not reach inside
            half = {k: v.bfloat16() if k in ("u", "dt", "B", "C", "z") else v for k, v in args.items()}
            y, h = zk.selective_scan(**half, dt_softplus=True, return_final_state=True)
        assert y.dtype == torch.bfloat16
        assert h.dtype == torch.float32
        util.close(y, exact(half, dt_softplus=True)[0])


def test_functional_call_and_vmap_free_grad(native) -> None:
    args = arguments(1, 12, 4, 2, D=False, z=False)

    def loss(A):
        return zk.selective_scan(args["u"], args["dt"], A, args["B"], args["C"], dt_softplus=True)[0].square().sum()

    leaf = args["A"].clone().requires_grad_()
    loss(leaf).backward()
    module = torch.nn.Module()
    module.A = torch.nn.Parameter(args["A"].clone())
    module.forward = lambda: loss(module.A)
    other = args["A"].clone().requires_grad_()
    torch.func.functional_call(module, {"A": other}, ()).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("shape", [(1, 300, 40, 16), (3, 65, 200, 8), (1, 9000, 8, 16)])
def test_any_number_of_threads_gives_the_same_bits(native, shape: tuple[int, ...]) -> None:
    args = {k: None if v is None else v.requires_grad_() for k, v in arguments(*shape).items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with zk.backend("native"):
                y, _ = zk.selective_scan(**args, dt_softplus=True)
                results.append((y.detach(), *torch.autograd.grad(y.sum(), list(args.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_instruction_set(native, monkeypatch, dtype: torch.dtype) -> None:
    """Each one that this processor has, forward and backward, against the float64 reference."""
    names = ["selective_scan", "selective_scan_step", "causal_conv1d", "causal_conv1d_step", "linear"]
    try:
        for isa in native.known():
            monkeypatch.setenv("ZOO_KERNELS_ISA", isa)
            native.isa.cache_clear()
            native.function.cache_clear()
            assert native.isa() == isa
            found = [r for r in zk.self_check(dtype=dtype, operators=names) if r["backend"] == "native"]
            assert len(found) == len(names)
            for record in found:
                assert record["ok"] is True, (isa, record)
    finally:
        monkeypatch.undo()
        native.isa.cache_clear()
        native.function.cache_clear()


def test_complex_A_runs_on_the_reference_and_says_so(native, caplog) -> None:
    args = arguments(1, 8, 4, 2, z=False)
    args["A"] = torch.complex(args["A"], torch.randn(4, 2))
    args["B"], args["C"] = args["B"].to(torch.complex64), args["C"].to(torch.complex64)
    y, h = zk.selective_scan(**args, dt_softplus=True, return_final_state=True)
    assert y.dtype == torch.float32
    assert h.dtype == torch.complex64
    with zk.backend("native"), pytest.raises(zk.BackendError, match="complex64, which only the reference"):
        zk.selective_scan(**args, dt_softplus=True)


def test_path_memory_is_not_repeated(native) -> None:
    """Four paths allocate the output alone: nothing of four times its size."""
    args = arguments(1, 256, 32, 4, paths=4, z=False)
    path = torch.stack([torch.randperm(256) for _ in range(4)])
    with zk.backend("native"):
        size = util.largest_allocation(lambda: zk.selective_scan(**args, path=path))
    assert size == 4 * 256 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 37)}, r"u has shape \(2, 37\); it must be \(batch, length, channels\)"),
        ({"dt": torch.zeros(2, 36, 12)}, r"dt has shape \(2, 36, 12\); it must be \(batch 2, length 37, channels 12\)"),
        ({"A": torch.zeros(12)}, r"A has shape \(12,\)"),
        ({"B": torch.zeros(2, 37, 5)}, r"B has shape \(2, 37, 5\); it must be .*state 4"),
        (
            {"B": torch.zeros(2, 37, 5, 4), "C": torch.zeros(2, 37, 5, 4)},
            "B has 5 groups; they must divide the 12 channels",
        ),
        ({"C": torch.zeros(2, 37, 2, 4)}, r"C has shape \(2, 37, 2, 4\); it must be \(2, 37, 4\), as B is"),
        ({"u": torch.zeros(2, 37, 12, dtype=torch.int64)}, "u is int64; it must be one of float32"),
        ({"D": torch.zeros(3)}, r"D has shape \(3,\); it must be \(channels 12\)"),
        ({"path": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"path has shape \(2, 3, 4\)"),
        ({"path": torch.arange(38)}, "path has 38 steps"),
        ({"path": torch.rand(37)}, "path is float32; it must be one of int64"),
        ({"path": torch.arange(37) + 1}, "path has rows 1 to 37; they must be within 0 to 36"),
        ({"lengths": torch.tensor([1.0, float("nan")])}, "lengths is float32; it must be one of int64"),
        ({"lengths": torch.tensor([1, 38])}, "lengths has values 1 to 38; they must be within 0 to 37"),
        ({"resets": torch.zeros(2, 37)}, "resets is float32; it must be one of bool"),
        ({"reverse": [True, False]}, "reverse has 2 flags"),
        (
            {"initial_state": torch.zeros(2, 4, 12)},
            r"initial_state has shape \(2, 4, 12\); it must be \(batch 2, channels 12, state 4\)",
        ),
        ({"dt": torch.zeros(2, 37, 12, device="meta")}, "dt is on meta; it must be on cpu"),
        ({"dt_proj": torch.zeros(12, 3)}, r"dt has shape \(2, 37, 12\); it must be \(batch 2, length 37, rank 3\)"),
        ({"dt_proj": torch.zeros(11, 3)}, r"dt_proj has shape \(11, 3\); it must be \(channels 12, rank\)"),
        ({"z": 3.0}, "z is float; it must be a torch.Tensor"),
        ({"C": None}, "D and z must be None where C is None"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zk.selective_scan(**{**arguments(), **change})


def test_decays_are_exact_over_their_whole_range(native):
    """One step from a state of 1 with no input gives the decay itself: exp(dt A) to a few units in the last place."""
    x = torch.cat(
        [-torch.logspace(-9, 2, 4000, dtype=torch.float64), torch.linspace(-80, 80, 4001, dtype=torch.float64)]
    )
    x = x.float()
    one = torch.ones(1, 1, x.numel())
    none = torch.zeros(1, 1, 1)
    with zk.backend("native"):
        y, _ = zk.selective_scan(0 * one, one, x[:, None], none, none + 1, initial_state=torch.ones(1, x.numel(), 1))
    want = torch.exp(x.double())
    kept = want > 1e-37  # below, results are flushed to 0
    error = ((y[0, 0].double() - want).abs() / want)[kept]
    # The rounding of x log2(e) in float32 costs |x| times a unit: part of the definition, not of the exponential.
    assert float((error / (1 + x.double().abs()[kept])).max()) < 2.5e-7
    # Near 1 what counts is how far the decay is from 1.
    near = (x < 0) & (x > -0.01)
    assert torch.allclose(y[0, 0][near].double(), want[near], rtol=0, atol=1.3e-7)


def test_decays_at_infinity(native):
    x = torch.tensor([-float("inf"), -1e30, -200.0, 0.0, 200.0, 1e30, float("inf"), float("nan")] * 3)
    one = torch.ones(1, 1, x.numel())
    none = torch.zeros(1, 1, 1)
    with zk.backend("native"):
        y, _ = zk.selective_scan(0 * one, one, x[:, None], none, none + 1, initial_state=torch.ones(1, x.numel(), 1))
    assert torch.equal(y[0, 0].nan_to_num(7.0, 9.0), torch.exp(x).nan_to_num(7.0, 9.0))
