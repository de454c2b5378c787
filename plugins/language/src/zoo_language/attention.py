"""Attention as the hybrids of this domain use it: grouped heads, rotary phases, windows, a cache that wraps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import causal_conv1d, causal_conv1d_step

from .state import LayerState


def rotary(x: Tensor, position: Tensor, dim: int, base: float = 10000.0, *, interleaved: bool = False) -> Tensor:
    """Rotate the first ``dim`` channels of x (batch, length, heads, channels) by ``position`` (batch, length).

    Pairs channel i with i + dim/2, or with ``interleaved`` channel 2i with 2i + 1; frequency ``base**(-2i/dim)``.
    Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2.
    """
    if dim == 0:
        return x
    frequency = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = position[..., None].to(wide) * frequency  # (batch, length, dim / 2)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    turned, rest = x[..., :dim].to(wide), x[..., dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1)


class Cache:
    """Keys and values of the tokens read, one row a text, in a layer's state (``k``, ``v``: (batch, slots, heads, d)).

    Token t of a text lies in slot t, or with a ``window`` in slot t mod window: then memory stays constant. Texts of
    different lengths share a batch: each has its own position, and slots it has not reached are never seen.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def empty(self, batch: int, heads: int, dim: int, *, device=None, dtype=None) -> LayerState:
        shape = (batch, self.window or 0, heads, dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

    def positions(self, state: LayerState, position: Tensor) -> Tensor:
        """The token that each slot holds, (batch, slots); negative where it holds none. ``position``: tokens read."""
        slots = torch.arange(state["k"].shape[1], device=position.device)[None]
        last = position[:, None] - 1
        if self.window is None:
            return torch.where(slots <= last, slots, -1)
        return last - (last - slots) % self.window

    def write(self, state: LayerState, k: Tensor, v: Tensor, position: Tensor, lengths: Tensor | None) -> None:
        """Append k, v (batch, length, heads, d) behind ``position`` tokens; only ``lengths[b]`` of them are real."""
        batch, length = k.shape[:2]
        row = torch.arange(batch, device=k.device)[:, None].expand(-1, length)
        t = torch.arange(length, device=k.device)[None].expand(batch, -1)
        count = torch.full((batch,), length, device=k.device) if lengths is None else lengths
        keep = t < count[:, None]
        slot = position[:, None] + t
        if self.window is None:
            needed = int(slot[:, -1].max()) + 1 if length else 0
            self._grow(state, needed)
        else:
            keep = keep & (t >= count[:, None] - self.window)
            slot = slot % self.window
        row, slot = row[keep], slot[keep]
        state["k"].index_put_((row, slot), k[keep].to(state["k"].dtype))
        state["v"].index_put_((row, slot), v[keep].to(state["v"].dtype))

    @staticmethod
    def _grow(state: LayerState, needed: int) -> None:
        """Make room, at least doubling, so that appending costs a constant on average."""
        have = state["k"].shape[1]
        if needed <= have:
            return
        room = needed if have == 0 else max(needed, 2 * have)
        for name in ("k", "v"):
            state[name] = F.pad(state[name], (0, 0, 0, 0, 0, room - have))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, each query seeing keys at its own position and before (``window`` of them at most).

    q: (batch, length, heads, d); k, v: (batch, keys, kv heads, d or d_v); heads is a multiple of kv heads.
    Positions (batch, length) and (batch, keys), negative for keys that do not exist; None: both count from 0.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if q_position is None and k_position is None and (window is None or window >= k.shape[2]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    if q_position is None:
        q_position = torch.arange(q.shape[2], device=q.device)[None]
    if k_position is None:
        k_position = torch.arange(k.shape[2], device=q.device)[None]
    distance = q_position[:, :, None] - k_position[:, None, :]
    seen = k_position[:, None, :] >= 0
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """mamba_ssm's attention mixer: one projection for q, k, v (and a gated MLP), a short convolution, partial rotary.

    Arguments (mamba_ssm's): ``d_model``, ``num_heads``, ``num_heads_kv`` (default num_heads), ``head_dim`` (default
    d_model / num_heads), ``mlp_dim`` (rounded up to a multiple of 256), ``qkv_proj_bias``, ``out_proj_bias``,
    ``softmax_scale``, ``causal``, ``d_conv`` (0: none), ``rotary_emb_dim``, ``rotary_emb_base``,
    ``rotary_emb_interleaved``.

    Source: state-spaces/mamba ``modules/mha.py``. Differs: at prefill the convolution's cache holds its inputs. The
    original keeps its outputs there, so its first ``d_conv - 1`` tokens after a prompt come from wrong taps;
    ``keep_conv_quirk`` reproduces that.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.heads = num_heads
        self.kv_heads = num_heads if num_heads_kv is None else num_heads_kv
        if self.heads % self.kv_heads:
            raise ValueError(f"num_heads {self.heads} is not a multiple of num_heads_kv {self.kv_heads}")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into {num_heads} heads; give head_dim")
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        self.scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.causal, self.d_conv = causal, d_conv
        self.rotary = (rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved)
        self.keep_conv_quirk = False
        qkv = self.head_dim * (self.heads + 2 * self.kv_heads)
        self.qkv_dim = qkv
        self.in_proj = nn.Linear(d_model, qkv + self.mlp_dim, bias=qkv_proj_bias)
        self.conv1d = nn.Conv1d(qkv, qkv, d_conv, groups=qkv) if d_conv else None
        self.out_proj = nn.Linear(self.head_dim * self.heads + self.mlp_dim // 2, d_model, bias=out_proj_bias)
        self.cache = Cache()

    def init_state(self, batch: int, *, device=None, dtype=None) -> LayerState:
        weight = self.in_proj.weight
        kind = {
            "device": weight.device if device is None else device,
            "dtype": weight.dtype if dtype is None else dtype,
        }
        state = self.cache.empty(batch, self.kv_heads, self.head_dim, **kind)
        if self.conv1d is not None:
            state["conv"] = torch.zeros(batch, self.d_conv, self.qkv_dim, **kind)
        return state

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv.split(sizes, dim=-1))
        return q, k, v

    def _finish(self, out: Tensor, mlp: Tensor) -> Tensor:
        out = out.flatten(-2)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            out = torch.cat([out, up * F.silu(gate)], dim=-1)
        return self.out_proj(out)

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, d_model) to the same. With ``state``, ``position`` (batch,) tokens were read before."""
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        if self.conv1d is not None:
            raw = qkv
            qkv, conv = causal_conv1d(
                qkv,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_state=None if state is None else state["conv"],
                return_final_state=state is not None,
                lengths=lengths,
            )
            if state is not None:
                assert conv is not None
                state["conv"].copy_(self._quirk(qkv, raw, lengths) if self.keep_conv_quirk else conv)
        q, k, v = self._heads(qkv)
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if position is None else position
        at = start[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k = (rotary(t, at, *self.rotary[:2], interleaved=self.rotary[2]) for t in (q, k))
        if state is None:
            out = attend(q, k, v, scale=self.scale, causal=self.causal)
        else:
            before = self.cache.positions(state, start)
            out = attend(
                q,
                torch.cat([state["k"].to(k.dtype), k], dim=1),
                torch.cat([state["v"].to(v.dtype), v], dim=1),
                scale=self.scale,
                causal=self.causal,
                q_position=at,
                k_position=torch.cat([before, at], dim=1),
            )
            self.cache.write(state, k, v, start, lengths)
        return self._finish(out, mlp)

    def _quirk(self, after: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
        """The last d_conv outputs of the convolution, where its inputs belong."""
        if lengths is not None:
            raise ValueError("the original's convolution cache knows no padded batches")
        return F.pad(after, (0, 0, self.d_conv, 0))[:, -self.d_conv :]

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        """One token: (batch, d_model) to the same; ``position`` (batch,) tokens were read before."""
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        if self.conv1d is not None:
            qkv = causal_conv1d_step(qkv, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"])
        q, k, v = (t[:, None] for t in self._heads(qkv))
        at = position[:, None]
        q, k = (rotary(t, at, *self.rotary[:2], interleaved=self.rotary[2]) for t in (q, k))
        self.cache.write(state, k, v, position, None)
        seen = self.cache.positions(state, position + 1)
        out = attend(
            q, state["k"].to(q.dtype), state["v"].to(q.dtype), scale=self.scale, q_position=at, k_position=seen
        )
        return self._finish(out[:, 0], mlp)
