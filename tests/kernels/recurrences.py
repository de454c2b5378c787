"""What the tests of ssd and its relatives share: every back end against the float64 definition, and golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import zoo_kernels

GOLDEN = Path(__file__).parents[1] / "golden"
LIMIT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _path(name: str) -> Path:
    return GOLDEN / f"{name}.safetensors"


def golden(name: str) -> dict[str, Tensor]:
    with safe_open(_path(name), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)


def metadata(name: str) -> dict[str, str]:
    with safe_open(_path(name), "pt") as file:
        return file.metadata()


def agree(found: Tensor, exact: Tensor, limit: float) -> None:
    """The largest difference relative to the largest value; not finite in the same places."""
    assert found.shape == exact.shape, (tuple(found.shape), tuple(exact.shape))
    found, exact = found.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if finite.any():
        error = float((found - exact)[finite].abs().max()) / max(float(exact[finite].abs().max()), 1e-3)
        assert error <= limit, f"relative difference {error:.3g}, allowed {limit:.3g}"


def leaves_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value if part is not None for t in leaves_of(part)]


def results(function, tensors: dict[str, Any], options: dict[str, Any], backend: str, dtype: torch.dtype, states=()):
    """Outputs, and gradients of all floating-point tensors for fixed weights on the outputs."""
    cast = {}
    for name, value in tensors.items():
        keep = torch.float64 if dtype == torch.float64 else torch.float32
        if isinstance(value, tuple):
            cast[name] = tuple(t.to(keep).clone().requires_grad_() for t in value)
        elif value is None or not value.is_floating_point():
            cast[name] = value
        else:
            cast[name] = value.to(keep if name in states else dtype).clone().requires_grad_()
    with zoo_kernels.backend(backend):
        outputs = leaves_of(function(**cast, **options))
        inputs = [t for t in leaves_of([v for v in cast.values() if v is not None]) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randint(-2, 3, o.shape, generator=generator).to(o.dtype) for o in outputs]
        pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad and o.numel()]
        grads = (
            torch.autograd.grad(
                [o for o, _ in pairs], inputs, [w for _, w in pairs], allow_unused=True, materialize_grads=True
            )
            if pairs
            else [torch.zeros_like(t) for t in inputs]
        )
    return [o.detach() for o in outputs], [g.detach() for g in grads]


def equal_to_definition(function, tensors, options, dtype, *, states=(), backend="auto", grads=True, factor=1.0):
    """``function`` in ``dtype`` on ``backend`` against float64 on the reference, from the same rounded numbers."""
    rounded = {
        k: v.to(dtype).double() if isinstance(v, Tensor) and v.is_floating_point() and k not in states else v
        for k, v in tensors.items()
    }
    exact = results(function, rounded, options, "reference", torch.float64, states)
    found = results(function, tensors, options, backend, dtype, states)
    for f, e in zip(found[0], exact[0], strict=True):
        agree(f, e, LIMIT[dtype] * factor)
    if grads:
        for f, e in zip(found[1], exact[1], strict=True):
            agree(f, e, LIMIT[dtype] * factor * 2)


def strided(x: Tensor) -> Tensor:
    """The same numbers as a slice of a wider tensor, batch and length swapped in memory."""
    wide = torch.full((x.shape[1], x.shape[0], *x.shape[2:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = wide.transpose(0, 1)[..., 1:-2]
    view.copy_(x)
    return view
