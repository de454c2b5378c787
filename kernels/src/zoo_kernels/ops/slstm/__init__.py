"""The sLSTM of xLSTM: scalar memories with exponential gates that see the last output of their head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._checks import state_dtype
from zoo_kernels._loop import traced
from zoo_kernels._ops import Operator
from zoo_kernels.ops._walk import walk_order

from .step import slstm_step

__all__ = ["slstm", "slstm_step"]


def _fake(gates, recurrent, bias, state, resets, order, *, save):
    batch, length, _, heads, headdim = gates.shape
    work = state_dtype(gates.dtype)
    steps = length if order is None else order.shape[1]
    y = gates.new_empty(batch, length, heads, headdim)
    final = gates.new_empty(4, batch, heads, headdim, dtype=work)
    if not save:
        return y, final, gates.new_empty(0, dtype=work), gates.new_empty(0, dtype=work)
    raw = gates.new_empty(batch, steps, 4, heads, headdim, dtype=work)
    return y, final, raw, gates.new_empty(batch, steps, 3, heads, headdim, dtype=work)


def _cases(device, dtype):
    def rand(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    gates, recurrent, bias = rand(2, 13, 4, 3, 20), 0.2 * rand(3, 20, 4, 20), rand(3, 4, 20)
    yield gates, recurrent, None, None, None, None
    order = torch.randperm(13, device=device)[None, :11].contiguous()
    state = torch.rand(4, 2, 3, 20, device=device) + 0.5
    yield gates, recurrent, bias, state, torch.rand(2, 13, device=device) < 0.2, order


_slstm = Operator(
    "slstm",
    package=__name__,
    arguments="Tensor gates, Tensor recurrent, Tensor? bias, Tensor? state, Tensor? resets, Tensor? order",
    outputs=("y", "final"),
    saved=("raw", "trace"),
    differentiable=("gates", "recurrent", "bias", "state"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
)


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    *,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sLSTM cell: sequential by nature, walked in one kernel. Per head, ``(i~, f~, z~, o~) = gates_t + R y_{t-1} +
    bias``::

        m_t = max(i~, logsigmoid(f~) + m_{t-1})               (i~ where n_{t-1} is 0: nothing is remembered yet)
        i = exp(i~ - m_t), f = exp(logsigmoid(f~) + m_{t-1} - m_t)
        c_t = f * c_{t-1} + i * tanh(z~);  n_t = f * n_{t-1} + i
        y_t = sigmoid(o~) * c_t / n_t

    gates: (batch, length, 4, heads, headdim), the inputs' share of i, f, z, o in this order, before activation
    recurrent: (heads, headdim in, 4, headdim out): how the last y of a head enters each gate
    bias: (heads, 4, headdim)
    path: None, (steps,) or (batch, steps) integer rows in visiting order; reverse: walk from the end
    resets: (batch, length) bool, by row: the state returns to zero before that row
    lengths: (batch,) int: only the first ``lengths[b]`` steps are walked; rows not visited give 0
    initial_state, final state: (4, batch, heads, headdim): y, c, n, m, float32 (float64 if gates is); zero where not
    given

    Returns ``(y, final_state)``; y: (batch, length, heads, headdim) in gates' dtype.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Beck et al., "xLSTM", arXiv 2405.04517, equations 8 to 17; NX-AI/xlstm ``blocks/slstm/cell.py`` (its
    "cuda" layout of recurrent weights is ``(heads, in, 4 * out)``, its "vanilla" one ``(heads, 4 * out, in)``; the
    states i, f <= 1 are clamped as there).

    Example::

        y, _ = slstm(gates, recurrent, bias)
    """
    _checks.has_shape(
        "slstm", "gates", gates, [("batch", None), ("length", None), ("gates", 4), ("heads", None), ("headdim", None)]
    )
    _checks.has_dtype("slstm", "gates", gates)
    batch, length, _, heads, headdim = gates.shape
    axes = [("heads", heads), ("headdim", headdim), ("gates", 4), ("headdim", headdim)]
    _checks.has_shape("slstm", "recurrent", recurrent, axes, gates)
    _checks.has_dtype("slstm", "recurrent", recurrent)
    if bias is not None:
        _checks.has_shape("slstm", "bias", bias, [axes[0], axes[2], axes[3]], gates)
    if initial_state is not None:
        _checks.has_shape(
            "slstm", "initial_state", initial_state, [("y, c, n, m", 4), ("batch", batch), *axes[:2]], gates
        )
    path = _checks.canonical_path("slstm", path, batch=batch, length=length, paths=None, like=gates)
    path = None if path is None else path[:, 0]
    (flag,) = _checks.canonical_reverse("slstm", reverse, paths=1)
    resets = _checks.canonical_resets("slstm", resets, batch=batch, length=length, like=gates)
    lengths = _checks.canonical_lengths("slstm", lengths, batch=batch, like=gates)
    if not torch.compiler.is_compiling() and all(t is None or type(t) is Tensor for t in (path, lengths)):
        _checks.check_values("slstm", path, lengths, length=length)
    order = walk_order(path, flag, lengths, batch=batch, length=length, device=gates.device)
    if _slstm.exporting() and traced() and (length if order is None else order.shape[1]) != 0:
        from .export import slstm_export

        y, final = slstm_export(gates, recurrent, bias, initial_state, resets, order)
    else:
        y, final = _slstm(gates, recurrent, bias, initial_state, resets, order)
    return y, final if return_final_state else None
