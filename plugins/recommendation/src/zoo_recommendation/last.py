"""What training of a next-item model needs and full encodings do not: the last item alone, and cheap dropout.

A training sample asks for one vector, the one at its last item. Up to the last layer every position matters, since the
scan mixes them; in the last layer only that position's gate, norm and feed-forward are read, and the scan's output
there is one row of the dual (attention-like) form, which costs a product with the history instead of a scan. The
values are those of the full encoding (tested); the work is about half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import runtime


class Dropout(nn.Dropout):
    """nn.Dropout, drawn on a CPU from 16 random bits an element instead of one full draw each.

    A third of a training step on a CPU is spent drawing masks the ordinary way. The chance of dropping is ``p`` to
    1/65536, kept elements are scaled by the chance that was really drawn, so the expectation is exact. The draws come
    from torch's global generator: seeds and saved random states work as ever. Elsewhere (another device, a traced or
    compiled call) this is nn.Dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor
        torchs = x.device.type != "cpu" or tracing or runtime.forced_backend() not in ("", "native")
        if not self.training or not 0 < self.p < 1 or self.inplace or torchs:
            return super().forward(x)
        threshold = round(self.p * 65536)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        # In place and in float32 the comparison is vectorised, unlike one that gives bool: a third of the time.
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape).to(torch.float32).ge_(threshold - 32768)
        return x * keep.mul_(1 / (1 - threshold / 65536)).to(x.dtype)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, length, ...) at one row of each sequence, index (batch,) int64: (batch, ...)."""
    return x[torch.arange(x.shape[0], device=x.device), index]  # not len, which a tracer takes for a constant


def ssd_at(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    index: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """One row of :func:`zoo_kernels.ssd`: its output at ``index`` (batch,) of each sequence, (batch, heads, headdim).

    x (batch, length, heads, headdim); dt (batch, length, heads) before bias and softplus; A, dt_bias (heads,);
    B (batch, length, groups, state); C (batch, groups, state), at ``index`` already; D (heads,) or (heads, headdim).

    With ``d = softplus(dt + dt_bias)``, the row T of the masked matrix times x (arXiv 2405.21060, equation 16)::

        y_T = sum over s <= T of exp(A * (d_{s+1} + ... + d_T)) * d_s * (C_T . B_s) * x_s  +  D * x_T
    """
    work = torch.promote_types(x.dtype, torch.float32)
    d = F.softplus(dt.to(work) + dt_bias.to(work)).clamp(*dt_limit)
    before = torch.arange(x.shape[1], device=x.device) <= index[:, None]
    d = d * before[..., None]
    # Summed from the end, so that the recent items, which weigh most, lose nothing to rounding.
    after = F.pad(d[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))
    similarity = torch.einsum("blgn,bgn->blg", B.to(work), C.to(work))
    similarity = similarity.repeat_interleave(x.shape[2] // B.shape[2], dim=2)  # head h reads group h // repeat
    weight = torch.exp(after * A.to(work)) * d * similarity
    y = torch.einsum("blh,blhp->bhp", weight, x.to(work))
    here = rows_at(x, index).to(work)
    return (y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * here).to(x.dtype)
