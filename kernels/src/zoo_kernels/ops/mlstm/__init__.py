"""The mLSTM of xLSTM: a matrix memory with exponential gates, stabilised by a running maximum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._backends import exporting
from zoo_kernels.ops._walk import gather_rows, scatter_rows, walk_order
from zoo_kernels.ops.ssd.core import decayed_scan

from .reference import mlstm_reference
from .step import mlstm_step

__all__ = ["mlstm", "mlstm_reference", "mlstm_step"]

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    bidirectional: bool = False,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: State | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """mLSTM cell: per head, with ``logf_t = logsigmoid(f_t)``::

        m_t = max(logf_t + m_{t-1}, i_t)                                                the stabiliser
        C_t = exp(logf_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) v_t k_t^T            (headdim, state)
        n_t = exp(logf_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
        y_t = scale * C_t q_t / (max(|scale * n_t . q_t|, exp(-m_t)) + eps)

    q, k: (batch, length, heads, state); v: (batch, length, heads, headdim)
    i, f: (batch, length, heads), input and forget gates before their activation
    scale: state ** -0.5 unless given; it acts on the query, so C and n hold plain keys (where an original scales its
        keys, scale them before the call and give ``scale=1.0``)
    bidirectional: each row also reads the rows after it, ``i_j + logf_i + .. + logf_{j-1}`` weighing row j > i, under
        one common normaliser; no state, resets or lengths then
    path: None, (steps,) or (batch, steps) integer rows in visiting order; reverse: walk from the end
    resets: (batch, length) bool, by row: the state returns to zero before that row
    lengths: (batch,) int: only the first ``lengths[b]`` steps are walked; rows not visited give 0
    initial_state, final state: (C, n, m): (batch, heads, headdim, state), (batch, heads, state), (batch, heads),
    float32
        (float64 if v is); zero where not given. C is the transpose of the (state, headdim) matrix that NX-AI/xlstm
        stores.

    With decay ``logf_t + m_{t-1} - m_t`` and input weight ``exp(i_t - m_t)``, both at most 0 and 1 however large the
    gates, this is the chunked product of :func:`zoo_kernels.ssd`; the sum of keys is one more row of the state.
    Returns ``(y, final_state)``; y has v's shape and dtype. Raises ValueError naming the argument and what it must be.
    Source: Beck et al., "xLSTM", arXiv 2405.04517, equations 19 to 27 and appendix A; NX-AI/mlstm_kernels.

    Example::

        y, _ = mlstm(q, k, v, i, f)
    """
    check("mlstm", q, k, v, i, f, initial_state)
    batch, length, heads, headdim = v.shape
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    path = _checks.canonical_path("mlstm", path, batch=batch, length=length, paths=None, like=v)
    path = None if path is None else path[:, 0]
    (flag,) = _checks.canonical_reverse("mlstm", reverse, paths=1)
    resets = _checks.canonical_resets("mlstm", resets, batch=batch, length=length, like=v)
    lengths = _checks.canonical_lengths("mlstm", lengths, batch=batch, like=v)
    if not torch.compiler.is_compiling() and all(t is None or type(t) is Tensor for t in (path, lengths)):
        _checks.check_values("mlstm", path, lengths, length=length)
    ones = v.new_ones(batch, length, heads, 1)
    values = torch.cat([v, ones], dim=-1)
    work = torch.promote_types(v.dtype, torch.float32)
    if bidirectional:
        if initial_state is not None or return_final_state or resets is not None or lengths is not None:
            raise ValueError("mlstm: bidirectional takes and returns no state, resets or lengths")
        order = walk_order(path, flag, None, batch=batch, length=length, device=v.device)
        back = walk_order(path, not flag, None, batch=batch, length=length, device=v.device)
        ahead, _, m_ahead = _scan(q, k, values, i, f, None, None, order, False, work)
        behind, _, m_behind = _scan(q, k, values, i, f, None, None, back, True, work)
        m = torch.maximum(m_ahead, m_behind)
        sums = torch.exp(m_ahead - m)[..., None] * ahead + torch.exp(m_behind - m)[..., None] * behind
        return _normalised(sums, m, scale, eps, order, v), None
    order = walk_order(path, flag, lengths, batch=batch, length=length, device=v.device)
    state = None
    if initial_state is not None:
        C, n, _m0 = initial_state
        state = torch.cat([C, n[:, :, None]], dim=2)
    sums, final, m = _scan(
        q, k, values, i, f, state, None if initial_state is None else initial_state[2], order, False, work, resets
    )
    y = _normalised(sums, m, scale, eps, order, v)
    if not return_final_state:
        return y, None
    if (length if order is None else order.shape[1]) == 0:
        last = final.new_zeros(batch, heads) if initial_state is None else initial_state[2].to(final.dtype)
    else:
        last = final_stabiliser(m, order, initial_state, final)
    return y, (final[:, :, :headdim], final[:, :, headdim], last)


def _scan(q, k, values, i, f, state, m0, order, strict, work, resets=None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums ``C q`` and ``n . q`` scaled by exp(-m), the last state, and m by row (batch, length, heads)."""
    decay, weight, m = stabilise(i, f, m0, resets, order)
    length = values.shape[1]
    rows = [scatter_rows(x.to(work), order, length) for x in (decay, weight, m)]
    values = values.to(work)  # the normaliser decides between large sums: no rounding in between
    sums, final = decayed_scan(values, rows[0], rows[1], k, q, None, state, resets, order, strict)
    return sums, final, rows[2]


def stabilise(
    i: Tensor, f: Tensor, m0: Tensor | None, resets: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log decays, input weights and stabilisers in visiting order, (batch, steps, heads) in float64.

    ``m_t = max(logf_t + m_{t-1}, i_t)`` without a loop: ``m_t - F_t`` is a running maximum of ``i_s - F_s``, F being
    the running sum of logf (in float64, for over long walks F grows large while m does not).
    """
    gi, logf = gather_rows(i, order).to(torch.float64), F.logsigmoid(gather_rows(f, order).to(torch.float64))
    if order is not None:
        absent = (order < 0)[..., None]
        gi, logf = gi.masked_fill(absent, -torch.inf), logf.masked_fill(absent, 0)
    total = logf.cumsum(1)
    start = i.new_zeros(i.shape[0], i.shape[2], dtype=torch.float64) if m0 is None else m0.to(torch.float64)
    candidate = gi - total
    if candidate.shape[1] == 0:
        return logf, logf, logf
    first = torch.maximum(candidate[:, :1], start[:, None])
    candidate = torch.cat([first, candidate[:, 1:]], dim=1)
    before_first = start[:, None]
    if resets is None:
        m = _running_maximum(candidate) + total
    else:  # a reset starts over from m = 0; an offset per segment keeps the running maximum inside it
        drop = gather_rows(resets, order)[..., None]
        fresh = torch.maximum(gi, logf) - total
        candidate = torch.where(drop, fresh, candidate)
        finite = torch.nan_to_num(candidate.detach(), nan=0.0, posinf=0.0, neginf=0.0)
        gap = finite.amax(1, keepdim=True) - finite.amin(1, keepdim=True) + 1
        offset = drop.cumsum(1) * gap
        m = _running_maximum(candidate + offset) - offset + total
    previous = torch.cat([before_first, m[:, :-1]], dim=1)
    if resets is not None:
        previous = previous.masked_fill(drop, 0)
    return (logf + previous - m).clamp(max=0), torch.exp(gi - m), m


def _running_maximum(x: Tensor) -> Tensor:
    """Along axis 1 of (batch, steps, heads)."""
    if not exporting():
        return x.cummax(1).values
    t = torch.arange(x.shape[1], device=x.device)  # all pairs, as in the product that follows: ONNX has no cummax
    pairs = torch.where((t[:, None] >= t)[..., None], x[:, None], torch.full_like(x[:, :1, None], -torch.inf))
    return pairs.amax(2)


def final_stabiliser(m: Tensor, order: Tensor | None, initial_state: State | None, like: Tensor) -> Tensor:
    """m after the last step that visits a row; the given one (or 0) where none does."""
    if order is None:
        return m[:, -1].contiguous()
    batch = m.shape[0]
    index = order.expand(batch, -1)
    count = (index >= 0).sum(1)
    row = index.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
    last = m[torch.arange(batch, device=m.device), row]
    start = torch.zeros_like(last) if initial_state is None else initial_state[2].to(last.dtype)
    return torch.where((count > 0)[:, None], last, start)


def _normalised(sums: Tensor, m: Tensor, scale: float, eps: float, order: Tensor | None, v: Tensor) -> Tensor:
    headdim = v.shape[3]
    # Where m is so low that exp(-m) overflows, y is 0 to rounding and so is its gradient.
    most = 80.0 if m.dtype == torch.float32 else 700.0
    total = torch.maximum((sums[..., headdim] * scale).abs(), torch.exp((-m).clamp(max=most))) + eps
    y = sums[..., :headdim] * (scale / total)[..., None]
    return y.to(v.dtype)


def check(name: str, q, k, v, i, f, state) -> None:
    _checks.has_shape(name, "v", v, [("batch", None), ("length", None), ("heads", None), ("headdim", None)])
    _checks.has_dtype(name, "v", v)
    batch, length, heads, headdim = v.shape
    rows = [("batch", batch), ("length", length), ("heads", heads)]
    _checks.has_shape(name, "q", q, [*rows, ("state", None)], v)
    _checks.has_shape(name, "k", k, [*rows, ("state", q.shape[3])], v)
    for label, t in (("i", i), ("f", f)):
        _checks.has_shape(name, label, t, rows, v)
    for label, t in (("q", q), ("k", k), ("i", i), ("f", f)):
        _checks.has_dtype(name, label, t)
    if state is None:
        return
    if not (isinstance(state, tuple | list) and len(state) == 3):
        raise ValueError(f"{name}: initial_state is {type(state).__name__}; it must be the triple (C, n, m)")
    axes = [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", q.shape[3])]
    _checks.has_shape(name, "initial_state[0]", state[0], axes, v)
    _checks.has_shape(name, "initial_state[1]", state[1], [axes[0], axes[1], axes[3]], v)
    _checks.has_shape(name, "initial_state[2]", state[2], axes[:2], v)
