"""The CPU path of the linear scan: kernels/native/linear_scan.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _memory
from zoo_kernels import _native as native

from . import empty_borders, state_dtype


def unavailable() -> str | None:
    return native.missing("linear_scan_forward", "linear_scan_backward")


def unsupported(x, a, path, reverse, initial_state, return_final_state, resets, lengths) -> str | None:
    if x.is_complex():
        return None if x.device.type == "cpu" else f"x is on {x.device}; the native library runs on a CPU"
    return native.wrong_dtypes(("x", "a", "initial_state"), (x, a, initial_state))


def _view(x: Tensor, axes: int = 2) -> tuple[int, ...]:
    """Pointer, dtype and strides (in numbers, or in pairs of them) of a tensor whose last axis is contiguous."""
    kind = native.DTYPES[x.dtype.to_real() if x.is_complex() else x.dtype]
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride(), strict=False)]
    return (x.data_ptr(), kind, *strides)


def _ready(x: Tensor) -> Tensor:
    return native.rows(x.detach().resolve_conj() if x.is_complex() else x.detach())


def _arguments(x, a, path, reverse, initial_state, resets, lengths) -> tuple[list[int], list[Any]]:
    """The numbers of ``LinearArgs`` in order, and the tensors that must stay alive during the call."""
    work = state_dtype(x)
    x, a = _ready(x), _ready(a)
    if work == torch.float64:  # one type of a is enough for double vectors
        a = a.to(work)
    init = None if initial_state is None else _ready(initial_state).to(work).contiguous()
    steps = x.shape[1] if path is None else path.shape[-1]
    dual = work in (torch.float64, torch.complex128)
    numbers = [
        x.shape[0], x.shape[1], steps, x.shape[2], native.threads(), int(dual), int(work.is_complex),
        *_view(x), *_view(a), native.pointer(path), 0 if path is None or path.shape[0] == 1 else path.stride(0),
        int(reverse), native.pointer(resets), native.pointer(lengths), native.pointer(init),
    ]  # fmt: skip
    return numbers, [x, a, path, resets, lengths, init]


def _new(x: Tensor, path: Tensor | None, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(batch, length, channels); zeros where there may be rows that no step visits."""
    partial = lengths is not None or (path is not None and path.shape[-1] < x.shape[1])
    return torch.zeros(x.shape, dtype=dtype) if partial else _memory.empty(*x.shape, dtype=dtype)


def _real(dtype: torch.dtype) -> int:
    return native.DTYPES[dtype.to_real() if dtype.is_complex else dtype]


def forward(x, a, path, reverse, initial_state, return_final_state, resets, lengths, *, save) -> tuple[Tensor, ...]:
    work = state_dtype(x)
    h = _new(x, path, lengths, x.dtype)
    final = torch.empty((x.shape[0], x.shape[2]) if return_final_state else (0,), dtype=work)
    borders = empty_borders(x, path, save)
    numbers, alive = _arguments(x, a, path, reverse, initial_state, resets, lengths)
    native.function("linear_scan_forward")(
        *numbers, h.data_ptr(), _real(h.dtype), final.data_ptr() if return_final_state else 0,
        borders.data_ptr() if save else 0,
    )  # fmt: skip
    del alive
    return h, final, borders


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    x, a, path, reverse, initial_state, return_final_state, resets, lengths = arguments
    dh, dfinal = grads
    (borders,) = saved
    work = state_dtype(x)
    batch, _, channels = x.shape
    dh = _ready(dh)
    dx = _new(x, path, lengths, x.dtype)
    da = None
    rows = a.shape[1] != 1
    if needs[1]:
        exact = a.shape[0] == batch  # one gradient for each sequence: nothing is left to be summed
        da = _new(x, path, lengths, a.dtype if exact else work) if rows else torch.empty(batch, channels, dtype=work)
    end = _ready(dfinal).to(work).contiguous() if return_final_state else None
    dinit = None if initial_state is None else torch.empty(batch, channels, dtype=work)
    numbers, alive = _arguments(x, a, path, reverse, initial_state, resets, lengths)
    native.function("linear_scan_backward")(
        *numbers, borders.data_ptr(), *_view(dh), native.pointer(end), dx.data_ptr(), _real(dx.dtype),
        native.pointer(da), 0 if da is None else _real(da.dtype), int(rows), native.pointer(dinit),
    )  # fmt: skip
    del alive
    if da is not None:
        da = da if rows else da[:, None]
        da = da.sum(0, keepdim=True) if a.shape[0] == 1 and batch != 1 else da
    return [dx, da, dinit]
