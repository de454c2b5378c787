"""The CPU path of the selective scan: kernels/native/selective_scan_{forward,backward}.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _native as native
from zoo_kernels._memory import empty

from . import empty_borders, work_dtype
from .low_rank import gradients, product

# dt_proj of a block of channels stays in the second level of cache up to here; a wider one is multiplied beforehand.
MOST_COLUMNS = 128


def unavailable() -> str | None:
    return native.missing("selective_scan_forward", "selective_scan_backward")


def unsupported(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj=None,
) -> str | None:  # fmt: skip
    return native.wrong_dtypes(
        ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "dt_proj"),
        (u, dt, A, B, C, D, z, dt_bias, initial_state, dt_proj),
    )


def _own(x: Tensor | None, work: torch.dtype) -> Tensor | None:
    if x is None or (x.dtype == work and x.is_contiguous()):
        return x
    return x.to(work).contiguous()


def _view(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """What the C++ ``Strided`` holds, of a tensor with ``axes`` axes (at most 4) before its last, contiguous one."""
    if x is None:
        return (0, 0, 0, 0, 0, 0)
    return (x.data_ptr(), native.DTYPES[x.dtype], *x.stride()[:axes], *(0, 0, 0, 0)[axes:])


@functools.cache
def _flags(reverse: tuple[bool, ...]) -> Tensor:
    return torch.tensor(reverse, dtype=torch.uint8)


def _states_first(x: Tensor | None, work: torch.dtype) -> Tensor | None:
    """(..., channels, state) as (..., state, channels): neighbouring channels are what a vector holds."""
    return None if x is None else x.to(work).transpose(-1, -2).contiguous()


def _arguments(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, resets, lengths
) -> tuple[list[int], list[Any]]:
    """The numbers of ``ScanArgs`` in order, and the tensors that must stay alive during the call."""
    work = work_dtype(u, A)
    K, channels, N = A.shape
    batch, length = u.shape[:2]
    steps = length if path is None else path.shape[-1]
    u, dt, B, C = (native.rows(x) for x in (u, dt, B, C))
    z = None if z is None else native.rows(z)
    A = A if A.dtype == work else A.to(work)
    D, dt_bias = _own(D, work), _own(dt_bias, work)
    init = _states_first(initial_state, work)
    flags = _flags(tuple(reverse))
    path_b = 0 if path is None or path.shape[0] == 1 else path.stride(0)
    numbers = [
        batch, length, steps, K, channels, B.shape[3], N, int(dt_softplus), native.threads(),
        int(work == torch.float64),
        *_view(u, 3 if u.shape[2] > 1 else 2), *_view(dt, 3), *_view(B, 4), *_view(C, 4), *_view(z, 2),
        native.pointer(A), *A.stride(), native.pointer(D), native.pointer(dt_bias),
        native.pointer(path), path_b, 0 if path is None else path.stride(1),
        native.pointer(flags), native.pointer(resets), native.pointer(lengths), native.pointer(init),
    ]  # fmt: skip
    return numbers, [u, dt, A, B, C, D, z, dt_bias, path, flags, resets, lengths, init]


def _partial(u: Tensor, path: Tensor | None, lengths: Tensor | None) -> bool:
    """Whether there may be rows that no step visits."""
    return lengths is not None or (path is not None and path.shape[-1] < u.shape[1])


def forward(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    path,
    reverse,
    initial_state,
    return_final_state,
    resets,
    lengths,
    dt_proj=None,
    *,
    save,
) -> tuple[Tensor, Tensor, Tensor]:
    work = work_dtype(u, A)
    batch, length, _, channels = u.shape
    K, _, N = A.shape
    if dt_proj is not None and not 0 < dt_proj.shape[2] <= MOST_COLUMNS:
        dt, dt_proj = product(dt, dt_proj, work), None
    # Several paths add to one output, in the working precision, each multiplied by the gate as it is written.
    y_dtype = u.dtype if K == 1 else work
    new = torch.zeros if _partial(u, path, lengths) else empty
    y = new(batch, length, channels, dtype=y_dtype)
    final = torch.empty(batch, K, N, channels, dtype=work) if return_final_state else None
    borders = empty_borders(u, A, path, save)
    numbers, alive = _arguments(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, resets, lengths
    )
    proj = None if dt_proj is None else dt_proj.to(work)
    native.function("selective_scan_forward")(
        *numbers, y.data_ptr(), native.DTYPES[y_dtype], native.pointer(final), borders.data_ptr() if save else 0,
        *((0, 0, 0, 0, 0) if proj is None else (proj.shape[2], proj.data_ptr(), *proj.stride())),
    )  # fmt: skip
    del alive
    out = torch.empty(0, dtype=work) if final is None else final.transpose(-1, -2).contiguous()
    return y if y.dtype == u.dtype else y.to(u.dtype), out, borders


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    (
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
        dt_proj,
    ) = arguments  # fmt: skip
    dy, dfinal = grads
    (borders,) = saved
    work = work_dtype(u, A)
    low = dt
    if dt_proj is not None:
        dt = product(dt, dt_proj, work)
    batch, length, shared, channels = u.shape
    K, _, N = A.shape
    if batch == 0 or channels == 0 or N == 0:
        return [None] * len(needs)
    dz = None
    gate = z
    if z is not None and K > 1:  # the gate of a sum over paths: its gradient needs that sum
        gate = None
        y, _, _ = forward(
            u.to(work), dt, A, B, C, D, None, dt_bias, dt_softplus, path, reverse, initial_state, False, resets,
            lengths, save=False,
        )  # fmt: skip
        wide, s = z.to(work), torch.sigmoid(z.to(work))
        dz = dy.to(work) * y * s * (1 + wide * (1 - s))
        dy = dy.to(work) * wide * s
    dy = native.rows(dy)
    new = torch.zeros if _partial(u, path, lengths) else empty
    du = new(batch, length, shared, channels, dtype=work)
    ddt = new(batch, length, K, channels, dtype=work)
    dB, dC = (torch.empty(batch, length, K, B.shape[3], N, dtype=work) for _ in range(2))
    dA = torch.empty(K, N, channels, dtype=work)
    dD = None if D is None else torch.empty(K, channels, dtype=work)
    dbias = None if dt_bias is None else torch.empty(K, channels, dtype=work)
    if gate is not None:
        dz = new(batch, length, channels, dtype=work)
    dinit = None if initial_state is None else torch.empty(batch, K, N, channels, dtype=work)
    end = _states_first(dfinal, work) if return_final_state else None
    numbers, alive = _arguments(
        u, dt, A, B, C, D, gate, dt_bias, dt_softplus, path, reverse, initial_state, resets, lengths
    )
    native.function("selective_scan_backward")(
        *numbers, borders.data_ptr(), *native.strided(dy, 2), 0, 0, native.pointer(end),
        du.data_ptr(), shared, ddt.data_ptr(), dB.data_ptr(), dC.data_ptr(), dA.data_ptr(), native.pointer(dD),
        native.pointer(dbias), native.pointer(dz if gate is not None else None), native.pointer(dinit),
    )  # fmt: skip
    del alive
    dinit = None if dinit is None else dinit.transpose(-1, -2)
    dproj = None
    if dt_proj is not None:
        ddt, dproj = gradients(ddt, low, dt_proj)
    return [du, ddt, dA.transpose(-1, -2), dB, dC, dD, dz, dbias, dinit, dproj]
