"""The sequence mixers that the in-context language learning study compares, one class each: (batch, length, d) in and
out.

Paper: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973. Original:
berlino/seq_icl @ 9b9223d, Apache-2.0 (``models/sequence/rnn``, ``mha_rope.py``, ``simple_lm.py``). Parameter names are
the original's, so that its checkpoints need no key table below the mixers. The long convolutions (S4D, H3, Hyena) are
in :mod:`zoo_language.icll_convolutions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba as MambaMixer
from zoo_kernels import causal_conv1d, linear_attention, linear_scan

from .attention import rotary
from .icll_convolutions import H3, S4D, Hyena, at_least_float32


def ngram_weights(ids: Tensor, n: int, shift: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where the last ``n`` symbols stood before: rows (batch, length, length) that average over what followed them.

    ``W[t, s] > 0`` iff the n symbols ending at s - ``shift`` equal the n symbols ending at t, and s < t; rows sum to 1,
    or are 0 without a match. Paper, section 6 (n-gram heads). ids: (batch, length).
    """
    length = ids.shape[1]
    match = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    whole = match
    for _ in range(n - 1):
        match = F.pad(match, (1, 0, 1, 0))[:, :length, :length]  # one symbol further back on both sides
        whole = whole & match
    after = F.pad(whole, (shift, 0))[:, :, :length].tril(-1).to(dtype)
    return after / after.sum(-1, keepdim=True).clamp(min=1)


class NGram(nn.Module):
    """The hard-wired head: ``t0(mean of the inputs that followed the last n symbols) + t1(x)``."""

    needs_ids = True

    def __init__(self, d_model: int, ngram: int = 1) -> None:
        super().__init__()
        self.ngram = ngram
        self.t0, self.t1 = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = ngram_weights(ids, self.ngram, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.t0(weights.to(x.dtype) @ x) + self.t1(x)


class Attention(nn.Module):
    """Softmax attention without positions of its own, or (``linear``) its causal product without softmax.

    ``softmax_scale``: factor of the products (default ``1/sqrt(head width)``); ``bias``: of the joint projection;
    ``causal``: False to see the whole text; ``dwconv``: a short causal convolution over q, k and v (width 3).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.0,
        linear: bool = False,
        bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        dwconv: bool = False,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into {num_heads} heads")
        self.heads, self.dropout, self.linear, self.causal = num_heads, dropout, linear, causal
        self.scale = softmax_scale or (d_model // num_heads) ** -0.5
        self.Wqkv, self.out_proj = nn.Linear(d_model, 3 * d_model, bias=bias), nn.Linear(d_model, d_model)
        self.dwconv_qkv = nn.Conv1d(3 * d_model, 3 * d_model, 3, groups=3 * d_model) if dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.Wqkv(x)
        if self.dwconv_qkv is not None:
            mixed, _ = causal_conv1d(mixed, self.dwconv_qkv.weight.squeeze(1), self.dwconv_qkv.bias)
        q, k, v = mixed.unflatten(-1, (3, self.heads, -1)).unbind(2)
        drop = self.dropout if self.training else 0.0
        if self.linear and self.causal:
            out, _ = linear_attention(q, k, v, scale=self.scale)
        elif self.linear:
            out = torch.einsum("blhd,bhde->blhe", q * self.scale, torch.einsum("bshd,bshe->bhde", k, v))
        else:
            out = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), dropout_p=drop, is_causal=self.causal, scale=self.scale
            ).transpose(1, 2)
        return self.out_proj(out.flatten(-2))


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary phases over the whole head (neighbouring channels, theta 10000)."""

    def __init__(self, d_model: int, n_heads: int = 8, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise ValueError("mha-rope is built causal, as every configuration of the study has it")
        self.heads = n_heads
        self.att_qkv, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def angles(self) -> Tensor:
        """Turns per position of each pair of channels (what the original keeps as a buffer)."""
        dim = self.out_proj.in_features // self.heads
        return 1.0 / 10000 ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.att_qkv(x).chunk(3, dim=-1))
        position = torch.arange(x.shape[1], device=x.device)[None]
        q, k = (rotary(t, position, t.shape[-1], interleaved=True) for t in (q, k))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class Retention(nn.Module):
    """RetNet's parallel form with its normalisers (Sun et al., arXiv 2307.08621, equation 5 and section 2.4).

    The second normaliser depends on all products of a row, so this is quadratic in length, as in the original.
    """

    def __init__(self, d_model: int, n_heads: int = 4) -> None:
        super().__init__()
        self.heads = n_heads
        self.scale = (d_model // n_heads) ** -0.5
        self.q_proj, self.k_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.v_proj, self.g_proj = nn.Linear(d_model, 2 * d_model), nn.Linear(d_model, 2 * d_model)
        self.out_proj = nn.Linear(2 * d_model, d_model)

    def angles(self) -> Tensor:
        """Turns per position of each channel, pairs alike: 10000^-linspace(0, 1), not the usual rotary spacing."""
        pairs = self.q_proj.out_features // self.heads // 2
        return (1.0 / 10000 ** torch.linspace(0, 1, pairs)).repeat_interleave(2)

    def decays(self) -> Tensor:
        """The logarithm of each head's decay."""
        return torch.log(1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float32)))

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channels."""
        frequency = self.angles()[::2].to(x.device)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, v, g = self.q_proj(x), self.v_proj(x), self.g_proj(x)
        k = self.k_proj(x) * self.scale
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        decay = self.decays().to(x.device)
        step = torch.arange(length, device=x.device)
        distance = step[:, None] - step[None]
        mask = torch.exp(distance * decay[:, None, None]).masked_fill(distance < 0, 0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        # Decays and normalisers in float32 at least, whatever the weights are.
        q, k, v = (at_least_float32(t) for t in (q, k, v))
        weight = torch.einsum("blhd,bshd->bhls", self._turn(q), self._turn(k)) * mask
        weight = weight / weight.detach().sum(-1, keepdim=True).abs().clamp(min=1)
        out = torch.einsum("bhls,bshd->blhd", weight, v).to(x.dtype)
        out = F.layer_norm(out, (out.shape[-1],)).flatten(-2)
        return self.out_proj(F.silu(g) * out)


class GLA(nn.Module):
    """Gated linear attention (Yang et al., arXiv 2312.06635): a decay from the input for each key channel.

    ``use_gv``: one for each value channel too; ``use_gk`` False: none for the keys. The original's ablations, with its
    widths: keys have d/2 channels, d/4 where values decay.
    """

    def __init__(self, d_model: int, n_heads: int, use_gk: bool = True, use_gv: bool = False) -> None:
        super().__init__()
        self.heads, self.use_gk, self.use_gv = n_heads, use_gk, use_gv
        keys = d_model // 4 if use_gv else d_model // 2
        if keys % n_heads or d_model % n_heads:
            raise ValueError(f"{keys} key and {d_model} value channels do not divide into {n_heads} heads")
        self.scale = (d_model // n_heads) ** -0.5
        self.q_proj, self.k_proj = nn.Linear(d_model, keys, bias=False), nn.Linear(d_model, keys, bias=False)
        if use_gk:
            low_rank = nn.Sequential(nn.Linear(d_model, 16, bias=False), nn.Linear(16, keys))
            self.k_gate = nn.Linear(d_model, keys, bias=False) if use_gv else low_rank
        if use_gv:
            rank = d_model // 8 if use_gk else d_model // 4
            self.v_gate = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model))
        self.v_proj, self.g_proj = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def _decay(self, gate: nn.Module, x: Tensor) -> Tensor:
        return (F.logsigmoid(gate(x)) / 16).clamp(min=-3).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x) * self.scale, self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        decay = self._decay(self.k_gate, x) if self.use_gk else None
        if self.use_gv:
            # Both sides of the state decay, so it is scanned entry by entry: (heads, keys, values) channels.
            log = self._decay(self.v_gate, x)[..., None, :]
            log = log.expand(*k.shape, v.shape[-1]) if decay is None else log + decay[..., None]
            states, _ = linear_scan((k[..., None] * v[..., None, :]).flatten(2), log.exp().flatten(2))
            out = torch.einsum("blhd,blhde->blhe", q, states.unflatten(-1, (self.heads, k.shape[-1], -1)))
        else:
            out, _ = linear_attention(q, k, v, decay)
        out = F.layer_norm(out, (out.shape[-1],)).flatten(-2)
        return self.out_proj(F.silu(self.g_proj(x)) * out)


class RWKV(nn.Module):
    """RWKV-4's time mix in log space, as the study has it.

    Its decay enters with a plus sign (``w = exp(time_decay)`` is added to the log states): older tokens grow instead of
    fading. Kept, since checkpoints were trained so; only the log-space form survives it.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.time_decay, self.time_first = nn.Parameter(torch.zeros(d_model)), nn.Parameter(torch.zeros(d_model))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (
            nn.Parameter(torch.full((1, 1, d_model), 0.5)) for _ in range(3)
        )
        self.key, self.value, self.receptance, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        k = self.key(x * self.time_mix_k + before * (1 - self.time_mix_k))
        v = self.value(x * self.time_mix_v + before * (1 - self.time_mix_v))
        r = self.receptance(x * self.time_mix_r + before * (1 - self.time_mix_r))
        positive, negative = v.clamp(min=0) + 1e-4, (-v).clamp(min=0) + 1e-4
        w, u = self.time_decay.exp(), self.time_first
        step = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]

        def carried(terms: Tensor) -> Tensor:
            """log of the sum over s < t of exp(terms_s + w (t - 1 - s)): the state before step t."""
            state = torch.logcumsumexp(terms - w * step, dim=1) + w * step
            return F.pad(state, (0, 0, 1, -1), value=-torch.inf)

        base = torch.logaddexp(u + k, carried(k))

        def share(part: Tensor) -> Tensor:
            return torch.exp(torch.logaddexp(u + k + part.log(), carried(k + part.log())) - base)

        return self.output(torch.sigmoid(r) * (share(positive) - share(negative)))


class GILR(nn.Module):
    """Gated impulse linear recurrence: ``h = f h + (1 - f) v``, normalised and gated."""

    def __init__(self, d_model: int, factor: int = 1, dropout: float = 0.2) -> None:
        super().__init__()
        width = factor * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * width), nn.Linear(width, d_model)
        self.layer_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        v, o, f = self.in_proj(x).chunk(3, dim=-1)
        f = torch.sigmoid(f)
        h, _ = linear_scan((1 - f) * v, f)
        return self.out_proj(self.layer_norm(self.dropout(h * F.silu(o))))


class LRU(nn.Module):
    """Linear recurrent unit with a gate (Orvieto et al., arXiv 2303.06349): a complex diagonal recurrence."""

    def __init__(self, d_model: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(d_model, 4 * d_model), nn.Linear(2 * d_model, d_model)
        self.layer_norm, self.dropout = nn.LayerNorm(2 * d_model), nn.Dropout(dropout)
        radius, phase = torch.rand(d_model) * 0.1 + 0.9, torch.rand(d_model) * 2 * math.pi
        self.nu_log, self.theta_log = nn.Parameter((-radius.log()).log()), nn.Parameter(phase.log())
        self.gamma_log = nn.Parameter((1 - radius.square()).sqrt().log())

    def forward(self, x: Tensor) -> Tensor:
        v, o = self.in_proj(x).chunk(2, dim=-1)
        nu, theta, gamma = (at_least_float32(p).exp() for p in (self.nu_log, self.theta_log, self.gamma_log))
        value = torch.complex(*at_least_float32(v).chunk(2, dim=-1)) * gamma
        decay = torch.exp(torch.complex(-nu, theta))
        h, _ = linear_scan(value, decay)
        mixed = torch.cat([h.real, h.imag], dim=-1).to(x.dtype) * F.silu(o)
        return self.out_proj(self.layer_norm(self.dropout(mixed)))


class LSTM(nn.Module):
    """torch's LSTM (``n_layer`` of them in one mixer); ``reinit``: Keras-like initialisation, forget bias 1."""

    def __init__(self, d_model: int, n_layer: int = 1, reinit: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        between = dropout if n_layer > 1 else 0.0  # torch drops between stacked layers, and warns where there is one
        self.lstm = nn.LSTM(d_model, d_model, n_layer, batch_first=True, dropout=between)
        if reinit:
            for name, weight in self.lstm.named_parameters():
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(weight)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(weight)
                else:
                    nn.init.zeros_(weight)
                    if "bias_ih" in name:
                        with torch.no_grad():
                            weight[d_model : 2 * d_model] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Mamba(nn.Module):
    """Mamba-1 with its published defaults (d_state 16, d_conv 4)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.inner_mamba = MambaMixer(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner_mamba(x)


#: The original's names, and which of its arguments each takes.
MIXERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "gla": (GLA, ("n_heads", "use_gk", "use_gv")),
    "retention": (Retention, ("n_heads",)),
    "retentionv2": (Retention, ("n_heads",)),  # the same numbers; the original's second copy differs in its interface
    "rwkv": (RWKV, ()),
    "mha-rope": (RotaryAttention, ("n_heads", "causal")),
    "h3": (H3, ("d_state", "head_dim", "l_max", "n_ssm", "disc", "real_type", "bandlimit", "force_real")),
    "s4d": (S4D, ("d_state", "channels", "bidirectional", "activation", "postact", "dropout", "n_ssm")),
    "hyena": (
        Hyena,
        (
            "l_max", "order", "filter_order", "emb_dim", "short_filter_order", "modulate", "w", "num_inner_mlps",
            "normalized", "bias", "shift", "fast_decay_pct", "slow_decay_pct", "target", "activation", "dropout",
            "outer_mixing", "post_order_ffn", "lr_pos_emb", "modulation_lr",
        ),
    ),
    "lstm": (LSTM, ("n_layer", "reinit", "dropout")),
    "mamba": (Mamba, ()),
    "gilr": (GILR, ("factor", "dropout")),
    "lru": (LRU, ("dropout",)),
    "ngram": (NGram, ("ngram",)),
}  # fmt: skip
#: Arguments that change no numbers: they set the optimiser or how a fresh model starts, or are read by nobody.
IGNORED = {
    "_name_", "lr", "wd", "lr_pos_emb", "modulation_lr", "measure", "measure_args", "rank", "scaling", "deterministic",
    "dt_min", "dt_max", "train_w", "train_dt", "verbose", "dropout", "filter_dropout", "local_order", "layer_idx",
    "fuse_forget_gate", "use_fast_fftconv", "fused_bias_fc", "fused_fft_conv", "jit_filter", "d_model",
}  # fmt: skip
#: Arguments of the original of which one value alone runs in a language model, or is built here.
FIXED: dict[str, Any] = {
    "transposed": False, "return_state": False, "mode": "diag", "num_heads": 1, "inner_factor": 1, "num_blocks": 1,
    "filter_cls": "hyena-filter",
}  # fmt: skip


def mixer(name: str, d_model: int, **arguments: Any) -> nn.Module:
    """A mixer by the original's name. Raises ValueError for a name or an argument that the study does not have."""
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r}; the study has {', '.join(sorted(MIXERS))}")
    build, known = MIXERS[name]
    for key, value in FIXED.items():
        if arguments.get(key, value) != value:
            raise ValueError(f"the mixer {name!r} is built with {key}={value!r} alone, not {arguments[key]!r}")
    unknown = sorted(set(arguments) - set(known) - IGNORED - set(FIXED))
    if unknown:
        raise ValueError(
            f"the mixer {name!r} has no argument {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    return build(d_model, **{k: v for k, v in arguments.items() if k in known})
