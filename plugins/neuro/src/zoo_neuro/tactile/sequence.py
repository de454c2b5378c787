"""Stacks that read a sequence of features, inside encoders and as attenders: S4, Mamba, and a GPT with action tokens.

All map (batch, time, features) to the same, take ``steps`` (the time steps that are asked for, None: all) and ``mids``
(a dictionary that is filled with intermediates, under the original's names), and step one frame at a time.
Source: neuroagents-lab/2025-tactile-whisking ``enc_att_dec/{encoder,attender}``; arXiv 2505.18361.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba, Recomputed, RMSNorm, S4Block
from zoo.layers.linear import Linear, call

State = dict[str, Any]
Mids = dict[str, Tensor]


def at(x: Tensor, steps: Sequence[int] | None) -> Tensor:
    """The time steps ``steps`` of (batch, time, ...), all for None."""
    if steps is None:
        return x
    if list(steps) == [x.shape[1] - 1]:
        return x[:, -1:]
    return torch.stack([x[:, t] for t in steps], 1)


class S4Stack(nn.Module):
    """``x = norm(x + dropout(S4(x)))`` (or ``x + dropout(S4(norm(x)))`` with ``prenorm``), ``nlayers`` times.

    The S4 layers are those of Gu et al. (arXiv 2111.00396): a DPLR kernel of 64 states, one a channel, GELU, GLU.
    """

    def __init__(
        self, dim: int, nlayers: int, dropout: float = 0.0, prenorm: bool = False, *, name: str = "s4"
    ) -> None:
        super().__init__()
        self.prenorm, self.name = prenorm, name
        self.s4_layers = nn.ModuleList(S4Block(dim, dropout_p=dropout) for _ in range(nlayers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(nlayers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        for i, (layer, norm) in enumerate(zip(self.s4_layers, self.norms, strict=True)):
            z = self.dropout(layer(norm(x) if self.prenorm else x))
            x = z + x if self.prenorm else norm(z + x)
            if mids is not None:
                mids[f"{self.name}_l{i}"] = x
        return at(x, steps)

    def init_state(self, batch: int) -> State:
        return {"layers": [layer.init_state(batch) for layer in self.s4_layers]}  # type: ignore[union-attr, operator]

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, features) to the same; ``state`` moves on."""
        for layer, norm, inside in zip(self.s4_layers, self.norms, state["layers"], strict=True):
            z = layer.step(norm(x) if self.prenorm else x, inside)  # type: ignore[union-attr, operator]
            x = z + x if self.prenorm else norm(z + x)
        return x


class MambaBlock(nn.Module):
    """``residual += hidden; hidden = mixer(norm(residual))``."""

    def __init__(self, dim: int, norm: nn.Module, ssm: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = Mamba(dim, **ssm)


class MambaStack(nn.Module):
    """Blocks of Mamba without an MLP, and a norm after the last (state-spaces/mamba v2.2, d_intermediate 0).

    ``ssm``: arguments of :class:`~zoo.layers.Mamba` (d_state, d_conv, expand ...). ``residual_in_fp32``: the sum of the
    residual branch is kept in float32 where the model is of half precision.
    """

    def __init__(
        self,
        dim: int,
        nlayers: int,
        *,
        ssm: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        residual_in_fp32: bool = False,
        name: str = "mamba",
    ) -> None:
        super().__init__()
        kind = RMSNorm if rms_norm else nn.LayerNorm
        self.residual_in_fp32, self.name = residual_in_fp32, name
        make = lambda: kind(dim, eps=norm_epsilon)  # noqa: E731
        self.layers = nn.ModuleList(MambaBlock(dim, make(), ssm or {}) for _ in range(nlayers))
        self.norm_f = make()

    def _add(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        residual = hidden if residual is None else hidden + residual
        return residual.float() if self.residual_in_fp32 else residual

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.to(norm.weight.dtype))  # type: ignore[no-any-return, arg-type]

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        """At the last layer only the ``steps`` that are asked for are gated and projected."""
        hidden, residual = x, None
        for i, block in enumerate(self.layers):
            residual = self._add(hidden, residual)
            normed = self._normed(block.norm, residual)  # type: ignore[arg-type]
            if i + 1 < len(self.layers) or steps is None or mids is not None:
                hidden = block.mixer(normed)  # type: ignore[operator]
            else:
                y, z = block.mixer.mix(normed, gate=False)  # type: ignore[union-attr, operator]
                y, z, residual = at(y, steps), at(z, steps), at(residual, steps)
                hidden = block.mixer.out_proj(y * F.silu(z))  # type: ignore[union-attr, operator]
                steps = None
            if mids is not None:
                mids[f"{self.name}_l{i}"] = hidden
        y = self._normed(self.norm_f, hidden if residual is None else hidden + residual)
        if mids is not None:
            mids[f"{self.name}_norm"] = y
        return at(y, steps)

    def init_state(self, batch: int) -> State:
        return {"layers": [block.mixer.init_state(batch) for block in self.layers]}  # type: ignore[union-attr, operator]

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, features) to the same; ``state`` moves on."""
        hidden, residual = x, None
        for block, inside in zip(self.layers, state["layers"], strict=True):
            residual = self._add(hidden, residual)
            hidden = block.mixer.step(self._normed(block.norm, residual), inside)  # type: ignore[union-attr, operator, arg-type]
        return self._normed(self.norm_f, hidden if residual is None else hidden + residual)


class GPTBlock(Recomputed):
    """Pre-norm causal self-attention and an MLP of four times the width (tanh GELU)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.attn_proj = Linear(dim, 3 * dim), Linear(dim, dim)
        self.c_fc, self.mlp_proj = Linear(dim, 4 * dim), Linear(4 * dim, dim)
        self.gelu, self.drop = nn.GELU(approximate="tanh"), nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rest(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop(self.attn_proj(y.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp_proj(call(self.c_fc, self.ln_2(x), act=self.gelu)))

    def forward(self, x: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """(batch, tokens, dim) to the same, or to the tokens at ``places`` alone."""
        q, k, v = (self._heads(part) for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        drop = self.dropout if self.training else 0.0
        if places is None:
            return self._rest(x, F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True))
        seen = torch.arange(x.shape[1], device=x.device) <= torch.tensor(places, device=x.device)[:, None]
        q = at(q.transpose(1, 2), places).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=drop)
        return self._rest(at(x, places), y)

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, 1, dim) with the keys and values of the tokens before, which ``state`` keeps."""
        q, k, v = (self._heads(part) for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        for name, new in (("k", k), ("v", v)):
            state[name] = new if name not in state else torch.cat([state[name], new], dim=2)
        return self._rest(x, F.scaled_dot_product_attention(q, state["k"], state["v"]))


class GPTAttender(nn.Module):
    """A GPT that reads features and, after every ``num_feat_per_step`` of them, a learnt action token, whose places it
    answers at: (batch, time, repr_dim) to (batch, time / num_feat_per_step, hidden_dim).

    ``block_size``: tokens that there are positions for. Raises ValueError for more, and for features that do not
    divide.
    """

    def __init__(
        self,
        repr_dim: int,
        hidden_dim: int,
        block_size: int = 65,
        n_layer: int = 8,
        n_head: int = 4,
        dropout: float = 0.1,
        num_feat_per_step: int = 1,
    ) -> None:
        super().__init__()
        if hidden_dim % n_head:
            raise ValueError(f"hidden_dim {hidden_dim} does not divide into n_head {n_head} heads")
        self.block_size, self.every = block_size, num_feat_per_step
        self.action_token = nn.Parameter(torch.randn(1, 1, 1, repr_dim))
        self.wte, self.wpe = Linear(repr_dim, hidden_dim), nn.Embedding(block_size, hidden_dim)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(GPTBlock(hidden_dim, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(hidden_dim)
        self.lm_head = Linear(hidden_dim, hidden_dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # GPT-2's: smaller with depth where a residual branch ends
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if "_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _positions(self, first: int, count: int) -> Tensor:
        if first + count > self.block_size:
            raise ValueError(
                f"{first + count} tokens (features and action tokens), but there are positions for {self.block_size}; "
                "give fewer frames"
            )
        return self.wpe.weight[first : first + count]

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        """At the last layer only the action tokens that are asked for have queries."""
        batch, time, _ = x.shape
        if time % self.every:
            raise ValueError(f"{time} features do not divide into groups of {self.every} (num_feat_per_step)")
        groups = x.unflatten(1, (-1, self.every))
        action = self.action_token.to(x.dtype).expand(batch, groups.shape[1], 1, -1)
        tokens = torch.cat([groups, action], dim=2).flatten(1, 2)
        x = self.drop(self.wte(tokens) + self._positions(0, tokens.shape[1]))
        asked = range(groups.shape[1]) if steps is None else steps
        places = [t * (self.every + 1) + self.every for t in asked]
        if mids is not None:
            mids["att_gpt_emb"] = x
        *first, last = self.h
        for i, block in enumerate(first):
            x = block(x)
            if mids is not None:
                mids[f"att_gpt_b{i}"] = x
        if mids is None:
            return self.lm_head(self.ln_f(last(x, places)))
        mids[f"att_gpt_b{len(first)}"] = last(x)
        mids["att_gpt_ln"] = self.ln_f(mids[f"att_gpt_b{len(first)}"])
        mids["att_gpt_lm_head"] = self.lm_head(mids["att_gpt_ln"])
        return at(mids["att_gpt_lm_head"], places)

    def init_state(self, batch: int) -> State:
        return {"time": 0, "layers": [{} for _ in self.h]}

    def step(self, x: Tensor, state: State) -> Tensor | None:
        """(batch, repr_dim) to (batch, hidden_dim), or None while an action token does not follow yet."""
        tokens = [x[:, None]]
        if (state["time"] + 1) % (self.every + 1) == self.every:
            tokens.append(self.action_token.to(x.dtype).expand(x.shape[0], 1, 1, -1).squeeze(1))
        y = None
        for token in tokens:
            y = self.wte(token) + self._positions(state["time"], 1)
            for block, inside in zip(self.h, state["layers"], strict=True):
                y = block.step(y, inside)  # type: ignore[operator]
            state["time"] += 1
        return self.lm_head(self.ln_f(y))[:, 0] if len(tokens) > 1 else None
