"""How two tensors are compared, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaNs must be at the same places. Complex works."""
    if found.numel() == 0:
        return 0.0
    wide = torch.complex128 if found.is_complex() or expected.is_complex() else torch.float64
    a, b = found.detach().cpu().to(wide), expected.detach().cpu().to(wide)
    nan = torch.isnan(b)
    if not torch.equal(torch.isnan(a), nan):
        return float("inf")
    infinite = torch.isinf(b.abs()) & ~nan
    if not torch.equal(a[infinite], b[infinite]):
        return float("inf")
    keep = ~nan & ~infinite
    if not bool(keep.any()):
        return 0.0
    difference = (a[keep] - b[keep]).abs().max().item()
    largest = b[keep].abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 else float("inf")


def assert_close(found: Tensor, expected: Tensor, *, tolerance: float = 1e-4, what: str = "output") -> float:
    """Equal shapes and a relative error within ``tolerance``; integers and booleans exactly. Returns the error."""
    assert tuple(found.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    )
    if not (expected.is_floating_point() or expected.is_complex()):
        different = int((found.detach().cpu().to(torch.float64) != expected.cpu().to(torch.float64)).sum())
        assert different == 0, f"{what}: {different} of {expected.numel()} integers differ"
        return 0.0
    error = relative_error(found, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"
    return error
