"""Argument checks that the operators share, and the canonical form of what every scan takes.

Shapes, dtypes and devices are checked where the public function is called (and traced); values (rows of a path,
lengths) are checked by :func:`check_values` when a call runs on a CPU, because looking at them on a GPU would stall it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def is_tensor(operator: str, name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """``value`` must be a tensor, on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{operator}: {name} is {type(value).__name__}; it must be a torch.Tensor")
    if like is not None and value.device != like.device:
        raise ValueError(f"{operator}: {name} is on {value.device}; it must be on {like.device} like the other tensors")
    return value


def has_shape(
    operator: str, name: str, value: Any, axes: Sequence[tuple[str, int | None]], like: Tensor | None = None
) -> Tensor:
    """``value`` must be a tensor with these axes: (what it is called, its size or None for any)."""
    is_tensor(operator, name, value, like)
    good = value.dim() == len(axes)
    if good:
        for size, (_, wanted) in zip(value.shape, axes, strict=True):
            if wanted is not None and size != wanted:
                good = False
    if not good:
        words = ", ".join(label if size is None else f"{label} {size}" for label, size in axes)
        raise ValueError(f"{operator}: {name} has shape {tuple(value.shape)}; it must be ({words})")
    return value


def has_dtype(operator: str, name: str, value: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> Tensor:
    if value.dtype not in allowed:
        words = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{operator}: {name} is {str(value.dtype).removeprefix('torch.')}; it must be one of {words}")
    return value


def signature(*tensors: Any) -> tuple[Any, ...] | None:
    """Shapes, dtypes and devices, by which a public function remembers what it has found to fit: checks take longer
    than a small call. None where values are not plain tensors, or a trace needs the checks in it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return None
    return tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])


def remember(seen: set[tuple[Any, ...]], found: tuple[Any, ...] | None) -> None:
    """Keep a signature whose tensors fit."""
    if found is not None:
        if len(seen) >= 4096:
            seen.clear()
        seen.add(found)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that accumulates and that states have: float64 for float64, else float32 (complex likewise)."""
    return torch.promote_types(dtype, torch.float32)


def canonical_path(
    operator: str, path: Tensor | None, *, batch: int, length: int, paths: int | None, like: Tensor
) -> Tensor | None:
    """A path as (1 or batch, K, steps) int64, contiguous; ``paths`` None: one path, without a K axis."""
    if path is None:
        return None
    is_tensor(operator, "path", path, like)
    has_dtype(operator, "path", path, INTEGERS)
    if paths is None:
        if path.dim() == 1:
            path = path[None, None]
        elif path.dim() == 2 and path.shape[0] in (1, batch):
            path = path[:, None]
        else:
            raise ValueError(
                f"{operator}: path has shape {tuple(path.shape)}; it must be (steps,) or (batch {batch}, steps)"
            )
    elif path.dim() == 2 and path.shape[0] == paths:
        path = path[None]
    elif not (path.dim() == 3 and path.shape[0] in (1, batch) and path.shape[1] == paths):
        raise ValueError(
            f"{operator}: path has shape {tuple(path.shape)}; it must be (paths {paths}, steps) or "
            f"(batch {batch}, paths {paths}, steps)"
        )
    if path.shape[-1] > length:
        raise ValueError(f"{operator}: path has {path.shape[-1]} steps; at most length {length} fit, each row once")
    return path.to(torch.int64).contiguous()


def canonical_reverse(operator: str, reverse: bool | Sequence[bool], *, paths: int) -> list[bool]:
    """One flag for each path."""
    if isinstance(reverse, bool):
        return [reverse] * paths
    flags = [bool(flag) for flag in reverse]
    if len(flags) != paths:
        raise ValueError(
            f"{operator}: reverse has {len(flags)} flags; it must be one bool, or one for each of {paths} paths"
        )
    return flags


def canonical_resets(operator: str, resets: Tensor | None, *, batch: int, length: int, like: Tensor) -> Tensor | None:
    """(batch, length) bool, by row."""
    if resets is None:
        return None
    has_shape(operator, "resets", resets, [("batch", batch), ("length", length)], like)
    has_dtype(operator, "resets", resets, (torch.bool,))
    return resets.contiguous()


def canonical_lengths(operator: str, lengths: Tensor | None, *, batch: int, like: Tensor) -> Tensor | None:
    """(batch,) int64: how many steps of the path are walked."""
    if lengths is None:
        return None
    has_shape(operator, "lengths", lengths, [("batch", batch)], like)
    has_dtype(operator, "lengths", lengths, INTEGERS)
    return lengths.to(torch.int64).contiguous()


def check_values(operator: str, path: Tensor | None, lengths: Tensor | None, *, length: int) -> None:
    """Rows of a path within 0 .. length - 1, lengths within 0 .. steps. Looks on a CPU only."""
    if path is not None and path.device.type == "cpu" and path.numel():
        low, high = (int(v) for v in torch.aminmax(path))
        if low < 0 or high >= length:
            raise ValueError(f"{operator}: path has rows {low} to {high}; they must be within 0 to {length - 1}")
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        steps = length if path is None else path.shape[-1]
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(
                f"{operator}: lengths has values {low} to {high}; they must be within 0 to {steps}, the path's steps"
            )
