"""The CPU path: the C++ library (``kernels/native/ssd*``), or chunked matrix products of torch where it is missing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo_kernels import _native
from zoo_kernels._checks import state_dtype
from zoo_kernels.ops._walk import new_rows

from . import chunked

# Work items of the backward, as far as shapes allow: each has its own sums over heads of the gradients of k and q.
ITEMS = 8


def _problem(v, decay, weight, k, q, D, state, resets, order, strict) -> tuple[list[int], list[Tensor | None]]:
    """The numbers of the C++ struct ``SsdArgs``, and the tensors that must stay alive while they are used."""
    work = state_dtype(v.dtype)
    batch, length, heads, headdim = v.shape
    groups, states = k.shape[2:]
    steps = length if order is None else order.shape[1]
    if order is not None and order.numel() and int(order.max()) >= length:
        raise ValueError(f"a path visits row {int(order.max())}; rows are 0 to {length - 1}")

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None or (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()

    v, k, q = (x if dense(x) is None else x.contiguous() for x in (v, k, q))
    a, w = (None if x is None else x.to(work)[..., None] for x in (decay, weight))
    if D is not None:
        D = D.to(work)
        D = (D[:, None] if D.dim() == 1 else D).expand(heads, headdim).contiguous()
    order = None if order is None else order.contiguous()
    resets = None if resets is None else resets.contiguous()
    state = None if state is None else state.to(work).contiguous()
    numbers = [
        *(batch, length, steps, heads, groups, headdim, states, int(strict), _native.threads()),
        int(work == torch.float64),
        *(n for x in (v, k, q, a, w) for n in _native.strided(x, 3)),
        *(_native.pointer(D), _native.pointer(order), 0 if order is None or order.shape[0] == 1 else steps),
        *(_native.pointer(resets), _native.pointer(state)),
    ]
    return numbers, [v, k, q, a, w, D, order, resets, state]


def forward(v, decay, weight, k, q, D, state, resets, order, strict, *, save=False):
    """See :func:`zoo_kernels.ops.ssd.reference.forward`; the same arguments and results."""
    if _native.missing("ssd_forward") is not None:
        return chunked.forward(v, decay, weight, k, q, D, state, resets, order, strict)
    numbers, alive = _problem(v, decay, weight, k, q, D, state, resets, order, strict)
    y = new_rows(*v.shape, dtype=v.dtype, order=order)
    final = torch.empty(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=state_dtype(v.dtype))
    _native.function("ssd_forward")(*numbers, y.data_ptr(), _native.DTYPES[y.dtype], final.data_ptr())
    del alive
    return y, final


def backward(grads, arguments, saved, needs):
    """See :func:`zoo_kernels.ops.ssd.chunked.backward`."""
    if _native.missing("ssd_backward") is not None:
        return chunked.backward(grads, arguments, saved, needs)
    dy, dfinal = grads
    v, decay, weight, k, _, D, state, _, order, _ = arguments
    numbers, alive = _problem(*arguments)
    work = state_dtype(v.dtype)
    batch, length, heads, headdim = v.shape
    groups, states = k.shape[2:]
    make = functools.partial(new_rows, order=order)
    # Heads of one item sum their dk and dq in place, items into buffers of their own: as few as keep threads busy.
    # Their number follows from the shapes alone, so that results do not depend on the number of threads.
    repeat = heads // groups
    size = max(1, -(-repeat * batch * groups // ITEMS) if batch * groups < ITEMS else repeat)
    size = min(size, repeat)
    parts = -(-repeat // size)
    dy, dfinal = _native.rows(dy), dfinal.to(work).contiguous()
    dv = make(*v.shape, dtype=v.dtype)
    da, dw = (None if x is None else make(batch, length, heads, dtype=work) for x in (decay, weight))
    dk, dq = (make(parts * batch, length, groups, states, dtype=work) for _ in range(2))
    dD = None if D is None else torch.empty(batch, heads, headdim, dtype=work)
    dinit = torch.empty(batch, heads, headdim, states, dtype=work)
    _native.function("ssd_backward")(
        *numbers, *_native.strided(dy, 3), dfinal.data_ptr(), size, dv.data_ptr(),
        *(_native.pointer(x) for x in (da, dw, dk, dq, dD, dinit)),
    )  # fmt: skip
    del alive
    dk, dq = (x if parts == 1 else x.unflatten(0, (parts, batch)).sum(0) for x in (dk, dq))
    if dD is not None:
        dD = dD.sum((0, 2)) if D.dim() == 1 else dD.sum(0)
    return [dv, da, dw, dk, dq, dD, None if state is None else dinit]
