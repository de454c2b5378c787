"""mmMamba's two mixers: the Mamba-2 form that replaces attention, and the InternLM2 attention that it replaces.

Paper: Liao, Tao et al., "Multimodal Mamba: Decoder-only Multimodal State Space Model via Quadratic to Linear
Distillation", arXiv 2502.13145. Original: hustvl/mmMamba @ 85143d0, MIT (``src/model/linear_attention/mamba2.py``,
``hovle/modeling_internlm2.py``). Differs: one product gives v, k and q (the original has one matrix each in training
and one for everything in its release; the numbers are the same), and both mixers decode from a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear
from zoo_kernels import causal_conv1d, causal_conv1d_step, gated_rms_norm, ssd, ssd_step

#: What a layer remembers: "conv" and "ssm" of fixed size, or "k" and "v" that grow with the text.
LayerState = dict[str, Tensor]
#: Cosines and sines of the rotary angles, (1 or batch, length, 1, P / 2) each.
Phases = tuple[Tensor, Tensor]

EPS = 1e-5
CONV_WIDTH = 2


class Rotary:
    """Rotary phases of a stack: the angle of channel pair i at position p is ``p * theta**(-2 i / P)``.

    ``scaling``: None, ``{"type": "linear", "factor": f}`` (positions are divided by f) or ``{"type": "dynamic", ...}``
    (beyond ``max_positions`` theta grows with the length). Source: Su et al., arXiv 2104.09864; InternLM2's code.
    """

    def __init__(
        self, head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None, max_positions: int = 4096
    ) -> None:
        kind = None if scaling is None else scaling.get("type")
        if kind not in (None, "linear", "dynamic"):
            raise ValueError(f"rope_scaling has type {kind!r}; expected 'linear' or 'dynamic'")
        if head_dim % 2:
            raise ValueError(f"the head width is {head_dim}; rotary phases turn pairs of channels: it must be even")
        self.head_dim, self.theta, self.kind, self.max_positions = head_dim, float(theta), kind, max_positions
        self.factor = 1.0 if scaling is None else float(scaling["factor"])

    def __call__(self, positions: Tensor, length: int) -> Phases:
        """positions: (1 or batch, tokens) integers; length: tokens that will have been read after these."""
        theta = self.theta
        if self.kind == "dynamic" and length > self.max_positions:
            grown = self.factor * length / self.max_positions - (self.factor - 1)
            theta = theta * grown ** (self.head_dim / (self.head_dim - 2))
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        at = positions.float() / self.factor if self.kind == "linear" else positions.float()
        angle = at[..., None] * theta**-exponent
        return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x: Tensor, phases: Phases) -> Tensor:
    """Turn channel i with channel i + P / 2: x (batch, length, heads, P)."""
    cos, sin = phases
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def softmax_heads(q: Tensor, k: Tensor, v: Tensor, *, before: int = 0, padding: Tensor | None = None) -> Tensor:
    """Causal attention with scale P^-0.5: q (batch, length, H, P), k and v (batch, before + length, G, P) to q's shape.

    The first query stands behind ``before`` keys. ``padding`` (batch, length), of whole texts: nonzero for real tokens.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    length = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if padding is not None:
        # Two terms of the least number each, as in the original: they decide what a row without a real key sees.
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        least = torch.finfo(q.dtype).min
        bias = future.to(q.dtype) * least + (padding == 0)[:, None, None].to(q.dtype) * least
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped).transpose(1, 2)
    if before == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    mask = None
    if length > 1:  # a single query sees every key
        mask = torch.ones(length, before + length, dtype=torch.bool, device=q.device).tril(before)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _checked_heads(d_model: int, heads: int, kv_heads: int) -> int:
    if heads < 1 or d_model % heads:
        raise ValueError(f"d_model {d_model} does not divide into {heads} heads")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} kv heads")
    return d_model // heads


class SoftmaxAttention(nn.Module):
    """InternLM2's attention: H query heads over G key and value heads, rotary phases, causal softmax.

    ``wqkv``'s rows lie in G groups of H / G query heads, a key head and a value head, P rows each. ``bias``: of both
    projections (no published model has them).
    """

    def __init__(self, d_model: int, heads: int, kv_heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.head_dim = _checked_heads(d_model, heads, kv_heads)
        self.heads, self.kv_heads = heads, kv_heads
        self.wqkv = Linear(d_model, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.wo = Linear(d_model, d_model, bias=bias)

    def init_state(self, batch: int) -> LayerState:
        empty = self.wo.weight.new_zeros(batch, 0, self.kv_heads, self.head_dim)
        return {"k": empty, "v": empty.clone()}

    def forward(
        self,
        u: Tensor,
        phases: Phases,
        *,
        state: LayerState | None = None,
        before: int = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, D) to the same; with ``state``, ``before`` tokens were read into it and these are added.
        ``padding``: as in :func:`softmax_heads`."""
        x = self.wqkv(u).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        q, k, v = x[..., :-2, :].flatten(2, 3), x[..., -2, :], x[..., -1, :]
        q, k = rotate(q, phases), rotate(k, phases)
        if state is not None:
            k, v = (_remember(state, name, t, before) for name, t in (("k", k), ("v", v)))
        return self.wo(softmax_heads(q, k, v, before=before, padding=padding).flatten(2))


def _remember(state: LayerState, name: str, new: Tensor, before: int) -> Tensor:
    """Write rows behind the first ``before`` ones, in memory that at least doubles when it is full; all rows so far."""
    kept, after = state[name], before + new.shape[1]
    if after > kept.shape[1]:
        room = max(after, 2 * kept.shape[1])
        state[name] = kept = torch.cat(
            [kept[:, :before], kept.new_empty(kept.shape[0], room - before, *kept.shape[2:])], dim=1
        )
    kept[:, before:after] = new.detach()
    return kept[:, :after]


class Mamba2Attention(nn.Module):
    """Mamba-2 in the place of attention: per head a state S of P x P numbers, values for x, keys for B, queries for C.

    ``S_t = exp(dt_t A) S_{t-1} + dt_t v_t k_t^T``, ``y_t = S_t q_t``; then the norm of each head's P channels (one
    weight for all heads) times ``silu(g_proj u)``, then ``o_proj``. Before it a causal convolution of width 2 and SiLU
    run over [v, k, q]; each of the G kv heads serves H / G heads. No rotary phases, no scale of P^-0.5.

    ``use_D``: add ``D v``; ``use_qknorm``: LayerNorm over P of queries and keys; ``use_conv``: without it SiLU alone,
    and only G = H works; ``use_gnorm``: without it neither norm nor gate; ``use_A``: without it A is -1.
    ``mimic_init``: start as linear attention without memory loss to speak of (convolution = identity, dt from 1e-3 to
    0.1 whatever the token, A = -e). ``shadow``: also hold the teacher's v, k and q, frozen (distillation stage 2).
    ``bias``: of ``o_proj``, where the attention that it replaces has biases (its others are dropped, as in the
    original).
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        *,
        use_D: bool = False,
        use_qknorm: bool = False,
        use_conv: bool = True,
        use_gnorm: bool = True,
        use_A: bool = True,
        mimic_init: bool = True,
        shadow: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = _checked_heads(d_model, heads, kv_heads)
        self.heads, self.kv_heads, self.mimic_init = heads, kv_heads, mimic_init
        rows = (heads + 2 * kv_heads) * self.head_dim
        self.vkq_proj = Linear(d_model, rows, bias=False)
        self.dt_proj = Linear(d_model, heads, bias=False)
        self.conv1d = nn.Conv1d(rows, rows, CONV_WIDTH, groups=rows) if use_conv else None
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log_bias = nn.Parameter(torch.empty(heads)) if use_A else None
        self.D = nn.Parameter(torch.ones(heads)) if use_D else None
        self.q_norm = nn.LayerNorm(self.head_dim, eps=EPS) if use_qknorm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=EPS) if use_qknorm else None
        self.g_proj = Linear(d_model, d_model, bias=False) if use_gnorm else None
        self.g_norm = nn.Parameter(torch.ones(self.head_dim)) if use_gnorm else None
        self.o_proj = Linear(d_model, d_model, bias=bias)
        self.shadow_proj = Linear(d_model, rows, bias=False).requires_grad_(False) if shadow else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What the original sets when it replaces an attention; projections that it takes from there stay."""
        if self.g_proj is not None:
            nn.init.xavier_uniform_(self.g_proj.weight, gain=2**-2.5)
        if self.mimic_init:
            low, high = 1e-3, 0.1
            dt = low * (high / low) ** torch.rand_like(self.dt_bias)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.dt_proj.weight.zero_()
            if self.A_log_bias is not None:
                self.A_log_bias.fill_(1.0)
            if self.conv1d is not None:
                assert self.conv1d.bias is not None
                self.conv1d.weight.zero_()
                self.conv1d.weight[:, 0, -1] = 1.0
                self.conv1d.bias.zero_()
        else:
            self.dt_bias.zero_()
            if self.A_log_bias is not None:
                self.A_log_bias.copy_(torch.empty_like(self.A_log_bias).uniform_(1, 16).log())

    # -- parts

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of v, k and q."""
        return self.kv_heads * self.head_dim, self.kv_heads * self.head_dim, self.heads * self.head_dim

    @property
    def A(self) -> Tensor:
        """(H,), negative."""
        return -torch.ones_like(self.dt_bias).float() if self.A_log_bias is None else -self.A_log_bias.float().exp()

    def _split(self, vkq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, k (..., G, P) and q (..., H, P)."""
        v, k, q = (t.unflatten(-1, (-1, self.head_dim)) for t in vkq.split(self.sizes, dim=-1))
        return v, k, q

    def _spread(self, vkq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, k and q of every head, (..., H, P) each, queries and keys normalised where they are."""
        v, k, q = self._split(vkq)
        if self.kv_heads != self.heads:
            repeat = self.heads // self.kv_heads
            v, k = (t.repeat_interleave(repeat, dim=-2) for t in (v, k))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return v, k, q

    def _gated(self, y: Tensor, u: Tensor) -> Tensor:
        if self.g_proj is None:
            return y
        z = self.g_proj(u).unflatten(-1, (self.heads, self.head_dim))
        return gated_rms_norm(y, z, self.g_norm, eps=EPS, norm_before_gate=True)

    def _activated(self, vkq: Tensor) -> Tensor:
        """What stands in for the convolution where there is none."""
        if self.kv_heads != self.heads:
            raise ValueError(
                f"use_conv=False does not spread {self.kv_heads} kv heads over {self.heads} heads (nor does the "
                "original): it runs with as many kv heads as heads; only the distillation pass takes it otherwise"
            )
        return F.silu(vkq)

    # -- whole texts

    def head_outputs(self, u: Tensor, *, state: LayerState | None = None, distilling: bool = False) -> Tensor:
        """(batch, length, D) to the heads before ``o_proj``, (batch, length, H, P); ``state`` moves on in place.

        ``distilling``: the original's distillation pass, which without a convolution has no SiLU either.
        """
        vkq = self.vkq_proj(u)
        if self.conv1d is not None:
            vkq, conv = causal_conv1d(
                vkq,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu",
                initial_state=None if state is None else state["conv"],
                return_final_state=state is not None,
            )
            if state is not None:
                assert conv is not None
                state["conv"].copy_(conv.detach())
        elif not distilling:
            vkq = self._activated(vkq)
        v, k, q = self._spread(vkq)
        y, ssm = ssd(
            v,
            self.dt_proj(u),
            self.A,
            k,
            q,
            None if self.D is None else self.D.float(),
            dt_bias=self.dt_bias.float(),
            dt_softplus=True,
            initial_state=None if state is None else state["ssm"],
            return_final_state=state is not None,
        )
        if state is not None:
            assert ssm is not None
            state["ssm"].copy_(ssm.detach())
        return self._gated(y, u)

    def forward(self, u: Tensor, *, state: LayerState | None = None) -> Tensor:
        """(batch, length, D) to the same."""
        return self.o_proj(self.head_outputs(u, state=state).flatten(2))

    def teacher(self, u: Tensor, phases: Phases) -> Tensor:
        """The softmax heads (batch, length, H, P) that this mixer learns to give: of the shadow's v, k and q where it
        has one, else of its own."""
        v, k, q = self._split((self.vkq_proj if self.shadow_proj is None else self.shadow_proj)(u))
        return softmax_heads(rotate(q, phases), rotate(k, phases), v)

    # -- one token at a time

    def init_state(self, batch: int) -> LayerState:
        """At rest: ``ssm`` (batch, H, P, P) and, with the convolution, ``conv`` (batch, 2, (H + 2 G) P)."""
        size = self.head_dim
        state = {"ssm": torch.zeros(batch, self.heads, size, size, device=self.dt_bias.device)}
        if self.conv1d is not None:
            state["conv"] = self.vkq_proj.weight.new_zeros(batch, CONV_WIDTH, sum(self.sizes))
        return state

    def step(self, u: Tensor, state: LayerState) -> Tensor:
        """(batch, D) to the same; ``state`` moves on in place."""
        vkq = self.vkq_proj(u)
        if self.conv1d is not None:
            weight = self.conv1d.weight.squeeze(1)
            vkq = causal_conv1d_step(vkq, weight, self.conv1d.bias, state=state["conv"], activation="silu")
        else:
            vkq = self._activated(vkq)
        v, k, q = self._spread(vkq)
        D = None if self.D is None else self.D.float()
        y = ssd_step(
            v, self.dt_proj(u), self.A, k, q, D, dt_bias=self.dt_bias.float(), dt_softplus=True, state=state["ssm"]
        )
        return self.o_proj(self._gated(y, u).flatten(1))
