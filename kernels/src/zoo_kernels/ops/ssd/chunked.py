"""The chunked form in torch: matrix products inside a chunk, a short recurrence over chunks; forward and backward.

Inside a chunk, with c the running sum of the log decays, ``M[t, s] = exp(c_t - c_s)`` for s <= t in the same segment
(masked before the exponential: above the diagonal the difference is positive and would overflow) and S the state at the
start::

    y_t = sum_s M[t, s] (q_t . k_s) w_s v_s + exp(c_t) S q_t
    S'  = exp(c_end) S + sum_s M[end, s] w_s v_s k_s^T

One chunk is alive at a time. Serves where the C++ library was not built, and any device without a kernel of its own.
Source: Dao and Gu, arXiv 2405.21060, section 6; the gradients are derived from these formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels.ops._walk import LEAST, gather_rows, scatter_rows

CHUNK = 64


class _Walk:
    """Arguments in visiting order, cut into chunks on demand, in the accumulation dtype, heads before rows."""

    def __init__(self, v, decay, weight, k, q, resets, order, chunk):
        self.batch, self.length, self.heads, self.headdim = v.shape
        self.groups, self.state = k.shape[2:]
        self.work = torch.promote_types(v.dtype, torch.float32)
        self.args = (v, k, q)
        self.order, self.resets, self.chunk = order, resets, chunk
        self.decay = None if decay is None else gather_rows(decay, order).to(torch.float64).clamp(min=LEAST)
        self.weight = None if weight is None else gather_rows(weight, order).to(self.work)
        self.steps = self.length if order is None else order.shape[1]
        walked = None if resets is None else gather_rows(resets, order)
        self.walked_resets = walked

    def starts(self) -> range:
        return range(0, self.steps, self.chunk)

    def rows(self, x: Tensor, a: int, b: int) -> Tensor:
        part = x[:, a:b] if self.order is None else gather_rows(x, self.order[:, a:b])
        return part.to(self.work).transpose(1, 2)  # (batch, heads or groups, rows, width)

    def heads_of(self, x: Tensor) -> Tensor:
        """(batch, groups, rows, width) as (batch, heads, rows, width)."""
        return x if self.groups == self.heads else x.repeat_interleave(self.heads // self.groups, dim=1)

    def groups_of(self, x: Tensor) -> Tensor:
        if self.groups == self.heads:
            return x
        return x.unflatten(1, (self.groups, -1)).sum(2)

    def decays(self, a: int, b: int, strict: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M (batch, heads, rows, rows), exp(c) and M[end] (batch, heads, rows), exp(c_end) (batch, heads)."""
        n = b - a
        device = self.args[0].device
        if self.decay is None:
            c = torch.zeros(self.batch, self.heads, n, dtype=torch.float64, device=device)
        else:
            c = self.decay[:, a:b].transpose(1, 2).cumsum(-1)
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        seg = None
        keep = causal[None, None]
        if self.walked_resets is not None:
            seg = self.walked_resets[:, a:b].cumsum(1)
            keep = keep & (seg[:, None, :, None] == seg[:, None, None, :])
        difference = (c[..., :, None] - c[..., None, :]).masked_fill(~keep, -torch.inf)
        M = difference.to(self.work).exp()
        carry = c.to(self.work).exp()
        if seg is not None:
            carry = carry.masked_fill((seg > 0)[:, None], 0)
        end = M[..., -1, :]
        if strict:
            M = M.tril(-1)
        return M, carry, end, carry[..., -1]


def forward(v, decay, weight, k, q, D, state, resets, order, strict, *, save=False, chunk=CHUNK):
    """See :func:`zoo_kernels.ops.ssd.reference.forward`; the same arguments and results."""
    w = _Walk(v, decay, weight, k, q, resets, order, chunk)
    S = _start(w, v, state)
    y = v.new_zeros(v.shape, dtype=w.work) if order is not None else v.new_empty(v.shape, dtype=w.work)
    for a in w.starts():
        b = min(a + chunk, w.steps)
        vs, ks, qs = (w.rows(x, a, b) for x in (v, k, q))
        M, carry, end, total = w.decays(a, b, strict)
        scores = w.heads_of(qs @ ks.transpose(-1, -2)) * M
        u = vs if w.weight is None else vs * w.weight[:, a:b].transpose(1, 2)[..., None]
        out = scores @ u + carry[..., None] * (w.heads_of(qs) @ S.transpose(-1, -2))
        if D is not None:
            out = out + (D.to(w.work)[:, None, None] if D.dim() == 1 else D.to(w.work)[:, None]) * vs
        S = total[..., None, None] * S + (u * end[..., None]).transpose(-1, -2) @ w.heads_of(ks)
        _put(w, y, out, a, b)
    return y.to(v.dtype), S.contiguous()


def backward(grads, arguments, saved, needs, *, chunk=CHUNK):
    """Gradients of v, decay, weight, k, q, D, state, from those of y and of the last state."""
    dy, dfinal = grads
    v, decay, weight, k, q, D, state, resets, order, strict = arguments
    w = _Walk(v, decay, weight, k, q, resets, order, chunk)
    starts = list(w.starts())
    S = _start(w, v, state)
    borders = []
    for a in starts:  # the states at the borders of chunks, replayed
        borders.append(S)
        b = min(a + chunk, w.steps)
        vs, ks = w.rows(v, a, b), w.rows(k, a, b)
        _, _, end, total = w.decays(a, b, strict)
        u = vs if w.weight is None else vs * w.weight[:, a:b].transpose(1, 2)[..., None]
        S = total[..., None, None] * S + (u * end[..., None]).transpose(-1, -2) @ w.heads_of(ks)
    dS = dfinal.to(w.work)
    shape = (w.batch, w.steps)
    dv = v.new_zeros(v.shape, dtype=w.work)
    dk, dq = k.new_zeros(k.shape, dtype=w.work), q.new_zeros(q.shape, dtype=w.work)
    da = None if decay is None else v.new_zeros(*shape, w.heads, dtype=w.work)
    dw = None if weight is None else v.new_zeros(*shape, w.heads, dtype=w.work)
    dD = None if D is None else v.new_zeros(w.heads, w.headdim, dtype=w.work)
    for a, S in zip(reversed(starts), reversed(borders), strict=True):
        b = min(a + chunk, w.steps)
        vs, ks, qs, g = (w.rows(x, a, b) for x in (v, k, q, dy))
        M, carry, end, total = w.decays(a, b, strict)
        weights = None if w.weight is None else w.weight[:, a:b].transpose(1, 2)[..., None]
        u = vs if weights is None else vs * weights
        kh, qh = w.heads_of(ks), w.heads_of(qs)
        G = w.heads_of(qs @ ks.transpose(-1, -2))
        dM = g @ u.transpose(-1, -2)  # gradient of M * G
        dG = w.groups_of(dM * M)
        gS = g @ S  # (batch, heads, rows, state)
        uS = u @ dS
        du_in = (G * M).transpose(-1, -2) @ g
        du_out = end[..., None] * (kh @ dS.transpose(-1, -2))
        du = du_in + du_out
        dq_rows = dG @ ks + w.groups_of(carry[..., None] * gS)
        dk_rows = dG.transpose(-1, -2) @ qs + w.groups_of(end[..., None] * uS)
        if da is not None:
            # decay_t acts on every pair s < t <= t'; sums of these, not differences of sums, which would lose what
            # strong decays leave
            pairs = (dM * M * G).flip(-2).cumsum(-2).flip(-2).tril(-1)
            off = carry * (gS * qh).sum(-1)
            out = end * (uS * kh).sum(-1)
            whole = total * (dS * S).sum((-1, -2))
            tail = pairs.sum(-1) + off.flip(-1).cumsum(-1).flip(-1) + whole[..., None] + (out.cumsum(-1) - out)
            da[:, a:b] = tail.transpose(1, 2)
        if dw is not None:
            dw[:, a:b] = (du * vs).sum(-1).transpose(1, 2)
            du = du * weights
        if dD is not None:
            dD += (g * vs).sum((0, 2))
            du = du + g * (D.to(w.work)[:, None, None] if D.dim() == 1 else D.to(w.work)[:, None])
        dS = total[..., None, None] * dS + (carry[..., None] * g).transpose(-1, -2) @ qh
        for target, rows in ((dv, du), (dk, dk_rows), (dq, dq_rows)):
            _put(w, target, rows, a, b)
    if da is not None:
        if w.walked_resets is not None:
            da = da.masked_fill(w.walked_resets[..., None], 0)
        da = scatter_rows(_visited(da, order), order, w.length)
    if dw is not None:
        dw = scatter_rows(_visited(dw, order), order, w.length)
    if dD is not None and D.dim() == 1:
        dD = dD.sum(1)
    return [dv, da, dw, dk, dq, dD, None if state is None else dS]


def _start(w: _Walk, v: Tensor, state: Tensor | None) -> Tensor:
    if state is None:
        return v.new_zeros(w.batch, w.heads, w.headdim, w.state, dtype=w.work)
    return state.to(w.work, copy=True)


def _visited(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.masked_fill((order < 0)[..., None], 0)


def _put(w: _Walk, target: Tensor, rows: Tensor, a: int, b: int) -> None:
    """Write (batch, heads, rows, width) to the rows of ``target`` that the steps a to b visit."""
    rows = rows.transpose(1, 2)
    if w.order is None:
        target[:, a:b] = rows
        return
    index = w.order[:, a:b].expand(w.batch, -1)
    batch, step = (index >= 0).nonzero(as_tuple=True)
    target[batch, index[batch, step]] = rows[batch, step]
