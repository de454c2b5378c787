"""The definition of the sLSTM in plain torch: one step after the other, any real dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels.ops._walk import gather_rows, scatter_rows


def advance(
    raw: Tensor, state: tuple[Tensor, ...], R: Tensor, b: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step: the gates before activation (batch, 4, heads, headdim), and the next y, c, n, m."""
    y, c, n, m = state
    raw = raw + torch.einsum("bhi,higo->bgho", y, R)
    if b is not None:
        raw = raw + b
    gi, gf, gz, go = raw.unbind(1)
    logf = m + F.logsigmoid(gf)
    m_new = torch.where(n == 0, gi, torch.maximum(gi, logf))  # nothing remembered yet: nothing to compare with
    # At most 1, whatever is not yet remembered: clamped before exp, whose infinity would make NaN of the gradient
    i, f = torch.exp((gi - m_new).clamp(max=0)), torch.exp((logf - m_new).clamp(max=0))
    c_new = f * c + i * torch.tanh(gz)
    n_new = f * n + i
    return raw, (torch.sigmoid(go) * c_new / n_new, c_new, n_new, m_new)


def forward(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    resets: Tensor | None,
    order: Tensor | None,
    *,
    save: bool = False,
) -> tuple[Tensor, ...]:
    """gates (batch, length, 4, heads, headdim); recurrent (heads, headdim in, 4, headdim out); bias (heads, 4,
    headdim); state (4, batch, heads, headdim). Returns y, the last state, and with ``save`` the gates before activation
    (batch, steps, 4, heads, headdim) and the states c, n, m after every step (batch, steps, 3, heads, headdim)."""
    batch, length, _, heads, headdim = gates.shape
    work = torch.promote_types(gates.dtype, torch.float32)
    inputs = gather_rows(gates, order).to(work)
    R = recurrent.to(work)
    b = None if bias is None else bias.to(work).transpose(0, 1)  # (4, heads, headdim)
    r = None if resets is None else gather_rows(resets, order)
    zero = inputs.new_zeros(batch, heads, headdim)
    y, c, n, m = (zero, zero, zero, zero) if state is None else state.to(work).unbind(0)
    rows, raws, trace = [], [], []
    for t in range(inputs.shape[1]):
        if r is not None:
            drop = r[:, t, None, None]
            y, c, n, m = (torch.where(drop, zero, s) for s in (y, c, n, m))
        raw, (y_new, c_new, n_new, m_new) = advance(inputs[:, t], (y, c, n, m), R, b)
        if order is None:
            y, c, n, m = y_new, c_new, n_new, m_new
        else:
            on = (order[:, t] >= 0)[:, None, None]
            y, c, n, m = (torch.where(on, a, b_) for a, b_ in ((y_new, y), (c_new, c), (n_new, n), (m_new, m)))
        rows.append(y)
        if save:
            raws.append(raw)
            trace.append(torch.stack([c, n, m], dim=1))
    out = torch.stack(rows, dim=1) if rows else inputs.new_zeros(batch, 0, heads, headdim)
    if order is not None:
        out = out.masked_fill((order < 0)[..., None, None], 0)
    final = torch.stack([y, c, n, m])
    kept = (gates.new_empty(0, dtype=work), gates.new_empty(0, dtype=work))
    if save:
        steps = inputs.shape[1]
        kept = (
            torch.stack(raws, dim=1) if raws else inputs.new_empty(batch, steps, 4, heads, headdim),
            torch.stack(trace, dim=1) if trace else inputs.new_empty(batch, steps, 3, heads, headdim),
        )
    return (scatter_rows(out, order, length).to(gates.dtype).contiguous(), final, *(k.detach() for k in kept))
