"""The mLSTM layer: widen, a short convolution, a matrix memory per head, a gate, narrow again.

Source: Beck et al., "xLSTM", arXiv 2405.04517, figure 11; NX-AI/xlstm ``xlstm/blocks/mlstm/layer.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.inference import results_only, untouched
from zoo.layers.linear import Linear, linear
from zoo_kernels import mlstm, mlstm_step

from .parts import HeadNorm, HeadwiseLinear, ShortConv, few_rows, narrow_init, rounded_width, small_init

State = dict[str, Tensor]
#: cosines and sines of rotary positions, (..., width / 2) each
Rotary = tuple[Tensor, Tensor]


def frequencies(position: Tensor, width: int, theta: float) -> Rotary:
    """Cosines and sines (..., width / 2) of ``position`` (...,) times ``theta^(-2j / width)``."""
    steps = torch.arange(0, width, 2, device=position.device, dtype=torch.float32)
    angle = position[..., None].float() * (1.0 / theta ** (steps / width))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (even, odd) of the last axis, (..., width), in float32; the result has x's type."""
    cos, sin = rotary
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class MLSTM(nn.Module):
    """(batch, length, d_model) to the same.

    Arguments: ``num_heads``; ``proj_factor`` with ``round_up`` and ``multiple``, the inner width; ``conv_width`` and
    ``conv_causal``; ``block_size`` of the block-diagonal q, k, v; ``bias`` of all projections; ``rotate_gates``:
    whether the gates read q and k after the rotary positions (Prot-xLSTM) or before (DNA-xLSTM); ``num_blocks`` of the
    network, for the initial scale.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        proj_factor: float = 2.0,
        round_up: bool = True,
        multiple: int = 64,
        conv_width: int = 4,
        conv_causal: bool = True,
        block_size: int = 4,
        bias: bool = False,
        dropout: float = 0.0,
        rotate_gates: bool = True,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        inner = rounded_width(d_model, proj_factor, multiple, round_up)
        if inner % num_heads or inner % block_size:
            raise ValueError(
                f"an inner width of {inner} does not divide into {num_heads} heads and blocks of {block_size}"
            )
        self.inner, self.num_heads, self.rotate_gates = inner, num_heads, rotate_gates
        self.up = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv = ShortConv(inner, conv_width, conv_causal)
        self.q_proj = HeadwiseLinear(inner, inner // block_size, bias)
        self.k_proj = HeadwiseLinear(inner, inner // block_size, bias)
        self.v_proj = HeadwiseLinear(inner, inner // block_size, bias)
        self.igate = nn.Linear(3 * inner, num_heads)
        self.fgate = nn.Linear(3 * inner, num_heads)
        self.norm = HeadNorm(inner)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = Linear(inner, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self._initialise(d_model, num_blocks)

    def _initialise(self, d_model: int, num_blocks: int) -> None:
        for layer in (self.up, self.q_proj, self.k_proj, self.v_proj):
            small_init(layer.weight, d_model)
        narrow_init(self.down.weight, d_model, num_blocks)
        for projection in (self.up, self.down):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))

    @property
    def headdim(self) -> int:
        return self.inner // self.num_heads

    def init_state(self, batch: int) -> State:
        """At rest: the last inputs of the convolution, and C (values x keys), n, m of each head in float32."""
        like = self.down.weight
        work = torch.promote_types(like.dtype, torch.float32)
        size = (batch, self.num_heads, self.headdim)
        return {
            "conv": self.conv.init_state(batch),
            "C": like.new_zeros(*size, self.headdim, dtype=work),
            "n": like.new_zeros(size, dtype=work),
            "m": like.new_zeros(size[:2], dtype=work),
        }

    def forward(
        self,
        x: Tensor,
        *,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
        rotary: Rotary | None = None,
        bidirectional: bool = False,
    ) -> Tensor:
        """x: (batch, length, d_model).

        reverse: as on the flipped sequence, flipped back. resets (batch, length), lengths (batch,): as in
        :func:`zoo_kernels.mlstm`. state: go on from it; it moves on in place. rotary: cosines and sines, (length,
        headdim / 2) or (batch, length, inner / 2), by row. bidirectional: one memory that reads both ways.
        """
        u, gate = self._widen(x)
        kept = None if state is None else state["conv"]
        c = self.conv(u, reverse=reverse, resets=resets, lengths=lengths, state=kept)
        q, k, v, i, f = self._inputs(u, c, rotary)
        heads = (self.num_heads, self.headdim)
        start = None if state is None else (state["C"], state["n"], state["m"])
        h, last = mlstm(
            q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), i, f,
            bidirectional=bidirectional, reverse=reverse, resets=resets, lengths=lengths,
            initial_state=start, return_final_state=state is not None,
        )  # fmt: skip
        if start is not None:
            assert last is not None
            for old, new in zip(start, last, strict=True):
                old.copy_(new.detach())
        return self.dropout(self.down(self._gated(h, c, gate)))

    def step(self, x: Tensor, state: State, *, rotary: Rotary | None = None) -> Tensor:
        """One row (batch, d_model); ``state`` moves on in place."""
        u, z = few_rows(self.up, x).chunk(2, dim=-1)
        c = self.conv.step(u, state["conv"])
        q, k, v, i, f = self._inputs(u, c, rotary)
        heads = (self.num_heads, self.headdim)
        h = mlstm_step(
            q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), i, f,
            state=(state["C"], state["n"], state["m"]),
        )  # fmt: skip
        return few_rows(self.down, self._gated(h, c, F.silu(z)))

    def _widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the memory reads, and the gate behind its activation, (..., inner) each.

        In inference the first is torch's own product: what it rounds, q.k of the first rows magnifies a hundredfold,
        and oneDNN's sums round 1.7 times as much (over the 16 blocks of protxlstm_26m, 3e-4 of the logits against
        3e-5). The gate forgives, and is oneDNN's.
        """
        if type(self.up) is nn.Linear and results_only(x, self.up.weight, self.up.bias) and untouched(self.up):
            first, second = self.up.weight.chunk(2)
            one, two = (None, None) if self.up.bias is None else self.up.bias.chunk(2)
            return F.linear(x, first, one), linear(x, second, two, act="silu")
        u, z = self.up(x).chunk(2, dim=-1)
        return u, F.silu(z)

    def _inputs(self, u: Tensor, c: Tensor, rotary: Rotary | None) -> tuple[Tensor, ...]:
        """q, k, v (..., inner) and the gates i, f (..., heads)."""
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        turned = (q, k) if rotary is None else (self._rotate(q, rotary), self._rotate(k, rotary))
        # One product over q, k and v side by side, without laying them there: of it only 2 channels a head are kept.
        weights = torch.cat([self.igate.weight, self.fgate.weight]).chunk(3, dim=1)
        gates = torch.cat([self.igate.bias, self.fgate.bias])
        for seen, weight in zip((*(turned if self.rotate_gates else (q, k)), v), weights, strict=True):
            gates = gates + F.linear(seen, weight)
        i, f = gates.chunk(2, dim=-1)
        return *turned, v, i, f

    def _rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        if 2 * rotary[0].shape[-1] == self.inner and rotary[0].dim() >= x.dim():
            return rotate(x, rotary)
        return rotate(
            x.unflatten(-1, (self.num_heads, self.headdim)), (rotary[0].unsqueeze(-2), rotary[1].unsqueeze(-2))
        ).flatten(-2)

    def _gated(self, h: Tensor, c: Tensor, gate: Tensor) -> Tensor:
        return (self.norm(h) + self.skip * c) * gate
