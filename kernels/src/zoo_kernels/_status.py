"""What can run on this machine: the data behind ``zoo doctor``, and a comparison of back ends with the reference."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import OPERATORS, Operator


def _load_all() -> dict[str, str]:
    """Import every module of operators; the reasons of those that fail."""
    import zoo_kernels

    broken = {}
    for module in sorted({m for m in zoo_kernels._LAZY.values() if m.startswith("zoo_kernels.ops.")}):
        try:
            importlib.import_module(module)
        except Exception as error:  # one operator must not take the report down
            broken[module.rsplit(".", 1)[1]] = f"{type(error).__name__}: {error}"
    return broken


def status() -> dict[str, Any]:
    """Plain data for ``zoo doctor``.

    ``operators``: {operator: {back end: None if it can run here, else the reason}}; ``native``: the library's path,
    instruction set and threads, or the reason why it is missing; ``triton``: its version, or the reason;
    ``forced``: the forced back end, or None; ``broken``: {module: error} for operators that do not import.
    """
    from . import _backends, _native, _triton

    broken = _load_all()
    return {
        "forced": _backends.forced() or None,
        "native": _native.describe(),
        "triton": _triton.describe(),
        "operators": {
            name: {back: op.unavailable(back) for back in op.backends} for name, op in sorted(OPERATORS.items())
        },
        "broken": broken,
    }


def self_check(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    operators: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Run small cases of every operator (or those named) on every available back end, forward and backward.

    Returns one record for each operator and back end: ``operator``, ``backend``, ``ok``, ``error`` (largest difference
    from the float64 reference, relative to the largest value), ``detail`` (why it failed or was left out, or None).
    """
    _load_all()
    place = torch.device(device)
    return [
        _check(op, name, place, dtype)
        for _, op in sorted(OPERATORS.items())
        for name in op.backends
        if name != "reference" and op.cases is not None and (operators is None or op.name in operators)
    ]


def _check(op: Operator, name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    record: dict[str, Any] = {"operator": op.name, "backend": name, "ok": False, "error": None, "detail": None}
    served = {"native": "cpu", "triton": "cuda"}.get(name)
    if served is not None and served != device.type:
        return record | {"ok": None, "detail": f"serves {served}, not {device.type}"}
    reason = op.unavailable(name)
    if reason is not None:
        return record | {"ok": None, "detail": reason}
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 4e-2)
    worst = 0.0
    assert op.cases is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cases = list(op.cases(device, dtype))
    try:
        for args in cases:
            exact = _results(op, [_double(a) for a in args], "reference")
            found = _results(op, list(args), name)
            for a, b in zip(exact, found, strict=True):
                if a.numel():
                    scale = max(float(a.abs().max()), 1e-3)
                    worst = max(worst, float((a - b.to(a.dtype)).abs().max()) / scale)
    except Exception as error:  # whatever goes wrong on this machine is the answer
        return record | {"detail": f"{type(error).__name__}: {error}"}
    ok = worst <= limit
    return record | {"ok": ok, "error": worst, "detail": None if ok else f"differs by {worst:.2g}, allowed {limit:g}"}


def _double(value: Any) -> Any:
    """A tensor of numbers in double precision, everything else as it is."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float64))


def _weighted(value: Tensor) -> Tensor:
    """A number of all of a result's, each with a weight of its own, complex ones as two."""
    value = _double(torch.view_as_real(value) if value.is_complex() else value).flatten()
    return (value * torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64)).sum()


def _results(op: Operator, args: list[Any], name: str) -> list[Tensor]:
    """Outputs and gradients (for outputs weighted by a fixed pattern) of one call; arguments are cloned."""
    args = [a.clone() if isinstance(a, Tensor) else a for a in args]
    for i in op.differentiable:
        if args[i] is not None:
            args[i].requires_grad_()
    outputs = op.op(*args, bool(op.saved), name)
    outputs = (outputs if isinstance(outputs, tuple) else (outputs,))[: len(op.outputs)]
    moved = (args[op.arguments.index(name)] for name in op.mutates)
    results = [o.detach() for o in outputs] + [t for t in moved if t is not None]
    if op.differentiable:
        total = sum(_weighted(o) for o in outputs if o.numel())
        leaves = [args[i] for i in op.differentiable if args[i] is not None]
        results += torch.autograd.grad(total, leaves)
    return results
