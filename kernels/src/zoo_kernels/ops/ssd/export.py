"""The recurrence as one masked product over the whole length, without a loop: for exporters. Quadratic in length."""

from __future__ import annotations

import torch

from zoo_kernels.ops._walk import LEAST, gather_rows, scatter_rows


def forward(v, decay, weight, k, q, D, state, resets, order, strict, *, save=False):
    """See :func:`zoo_kernels.ops.ssd.reference.forward`; the same arguments and results."""
    work = torch.promote_types(v.dtype, torch.float32)
    batch, length, heads, _headdim = v.shape
    repeat = heads // k.shape[2]
    vs, ks, qs = (gather_rows(x, order).to(work) for x in (v, k, q))
    kh, qh = (x.repeat_interleave(repeat, dim=2) for x in (ks, qs))
    steps = torch.arange(vs.shape[1], device=v.device)
    keep = (steps[:, None] >= steps)[None, :, :, None]  # (batch, to, from, heads)
    if decay is None:
        c = torch.zeros(batch, vs.shape[1], heads, dtype=torch.float64, device=v.device)
    else:  # in float64, for differences of sums that may be large
        c = gather_rows(decay, order).to(torch.float64).clamp(min=LEAST).cumsum(1)
    carry = c.to(work).exp()
    if resets is not None:
        segment = gather_rows(resets, order).to(torch.int64).cumsum(1)
        keep = keep & (segment[:, :, None] == segment[:, None])[..., None]
        carry = torch.where((segment == 0)[..., None], carry, torch.zeros_like(carry))
    M = torch.where(keep, c[:, :, None] - c[:, None], torch.full_like(c[:, :1, None], -torch.inf)).to(work).exp()
    end = M[:, -1]
    if strict:
        M = torch.where((steps[:, None] > steps)[None, :, :, None], M, torch.zeros_like(M))
    u = vs if weight is None else vs * gather_rows(weight, order).to(work)[..., None]
    scores = torch.einsum("bthn,bshn->btsh", qh, kh) * M
    y = torch.einsum("btsh,bshp->bthp", scores, u)
    final = torch.einsum("bsh,bshp,bshn->bhpn", end, u, kh)
    if state is not None:
        y = y + carry[..., None] * torch.einsum("bthn,bhpn->bthp", qh, state.to(work))
        final = final + carry[:, -1, :, None, None] * state.to(work)
    if D is not None:
        y = y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * vs
    if order is not None:
        y = torch.where((order < 0)[..., None, None], torch.zeros_like(y), y)
    return scatter_rows(y, order, length).to(v.dtype), final
