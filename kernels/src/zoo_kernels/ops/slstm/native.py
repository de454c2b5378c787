"""The CPU path: the whole walk over time in one call into the C++ library (``kernels/native/slstm*``)."""

from __future__ import annotations

import torch

from zoo_kernels import _native
from zoo_kernels._checks import state_dtype

BLOCK = 6  # kBlock in slstm.h: sequences of one work item


def unavailable() -> str | None:
    return _native.missing("slstm_forward", "slstm_backward")


def unsupported(gates, recurrent, bias, state, resets, order) -> str | None:
    names = ("gates", "recurrent", "bias", "state")
    return _native.wrong_dtypes(names, (gates, recurrent, bias, state))


def _problem(gates, recurrent, bias, state, resets, order):
    """The numbers of the C++ struct ``LstmArgs``, and the tensors that must stay alive while they are used."""
    work = state_dtype(gates.dtype)
    batch, length, _, heads, headdim = gates.shape
    steps = length if order is None else order.shape[1]
    if order is not None and order.numel() and int(order.max()) >= length:
        raise ValueError(f"a path visits row {int(order.max())}; rows are 0 to {length - 1}")
    gates = gates.contiguous()
    recurrent = recurrent.to(work).contiguous()
    bias, state = (None if x is None else x.to(work).contiguous() for x in (bias, state))
    order, resets = (None if x is None else x.contiguous() for x in (order, resets))
    numbers = [
        *(batch, length, steps, heads, headdim, _native.threads(), int(work == torch.float64)),
        *(gates.data_ptr(), _native.DTYPES[gates.dtype], recurrent.data_ptr()),
        *(_native.pointer(bias), _native.pointer(state), _native.pointer(order)),
        *(0 if order is None or order.shape[0] == 1 else steps, _native.pointer(resets)),
    ]
    return numbers, [gates, recurrent, bias, state, order, resets]


def forward(gates, recurrent, bias, state, resets, order, *, save=False):
    """See :func:`zoo_kernels.ops.slstm.reference.forward`; the same arguments and results."""
    numbers, alive = _problem(gates, recurrent, bias, state, resets, order)
    work = state_dtype(gates.dtype)
    batch, length, _, heads, headdim = gates.shape
    steps = length if order is None else order.shape[1]
    make = torch.empty if order is None else torch.zeros
    y = make(batch, length, heads, headdim, dtype=gates.dtype)
    final = torch.empty(4, batch, heads, headdim, dtype=work)
    raw = make(*((batch, steps, 4, heads, headdim) if save else (0,)), dtype=work)
    trace = make(*((batch, steps, 3, heads, headdim) if save else (0,)), dtype=work)
    kept = (raw.data_ptr(), trace.data_ptr()) if save and raw.numel() else (0, 0)
    _native.function("slstm_forward")(*numbers, y.data_ptr(), final.data_ptr(), *kept)
    del alive
    return y, final, raw, trace


def backward(grads, arguments, saved, needs):
    """Gradients of gates, recurrent, bias, state."""
    dy, dfinal = grads
    gates, _, bias, state, _, order = arguments
    raw, trace = saved
    numbers, alive = _problem(*arguments)
    work = state_dtype(gates.dtype)
    batch, _, _, heads, headdim = gates.shape
    make = torch.empty if order is None else torch.zeros
    dgates = make(gates.shape, dtype=work)
    dR = torch.empty(-(-batch // BLOCK), heads, headdim, 4, headdim, dtype=work)
    dinit = torch.empty(4, batch, heads, headdim, dtype=work)
    inputs = [raw.contiguous(), trace.contiguous(), dy.to(work).contiguous(), dfinal.to(work).contiguous()]
    _native.function("slstm_backward")(
        *numbers, *(x.data_ptr() for x in inputs), dgates.data_ptr(), dR.data_ptr(), dinit.data_ptr()
    )
    del alive
    dbias = None if bias is None else dgates.sum((0, 1)).transpose(0, 1)
    return [dgates, dR.sum(0), dbias, None if state is None else dinit]
