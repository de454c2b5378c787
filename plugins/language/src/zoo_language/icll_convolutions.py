"""The long convolutions of the in-context language learning study: S4D, H3 and Hyena, (batch, length, d) in and out.

Paper: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973. Original:
berlino/seq_icl @ 9b9223d, Apache-2.0 (``ssm/s4d.py``, ``h3.py``, ``ssm/ss_kernel*.py``, ``hyena.py``). Parameter names
are the original's. Kernels are in float32 at least, whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import causal_conv1d, long_conv

ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity, "id": nn.Identity, "identity": nn.Identity, "linear": nn.Identity, "tanh": nn.Tanh,
    "relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
}  # fmt: skip


def activation_of(name: str | None) -> nn.Module:
    """An activation by the original's name. Raises ValueError for another."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation {name!r}; the study has {', '.join(str(k) for k in ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def at_least_float32(x: Tensor) -> Tensor:
    """Complex numbers and long powers have no half precision."""
    return x if x.dtype == torch.float64 else x.float()


class _Nested(nn.Module):
    """Parameters below ``kernel.kernel``, where the original's checkpoints have them; read in float32 at least."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Module()
        for name, value in parameters.items():
            self.kernel.register_parameter(name, nn.Parameter(value))

    def __getitem__(self, name: str) -> Tensor:
        return at_least_float32(getattr(self.kernel, name))


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _log_dt(d_model: int) -> Tensor:
    return torch.rand(d_model) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)


def _copies(d_model: int, n_ssm: int) -> int:
    """How many channels share one spectrum; channel c has spectrum ``c % n_ssm``."""
    if d_model % n_ssm:
        raise ValueError(f"n_ssm {n_ssm} spectra do not divide {d_model} channels")
    return d_model // n_ssm


class S4D(nn.Module):
    """Diagonal S4: a long convolution, a skip, an activation, a projection (arXiv 2206.11893).

    ``n_ssm`` spectra are shared by the channels (one for all by default). ``channels``: outputs for each input
    channel; ``bidirectional``: a second kernel walks from the end; ``postact``: activation behind the projection
    ("glu" doubles it).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        bidirectional: bool = False,
        activation: str | None = "gelu",
        postact: str | None = None,
        dropout: float = 0.0,
        n_ssm: int = 1,
    ) -> None:
        super().__init__()
        pairs = d_state // 2
        self.copies, self.bidirectional = _copies(d_model, n_ssm), bidirectional
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.kernel = _Nested(
            C=torch.randn(channels * (2 if bidirectional else 1), d_model, pairs, 2) * 0.5**0.5,
            log_w_real=torch.full((n_ssm, pairs), math.log(0.5)),
            w_imag=math.pi * torch.arange(pairs).float().repeat(n_ssm, 1),
            log_dt=_log_dt(d_model),
        )
        self.activation, self.dropout = activation_of(activation), nn.Dropout(dropout)
        linear = nn.Linear(channels * d_model, d_model * (2 if postact == "glu" else 1))
        behind = nn.GLU() if postact == "glu" else activation_of(postact)
        self.output_linear = linear if postact is None else nn.Sequential(linear, behind)

    def taps(self, length: int) -> Tensor:
        """``2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)``: (kernels, d, length)."""
        A = torch.complex(-self.kernel["log_w_real"].exp(), self.kernel["w_imag"]).repeat(self.copies, 1)
        dtA = self.kernel["log_dt"].exp()[:, None] * A
        C = _complex(self.kernel["C"]) * (torch.exp(dtA) - 1) / A
        powers = torch.exp(dtA[..., None] * torch.arange(length, device=A.device))
        return 2 * torch.einsum("cdn,dnl->cdl", C, powers).real

    def forward(self, x: Tensor) -> Tensor:
        taps, back = self.taps(x.shape[1]), None
        channels = self.D.shape[0]
        if self.bidirectional:
            taps, back = taps[:channels], taps[channels:].flatten(0, 1)
        y, _ = long_conv(x.repeat(1, 1, channels), taps.flatten(0, 1), self.D.flatten(), back_kernel=back)
        return self.output_linear(self.dropout(self.activation(y)))


#: How the real part of H3's spectrum follows from its parameter, and the parameter that gives -1/2.
REAL_PARTS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (lambda x: -x.exp(), math.log(0.5)),
    "none": (lambda x: -x, 0.5),
    "relu": (lambda x: -F.relu(x) - 1e-4, 0.5),
    "sigmoid": (lambda x: -F.sigmoid(x), 0.0),
    "softplus": (lambda x: -F.softplus(x), math.log(math.expm1(0.5))),
}


class H3(nn.Module):
    """H3: a shift kernel on k, a diagonal kernel on k v, gated by q (Fu et al., arXiv 2212.14052, section 3).

    ``head_dim`` p: k and v of a head of p channels meet in all p * p pairs, and q sums over those of its k (1: a plain
    product). Of the diagonal kernel: ``n_ssm`` spectra shared by the heads (default: one each); ``disc``: "bilinear" or
    "zoh"; ``real_type``: how the decay is parametrised; ``force_real``: without phases; ``bandlimit``: modes above this
    share of the sampling rate are silent; ``l_max``: taps from there on are zero.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        l_max: int | None = None,
        n_ssm: int | None = None,
        disc: str = "bilinear",
        real_type: str = "exp",
        bandlimit: float | None = None,
        force_real: bool = False,
    ) -> None:
        super().__init__()
        if d_model % head_dim:
            raise ValueError(f"d_model {d_model} does not divide into heads of head_dim {head_dim}")
        if disc not in ("bilinear", "zoh"):
            raise ValueError(f"disc is {disc!r}; 'bilinear' and 'zoh' are built")
        if real_type not in REAL_PARTS:
            raise ValueError(f"real_type is {real_type!r}; choose from {', '.join(REAL_PARTS)}")
        pairs, heads = d_state // 2, d_model // head_dim
        n_ssm = heads if n_ssm is None else n_ssm
        self.head_dim, self.l_max, self.copies = head_dim, l_max, _copies(heads, n_ssm)
        self.disc, self.bandlimit, self.force_real = disc, bandlimit, force_real
        self.real_part, start = REAL_PARTS[real_type]
        self.q_proj, self.k_proj, self.v_proj, self.output_linear = (nn.Linear(d_model, d_model) for _ in range(4))
        self.ssm_k_D, self.D = nn.Parameter(torch.randn(d_model)), nn.Parameter(torch.randn(heads))
        self.ssm_k_kernel = _Nested(
            B=F.pad(torch.ones(d_model, 1), (0, d_state - 1)), C=torch.randn(1, d_model, d_state)
        )
        self.kernel = _Nested(
            B=torch.stack([torch.ones(n_ssm, pairs), torch.zeros(n_ssm, pairs)], dim=-1),
            C=torch.randn(1, heads, pairs, 2) * 0.5**0.5,
            inv_A_real=torch.full((n_ssm, pairs), start),
            A_imag=math.pi * torch.arange(pairs).float().repeat(n_ssm, 1),
            log_dt=_log_dt(heads),
        )

    def shift_taps(self, length: int) -> Tensor:
        """``K[l] = sum_j C[j + l] B[j]`` for l below the state's size: (d, at most ``length``)."""
        B, C = self.ssm_k_kernel["B"], self.ssm_k_kernel["C"][0]
        size = B.shape[-1]
        return torch.stack([(C[:, lag:] * B[:, : size - lag]).sum(-1) for lag in range(min(size, length))], dim=-1)

    def taps(self, length: int) -> Tensor:
        """The diagonal kernel, discretised: (heads, length)."""
        A = torch.complex(self.real_part(self.kernel["inv_A_real"]), self.kernel["A_imag"]).repeat(self.copies, 1)
        dt = self.kernel["log_dt"].exp()[:, None]
        scale = _complex(self.kernel["C"])[0]
        if self.bandlimit is not None:
            scale = scale * (dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        if self.force_real:
            A = A.real + 0j
        scale, half = scale * _complex(self.kernel["B"]).repeat(self.copies, 1), dt * A / 2
        if self.disc == "bilinear":
            scale, log_step = scale * dt / (1 - half), torch.log((1 + half) / (1 - half))
        else:
            scale, log_step = scale * (torch.exp(dt * A) - 1) / A, dt * A
        powers = torch.exp(log_step[..., None] * torch.arange(length, device=A.device))
        return 2 * torch.einsum("dn,dnl->dl", scale, powers).real

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1] if self.l_max is None else min(x.shape[1], self.l_max)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k, _ = long_conv(k, self.shift_taps(length), self.ssm_k_D)
        taps, p = self.taps(length), self.head_dim
        if p == 1:
            y, _ = long_conv(k * v, taps, self.D)
            return self.output_linear(y * q)
        q, k, v = (t.unflatten(-1, (-1, p)) for t in (q, k, v))
        both = k[..., None] * v[..., None, :]  # (batch, length, heads, of k, of v)
        y, _ = long_conv(both.flatten(2), taps.repeat_interleave(p * p, 0), self.D.repeat_interleave(p * p))
        y = (y.view_as(both) * q[..., None]).sum(-2)  # (batch, length, heads, of v)
        return self.output_linear(y.transpose(-1, -2).flatten(-2))  # the original writes heads innermost


class Sine(nn.Module):
    """``sin(freq * x)``; the layers of one filter share ``freq``."""

    def __init__(self, freq: nn.Parameter) -> None:
        super().__init__()
        self.freq = freq

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


def _register(module: nn.Module, name: str, value: Tensor, *, trained: bool) -> None:
    if trained:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class HyenaFilter(nn.Module):
    """The implicit filter: an MLP with sine activations on (t, cos, -sin), damped in time (arXiv 2302.10866, section
    3.3).

    ``num_inner_mlps``: hidden layers; ``normalized``: taps of one step have absolute sum 1; ``bias``: False to leave
    the skip out; ``shift``: what damping never goes below; ``fast_decay_pct``, ``slow_decay_pct``, ``target``: the
    range of damping. ``lr_pos_emb``, ``modulation_lr``: 0 where the features, or the dampings, are not trained (their
    values are the optimiser's business).
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        emb_dim: int,
        order: int,
        w: float,
        modulate: bool,
        num_inner_mlps: int = 2,
        normalized: bool = False,
        bias: bool = True,
        shift: float = 0.0,
        fast_decay_pct: float = 0.3,
        slow_decay_pct: float = 1.5,
        target: float = 1e-2,
        lr_pos_emb: float = 1e-5,
        modulation_lr: float = 0.0,
    ) -> None:
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim is {emb_dim}; time, sines and cosines need an odd number from 3 on")
        self.modulate, self.normalized, self.use_bias, self.shift = modulate, normalized, bias, shift
        self.bias = nn.Parameter(torch.randn(d_model))
        freq = nn.Parameter(torch.full((1, order), float(w)))
        layers: list[nn.Module] = [nn.Linear(emb_dim, order), Sine(freq)]
        for _ in range(num_inner_mlps):
            layers += [nn.Linear(order, order), Sine(freq)]
        self.implicit_filter = nn.Sequential(*layers, nn.Linear(order, d_model, bias=False))
        t = torch.linspace(0, 1, l_max)[None, :, None]
        bands = (emb_dim - 1) // 2
        angle = torch.linspace(1e-4, bands - 1, bands) * (2 * math.pi * torch.arange(l_max)[None, :, None] / l_max)
        self.pos_emb, self.modulation = nn.Module(), nn.Module()
        _register(self.pos_emb, "z", torch.cat([t, angle.cos(), -angle.sin()], dim=-1), trained=lr_pos_emb != 0)
        self.pos_emb.register_buffer("t", t)
        limits = math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct
        _register(self.modulation, "deltas", torch.linspace(*limits, d_model)[None, None], trained=modulation_lr != 0)

    def shared_names(self) -> list[str]:
        """Where ``freq`` stands in a state dict beside its first place."""
        return [f"implicit_filter.{j}.freq" for j in range(3, len(self.implicit_filter) - 1, 2)]

    @property
    def l_max(self) -> int:
        return self.pos_emb.t.shape[1]  # type: ignore[union-attr, index, return-value]

    @property
    def skip(self) -> Tensor:
        """What passes beside the convolution, (d)."""
        return self.bias if self.use_bias else torch.zeros_like(self.bias)

    def forward(self, length: int) -> Tensor:
        """Taps (d, length)."""
        if length > self.l_max:
            raise ValueError(f"the input has {length} steps, this filter l_max {self.l_max}")
        taps = self.implicit_filter(self.pos_emb.z[0, :length])  # type: ignore[index]
        if self.modulate:
            t, deltas = self.pos_emb.t[0, :length], self.modulation.deltas[0]  # type: ignore[index]
            taps = taps * (torch.exp(-t * deltas.abs()) + self.shift)
        if self.normalized:
            taps = taps / taps.abs().sum(-1, keepdim=True)
        return taps.t()


class Hyena(nn.Module):
    """Hyena: ``order`` gates with an implicit long convolution behind each but the last (arXiv 2302.10866).

    ``outer_mixing``: each channel is gated by the sum of all gates; ``post_order_ffn``: a learnt factor behind each
    convolution; ``activation`` in front of the last projection. Other arguments: :class:`HyenaFilter`.
    """

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
        activation: str | None = "id",
        dropout: float = 0.0,
        outer_mixing: bool = False,
        post_order_ffn: bool = False,
        **damping: float,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"order is {order}; Hyena has two gates or more")
        self.order, self.outer_mixing = order, outer_mixing
        width = (order + 1) * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, width), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(width, width, short_filter_order, groups=width)
        self.filter_fn = HyenaFilter((order - 1) * d_model, l_max, emb_dim, filter_order, w, modulate, **damping)  # type: ignore[arg-type]
        self.activation, self.dropout = activation_of(activation), nn.Dropout(dropout)
        # (order, 1, 1): the original mixes heads here, and its heads do not run with more than one
        start = torch.randn(order, 1, 1) / math.sqrt(d_model)
        self.ord_proj_w = nn.Parameter(start) if post_order_ffn else None

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = causal_conv1d(self.in_proj(x), self.short_filter.weight.squeeze(1), self.short_filter.bias)
        first, *gates, v = mixed.chunk(self.order + 1, dim=-1)
        # Channel c of convolution o is number c * (order - 1) + o of the filter.
        taps = self.filter_fn(x.shape[1]).unflatten(0, (-1, self.order - 1)).unbind(1)
        skips = self.filter_fn.skip.unflatten(0, (-1, self.order - 1)).unbind(1)
        for o, gate in enumerate(reversed(gates)):
            v = self.dropout(v * (gate.sum(-1, keepdim=True) if self.outer_mixing else gate))
            v, _ = long_conv(v, taps[o].contiguous(), skips[o])
            if self.ord_proj_w is not None:
                v = v * self.ord_proj_w[o]
        return self.out_proj(self.activation(v * first))
