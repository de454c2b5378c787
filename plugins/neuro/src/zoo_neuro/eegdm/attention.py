"""Stacks of attention and feed-forward layers written as a string: "scf" is self, cross attention, feed-forward.

Source: jhpuah/EEGDM ``MHAStack``; parameters are named and laid out as torch's ``nn.MultiheadAttention`` has them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Recomputed
from zoo.layers.linear import linear

#: Standard deviation, and bound, of initial weights where ``init_weight`` asks for them.
INIT_STD = 0.02


def small_normal_(tensor: Tensor) -> Tensor:
    """Normal of deviation 0.02, cut off at one deviation, as the original has it."""
    return nn.init.trunc_normal_(tensor, std=INIT_STD, a=-INIT_STD, b=INIT_STD)


class Attention(nn.Module):
    """Multi-head attention of queries (batch, N, d) to keys and values (batch, C, d_kv).

    Parameters: ``in_proj_weight`` (3 d, d) where d_kv = d, else ``q_proj_weight``, ``k_proj_weight``,
    ``v_proj_weight``; ``in_proj_bias`` (3 d); ``out_proj``. Raises ValueError where the heads do not divide d.
    """

    def __init__(self, dim: int, num_heads: int, dim_kv: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide the width {dim}")
        dim_kv = dim if dim_kv is None else dim_kv
        self.num_heads, self.dropout, self.joint = num_heads, dropout, dim_kv == dim
        if self.joint:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(dim, dim))
            self.k_proj_weight = nn.Parameter(torch.empty(dim, dim_kv))
            self.v_proj_weight = nn.Parameter(torch.empty(dim, dim_kv))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        for weight in self.projections():
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> list[nn.Parameter]:
        """The weights that make queries, keys and values: one, or three."""
        return [self.in_proj_weight] if self.joint else [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x (batch, N, d); ``other`` (batch, C, d_kv), itself if None. Returns (batch, N, d)."""
        if other is None and self.joint:
            q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            other = x if other is None else other
            wq, wk, wv = self.in_proj_weight.chunk(3) if self.joint else self.projections()
            bq, bk, bv = self.in_proj_bias.chunk(3)
            q, k, v = linear(x, wq, bq), linear(other, wk, bk), linear(other, wv, bv)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, exact GELU, Linear. Keys ``0.*``, ``2.*``."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__(Linear(dim, dim * factor), nn.GELU(), Linear(dim * factor, dim))


class AttentionStack(Recomputed):
    """Pre-norm residual layers, one a letter of ``struct``: s self attention, c cross attention, f feed-forward.

    ``dim`` and ``dim_kv`` widths; ``ff``: how many times wider a feed-forward layer is inside; ``crossnorm``: a
    LayerNorm on what is attended to; ``dropout`` of attention and of every branch; ``init_weight``: small initial
    weights, scaled down with the number of feed-forward layers below (``depth`` at the beginning).
    The j-th c reads the j-th of the given queries.
    """

    def __init__(
        self,
        dim: int,
        dim_kv: int,
        num_heads: int,
        ff: int = 4,
        struct: str = "scf",
        *,
        dropout: float = 0.0,
        crossnorm: bool = True,
        init_weight: bool = False,
        depth: int = 0,
    ) -> None:
        super().__init__()
        if unknown := set(struct) - set("scf"):
            raise ValueError(f"a stack is {struct!r}; expected letters of s, c and f, not {sorted(unknown)[0]!r}")
        self.struct, self.depth = struct, depth + struct.count("f")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in struct)
        norm = nn.LayerNorm if crossnorm else (lambda _: nn.Identity())
        self.c_norms = nn.ModuleList(norm(dim_kv) for _ in range(struct.count("c")))
        self.layers = nn.ModuleList(
            FeedForward(dim, ff) if s == "f" else Attention(dim, num_heads, dim_kv if s == "c" else dim, dropout)
            for s in struct
        )
        self.drop = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if init_weight:
            self._small(depth)

    @torch.no_grad()
    def _small(self, depth: int) -> None:
        for layer in self.layers:
            shrink = math.sqrt(2.0 * (depth + 1))
            if isinstance(layer, Attention):
                for weight in layer.projections():
                    small_normal_(weight).div_(shrink)
            else:
                first, _, last = layer  # type: ignore[misc]
                small_normal_(first.weight)
                small_normal_(last.weight).div_(shrink)
                nn.init.zeros_(first.bias)
                nn.init.zeros_(last.bias)
                depth += 1

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """x (batch, N, d); ``queries`` (batch, Q, C, d_kv), one for each c. Returns (batch, N, d)."""
        given = 0 if queries is None else queries.shape[1]
        if given != len(self.c_norms):
            raise ValueError(f"{given} queries were given to a stack {self.struct!r}, which reads {len(self.c_norms)}")
        read = 0
        for kind, norm, layer in zip(self.struct, self.norms, self.layers, strict=True):
            y = norm(x)
            if kind == "c":
                assert queries is not None
                y = layer(y, self.c_norms[read](queries[:, read]))
                read += 1
            else:
                y = layer(y)
            x = x + self.drop(y)
        return x
