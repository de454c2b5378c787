"""OCAB: attention from windows to the larger windows around them, and an MLP.

Chen et al., "Activating More Pixels in Image Super-Resolution Transformer" (HAT), arXiv 2205.04437, section 3.2: the
block that Contrast takes its attention from. Layout (batch, height, width, channels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Mlp, Recomputed
from zoo.layers.inference import results_only

#: numbers in the keys and values of the windows that are computed at a time in inference
AT_ONCE = 1 << 24


class OverlappingCrossAttention(nn.Module):
    """Queries of non-overlapping windows of side ``window``, keys and values of windows of side (1 + overlap) window
    around the same centres, zeros beyond the edges, with a learned bias for every relative position and head.

    Input and output (batch, H, W, dim), H and W multiples of ``window``. A query sees exactly the positions of its
    window's key window.
    """

    def __init__(self, dim: int, window: int = 16, overlap: float = 0.5, heads: int = 6, qkv_bias: bool = True) -> None:
        super().__init__()
        margin = window * overlap / 2
        if window < 1 or overlap < 0 or margin != int(margin):
            raise ValueError(
                f"window is {window} and overlap {overlap}; the key window must reach a whole number of positions, 0 "
                f"or more, beyond each side of the window, and {margin:g} is none"
            )
        if dim % heads:
            raise ValueError(f"dim is {dim} and heads {heads}; the heads must divide the channels")
        self.dim, self.window, self.heads = dim, window, heads
        self.margin = int(margin)
        self.key_window = window + 2 * self.margin
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = nn.Parameter(torch.zeros((window + self.key_window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.proj = Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"window={self.window}, key_window={self.key_window}, heads={self.heads}"

    def relative_positions(self) -> Tensor:
        """Row of the bias table for every (query, key) of a window: (window^2, key_window^2) int64."""
        device = self.bias.device
        q, k = torch.arange(self.window, device=device), torch.arange(self.key_window, device=device)
        apart = k[None, :] - q[:, None] + self.window - 1  # 0 .. window + key_window - 2, along one axis
        side = self.window + self.key_window - 1
        index = apart[:, None, :, None] * side + apart[None, :, None, :]
        return index.reshape(self.window**2, self.key_window**2)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        M = self.window
        if height % M or width % M:
            raise ValueError(f"a map of {height} x {width} has no whole windows of {M}; pad it to multiples first")
        q, kv = self.qkv(x).split([self.dim, 2 * self.dim], dim=-1)
        bias = self.bias[self.relative_positions()].permute(2, 0, 1)[None]
        kv = F.pad(kv, (0, 0, self.margin, self.margin, self.margin, self.margin))
        lines = height // M
        each = batch * (width // M) * self.key_window**2 * 2 * self.dim
        step = max(AT_ONCE // each, 1) if not torch.is_grad_enabled() and results_only(x) else lines
        parts = [self._lines(q, kv, bias, start, min(start + step, lines)) for start in range(0, lines, step)]
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def _lines(self, q: Tensor, kv: Tensor, bias: Tensor, start: int, stop: int) -> Tensor:
        """Lines of windows start .. stop-1: (batch, (stop - start) window, width, dim)."""
        M, O, h = self.window, self.key_window, self.heads
        batch, _, width, _ = q.shape
        rows, columns = stop - start, width // M
        q = q[:, start * M : stop * M].reshape(batch, rows, M, columns, M, h, -1).permute(0, 1, 3, 5, 2, 4, 6)
        kv = kv[:, start * M : (stop - 1) * M + O].unfold(1, O, M).unfold(2, O, M)  # (b, rows, columns, 2C, O, O)
        kv = kv.unflatten(3, (2, h, -1)).permute(0, 1, 2, 3, 4, 6, 7, 5)  # a position's channels side by side
        kv = kv.reshape(batch * rows * columns, 2, h, O * O, -1)
        y = F.scaled_dot_product_attention(
            q.reshape(batch * rows * columns, h, M * M, -1), kv[:, 0], kv[:, 1], attn_mask=bias.to(q.dtype)
        )
        y = y.view(batch, rows, columns, h, M, M, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(batch, rows * M, width, self.dim)


class OCAB(Recomputed):
    """``x + attention(norm x)``, then ``x + mlp(norm2 x)``; see :class:`OverlappingCrossAttention`."""

    def __init__(
        self, dim: int, window: int = 16, overlap: float = 0.5, heads: int = 6, mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = OverlappingCrossAttention(dim, window, overlap, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))
