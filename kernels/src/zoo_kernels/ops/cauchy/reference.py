"""The definition of the Cauchy sums in plain torch, with a backward that forms its large tensors piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the largest tensor that is formed at once.
PIECE = 1 << 22


def sums(v: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """(heads, channels, N), (channels, N), (nodes,) to (heads, channels, nodes)."""
    first = 1 / (p - a[..., None] * q)  # (channels, N, nodes)
    second = 1 / (p - a.conj()[..., None] * q)
    vt = v.transpose(0, 1)  # (channels, heads, N)
    return 2 * (vt @ first + vt.conj() @ second).transpose(0, 1)


def _pieces(channels: int, size: int) -> list[slice]:
    step = max(1, PIECE // max(size, 1))
    return [slice(i, min(i + step, channels)) for i in range(0, channels, step)]


def forward(v, a, p, q, *, save) -> tuple[Tensor]:
    out = v.new_empty(*v.shape[:2], p.shape[0])
    for part in _pieces(v.shape[1], v.shape[2] * p.shape[0]):
        out[:, part] = sums(v[:, part], a[part], p, q)
    return (out,)


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    """With c = 1 / (p - a q), d = 1 / (p - conj(a) q): r = 2 sum v c + conj(v) d; dc/da = q c^2, dd/da* = q d^2."""
    (g,) = grads
    v, a, p, q = arguments
    dv, da = torch.empty_like(v), torch.empty_like(a)
    for part in _pieces(v.shape[1], v.shape[2] * p.shape[0]):
        gt, vt = g[:, part].transpose(0, 1), v[:, part].transpose(0, 1)  # (channels, heads, ...)
        c = 1 / (p - a[part][..., None] * q)  # (channels, N, nodes)
        d = 1 / (p - a[part].conj()[..., None] * q)
        left = gt @ c.conj().transpose(1, 2)  # sum over nodes of g conj(c): (channels, heads, N)
        right = gt.conj() @ d.transpose(1, 2)
        dv[:, part] = 2 * (left + right).transpose(0, 1)
        if needs[1]:
            left = gt @ (q * c * c).conj().transpose(1, 2)
            right = gt.conj() @ (q * d * d).transpose(1, 2)
            # r depends on conj(a) through d: its part of the gradient is conj(g) * d r / d conj(a)
            da[part] = 2 * (vt.conj() * left + vt.conj() * right).sum(1)
    return [dv, da]
