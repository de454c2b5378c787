"""The sLSTM layer: a short convolution, scalar memories that hear their head's last output, a norm.

Source: Beck et al., "xLSTM", arXiv 2405.04517, figure 10; NX-AI/xlstm ``xlstm/blocks/slstm/layer.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo_kernels import slstm, slstm_step

from .parts import HeadNorm, HeadwiseLinear, ShortConv, small_init

State = dict[str, Tensor]
BIAS_INITS = ("powerlaw_blockdependent", "small_init", "standard")


class SLSTM(nn.Module):
    """(batch, length, d_model) to the same.

    ``i_proj`` and ``f_proj`` read the convolution, ``z_proj`` and ``o_proj`` the input (the originals call what feeds
    the input gate ``fgate`` and what feeds the forget gate ``igate``). ``recurrent``: (heads, headdim in, 4, headdim
    out), ``bias``: (heads, 4, headdim), gates in the order i, f, z, o. ``conv_width`` 0: no convolution.
    ``block`` and ``num_blocks``: where the layer stands in the network, for the initial forget gates.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        conv_width: int = 4,
        conv_causal: bool = True,
        bias_init: str = "powerlaw_blockdependent",
        dropout: float = 0.0,
        block: int = 0,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into {num_heads} heads")
        if bias_init not in BIAS_INITS:
            raise ValueError(f"bias_init is {bias_init!r}; expected one of {', '.join(BIAS_INITS)}")
        self.num_heads, self.headdim = num_heads, d_model // num_heads
        self.conv = ShortConv(d_model, conv_width, conv_causal) if conv_width else None
        self.i_proj = HeadwiseLinear(d_model, num_heads)
        self.f_proj = HeadwiseLinear(d_model, num_heads)
        self.z_proj = HeadwiseLinear(d_model, num_heads)
        self.o_proj = HeadwiseLinear(d_model, num_heads)
        self.recurrent = nn.Parameter(torch.zeros(num_heads, self.headdim, 4, self.headdim))
        self.bias = nn.Parameter(torch.zeros(num_heads, 4, self.headdim))
        self.norm = HeadNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.i_proj, self.f_proj, self.z_proj, self.o_proj):
            small_init(layer.weight, d_model)
        if bias_init == "powerlaw_blockdependent":
            place = block / (num_blocks - 1) if num_blocks > 1 else 0.0
            ramp = torch.arange(self.headdim) / max(self.headdim - 1, 1)
            with torch.no_grad():
                self.bias[:, 1] = 5 - 12 * ramp ** (0.3 + 1.3 * place)

    def init_state(self, batch: int) -> State:
        """At rest: ``cell`` (batch, 4, heads, headdim) holds y, c, n, m in float32; ``conv`` the last inputs."""
        work = torch.promote_types(self.recurrent.dtype, torch.float32)
        state = {"cell": self.recurrent.new_zeros(batch, 4, self.num_heads, self.headdim, dtype=work)}
        if self.conv is not None:
            state["conv"] = self.conv.init_state(batch)
        return state

    def forward(
        self,
        x: Tensor,
        *,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
        heads_flipped_from: int | None = None,
    ) -> Tensor:
        """x: (batch, length, d_model); reverse, resets, lengths, state: as in :class:`MLSTM`.

        heads_flipped_from: rows of the batch from this one on meet the norm with their heads in reverse order, as the
        reverse-complement pass of DNA-xLSTM does.
        """
        walk = {"reverse": reverse, "resets": resets, "lengths": lengths}
        c = x
        if self.conv is not None:
            c = self.conv(x, **walk, state=None if state is None else state["conv"])  # type: ignore[arg-type]
        start = None if state is None else state["cell"].transpose(0, 1).contiguous()
        y, last = slstm(
            self._gates(x, c), self.recurrent, self.bias, initial_state=start, return_final_state=state is not None,
            **walk,  # type: ignore[arg-type]
        )  # fmt: skip
        if state is not None:
            assert last is not None
            state["cell"].copy_(last.detach().transpose(0, 1))
        y = self.dropout(y)
        if heads_flipped_from is not None and self.num_heads > 1:
            y = torch.cat([y[:heads_flipped_from], y[heads_flipped_from:].flip(2)])
        return self.norm(y)

    def step(self, x: Tensor, state: State) -> Tensor:
        """One row (batch, d_model); ``state`` moves on in place."""
        c = x if self.conv is None else self.conv.step(x, state["conv"])
        cell = state["cell"].transpose(0, 1).contiguous()
        y = slstm_step(self._gates(x, c), self.recurrent, self.bias, state=cell)
        state["cell"].copy_(cell.transpose(0, 1))
        return self.norm(y)

    def _gates(self, x: Tensor, c: Tensor) -> Tensor:
        """The inputs' share of the gates, (..., 4, heads, headdim)."""
        gates = [self.i_proj(c), self.f_proj(c), self.z_proj(x), self.o_proj(x)]
        return torch.stack(gates, dim=-2).unflatten(-1, (self.num_heads, self.headdim))
