"""The parts of a DiMSUM block: modulation, MLPs, attention, the mixer, and the three frequency transforms.

Order of reading: small layers, attention, mixer, transforms (Haar wavelet packets, blockwise DCT, FFT). Tokens are
(batch, g * g, channels) in row-major order of a square grid of side g.

Paper: Phung et al., "DiMSUM: Diffusion Mamba - A Scalable and Unified Spatial-Frequency Method for Image Generation",
arXiv 2411.04168. Original: VinAIResearch/DiMSUM @ 8743e63, BSD 3-clause.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba
from zoo.layers.inference import by_rows, results_only, untouched
from zoo.layers.linear import Linear, call, linear
from zoo_kernels import causal_conv1d, selective_scan

#: Wavelet bands in the order of the original's channel groups: rows low or high, then columns.
BANDS = ("ll", "lh", "hl", "hh")


# -- small layers ------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``: x (batch, tokens, C), shift and scale (batch, C)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate * y``: x and y (batch, tokens, C), gate (batch, C)."""
    return torch.addcmul(x, gate.unsqueeze(1), y)


class Modulation(nn.Sequential):
    """``Linear(SiLU(c))`` cut into ``parts`` vectors: c (batch, cond_dim) to ``parts`` tensors (batch, dim)."""

    def __init__(self, cond_dim: int, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), Linear(cond_dim, parts * dim))
        self.parts = parts

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(c).chunk(self.parts, dim=1)


class GatedMlp(nn.Module):
    """``w3(gelu(a) * b)`` with ``a, b = w12(x)``, the tanh form of GELU; hidden width 4 dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = Linear(dim, 8 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self._rows, x, module=self)

    def _rows(self, x: Tensor) -> Tensor:
        weight, bias = self.w12.weight, self.w12.bias
        if type(self.w12) is Linear and results_only(x, weight, bias) and untouched(self.w12):
            (first, second), (one, two) = weight.chunk(2), bias.chunk(2)  # so that the product ends with the GELU
            return self.w3(linear(x, first, one, act="gelu_tanh") * linear(x, second, two))
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.gelu(a, approximate="tanh") * b)


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``, the tanh form of GELU; hidden width 4 dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(lambda rows: self.fc2(call(self.fc1, rows, act=self.act)), x, module=self)


class TimestepEmbedder(nn.Module):
    """Times t (batch,) in [0, 1], taken as they are, to (batch, dim): 128 cosines and 128 sines, then an MLP."""

    def __init__(self, dim: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Linear(2 * frequencies, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        angles = t[:, None].float() * torch.exp(-math.log(10000) / self.frequencies * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class LabelEmbedder(nn.Module):
    """Class labels (batch,) to (batch, dim). With ``dropout`` > 0 the table has one more row, for "no label", which
    takes a label's place at that rate in training."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)

    @property
    def null(self) -> int:
        """The row that stands for "no label": the last one, with and without dropout."""
        return self.embedding_table.num_embeddings - 1

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


# -- attention ---------------------------------------------------------------------------------------------------------


def _heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, tokens, 3 C) to q, k, v of (batch, heads, tokens, C / heads)."""
    q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


class Attention(nn.Module):
    """Softmax attention over all tokens: (batch, tokens, dim) to the same; ``qkv`` with bias, no norms."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"hidden_size is {dim}; expected a multiple of {heads}, the heads of the attention block")
        self.heads = heads
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*_heads(self.qkv(x), self.heads))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttentionFusion(nn.Module):
    """Two branches (batch, tokens, dim / 2) to one (batch, tokens, dim): each asks the other, 8 heads.

    ``proj([softmax(q1 k2^T) v2, softmax(q2 k1^T) v1])``. Source: arXiv 2411.04168, section 3.3.
    """

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"hidden_size is {dim}; expected a multiple of {2 * heads}: two branches of {heads} heads")
        self.heads = heads
        self.qkv1, self.qkv2 = Linear(dim // 2, 3 * (dim // 2)), Linear(dim // 2, 3 * (dim // 2))
        self.proj = Linear(dim, dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, k1, v1 = _heads(self.qkv1(x1), self.heads)
        q2, k2, v2 = _heads(self.qkv2(x2), self.heads)
        first = F.scaled_dot_product_attention(q1, k2, v2)
        second = F.scaled_dot_product_attention(q2, k1, v1)
        return self.proj(torch.cat([first.transpose(1, 2).flatten(2), second.transpose(1, 2).flatten(2)], dim=-1))


# -- the mixer ---------------------------------------------------------------------------------------------------------


class Mixer(Mamba):
    """Mamba-1 as DiMSUM has it, under the original's names.

    ``cond_dim``: also hold ``cond_proj``, the projection of the condition. It does nothing in either code: the original
    hands its result to the convolution as the memory to write the output into, where it is overwritten.
    ``both``: Vim's second direction ("v2"): a set of parameters (``A_b_log``, ``conv1d_b``, ``x_proj_b``,
    ``dt_proj_b``, ``D_b``) of its own runs from the sequence's end, and both are added before ``out_proj``.
    ``ssm``: more arguments of :class:`zoo.layers.Mamba`.
    """

    def __init__(self, d_model: int, *, cond_dim: int | None = None, both: bool = False, **ssm: Any) -> None:
        super().__init__(d_model, **ssm)
        self.both = both
        if cond_dim is not None:
            self.cond_proj = Linear(cond_dim, self.d_inner)
        if both:
            back = Mamba(d_model, **ssm)
            self.A_b_log, self.D_b = back.A_log, back.D
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = back.conv1d, back.x_proj, back.dt_proj

    def forward(self, u: Tensor, *, path: Tensor | None = None, reverse: bool = False) -> Tensor:  # type: ignore[override]
        """(batch, tokens, D) to the same; ``path`` (tokens,): the order in which they are walked."""
        if not self.both:
            return super().forward(u, path=path, reverse=reverse)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        ahead = (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        first = self._walk(x, z, ahead, path, reverse)
        return self.out_proj(first + self._walk(x, z, back, path, not reverse))

    def _walk(self, x: Tensor, z: Tensor, parts: tuple, path: Tensor | None, reverse: bool) -> Tensor:
        conv, x_proj, dt_proj, A_log, D = parts
        x, _ = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", path=path, reverse=reverse)
        dt, B, C = x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, _ = selective_scan(
            x, dt, -torch.exp(A_log.float()), B, C, D.float(), z, dt_proj.bias.float(), dt_proj=dt_proj.weight,
            dt_softplus=True, path=path, reverse=reverse,
        )  # fmt: skip
        return y


# -- frequency transforms ----------------------------------------------------------------------------------------------


def grid_side(tokens: int) -> int:
    """The side g of a square grid of g * g tokens."""
    return math.isqrt(tokens)


def to_patches(x: Tensor, p: int) -> Tensor:
    """Tokens (batch, g * g, C) to patches of p * p tokens: (batch, (g / p)^2, p * p, C), row-major in each."""
    g = grid_side(x.shape[1])
    x = x.unflatten(1, (g // p, p, g // p, p))  # h r w c
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_patches(x: Tensor, p: int) -> Tensor:
    """The inverse of :func:`to_patches`."""
    side = grid_side(x.shape[1])
    return x.unflatten(2, (p, p)).unflatten(1, (side, side)).transpose(2, 3).flatten(1, 4)


def _laid_out(x: Tensor) -> Tensor:
    """(batch, patches, n, C) read as (batch, patches, C, n), the memory unchanged, then turned back: the original
    stacks its bands band by band and lays them out as if they were stacked channel by channel."""
    return x.flatten(2).unflatten(2, (x.shape[3], x.shape[2])).transpose(2, 3)


def _read_back(x: Tensor) -> Tensor:
    """The inverse of :func:`_laid_out`."""
    return x.transpose(2, 3).flatten(2).unflatten(2, (x.shape[2], x.shape[3]))


def _haar_filters() -> Tensor:
    """The four 2 x 2 filters, (4, rows, columns), in the order of :data:`BANDS`."""
    low, high = torch.full((2,), 0.5**0.5), torch.tensor([1.0, -1.0]) * 0.5**0.5
    return torch.stack([low[:, None] * low, high[:, None] * low, low[:, None] * high, high[:, None] * high])


def _packets(filters: Tensor) -> Tensor:
    """(4, 2, 2) filters of one level to (16, 16): rows (level-1 band, level-2 band), columns the patch's tokens."""
    # level 1 (b) reads neighbours, level 2 (a) every other place: token (2 r + s, 2 c + d)
    return torch.einsum("arc,bsd->barscd", filters, filters).flatten(0, 1).flatten(1)


class HaarPackets(nn.Module):
    """Two levels of the Haar wavelet packet transform over each channel's 4 x 4 patches of tokens, divided by 4.

    Every patch of 16 tokens becomes 16 coefficients in its place, (level-1 band, level-2 band), in an order that mixes
    bands and channels (see :func:`_laid_out`). Source: arXiv 2411.04168, section 3.2; ``WaveDiMBlock._dwt_fast``.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, part in zip(BANDS, _haar_filters(), strict=True):
            self.register_buffer(f"w_{name}", part[None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, g * g, C), g divisible by 4, to as many coefficients."""
        filters = torch.cat([getattr(self, f"w_{name}") for name in BANDS])[:, 0]
        return from_patches(_laid_out((_packets(filters) / 4).to(x.dtype) @ to_patches(x, 4)), 4)


class HaarTokens(nn.Module):
    """The inverse of :class:`HaarPackets`, by filters of its own, as in the original."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", _haar_filters()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, g * g, C) coefficients to tokens."""
        packets = _packets(self.filters[:, 0]).t() * 4  # type: ignore[index]
        return from_patches(packets.to(x.dtype) @ _read_back(to_patches(x, 4)), 4)


class BlockDCT(nn.Module):
    """The orthonormal 4 x 4 DCT-II of each channel's patches of tokens, coefficient u + 4 v in the place of a token.

    ``weight``: (16 C, 1, 4, 4), or with ``inverse`` (16 C, 16, 1, 1), channel by channel, frozen and used as stored,
    as in the original. (batch, g * g, C) to the same, g divisible by 4.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        n = 4
        steps = torch.arange(n, dtype=torch.float64)
        basis = torch.cos((2 * steps + 1) * steps[:, None] * math.pi / (2 * n)) * (2 / n) ** 0.5  # (frequency, place)
        basis = torch.cat([basis[:1] * 0.5**0.5, basis[1:]])
        table = torch.einsum("vr,uc->vurc", basis, basis).reshape(n * n, n * n).float()  # (coefficient, token)
        table = table.t().reshape(n * n, n * n, 1, 1) if inverse else table.reshape(n * n, 1, n, n)
        self.weight = nn.Parameter(table.repeat(channels, 1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tables = self.weight.reshape(-1, 16, 16)  # (channel, out, in)
        return from_patches(torch.einsum("coi,bnic->bnoc", tables, to_patches(x, 4)), 4)


class EinFFT(nn.Module):
    """Two complex layers between a Fourier transform over (tokens, 4 channel blocks) and its inverse.

    Parameters, c = channels / 4: ``complex_weight_{1,2}`` (2, 4, c, c), ``complex_bias_{1,2}`` (2, 4, c), real and
    imaginary on the first axis. ReLU follows the first layer, soft shrinkage by 0.01 the second, on both parts.
    Source: SiMBA (arXiv 2403.15360), as in ``models_dim.py:EinFFT``.
    """

    blocks, threshold = 4, 0.01

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % self.blocks:
            raise ValueError(f"the frequency branch has {channels} channels; expected a multiple of {self.blocks}")
        c = channels // self.blocks
        for i in (1, 2):
            setattr(self, f"complex_weight_{i}", nn.Parameter(torch.randn(2, self.blocks, c, c) * 0.02))
            setattr(self, f"complex_bias_{i}", nn.Parameter(torch.randn(2, self.blocks, c) * 0.02))

    def _layer(self, real: Tensor, imag: Tensor, i: int) -> tuple[Tensor, Tensor]:
        weight, bias = getattr(self, f"complex_weight_{i}").float(), getattr(self, f"complex_bias_{i}").float()

        def times(x: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("...bd,bdk->...bk", x, w)

        return (
            times(real, weight[0]) - times(imag, weight[1]) + bias[0],
            times(real, weight[1]) + times(imag, weight[0]) + bias[1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) to the same; in float32 inside."""
        spectrum = torch.fft.fft2(x.float().unflatten(-1, (self.blocks, -1)), dim=(1, 2), norm="ortho")
        real, imag = self._layer(spectrum.real, spectrum.imag, 1)
        real, imag = self._layer(F.relu(real), F.relu(imag), 2)
        mixed = torch.complex(F.softshrink(real, self.threshold), F.softshrink(imag, self.threshold))
        return torch.fft.ifft2(mixed, dim=(1, 2), norm="ortho").real.flatten(-2).to(x.dtype)


# -- positions ---------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, side: int) -> Tensor:
    """Tokens (batch, side^2, dim) turned by their places: pairs of channels, half of them by column, half by row."""
    dim = x.shape[-1]
    omega = 10000.0 ** (-torch.arange(dim // 4, device=x.device, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, device=x.device, dtype=torch.float64)[:, None] * omega
    columns = angles.expand(side, side, -1)
    rows = angles[:, None].expand(side, side, -1)
    angle = torch.cat([columns, rows], dim=-1).flatten(0, 1).repeat_interleave(2, dim=-1)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)
