"""The chunked form with one decay per key channel, in torch: pairs inside a chunk, a recurrence over chunks.

The decay between two steps of a chunk is taken per channel from the difference of running sums, masked before the
exponential, so that no decay however strong overflows (the usual factorisation into exp(c_t) and exp(-c_s) does).
Source: Yang et al., "Gated linear attention", arXiv 2312.06635, section 4; gradients derived from the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels.ops._walk import LEAST, gather_rows, scatter_rows

CHUNK = 16


def _pieces(v, decay, k, q, resets, order, a, b, strict):
    """One chunk: v, k, q (batch, heads, rows, width), pair decays (.., rows, rows, state), carry, end, total."""
    work = torch.promote_types(v.dtype, torch.float32)

    def rows(x: Tensor) -> Tensor:
        part = x[:, a:b] if order is None else gather_rows(x, order[:, a:b])
        return part.transpose(1, 2)

    vs, ks, qs = (rows(x).to(work) for x in (v, k, q))
    c = rows(decay).to(torch.float64).clamp(min=LEAST).cumsum(2)
    n = c.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool, device=v.device).tril()[None, None]
    segment = None
    if resets is not None:
        part = resets[:, a:b] if order is None else gather_rows(resets, order[:, a:b])
        segment = part.cumsum(1)
        keep = keep & (segment[:, None, :, None] == segment[:, None, None, :])
    pairs = (c[..., :, None, :] - c[..., None, :, :]).masked_fill(~keep[..., None], -torch.inf).to(work).exp()
    carry = c.to(work).exp()
    if segment is not None:
        carry = carry.masked_fill((segment > 0)[:, None, :, None], 0)
    end = pairs[..., -1, :, :]
    if strict:
        pairs = pairs.masked_fill(torch.eye(n, dtype=torch.bool, device=v.device)[..., None], 0)
    return vs, ks, qs, pairs, carry, end, carry[..., -1, :]


def _advance(S, vs, ks, end, total):
    return total[:, :, None] * S + vs.transpose(-1, -2) @ (ks * end)


def _spans(v, order):
    steps = v.shape[1] if order is None else order.shape[1]
    return [(a, min(a + CHUNK, steps)) for a in range(0, steps, CHUNK)]


def forward(v, decay, k, q, state, resets, order, strict, *, save=False):
    """See :func:`zoo_kernels.ops.linear_attention.reference.forward`; the same arguments and results."""
    work = torch.promote_types(v.dtype, torch.float32)
    batch, length, heads, headdim = v.shape
    S = v.new_zeros(batch, heads, headdim, k.shape[3], dtype=work) if state is None else state.to(work, copy=True)
    parts = []
    for a, b in _spans(v, order):
        vs, ks, qs, pairs, carry, end, total = _pieces(v, decay, k, q, resets, order, a, b, strict)
        scores = torch.einsum("bhtn,bhsn,bhtsn->bhts", qs, ks, pairs)
        out = scores @ vs + (qs * carry) @ S.transpose(-1, -2)
        S = _advance(S, vs, ks, end, total)
        parts.append(out.transpose(1, 2))
    y = torch.cat(parts, dim=1) if parts else v.new_zeros(batch, 0, heads, headdim, dtype=work)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None], 0)
    return scatter_rows(y, order, length).to(v.dtype).contiguous(), S.contiguous()


def backward(grads, arguments, saved, needs):
    """Gradients of v, decay, k, q, state, from those of y and of the last state."""
    dy, dfinal = grads
    v, decay, k, q, state, resets, order, strict = arguments
    work = torch.promote_types(v.dtype, torch.float32)
    batch, length, heads, headdim = v.shape
    S = v.new_zeros(batch, heads, headdim, k.shape[3], dtype=work) if state is None else state.to(work, copy=True)
    spans, borders = _spans(v, order), []
    for a, b in spans:
        borders.append(S)
        vs, ks, _, _, _, end, total = _pieces(v, decay, k, q, resets, order, a, b, strict)
        S = _advance(S, vs, ks, end, total)
    dS = dfinal.to(work)
    found: list[list[Tensor]] = []
    for (a, b), S in zip(reversed(spans), reversed(borders), strict=True):
        vs, ks, qs, pairs, carry, end, total = _pieces(v, decay, k, q, resets, order, a, b, strict)
        g = (dy[:, a:b] if order is None else gather_rows(dy, order[:, a:b])).transpose(1, 2).to(work)
        scores = torch.einsum("bhtn,bhsn,bhtsn->bhts", qs, ks, pairs)
        dscores = g @ vs.transpose(-1, -2)
        dq = torch.einsum("bhts,bhsn,bhtsn->bhtn", dscores, ks, pairs)
        dk = torch.einsum("bhts,bhtn,bhtsn->bhsn", dscores, qs, pairs)
        dq_off, dk_out = carry * (g @ S), end * (vs @ dS)
        row = qs * (dq + dq_off) - ks * dk
        out = ks * dk_out
        whole = total * (dS * S).sum(2)
        da = row.flip(2).cumsum(2).flip(2) + (out.cumsum(2) - out) + whole[:, :, None]
        dv = scores.transpose(-1, -2) @ g + (ks * end) @ dS.transpose(-1, -2)
        found.append([x.transpose(1, 2) for x in (dv, da, dk + dk_out, dq + dq_off)])
        dS = total[:, :, None] * dS + g.transpose(-1, -2) @ (qs * carry)
    if not found:
        return [torch.zeros_like(v), torch.zeros_like(decay), torch.zeros_like(k), torch.zeros_like(q), dS]
    whole_length = [torch.cat(parts[::-1], dim=1) for parts in zip(*found, strict=True)]
    if resets is not None:
        walked = gather_rows(resets, order)
        whole_length[1] = whole_length[1].masked_fill(walked[..., None, None], 0)
    if order is not None:
        absent = (order < 0)[..., None, None]
        whole_length = [scatter_rows(x.masked_fill(absent, 0), order, length) for x in whole_length]
    return [*whole_length, None if state is None else dS]
