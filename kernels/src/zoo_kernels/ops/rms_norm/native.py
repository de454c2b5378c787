"""The CPU path of the normalisation: kernels/native/rms_norm.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native

# Gradients of weight and bias are summed in this many parts, whatever the number of threads, so that bits repeat.
PARTS = 16


def unavailable() -> str | None:
    return native.missing("rms_norm_forward", "rms_norm_backward")


def unsupported(x, z, weight, bias, eps, groups, norm_before_gate, centred) -> str | None:
    return native.wrong_dtypes(("x", "z", "weight", "bias"), (x, z, weight, bias))


def _arguments(x, z, weight, bias, eps, groups, norm_before_gate, centred) -> tuple[list[int], list[Any]]:
    """The numbers of ``NormArgs`` in order, and what must stay alive during the call."""
    work = checks.state_dtype(x.dtype)
    x = native.rows(x.detach())
    z = None if z is None else native.rows(z.detach())
    weight, bias = (None if p is None else p.detach().to(work).contiguous() for p in (weight, bias))
    epsilon = ctypes.c_double(eps)
    numbers = [
        x.shape[0], x.shape[1], groups, int(norm_before_gate), int(centred), native.threads(),
        int(work == torch.float64), *native.strided(x, 1), *native.strided(z, 1), native.pointer(weight),
        native.pointer(bias), ctypes.addressof(epsilon),
    ]  # fmt: skip
    return numbers, [x, z, weight, bias, epsilon]


def forward(x, z, weight, bias, eps, groups, norm_before_gate, centred, *, save) -> tuple[Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype)
    numbers, alive = _arguments(x, z, weight, bias, eps, groups, norm_before_gate, centred)
    native.function("rms_norm_forward")(*numbers, y.data_ptr(), native.DTYPES[y.dtype])
    del alive
    return (y,)


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    x, z, weight, bias, *_ = arguments
    dy = native.rows(grads[0])
    work = checks.state_dtype(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dz = torch.empty(z.shape, dtype=z.dtype) if z is not None and needs[1] else None
    parts = max(min(PARTS, x.shape[0]), 1)
    dweight = torch.empty(parts, x.shape[1], dtype=work) if weight is not None and needs[2] else None
    dbias = torch.empty(parts, x.shape[1], dtype=work) if bias is not None and needs[3] else None
    numbers, alive = _arguments(*arguments)
    native.function("rms_norm_backward")(
        *numbers, *native.strided(dy, 1), dx.data_ptr(), native.pointer(dz), native.pointer(dweight),
        native.pointer(dbias), parts,
    )  # fmt: skip
    del alive
    return [dx, dz, None if dweight is None else dweight.sum(0), None if dbias is None else dbias.sum(0)]
