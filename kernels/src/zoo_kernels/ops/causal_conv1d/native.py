"""The CPU path of the causal convolution: kernels/native/causal_conv1d.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native

MOST_PATHS = 62  # their directions are the bits of one number


def unavailable() -> str | None:
    return native.missing("causal_conv1d_forward", "causal_conv1d_backward")


def unsupported(x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths) -> str | None:
    if len(reverse) > MOST_PATHS:
        return f"there are {len(reverse)} paths; the native library takes at most {MOST_PATHS}"
    return native.wrong_dtypes(("x", "weight", "bias", "initial_state"), (x, weight, bias, initial_state))


def _own(x: Tensor | None, work: torch.dtype) -> Tensor | None:
    """x in the working precision, contiguous; x itself where it is so (every call pays for what is done here)."""
    if x is None or (x.dtype == work and x.is_contiguous()):
        return x
    return x.detach().to(work).contiguous()


def _arguments(x, weight, bias, silu, path, reverse, initial_state, resets, lengths) -> tuple[list[int], list]:
    """The numbers of ``ConvArgs`` in order, and the tensors that must stay alive during the call."""
    work = checks.state_dtype(x.dtype)
    x = native.rows(x)
    bias, init = _own(bias, work), _own(initial_state, work)
    batch, length, channels = x.shape
    *strides, w_c, w_w = weight.stride()
    numbers = [
        batch, length, length if path is None else path.shape[-1], channels, weight.shape[-1], len(reverse),
        int(silu), native.threads(), int(work == torch.float64),
        *native.strided(x, 2),
        weight.data_ptr(), native.DTYPES[weight.dtype], strides[0] if strides else 0, w_c, w_w, native.pointer(bias),
        native.pointer(path), 0 if path is None or path.shape[0] == 1 else path.stride(0),
        sum(flag << k for k, flag in enumerate(reverse)),
        native.pointer(resets), native.pointer(lengths), native.pointer(init),
    ]  # fmt: skip
    return numbers, [x, weight, bias, path, resets, lengths, init]


def _partial(x: Tensor, path: Tensor | None, lengths: Tensor | None) -> bool:
    """Whether there may be rows that no step visits."""
    return lengths is not None or (path is not None and path.shape[-1] < x.shape[1])


def forward(
    x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths, *, save
) -> tuple[Tensor, Tensor]:
    work = checks.state_dtype(x.dtype)
    batch, length, channels = x.shape
    paths = weight.shape[:-2]  # () for one path, (K,) for several
    y = (torch.zeros if _partial(x, path, lengths) else torch.empty)(batch, length, *paths, channels, dtype=x.dtype)
    final = torch.empty((batch, *paths, weight.shape[-1], channels) if return_final_state else 0, dtype=work)
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
    *paths, _, width = weight.shape
    dy = native.rows(dy)
    dfinal = _own(dfinal, work) if return_final_state else None
    dx = (torch.zeros if _partial(x, path, lengths) else torch.empty)(batch, length, channels, dtype=work)
    dweight = torch.empty(batch, *paths, width, channels, dtype=work)
    dbias = None if bias is None else torch.empty(batch, *paths, channels, dtype=work)
    dinit = None if initial_state is None else torch.zeros(batch, *paths, width, channels, dtype=work)
    numbers, alive = _arguments(x, weight, bias, silu, path, reverse, initial_state, resets, lengths)
    native.function("causal_conv1d_backward")(
        *numbers, *native.strided(dy, 3), native.pointer(dfinal), dx.data_ptr(), dweight.data_ptr(),
        native.pointer(dbias), native.pointer(dinit),
    )  # fmt: skip
    del alive
    return [dx, dweight.sum(0).transpose(-1, -2), None if dbias is None else dbias.sum(0), dinit]
