"""The CPU path of the causal convolution: kernels/native/causal_conv1d.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("causal_conv1d_forward", "causal_conv1d_backward")


def unsupported(x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths) -> str | None:
    return native.wrong_dtypes(("x", "weight", "bias", "initial_state"), (x, weight, bias, initial_state))


def _own(x: Tensor | None, work: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(work).contiguous()


def _arguments(x, weight, bias, silu, path, reverse, initial_state, resets, lengths) -> tuple[list[int], list]:
    """The numbers of ``ConvArgs`` in order, and the tensors that must stay alive during the call."""
    work = checks.state_dtype(x.dtype)
    x = native.rows(x.detach())
    taps = weight.detach().to(work).t().contiguous()
    bias, init = _own(bias, work), _own(initial_state, work)
    steps = x.shape[1] if path is None else path.shape[-1]
    numbers = [
        x.shape[0], x.shape[1], steps, x.shape[2], weight.shape[1], int(silu), native.threads(),
        int(work == torch.float64), *native.strided(x, 2), taps.data_ptr(), native.pointer(bias),
        native.pointer(path), 0 if path is None or path.shape[0] == 1 else path.stride(0), int(reverse[0]),
        native.pointer(resets), native.pointer(lengths), native.pointer(init),
    ]  # fmt: skip
    return numbers, [x, taps, bias, path, resets, lengths, init]


def forward(
    x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths, *, save
) -> tuple[Tensor, Tensor]:
    work = checks.state_dtype(x.dtype)
    batch, length, channels = x.shape
    partial = lengths is not None or (path is not None and path.shape[-1] < length)
    y = (torch.zeros if partial else torch.empty)(batch, length, channels, dtype=x.dtype)
    final = torch.empty((batch, weight.shape[1], channels) if return_final_state else 0, dtype=work)
    numbers, alive = _arguments(x, weight, bias, silu, path, reverse, initial_state, resets, lengths)
    native.function("causal_conv1d_forward")(
        *numbers, y.data_ptr(), native.DTYPES[y.dtype], final.data_ptr() if return_final_state else 0
    )
    del alive
    return y, final


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths = arguments
    dy, dfinal = grads
    work = checks.state_dtype(x.dtype)
    batch, length, channels = x.shape
    width = weight.shape[1]
    dy = native.rows(dy)
    dfinal = _own(dfinal, work) if return_final_state else None
    dx = torch.zeros(batch, length, channels, dtype=work)
    dweight = torch.zeros(batch, width, channels, dtype=work)
    dbias = None if bias is None else torch.zeros(batch, channels, dtype=work)
    dinit = None if initial_state is None else torch.zeros(batch, width, channels, dtype=work)
    numbers, alive = _arguments(x, weight, bias, silu, path, reverse, initial_state, resets, lengths)
    native.function("causal_conv1d_backward")(
        *numbers, *native.strided(dy, 2), native.pointer(dfinal), dx.data_ptr(), dweight.data_ptr(),
        native.pointer(dbias), native.pointer(dinit),
    )  # fmt: skip
    del alive
    return [dx, dweight.sum(0).t(), None if dbias is None else dbias.sum(0), dinit]
