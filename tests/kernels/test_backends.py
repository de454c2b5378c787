"""The choice of back ends, what is said about it, and the native library's surroundings."""

from __future__ import annotations

import json
import logging
import os
import sys

import pytest
import torch
import torch.nn.functional as F
import util

import zoo_kernels as zk
from zoo_kernels import _backends, _native, _ops, build
from zoo_kernels import _status as status

ARGS = {"x": torch.ones(1, 4, 3), "weight": torch.ones(3, 2)}


@pytest.fixture
def broken(monkeypatch):
    """causal_conv1d with a native back end that refuses, for a reason of its own."""
    from zoo_kernels.ops.causal_conv1d import _conv

    monkeypatch.setitem(_conv._reasons, "native", "no luck today")
    monkeypatch.setattr(_backends, "_told", set())
    return _conv


def test_import_loads_neither_torch_nor_operators() -> None:
    out = util.run_python("import sys, zoo_kernels; print('torch' in sys.modules, 'triton' in sys.modules)")
    assert out.split() == ["False", "False"]


def test_passed_over_once_with_its_reason(broken, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo_kernels"):
        for _ in range(3):
            y, _ = zk.causal_conv1d(**ARGS)
    assert torch.equal(y[0, 1:], torch.full((3, 3), 2.0))
    said = [r.getMessage() for r in caplog.records]
    assert said == ["causal_conv1d: the native back end is passed over: no luck today"]


def test_forced_raises_with_its_reason(broken) -> None:
    with (
        zk.backend("native"),
        pytest.raises(zk.BackendError, match=r"causal_conv1d: the back end 'native'.*no luck today"),
    ):
        zk.causal_conv1d(**ARGS)
    with zk.backend("triton"), pytest.raises(zk.BackendError, match="'triton'"):
        zk.causal_conv1d(**ARGS)


def test_backend_is_a_setter_and_a_context() -> None:
    assert _backends.forced() == ""
    with zk.backend("reference"):
        assert _backends.forced() == "reference"
        with zk.backend("auto"):
            assert _backends.forced() == ""
        assert _backends.forced() == "reference"
    assert _backends.forced() == ""
    try:
        zk.backend("reference")
        assert _backends.forced() == "reference"
    finally:
        zk.backend(None)
    assert _backends.forced() == ""
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, native, triton, export"):
        zk.backend("cuda")


def test_the_backward_keeps_the_forced_back_end(monkeypatch) -> None:
    x = torch.ones(1, 4, 3, requires_grad=True)
    with zk.backend("reference"):
        y, _ = zk.causal_conv1d(x, ARGS["weight"])
    called = []
    original = _ops.Operator._recompute
    monkeypatch.setattr(_ops.Operator, "_recompute", lambda self, *a: called.append(self.name) or original(self, *a))
    y.sum().backward()
    assert called == ["causal_conv1d"]
    assert x.grad is not None


def test_environment_forces_a_back_end() -> None:
    code = "from zoo_kernels import _backends; print(_backends.forced())"
    assert util.run_python(code, ZOO_KERNELS="reference").strip() == "reference"
    with pytest.raises(AssertionError, match="ZOO_KERNELS is 'fast'; expected one of"):
        util.run_python(code, ZOO_KERNELS="fast")


def test_status_is_plain_data() -> None:
    found = zk.status()
    assert json.loads(json.dumps(found)) == found
    assert found["broken"] == {}
    assert {"selective_scan", "selective_scan_step", "causal_conv1d", "causal_conv1d_step", "linear"} <= set(
        found["operators"]
    )
    assert all(per["reference"] is None for per in found["operators"].values())


def test_self_check_passes_here() -> None:
    for record in zk.self_check():
        assert record["ok"] in (True, None), record


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_self_check_passes_on_a_gpu(dtype) -> None:
    for record in zk.self_check("cuda", dtype):
        assert record["ok"] in (True, None), record


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reference_differentiates_on_a_gpu() -> None:
    """Inside a backward pass, whose thread is the device's only one: a second thread would wait for ever."""
    x = torch.randn(1, 4, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    with zk.backend("reference"):
        y, _ = zk.causal_conv1d(x, torch.ones(3, 2, device="cuda", dtype=torch.float64))
        y.sum().backward()
    assert torch.equal(x.grad[:, :-1], torch.full((1, 3, 3), 2.0, device="cuda", dtype=torch.float64))


def test_the_reference_differentiates_in_the_thread_of_the_backward_pass(monkeypatch) -> None:
    import threading

    from zoo_kernels.ops.causal_conv1d import reference

    seen = []
    original = reference.forward
    monkeypatch.setattr(
        reference, "forward", lambda *a, **k: (seen.append(threading.get_ident()), original(*a, **k))[1]
    )
    x = torch.randn(1, 4, 3, requires_grad=True)
    with zk.backend("reference"):
        y, _ = zk.causal_conv1d(x, torch.ones(3, 2))
        y.sum().backward()
    assert len(seen) == 2
    assert set(seen) == {threading.get_ident()}


def test_a_module_that_does_not_import_costs_only_its_back_end(monkeypatch, tmp_path) -> None:
    from zoo_kernels.ops.causal_conv1d import _conv

    (tmp_path / "zk_test_broken.py").write_text("import triton_of_another_age\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_conv.backends, "broken", "zk_test_broken")
    monkeypatch.setitem(_conv.backends, "absent", "zk_test_absent")
    assert _conv._import("broken") == "No module named 'triton_of_another_age'"
    assert _conv._import("absent") == "causal_conv1d has no absent implementation"
    assert _conv.unavailable("reference") is None


def test_missing_library_is_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    assert "python -m zoo_kernels.build" in str(_native._load.__wrapped__())
    (tmp_path / "native_missing.txt").write_text("no C++ compiler was found\n")
    assert "not built at installation: no C++ compiler was found" in str(_native._load.__wrapped__())
    (tmp_path / build.LIBRARY).write_text("not a library")
    assert "does not load" in str(_native._load.__wrapped__())


@pytest.mark.skipif(not build.SOURCES.is_dir(), reason="an installed package has no native sources")
def test_build_errors_are_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler was found \\(looked for no-such-compiler\\)"):
        build.compile_library(tmp_path / "out.so", work=tmp_path)
    with pytest.raises(build.BuildError, match="native sources are not at"):
        build.compile_library(tmp_path / "out.so", work=tmp_path, sources=tmp_path / "none")


def test_unknown_instruction_set(native) -> None:
    with pytest.raises(AssertionError, match="ZOO_KERNELS_ISA is 'mmx'; this processor has baseline"):
        util.run_python("from zoo_kernels import _native; _native.isa()", ZOO_KERNELS_ISA="mmx")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_works_after_a_fork(native) -> None:
    """numpy compares in the child: torch itself hangs there once OpenMP's threads ran in the parent."""
    code = (
        "import os, torch, zoo_kernels as zk\n"
        "torch.set_num_threads(3)\n"
        "x, w = torch.randn(4, 600, 64), torch.randn(64, 4)\n"
        "y = zk.causal_conv1d(x, w)[0]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if (zk.causal_conv1d(x, w)[0].numpy() == y.numpy()).all() else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(zk.causal_conv1d(x, w)[0], y))\n"
    )
    assert util.run_python(code, ZOO_KERNELS="native").split() == ["0", "True"]


def test_calls_from_several_threads(native) -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, w = torch.randn(4, 600, 64), torch.randn(64, 4)
    want = zk.causal_conv1d(x, w)[0]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(lambda _: zk.causal_conv1d(x, w)[0], range(40)):
                assert torch.equal(y, want)
    finally:
        torch.set_num_threads(before)


def test_offsets_are_64_bit(native) -> None:
    """Rows beyond 2^31 elements, in allocations of which only a few pages are ever touched."""
    if sys.platform != "linux":
        pytest.skip("needs memory that is only reserved")
    length, channels = 2**31 // 64 + 5, 64
    x = torch.empty(1, length, channels, dtype=torch.bfloat16)  # 4 GiB of address space, of which a few pages are used
    x[0, -3:] = torch.arange(3 * channels, dtype=torch.float32).view(3, channels).bfloat16()
    path = torch.tensor([length - 3, length - 2, length - 1])
    w = torch.ones(channels, 2)
    from zoo_kernels.ops.causal_conv1d import native as conv

    out = torch.empty(1, length, channels, dtype=torch.bfloat16)
    numbers, alive = conv._arguments(x, w, None, False, path[None, None], [False], None, None, None)
    _native.function("causal_conv1d_forward")(*numbers, out.data_ptr(), _native.DTYPES[out.dtype], 0)
    assert len(alive) == 7
    want = x[0, -3:].float()
    assert torch.equal(out[0, -3:], (want + torch.nn.functional.pad(want, (0, 0, 1, 0))[:-1]).bfloat16())


def test_a_profile_shows_operators_by_their_names():
    x = torch.ones(1, 4, 3)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        zk.selective_scan(x, x, -torch.ones(3, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 2))
        zk.rms_norm(x, torch.ones(3))
    names = {event.key for event in found.key_averages()}
    assert {"zoo_kernels::selective_scan", "zoo_kernels::rms_norm"} <= names


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_numbers_give_shapes(grad) -> None:
    status._load_all()
    for name, op in _ops.OPERATORS.items():
        if op.cases is None:
            continue
        for args in op.cases(torch.device("cpu"), torch.float32):
            there = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
            for i in op.differentiable if grad else ():
                if meta[i] is not None:
                    meta[i].requires_grad_()
            expected, found = op(*there), op(*meta)
            for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (expected, found)), strict=True):
                assert b.is_meta, name
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name


def _doubles(op):
    for args in op.cases(torch.device("cpu"), torch.float64):
        yield [status._double(a.clone()) if isinstance(a, torch.Tensor) else a for a in args]


def _first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def _size(x: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).square().sum()


@pytest.mark.parametrize("name", ["cauchy", "causal_conv1d", "linear_attention_gated", "linear_scan", "rms_norm",
                                  "selective_scan", "slstm", "ssd_core"])  # fmt: skip
def test_second_derivatives_are_the_definitions(name) -> None:
    status._load_all()
    op = _ops.OPERATORS[name]
    assert op.differentiable
    for args in _doubles(op):
        found = []
        for call in (op, op._plainly):
            given = list(args)
            leaves = []
            for i in op.differentiable:
                if given[i] is not None:
                    given[i] = args[i].clone().requires_grad_()
                    leaves.append(given[i])
            y = _first(call(*given) if call is op else call(given))
            first = torch.autograd.grad(_size(y), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(_size(g) for g in first) + _size(y), leaves))
        for ours, theirs in zip(*found, strict=True):
            util.close(torch.view_as_real(ours) if ours.is_complex() else ours,
                       torch.view_as_real(theirs) if theirs.is_complex() else theirs)  # fmt: skip


def test_forward_mode_agrees_with_reverse_mode() -> None:
    """<w, J v> = <J^T w, v>; a tangent that got lost would be zero without a word."""
    status._load_all()
    checked = set()
    for name, op in _ops.OPERATORS.items():
        if op.cases is None or not op.differentiable:
            continue
        for args in _doubles(op):
            for i in op.differentiable:
                if args[i] is None or args[i].is_complex():
                    continue

                def call(x, args=args, i=i, op=op):
                    return _first(op(*args[:i], x, *args[i + 1 :]))

                v = torch.randn_like(args[i])
                y, tangent = torch.func.jvp(call, (args[i],), (v,))
                leaf = args[i].clone().requires_grad_()
                w = torch.randn_like(y)
                (gradient,) = torch.autograd.grad(call(leaf), [leaf], w)
                assert float((w * tangent).sum()) == pytest.approx(float((gradient * v).sum()), rel=1e-8, abs=1e-8), (
                    name
                )
                with torch.autograd.forward_ad.dual_level():
                    dual = call(torch.autograd.forward_ad.make_dual(args[i], v))
                    assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
                checked.add(name)
    assert len(checked) >= 7


def test_a_gradient_penalty_reaches_the_parameters() -> None:
    x = torch.randn(2, 9, 4, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    y, _ = zk.causal_conv1d(x, weight, activation="silu")
    (slope,) = torch.autograd.grad(y.sum(), [x], create_graph=True)
    (found,) = torch.autograd.grad(slope.norm(), [weight])
    plain = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight[:, None], groups=4))
    (slope,) = torch.autograd.grad(plain.sum(), [x], create_graph=True)
    (expected,) = torch.autograd.grad(slope.norm(), [weight])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.abs().max()) > 0.1
