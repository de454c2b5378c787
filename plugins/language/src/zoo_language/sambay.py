"""SambaY: a decoder-hybrid-decoder whose second half reads one memory and one key-value cache of the first.

Paper: Ren et al., "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation", arXiv 2507.06607.
Original: microsoft/ArchScale @ c2ec1d6, MIT (``lit_gpt/model.py`` and beside it); the released Phi-4-mini-flash uses
another key layout, which is read too. Differs from the original: cached decoding (its training code has none), float32
rotary phases (it rounds them to bfloat16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import GatedRMSNorm, Mamba, Mamba2, Recomputed, RMSNorm

from ._base import CausalLM
from .attention import Cache, attend, rotary
from .state import LayerState, State


@dataclass
class Shared:
    """What the first half hands to the second, for the tokens of one call: memory, and keys, values with positions."""

    memory: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    k_position: Tensor | None = None


class GMU(nn.Module):
    """Gated memory unit: ``out_proj(silu(in_proj x) * m)``; with ``norm`` ``out_proj(RMSNorm(m * silu(in_proj x)))``.

    Paper, section 3.1. x: (..., d_model), m: (..., d_memory).
    """

    def __init__(self, d_model: int, d_memory: int, *, norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_memory, bias=bias)
        self.norm = GatedRMSNorm(d_memory) if norm else None
        self.out_proj = nn.Linear(d_memory, d_model, bias=bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        gate = self.in_proj(x)
        mixed = self.norm(memory, gate) if self.norm is not None else F.silu(gate) * memory
        return self.out_proj(mixed)


class Differential(nn.Module):
    """The learnt difference of two attentions (Ye et al., arXiv 2410.05258): even heads minus lambda times odd."""

    def __init__(self, head_dim: int, index: int) -> None:
        super().__init__()
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(head_dim)))
        self.subln = RMSNorm(2 * head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """q (batch, length, heads, d), k, v (batch, keys, kv heads, d) to (batch, length, heads, d)."""
        q1, q2 = q[:, :, 0::2], q[:, :, 1::2]
        k1, k2 = k[:, :, 0::2], k[:, :, 1::2]
        both = torch.cat([v[:, :, 0::2], v[:, :, 1::2]], dim=-1)
        # The sums are tiny and their exponentials are subtracted: in float32 whatever the weights are.
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()  # type: ignore[operator]
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()  # type: ignore[operator]
        weight = (first - second + self.lambda_init).to(q.dtype)
        out = attend(q1, k1, both, **how) - weight * attend(q2, k2, both, **how)
        out = self.subln(out) * (1 - self.lambda_init)
        return torch.stack(out.chunk(2, dim=-1), dim=3).flatten(2, 3)  # halves back to heads 2j and 2j + 1


class Attention(nn.Module):
    """Grouped causal attention: with a window, full, or (``cross``) reading the shared keys and values.

    ``rotary``: (channels that rotate, base), or None. ``gated``: a sigmoid a head before the projection. ``qk_norm``:
    the eps of an RMSNorm that queries and keys get a head. ``out_norm``: what normalises all heads before the
    projection.
    """

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, index: int, *,
        window: int | None, cross: bool, differential: bool, bias: bool, out_bias: bool, scale: float,
        rotary: tuple[int, float] | None, gated: bool = False, qk_norm: float | None = None,
        out_norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"{heads} heads do not divide into {kv_heads} key-value heads")
        if differential and (heads % 2 or kv_heads % 2):
            raise ValueError(f"differential attention needs even numbers of heads, not {heads} and {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window, self.cross, self.scale, self.rotary = window, cross, scale, rotary
        self.q_proj = nn.Linear(d_model, heads * head_dim, bias=bias)
        self.k_proj = None if cross else nn.Linear(d_model, kv_heads * head_dim, bias=False)
        self.v_proj = None if cross else nn.Linear(d_model, kv_heads * head_dim, bias=bias)
        self.g_proj = nn.Linear(d_model, heads, bias=bias) if gated else None
        # cross layers have both norms too, and use neither: their queries and outputs stay as they are
        self.q_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm)
        self.attn_norm = out_norm
        self.proj = nn.Linear(heads * head_dim, d_model, bias=out_bias)
        self.da = Differential(head_dim, index) if differential else None
        self.cache = Cache(window)

    def init_state(self, batch: int) -> LayerState:
        if self.cross:
            return {}
        weight = self.proj.weight
        return self.cache.empty(batch, self.kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def _turn(self, x: Tensor, at: Tensor) -> Tensor:
        return x if self.rotary is None else rotary(x, at, *self.rotary)

    def forward(
        self, x: Tensor, shared: Shared, state: LayerState | None, position: Tensor | None, lengths: Tensor | None,
        *, share: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The mixed x, and the attention output before its projection. ``share``: k and v go into ``shared``."""
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if position is None else position
        at = start[:, None] + torch.arange(x.shape[1], device=x.device)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        if self.q_norm is not None and not self.cross:
            q = self.q_norm(q)
        q = self._turn(q, at)
        if self.cross:
            k, v, seen = shared.k, shared.v, shared.k_position
            assert k is not None
            assert v is not None
        else:
            assert self.k_proj is not None
            assert self.v_proj is not None
            k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
            k = self._turn(k if self.k_norm is None else self.k_norm(k), at)
            v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
            seen = None
            if state is not None:
                seen = torch.cat([self.cache.positions(state, start), at], dim=1)
                new_k, new_v = k, v
                k = torch.cat([state["k"].to(k.dtype), k], dim=1)
                v = torch.cat([state["v"].to(v.dtype), v], dim=1)
                self.cache.write(state, new_k, new_v, start, lengths)  # may overwrite what was just read
        if share:
            shared.k, shared.v, shared.k_position = k, v, seen
        how: dict[str, Any] = {"scale": self.scale, "window": self.window}
        if seen is not None:
            how |= {"q_position": at, "k_position": seen}
        out = self.da(q, k, v, **how) if self.da is not None else attend(q, k, v, **how)
        if self.g_proj is not None:
            out = out * self.g_proj(x).sigmoid()[..., None]
        out = out.flatten(-2)
        normed = out if self.attn_norm is None or self.cross else self.attn_norm(out)
        return self.proj(normed), out


class MLP(nn.Module):
    """``w3(silu(gate) * value)`` with ``gate, value = w1(x)``."""

    def __init__(self, d_model: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the value half (a memory source)."""
        gate, value = self.w1(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value), value


class Block(Recomputed):
    """``x + mixer(norm_1 x)``, then ``x + mlp(norm_2 x)``; ``role`` says what the mixer is and hands on.

    roles: "mamba", "mamba2", "window", "full", "cross", "gmu". ``memory``: None, "scan" (a recurrent layer's output
    before its gate), "attention" or "mlp": what this layer puts into the shared memory.
    """

    def __init__(
        self, role: str, mixer: nn.Module, norm_1: nn.Module, norm_2: nn.Module, mlp: MLP, *,
        memory: str | None, share_kv: bool, branch_scale: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.role, self.memory, self.share_kv, self.branch_scale = role, memory, share_kv, branch_scale
        self.norm_1, self.mixer, self.norm_2, self.mlp = norm_1, mixer, norm_2, mlp

    def init_state(self, batch: int) -> LayerState:
        return {} if self.role == "gmu" else self.mixer.init_state(batch)  # type: ignore[operator]

    def forward(
        self, x: Tensor, shared: Shared, state: LayerState | None, position: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        n = self.norm_1(x)
        if self.role == "gmu":
            assert shared.memory is not None
            mixed = self.mixer(n, shared.memory)
        elif self.role in ("mamba", "mamba2"):
            mixed = self._recurrent(n, shared, state, lengths)
        else:
            mixed, before = self.mixer(n, shared, state, position, lengths, share=self.share_kv)
            if self.memory == "attention":
                shared.memory = before
        x = x + mixed * self.branch_scale
        out, value = self.mlp(self.norm_2(x))
        if self.memory == "mlp":
            shared.memory = value
        return x + out * self.branch_scale

    def _recurrent(self, n: Tensor, shared: Shared, state: LayerState | None, lengths: Tensor | None) -> Tensor:
        mixer = self.mixer
        if self.memory != "scan":
            return mixer(n, state=state, lengths=lengths)
        if isinstance(mixer, Mamba):
            y, z = mixer.mix(n, gate=False, state=state, lengths=lengths)
            shared.memory = y
            return mixer.out_proj(F.silu(z) * y)
        assert isinstance(mixer, Mamba2)
        z0, x0, z, xBC, dt = mixer._split(n)
        shared.memory = mixer.scan(xBC, dt, state=state, lengths=lengths)
        return mixer._finish(shared.memory, z, z0, x0)


class SambaY(CausalLM):
    """SambaY and its family (Samba, SWA+YOCO, the GMU ablations, Phi-4-mini-flash).

    Arguments: ``vocab_size`` (padded up to ``padding_multiple``); ``n_layer`` n, a multiple of 4; ``d_model``;
    ``heads``, ``kv_heads``, ``head_dim``; ``ff`` hidden size of the MLPs; ``window`` of the self-decoder's attention;
    ``rnn_per_layer`` (layer i is recurrent when i is a multiple; -1: never) and ``rnn_type`` "mamba" or "mamba2";
    ``yoco``: the second half reads shared memory and cache; ``gmu`` and ``gmu_per_layer``: with GMUs; ``gmu_source``
    "scan", "attention" or "mlp"; ``differential`` attention; ``rope_base`` (None: no positions); ``attn_bias``,
    ``attn_out_bias``; ``layer_norm`` instead of RMSNorm; ``tied``; ``mup`` (scales of muP) with ``mup_d0`` and
    ``mup_hd0``; ``depth_scale`` (branches divided by sqrt(2 n)); ``yoco_window``: the shared attention's window.

    What only ablations of the original set: ``full_per_layer`` (without a window, the last of so many layers);
    ``adaptive_rope`` (base 0.09 window^1.628 instead of ``rope_base``, the long window counted as 4096);
    ``rotary_share`` of each head's channels; ``yoco_nope`` (no positions where attention has no window); ``gated``,
    ``qk_norm`` and ``attn_norm`` (see :class:`Attention`); ``attn_scale`` instead of 1/sqrt(head_dim);
    ``constant_lambda`` (of differential attention, not by depth); ``bias`` (of MLPs and GMUs); ``scale_embed`` (by
    sqrt(d_model)).
    """

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        ff: int,
        window: int | None = None,
        rnn_per_layer: int = 2,
        rnn_type: str = "mamba",
        yoco: bool = True,
        gmu: bool = True,
        gmu_per_layer: int = 2,
        gmu_source: str = "scan",
        differential: bool = False,
        rope_base: float | None = None,
        attn_bias: bool = False,
        attn_out_bias: bool = False,
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
        tied: bool = False,
        mup: bool = False,
        mup_d0: int = 16,
        mup_hd0: int = 128,
        depth_scale: bool = False,
        padding_multiple: int = 64,
        yoco_window: int | None = None,
        full_per_layer: int | None = None,
        adaptive_rope: bool = False,
        rotary_share: float = 1.0,
        yoco_nope: bool = False,
        gated: bool = False,
        qk_norm: bool = False,
        attn_norm: bool = False,
        attn_scale: float | None = None,
        constant_lambda: bool = False,
        bias: bool = False,
        scale_embed: bool = False,
    ) -> None:
        super().__init__()
        if n_layer % 4 and yoco:
            raise ValueError(f"n_layer is {n_layer}; a decoder-hybrid-decoder needs a multiple of 4")
        if rnn_type not in ("mamba", "mamba2"):
            raise ValueError(f"rnn_type is {rnn_type!r}; expected 'mamba' or 'mamba2' (gated delta nets are not built)")
        if gmu_source not in ("scan", "attention", "mlp"):
            raise ValueError(f"gmu_source is {gmu_source!r}; expected 'scan', 'attention' or 'mlp'")
        self.vocab_size, self.n_layer = vocab_size, n_layer
        padded = math.ceil(vocab_size / padding_multiple) * padding_multiple
        self.logit_scale = mup_d0 / n_layer if mup else 1.0
        self.embedding = nn.Embedding(padded, d_model)
        inner2 = 8 * math.ceil(2 * d_model / 64 / 8) * 64
        d_memory = {
            "scan": inner2 if rnn_type == "mamba2" else 2 * d_model, "attention": heads * head_dim, "mlp": ff,
        }[gmu_source]  # fmt: skip
        self.embed_scale = math.sqrt(d_model) if scale_embed else 1.0
        scale = head_dim**-0.5 if attn_scale is None else attn_scale
        scale = scale * (math.sqrt(mup_hd0 / head_dim) if mup else 1.0)

        def norm(dim: int = d_model) -> nn.Module:
            return nn.LayerNorm(dim, eps=norm_eps) if layer_norm else RMSNorm(dim, norm_eps)

        def phases(role: str, width: int | None, full: bool) -> tuple[int, float] | None:
            if rope_base is None or (yoco_nope and (role == "cross" or full or width is None)):
                return None
            base = float(rope_base)
            if adaptive_rope:
                if width is None:
                    raise ValueError("adaptive_rope follows the window; every attention needs one")
                base = 0.09 * (4096 if width == yoco_window else width) ** 1.628
            return int(rotary_share * head_dim), base

        def mixer(role: str, i: int) -> nn.Module:
            if role == "mamba":
                return Mamba(d_model)
            if role == "mamba2":
                return Mamba2(d_model, d_ssm=inner2, expand=inner2 / d_model)
            if role == "gmu":
                # by the kind of recurrence, whatever the memory is of (gated_memory_unit.py, ``use_norm``)
                return GMU(d_model, d_memory, norm=rnn_per_layer > 0 and rnn_type == "mamba2", bias=bias)
            width = window if role == "window" else (yoco_window if yoco else None)
            full = full_per_layer is not None and i % full_per_layer == full_per_layer - 1
            return Attention(
                d_model, heads, kv_heads, head_dim, 10000 if constant_lambda else i, window=None if full else width,
                cross=role == "cross", differential=differential, bias=attn_bias, out_bias=attn_out_bias, scale=scale,
                rotary=phases(role, width, full), gated=gated, qk_norm=norm_eps if qk_norm else None,
                out_norm=norm(heads * head_dim) if attn_norm else None,
            )  # fmt: skip

        half = n_layer // 2
        blocks = []
        for i in range(n_layer):
            role = _role(i, n_layer, rnn_per_layer, rnn_type, yoco, gmu, gmu_per_layer)
            memory = None
            if yoco and gmu:
                if gmu_source == "scan" and i == half:
                    memory = "scan"
                elif (gmu_source == "attention" and role in ("window", "full")) or (
                    gmu_source == "mlp" and i == half + 1
                ):
                    memory = gmu_source
            blocks.append(
                Block(
                    role, mixer(role, i), norm(), norm(), MLP(d_model, ff, bias=bias),
                    memory=memory, share_kv=role == "full" and yoco,
                    branch_scale=1 / math.sqrt(2 * n_layer) if depth_scale else 1.0,
                )
            )  # fmt: skip
        self.layers = nn.ModuleList(blocks)
        self.norm_f = norm()
        self.lm_head = None if tied else nn.Linear(d_model, padded, bias=False)
        self.reset_parameters(mup=mup, tied=tied)

    def reset_parameters(self, *, mup: bool, tied: bool) -> None:
        """The original's: tiny embeddings, and normal weights (or, with muP, torch's defaults and a zero head)."""
        nn.init.normal_(self.embedding.weight, std=0.02 if tied else 1e-4)
        if not mup:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        elif self.lm_head is not None:
            nn.init.zeros_(self.lm_head.weight)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden * self.logit_scale, self.embedding if self.lm_head is None else self.lm_head)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        self._check(input_ids, state, lengths)
        x = self.embed(input_ids)
        shared = Shared()
        position = None if state is None else state.position
        for i, layer in enumerate(self.layers):
            own = None if state is None else state.layers[i]
            # ``shared`` is filled again, with the same values, when a block is recomputed.
            x = layer(x, shared, state=own, position=position, lengths=lengths)
        if state is not None:
            state.position = state.position + (input_ids.shape[1] if lengths is None else lengths)
        return self.norm_f(x)

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        state.logits = self.head(self.backbone(token[:, None], state=state))[:, 0]
        return state.logits


def _role(i: int, n: int, rnn_per_layer: int, rnn_type: str, yoco: bool, gmu: bool, gmu_per_layer: int) -> str:
    """What layer i of n is (paper, figure 1; ArchScale's rule for other periods)."""
    recurrent = rnn_per_layer > 0 and i % rnn_per_layer == 0
    if not yoco or i < n // 2:
        return rnn_type if recurrent else "window"
    if i == n // 2:
        return rnn_type if rnn_per_layer > 0 else "window"
    if i == n // 2 + 1:
        return "full"
    return "gmu" if gmu and i % gmu_per_layer == 0 else "cross"
