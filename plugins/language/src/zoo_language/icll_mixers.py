"""The sequence mixers that the in-context language learning study compares, one class each: (batch, length, d) in and
out.

Paper: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973. Original:
berlino/seq_icl @ 9b9223d, Apache-2.0 (``models/sequence/rnn``, ``hyena.py``, ``h3.py``, ``ssm``). Parameter names are
the original's, so that its checkpoints need no key table below the mixers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba as MambaMixer
from zoo_kernels import causal_conv1d, linear_attention, linear_scan, long_conv

from .attention import rotary


def ngram_weights(ids: Tensor, n: int) -> Tensor:
    """Where the last ``n`` symbols stood before: rows (batch, length, length) that average over what followed them.

    ``W[t, s] > 0`` iff the n symbols ending at s - 1 equal the n symbols ending at t, and s < t; rows sum to 1, or
    are 0 without a match. Paper, section 6 (n-gram heads). ids: (batch, length).
    """
    length = ids.shape[1]
    match = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    whole = match
    for _ in range(n - 1):
        match = F.pad(match, (1, 0, 1, 0))[:, :length, :length]  # one symbol further back on both sides
        whole = whole & match
    after = F.pad(whole, (1, 0))[:, :, :length].tril(-1).float()
    return after / after.sum(-1, keepdim=True).clamp(min=1)


class NGram(nn.Module):
    """The hard-wired head: ``t0(mean of the inputs that followed the last n symbols) + t1(x)``."""

    needs_ids = True

    def __init__(self, d_model: int, ngram: int = 1) -> None:
        super().__init__()
        self.ngram = ngram
        self.t0, self.t1 = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.t0(ngram_weights(ids, self.ngram).to(x.dtype) @ x) + self.t1(x)


class Attention(nn.Module):
    """Softmax attention without positions of its own, or (``linear``) its causal product without softmax."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0, linear: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.linear = num_heads, dropout, linear
        self.Wqkv, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scale = q.shape[-1] ** -0.5
        if self.linear:
            out, _ = linear_attention(q, k, v, scale=scale)
            return self.out_proj(out.flatten(-2))
        drop = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=drop, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary phases over the whole head (neighbouring channels, theta 10000)."""

    def __init__(self, d_model: int, n_heads: int = 8, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise ValueError("mha-rope is built causal, as every configuration of the study has it")
        self.heads = n_heads
        self.att_qkv, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

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

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channels; frequencies 10000^-linspace(0, 1), not the usual rotary spacing."""
        pairs = x.shape[-1] // 2
        frequency = 1.0 / 10000 ** torch.linspace(0, 1, pairs, device=x.device)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, v, g = self.q_proj(x), self.v_proj(x), self.g_proj(x)
        k = self.k_proj(x) * self.scale
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, device=x.device, dtype=torch.float32))))
        step = torch.arange(length, device=x.device)
        distance = step[:, None] - step[None]
        mask = torch.exp(distance * decay[:, None, None]).masked_fill(distance < 0, 0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        # Decays and normalisers in float32, whatever the weights are.
        weight = torch.einsum("blhd,bshd->bhls", self._turn(q.float()), self._turn(k.float())) * mask
        weight = weight / weight.detach().sum(-1, keepdim=True).abs().clamp(min=1)
        out = torch.einsum("bhls,bshd->blhd", weight, v.float()).to(x.dtype)
        out = F.layer_norm(out, (out.shape[-1],)).flatten(-2)
        return self.out_proj(F.silu(g) * out)


class GLA(nn.Module):
    """Gated linear attention: one decay per key channel, from the input (Yang et al., arXiv 2312.06635)."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.heads = n_heads
        half = d_model // 2
        self.scale = (d_model // n_heads) ** -0.5
        self.q_proj, self.k_proj = nn.Linear(d_model, half, bias=False), nn.Linear(d_model, half, bias=False)
        self.k_gate = nn.Sequential(nn.Linear(d_model, 16, bias=False), nn.Linear(16, half))
        self.v_proj, self.g_proj = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x) * self.scale, self.v_proj(x)
        decay = (F.logsigmoid(self.k_gate(x)) / 16).clamp(min=-3)
        q, k, v, decay = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, decay))
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

    def __init__(self, d_model: int, factor: int = 1) -> None:
        super().__init__()
        width = factor * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * width), nn.Linear(width, d_model)
        self.layer_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        v, o, f = self.in_proj(x).chunk(3, dim=-1)
        f = torch.sigmoid(f)
        h, _ = linear_scan((1 - f) * v, f)
        return self.out_proj(self.layer_norm(self.dropout(h * F.silu(o))))


class LRU(nn.Module):
    """Linear recurrent unit with a gate (Orvieto et al., arXiv 2303.06349): a complex diagonal recurrence."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(d_model, 4 * d_model), nn.Linear(2 * d_model, d_model)
        self.layer_norm, self.dropout = nn.LayerNorm(2 * d_model), nn.Dropout(0.2)
        radius, phase = torch.rand(d_model) * 0.1 + 0.9, torch.rand(d_model) * 2 * math.pi
        self.nu_log, self.theta_log = nn.Parameter((-radius.log()).log()), nn.Parameter(phase.log())
        self.gamma_log = nn.Parameter((1 - radius.square()).sqrt().log())

    def forward(self, x: Tensor) -> Tensor:
        v, o = self.in_proj(x).chunk(2, dim=-1)
        value = torch.complex(*(part.float() for part in v.chunk(2, dim=-1))) * self.gamma_log.exp()
        decay = torch.exp(torch.complex(-self.nu_log.exp(), self.theta_log.exp()))
        h, _ = linear_scan(value, decay)
        mixed = torch.cat([h.real, h.imag], dim=-1).to(x.dtype) * F.silu(o)
        return self.out_proj(self.layer_norm(self.dropout(mixed)))


class LSTM(nn.Module):
    """torch's LSTM (``n_layer`` of them in one mixer); ``reinit``: Keras-like initialisation, forget bias 1."""

    def __init__(self, d_model: int, n_layer: int = 1, reinit: bool = True) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_model, n_layer, batch_first=True)
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


class _Nested(nn.Module):
    """Parameters below ``kernel.kernel``, where the original's checkpoints have them."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Module()
        for name, value in parameters.items():
            self.kernel.register_parameter(name, nn.Parameter(value))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self.kernel, name)


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _log_dt(d_model: int) -> Tensor:
    return torch.rand(d_model) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)


class S4D(nn.Module):
    """Diagonal S4 with one spectrum for all channels: a long convolution, a skip, GELU, a projection (arXiv
    2206.11893).
    """

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        pairs = d_state // 2
        self.D = nn.Parameter(torch.randn(1, d_model))
        self.kernel = _Nested(
            C=torch.randn(1, d_model, pairs, 2) * 0.5**0.5,
            log_w_real=torch.full((1, pairs), math.log(0.5)),
            w_imag=math.pi * torch.arange(pairs)[None].float(),
            log_dt=_log_dt(d_model),
        )
        self.output_linear = nn.Linear(d_model, d_model)

    def taps(self, length: int) -> Tensor:
        """``2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)``: (d, length)."""
        A = torch.complex(-self.kernel["log_w_real"].exp(), self.kernel["w_imag"])
        dtA = self.kernel["log_dt"].exp()[:, None] * A
        C = _complex(self.kernel["C"])[0] * (torch.exp(dtA) - 1) / A
        powers = torch.exp(dtA[..., None] * torch.arange(length, device=A.device))
        return 2 * torch.einsum("dn,dnl->dl", C, powers).real

    def forward(self, x: Tensor) -> Tensor:
        y, _ = long_conv(x, self.taps(x.shape[1]), self.D[0])
        return self.output_linear(F.gelu(y))


class H3(nn.Module):
    """H3: a shift kernel on k, a diagonal kernel on k v, gated by q (Fu et al., arXiv 2212.14052, section 3)."""

    def __init__(self, d_model: int, d_state: int = 64, head_dim: int = 1) -> None:
        super().__init__()
        if head_dim != 1:
            raise ValueError(f"head_dim is {head_dim}; every configuration of the study has 1, and only that is built")
        pairs = d_state // 2
        self.q_proj, self.k_proj, self.v_proj, self.output_linear = (nn.Linear(d_model, d_model) for _ in range(4))
        self.ssm_k_D, self.D = nn.Parameter(torch.randn(d_model)), nn.Parameter(torch.randn(d_model))
        self.ssm_k_kernel = _Nested(
            B=F.pad(torch.ones(d_model, 1), (0, d_state - 1)), C=torch.randn(1, d_model, d_state)
        )
        self.kernel = _Nested(
            B=torch.stack([torch.ones(d_model, pairs), torch.zeros(d_model, pairs)], dim=-1),
            C=torch.randn(1, d_model, pairs, 2) * 0.5**0.5,
            inv_A_real=torch.full((d_model, pairs), math.log(0.5)),
            A_imag=math.pi * torch.arange(pairs).float().expand(d_model, pairs).clone(),
            log_dt=_log_dt(d_model),
        )

    def shift_taps(self) -> Tensor:
        """``K[l] = sum_j C[j + l] B[j]`` for l below the state's size: (d, N)."""
        B, C = self.ssm_k_kernel["B"], self.ssm_k_kernel["C"][0]
        size = B.shape[-1]
        return torch.stack([(C[:, lag:] * B[:, : size - lag]).sum(-1) for lag in range(size)], dim=-1)

    def taps(self, length: int) -> Tensor:
        """The diagonal kernel, discretised bilinearly: (d, length)."""
        A = torch.complex(-self.kernel["inv_A_real"].exp(), self.kernel["A_imag"])
        dt = self.kernel["log_dt"].exp()[:, None]
        half = dt * A / 2
        scale = _complex(self.kernel["C"])[0] * _complex(self.kernel["B"]) * dt / (1 - half)
        powers = torch.exp(torch.log((1 + half) / (1 - half))[..., None] * torch.arange(length, device=A.device))
        return 2 * torch.einsum("dn,dnl->dl", scale, powers).real

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k, _ = long_conv(k, self.shift_taps(), self.ssm_k_D)
        y, _ = long_conv(k * v, self.taps(x.shape[1]), self.D)
        return self.output_linear(y * q)


class Sine(nn.Module):
    """``sin(freq * x)``; the layers of one filter share ``freq``."""

    def __init__(self, freq: nn.Parameter) -> None:
        super().__init__()
        self.freq = freq

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class HyenaFilter(nn.Module):
    """The implicit filter: an MLP with sine activations on (t, cos, -sin), damped in time (arXiv 2302.10866, section
    3.3).
    """

    def __init__(self, d_model: int, l_max: int, emb_dim: int, order: int, w: float, modulate: bool) -> None:
        super().__init__()
        self.modulate = modulate
        self.bias = nn.Parameter(torch.randn(d_model))
        freq = nn.Parameter(torch.full((1, order), float(w)))
        self.implicit_filter = nn.Sequential(
            nn.Linear(emb_dim, order), Sine(freq), nn.Linear(order, order), Sine(freq), nn.Linear(order, order),
            Sine(freq), nn.Linear(order, d_model, bias=False),
        )  # fmt: skip
        t = torch.linspace(0, 1, l_max)[:, None]
        bands = (emb_dim - 1) // 2
        angle = torch.linspace(1e-4, bands - 1, bands) * (2 * math.pi * torch.arange(l_max)[:, None] / l_max)
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("z", torch.cat([t, angle.cos(), -angle.sin()], dim=-1), persistent=False)
        deltas = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, d_model)
        self.register_buffer("deltas", deltas, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Taps (d, length)."""
        if length > self.z.shape[0]:
            raise ValueError(f"the input has {length} steps, this filter l_max {self.z.shape[0]}")
        taps = self.implicit_filter(self.z[:length])
        if self.modulate:
            taps = taps * torch.exp(-self.t[:length] * self.deltas.abs())
        return taps.t()


class Hyena(nn.Module):
    """Hyena of order 2: two gates around one implicit long convolution (Poli et al., arXiv 2302.10866)."""

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        filter_order: int = 64,
        emb_dim: int = 3,
        short_filter_order: int = 3,
        modulate: bool = True,
        w: float = 1.0,
    ) -> None:
        super().__init__()
        if order != 2:
            raise ValueError(f"order is {order}; every configuration of the study has 2, and only that is built")
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, short_filter_order, groups=3 * d_model)
        self.filter_fn = HyenaFilter(d_model, l_max, emb_dim, filter_order, w, modulate)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = causal_conv1d(self.in_proj(x), self.short_filter.weight.squeeze(1), self.short_filter.bias)
        x0, x1, v = mixed.chunk(3, dim=-1)
        y, _ = long_conv(v * x1, self.filter_fn(x.shape[1]), self.filter_fn.bias)
        return self.out_proj(y * x0)


#: The original's names, and which of its arguments each takes.
MIXERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "gla": (GLA, ("n_heads",)),
    "retention": (Retention, ("n_heads",)),
    "rwkv": (RWKV, ()),
    "mha-rope": (RotaryAttention, ("n_heads", "causal")),
    "h3": (H3, ("d_state", "head_dim")),
    "s4d": (S4D, ("d_state",)),
    "hyena": (
        Hyena,
        ("l_max", "order", "filter_order", "emb_dim", "short_filter_order", "modulate", "w"),
    ),
    "lstm": (LSTM, ("n_layer", "reinit")),
    "mamba": (Mamba, ()),
    "gilr": (GILR, ("factor",)),
    "lru": (LRU, ()),
    "ngram": (NGram, ("ngram",)),
}
#: Arguments that set the optimiser, or name what every configuration of the study fixes.
IGNORED = {"_name_", "lr", "wd", "lr_pos_emb", "transposed", "return_state", "mode", "measure", "dropout", "d_model"}


def mixer(name: str, d_model: int, **arguments: Any) -> nn.Module:
    """A mixer by the original's name. Raises ValueError for a name or an argument that the study does not have."""
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r}; the study has {', '.join(sorted(MIXERS))}")
    build, known = MIXERS[name]
    unknown = sorted(set(arguments) - set(known) - IGNORED)
    if unknown:
        raise ValueError(
            f"the mixer {name!r} has no argument {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    return build(d_model, **{k: v for k, v in arguments.items() if k in known})
