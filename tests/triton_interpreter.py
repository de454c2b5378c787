"""Shared by the tests of the Triton kernels: where they run, compare with the float64 reference, poison memory.

On a machine with a GPU they run on it (``pytest -m gpu tests/kernels``). Triton decides when it is imported whether it
interprets, so without one these tests run in a process of their own with TRITON_INTERPRET=1, which
``kernels/test_triton_interpreter.py`` starts. To run some of them by hand::

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_ssd.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRET and torch.cuda.is_available()
pytest.importorskip("triton")


def _broken() -> str | None:
    """Why the interpreter can run no kernel here, or None: Triton 3.6 counts loops in a way that numpy 2.4 refuses."""
    import numpy
    import triton
    import triton.language as tl

    @triton.jit
    def count(out, n):
        value = tl.load(out)
        for _i in range(0, n):
            value += 1.0
        tl.store(out, value)

    try:
        count[(1,)](torch.zeros(1), 2)
    except triton.runtime.errors.InterpreterError as error:
        return f"the interpreter of Triton {triton.__version__} does not work with numpy {numpy.__version__}: {error}"
    return None


if INTERPRET and (reason := _broken()) is not None:
    pytest.skip(reason, allow_module_level=True)


def kernel_test(test: Callable[..., None]) -> Callable[..., None] | None:
    """Collect this test where Triton interprets, or where there is a GPU (marked ``gpu``, tensors made on it)."""
    if ON_GPU:
        return pytest.mark.gpu(pytest.mark.usefixtures("made_on_gpu")(test))
    return test if INTERPRET else None


def kinds(shapes: Sequence[tuple[int, ...]], half: int = 2) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Every shape in float32, and the one at ``half`` in both half precisions."""
    return [(shape, torch.float32) for shape in shapes] + [
        (shapes[half], torch.bfloat16), (shapes[half], torch.float16)
    ]  # fmt: skip


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN (or large integers): what a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value; infinite where a value is NaN or a shape differs."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    got, want = (t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in (got, want))
    worst = float((got - want).abs().max())
    return worst / max(float(want.abs().max()), 1e-12) if worst == worst else float("inf")


def agrees(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: dict[str, Tensor],
    options: dict[str, object],
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    keep: tuple[str, ...] = (),
) -> None:
    """``function(**tensors, **options)`` on the triton back end in ``dtype`` against the reference in float64.

    Outputs and the gradients of all ``tensors`` are compared; those named in ``keep`` stay float32.
    """
    import zoo_kernels

    low = {
        name: t.to(t.dtype if t.is_complex() else torch.float32 if name in keep else dtype)
        for name, t in tensors.items()
    }
    low = {name: t.detach().requires_grad_() for name, t in low.items()}
    high = {
        name: t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()
        for name, t in low.items()
    }
    with zoo_kernels.backend("reference"):
        want = [t for t in function(**high, **options) if t is not None]
        torch.manual_seed(1)
        weights = [torch.randn_like(t) for t in want]
        weights = [
            w.to(dtype).to(w.dtype) if not w.is_complex() else w.to(torch.complex64).to(w.dtype) for w in weights
        ]
        sums = torch.autograd.grad(want, list(high.values()), weights, allow_unused=True)
    with zoo_kernels.backend("triton"):
        got = [t for t in function(**low, **options) if t is not None]
        assert len(got) == len(want)
        found = torch.autograd.grad(
            got, list(low.values()), [w.to(t.dtype) for w, t in zip(weights, got, strict=True)], allow_unused=True
        )
    errors = {f"output {i}": difference(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    for name, g, w in zip(high, found, sums, strict=True):
        if w is not None:
            errors[f"gradient of {name}"] = difference(g if g is not None else torch.zeros_like(w), w)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"larger than {tolerance}: {wrong}"
