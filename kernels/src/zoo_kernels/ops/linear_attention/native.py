"""The CPU path: the C++ library (``kernels/native/gated*``), or the chunked form in torch where it is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _native
from zoo_kernels._checks import state_dtype
from zoo_kernels.ops._walk import new_rows

from . import chunked

# Work items of the backward, as far as shapes allow: each block of values has gradients of k, q and decay of its own.
ITEMS, NARROWEST = 8, 16


def unsupported(v, decay, k, q, state, resets, order, strict) -> str | None:
    return _native.wrong_dtypes(("v", "decay", "k", "q", "initial_state"), (v, decay, k, q, state))


def _problem(v, decay, k, q, state, resets, order, strict) -> tuple[list[int], list[Tensor | None]]:
    """The numbers of the C++ struct ``GatedArgs``, and the tensors that must stay alive while they are used."""
    work = state_dtype(v.dtype)
    batch, length, heads, headdim = v.shape
    steps = length if order is None else order.shape[1]
    if order is not None and order.numel() and int(order.max()) >= length:
        raise ValueError(f"a path visits row {int(order.max())}; rows are 0 to {length - 1}")
    v, decay, k, q = (_native.rows(x.detach()) for x in (v, decay, k, q))
    order = None if order is None else order.contiguous()
    resets = None if resets is None else resets.contiguous()
    state = None if state is None else state.detach().to(work).contiguous()
    numbers = [
        *(batch, length, steps, heads, headdim, k.shape[3], int(strict), _native.threads(), int(work == torch.float64)),
        *(n for x in (v, decay, k, q) for n in _native.strided(x, 3)),
        *(_native.pointer(order), 0 if order is None or order.shape[0] == 1 else steps),
        *(_native.pointer(resets), _native.pointer(state)),
    ]
    return numbers, [v, decay, k, q, order, resets, state]


def forward(v, decay, k, q, state, resets, order, strict, *, save=False):
    """See :func:`zoo_kernels.ops.linear_attention.reference.forward`; the same arguments and results."""
    if _native.missing("gated_forward") is not None:
        return chunked.forward(v, decay, k, q, state, resets, order, strict)
    numbers, alive = _problem(v, decay, k, q, state, resets, order, strict)
    y = new_rows(*v.shape, dtype=v.dtype, order=order)
    final = torch.empty(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=state_dtype(v.dtype))
    _native.function("gated_forward")(*numbers, y.data_ptr(), _native.DTYPES[y.dtype], final.data_ptr())
    del alive
    return y, final


def backward(grads, arguments, saved, needs):
    """Gradients of v, decay, k, q, state, from those of y and of the last state."""
    if _native.missing("gated_backward") is not None:
        return chunked.backward(grads, arguments, saved, needs)
    dy, dfinal = grads
    v, _, k, _, state, _, order, _ = arguments
    numbers, alive = _problem(*arguments)
    work = state_dtype(v.dtype)
    batch, length, heads, headdim = v.shape
    states = k.shape[3]
    # As few blocks as keep threads busy, from the shapes alone: results do not depend on the number of threads.
    parts = min(-(-ITEMS // max(batch * heads, 1)), -(-headdim // NARROWEST))
    block = max(-(-headdim // max(parts, 1)), 1)
    parts = -(-headdim // block)
    dy, dfinal = _native.rows(dy), dfinal.to(work).contiguous()
    dv = new_rows(*v.shape, dtype=v.dtype, order=order)
    da, dk, dq = (new_rows(parts * batch, length, heads, states, dtype=work, order=order) for _ in range(3))
    dinit = torch.empty(batch, heads, headdim, states, dtype=work)
    _native.function("gated_backward")(
        *numbers, *_native.strided(dy, 3), dfinal.data_ptr(), block,
        *(x.data_ptr() for x in (dv, da, dk, dq, dinit)),
    )  # fmt: skip
    del alive
    da, dk, dq = (x if parts == 1 else x.unflatten(0, (parts, batch)).sum(0) for x in (da, dk, dq))
    return [dv, da, dk, dq, None if state is None else dinit]
