"""What the kernel tests share: random arguments, a float64 comparison, the memory that a call
takes, and a child process for another setting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Largest difference from the float64 reference, relative to its largest value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(found: Tensor, exact: Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0) -> None:
    """``found`` within its dtype's tolerance of ``exact``, and not finite exactly where that is not."""
    assert found.shape == exact.shape, (tuple(found.shape), tuple(exact.shape))
    limit = TOLERANCE[dtype or found.dtype] * factor
    found, exact = found.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if finite.any():
        scale = max(float(exact[finite].abs().max()), 1e-3)
        error = float((found - exact)[finite].abs().max()) / scale
        assert error <= limit, f"relative error {error:.3g}, allowed {limit:.3g}"


def double(value: Any) -> Any:
    """Tensors of floating point as float64, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def strided(x: Tensor, how: int) -> Tensor:
    """The same numbers in another layout: 0 contiguous, 1 a slice of a wider tensor, 2 batch and length swapped, 3 last
    axis not contiguous."""
    if how == 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if how == 2 and x.dim() >= 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == 3:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() >= 2 else x
    return x


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh Python with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest tensor memory that ``call`` takes on the CPU, inside operators too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")
