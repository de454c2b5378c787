"""Phi-Mamba: Phi-1.5's blocks with a discrete Mamba-2 mixer (some keep attention), distilled by MOHAWK.

Paper: Bick et al., "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models", arXiv 2408.10189.
Original: goombalab/phi-mamba @ b2e405f (lm_head.py, phi_block.py, discrete_mamba2.py, phi_attention.py). Differs: it
decodes batches (the original's step broadcasts over them wrongly), and the hybrid's attention takes the model's own
sizes (the original takes Phi-1.5's defaults whatever the configuration says; for what is published they are the same).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo_kernels import causal_conv1d, causal_conv1d_step, linear_attention, linear_attention_step

from ._base import CausalLM
from .attention import Cache, attend, rotary
from .state import LayerState

EPS = 1e-5


class DiscreteMamba2(nn.Module):
    """Mamba-2 without continuous time: per head ``h_t = sigmoid(-a_t) h_{t-1} + x_t B_t^T``, ``y_t = h_t C_t + D x_t``.

    in_proj gives (xBC, z, a) in this order; xBC goes through a causal convolution; the output is gated by
    ``silu(z + z_bias)``. Arguments: ``d_model``; ``d_state`` N; ``v_heads`` and ``qk_heads``; ``d_conv``; ``expand``;
    ``activation`` after the convolution (None or "silu"); ``bias`` of the projections (z_bias exists without it).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        v_heads: int = 32,
        qk_heads: int = 32,
        d_conv: int = 4,
        conv_bias: bool = True,
        expand: int = 1,
        activation: str | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if v_heads % qk_heads:
            raise ValueError(f"v_heads {v_heads} is not a multiple of qk_heads {qk_heads}")
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.v_heads, self.qk_heads, self.activation = v_heads, qk_heads, activation
        if self.d_inner % v_heads:
            raise ValueError(f"expand * d_model = {self.d_inner} does not divide into {v_heads} heads")
        self.conv_dim = self.d_inner + 2 * qk_heads * d_state
        self.in_proj = nn.Linear(d_model, self.conv_dim + self.d_inner + v_heads, bias=bias)
        self.z_bias = None if bias else nn.Parameter(torch.zeros(self.d_inner))
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias)
        self.D = nn.Parameter(torch.ones(v_heads))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def init_state(self, batch: int) -> LayerState:
        weight = self.in_proj.weight
        return {
            "conv": torch.zeros(batch, self.d_conv, self.conv_dim, device=weight.device, dtype=weight.dtype),
            "ssm": torch.zeros(batch, self.v_heads, self.d_inner // self.v_heads, self.d_state, device=weight.device),
        }

    def _parts(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.qk_heads * self.d_state
        x, B, C = xBC.split([self.d_inner, size, size], dim=-1)
        return (
            x.unflatten(-1, (self.v_heads, -1)),
            B.unflatten(-1, (self.qk_heads, -1)),
            C.unflatten(-1, (self.qk_heads, -1)),
        )

    def _gate(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.out_proj(y * F.silu(z if self.z_bias is None else z + self.z_bias))

    def forward(self, u: Tensor, *, state: LayerState | None = None, lengths: Tensor | None = None) -> Tensor:
        """(batch, length, d_model) to the same."""
        xBC, z, a = self.in_proj(u).split([self.conv_dim, self.d_inner, self.v_heads], dim=-1)
        xBC, conv = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation=self.activation,
            initial_state=None if state is None else state["conv"],
            return_final_state=state is not None,
            lengths=lengths,
        )
        x, B, C = self._parts(xBC)
        y, ssm = linear_attention(
            C,
            B,
            x,
            -F.softplus(a.float()),
            initial_state=None if state is None else state["ssm"],
            return_final_state=state is not None,
            lengths=lengths,
        )
        if state is not None:
            assert conv is not None
            assert isinstance(ssm, Tensor)
            state["conv"].copy_(conv.detach())
            state["ssm"].copy_(ssm.detach())
        return self._gate(y, x, z)

    def step(self, u: Tensor, state: LayerState) -> Tensor:
        """One token, (batch, d_model) to the same."""
        xBC, z, a = self.in_proj(u).split([self.conv_dim, self.d_inner, self.v_heads], dim=-1)
        xBC = causal_conv1d_step(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"], activation=self.activation
        )
        x, B, C = self._parts(xBC)
        y = linear_attention_step(C, B, x, -F.softplus(a.float()), state=state["ssm"])
        return self._gate(y, x, z)

    def mixing_matrix(self, u: Tensor) -> Tensor:
        """The matrix that the mixer applies along the sequence, (batch, heads, length, length): MOHAWK's student side.

        ``T[l, s] = (C_l . B_s) exp(-sum of softplus(a) from s + 1 to l)`` for s <= l, plus D on the diagonal;
        projections, convolution and gate are not part of it. Paper, equation 3 and section 4.1.
        """
        xBC, _, a = self.in_proj(u).split([self.conv_dim, self.d_inner, self.v_heads], dim=-1)
        xBC, _ = causal_conv1d(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        _, B, C = self._parts(xBC)
        repeat = self.v_heads // self.qk_heads
        B, C = (t.repeat_interleave(repeat, dim=2).transpose(1, 2) for t in (B, C))
        total = -F.softplus(a).transpose(1, 2).cumsum(-1)  # (batch, heads, length)
        difference = total[..., :, None] - total[..., None, :]
        length = u.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
        decay = difference.masked_fill(~seen, -torch.inf).exp()  # mask first: above the diagonal it would overflow
        return (C @ B.transpose(-1, -2)) * decay + torch.eye(length, device=u.device) * self.D[:, None, None]


class PhiAttention(nn.Module):
    """Phi's attention: biases everywhere, rotary on the first half of each head's channels, causal softmax."""

    def __init__(self, d_model: int, heads: int, rotary_share: float = 0.5, rope_theta: float = 10000.0) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model {d_model} does not divide into {heads} heads")
        self.heads, self.head_dim = heads, d_model // heads
        self.rotary_dim, self.rope_theta = int(rotary_share * self.head_dim), rope_theta
        self.q_proj, self.k_proj, self.v_proj, self.dense = (nn.Linear(d_model, d_model) for _ in range(4))
        self.cache = Cache()

    def init_state(self, batch: int) -> LayerState:
        weight = self.dense.weight
        return self.cache.empty(batch, self.heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return (
            rotary(q, position, self.rotary_dim, self.rope_theta),
            rotary(k, position, self.rotary_dim, self.rope_theta),
            v,
        )

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if position is None else position
        at = start[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k, v = self._project(x, at)
        if state is None:
            out = attend(q, k, v, scale=self.head_dim**-0.5)
        else:
            before = self.cache.positions(state, start)
            out = attend(
                q, torch.cat([state["k"].to(k.dtype), k], 1), torch.cat([state["v"].to(v.dtype), v], 1),
                scale=self.head_dim**-0.5, q_position=at, k_position=torch.cat([before, at], 1),
            )  # fmt: skip
            self.cache.write(state, k, v, start, lengths)
        return self.dense(out.flatten(-2))

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        return self(x[:, None], state=state, position=position)[:, 0]

    def mixing_matrix(self, x: Tensor) -> Tensor:
        """The attention weights (batch, heads, length, length): MOHAWK's teacher side."""
        q, k, _ = self._project(x, torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1))
        scores = torch.einsum("blhd,bshd->bhls", q.float(), k.float()) * self.head_dim**-0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)


class MLP(nn.Module):
    """``fc2(gelu(fc1 x))``, GELU in its tanh form, hidden size 4 d_model."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 4 * d_model)
        self.fc2 = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PhiBlock(Recomputed):
    """Phi's parallel block: ``x + mixer(n) + mlp(n)`` with ``n = LayerNorm(x)``."""

    def __init__(self, d_model: int, mixer: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(d_model, eps=EPS)
        self.mixer = mixer
        self.mlp = MLP(d_model)

    def init_state(self, batch: int) -> LayerState:
        return self.mixer.init_state(batch)  # type: ignore[operator]

    def _mix(self, n: Tensor, state: LayerState | None, position: Tensor | None, lengths: Tensor | None) -> Tensor:
        where: dict[str, Any] = {"position": position} if isinstance(self.mixer, PhiAttention) else {}
        return self.mixer(n, state=state, lengths=lengths, **where)

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        n = self.input_layernorm(x)
        return x + self._mix(n, state, position, lengths) + self.mlp(n)

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        n = self.input_layernorm(x)
        if isinstance(self.mixer, PhiAttention):
            mixed = self.mixer.step(n, state, position)
        else:
            mixed = self.mixer.step(n, state)  # type: ignore[operator]
        return x + mixed + self.mlp(n)


class PhiMambaLM(CausalLM):
    """Embedding, parallel blocks, LayerNorm, head with bias (not tied).

    Arguments: ``vocab_size`` (padded up to ``pad_vocab_size_multiple``); ``d_model``; ``blocks``, one word a layer:
    "mamba" or "attention"; ``mixer``, the arguments of :class:`DiscreteMamba2`, of all or a list of them, one a layer
    (those of attention blocks are not read); ``heads``, ``rotary_share`` and ``rope_theta`` of the attention blocks.
    """

    def __init__(
        self,
        vocab_size: int = 51200,
        d_model: int = 2048,
        blocks: Sequence[str] = ("mamba",) * 24,
        mixer: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        heads: int = 32,
        rope_theta: float = 10000.0,
        rotary_share: float = 0.5,
        pad_vocab_size_multiple: int = 8,
    ) -> None:
        super().__init__()
        unknown = sorted(set(blocks) - {"mamba", "attention"})
        if unknown:
            raise ValueError(f"blocks holds {unknown}; expected 'mamba' or 'attention' for each layer")
        mixers = [mixer] * len(blocks) if mixer is None or isinstance(mixer, Mapping) else list(mixer)
        if len(mixers) != len(blocks):
            raise ValueError(f"mixer lists {len(mixers)} layers, blocks {len(blocks)}; expected one entry each")
        padded = math.ceil(vocab_size / pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.vocab_size = padded  # the original writes the padded size back into its configuration
        self.embedding = nn.Embedding(padded, d_model)
        self.layers = nn.ModuleList(
            PhiBlock(
                d_model,
                DiscreteMamba2(d_model, **(own or {}))
                if kind == "mamba"
                else PhiAttention(d_model, heads, rotary_share, rope_theta),
            )
            for kind, own in zip(blocks, mixers, strict=True)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=EPS)
        self.lm_head = nn.Linear(d_model, padded)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """The input of every block and the output of the last one, (batch, length, d_model) each."""
        x = self.embed(input_ids)
        found = [x]
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found
