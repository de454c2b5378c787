"""Contrast: super-resolution by convolutions, selective scans and overlapping windows of attention.

Paper: Urumbekov and Chen, "Contrast", arXiv 2501.13353. No code is public, so this is a reading of the paper. The
paper's: a shallow convolution, residual groups ``F_j = Conv(OCAB(VSS^N2(F_{j-1}))) + F_{j-1}``, a reconstruction for
x2, x3 and x4. Ours, every one an argument: sizes, kind of VSS block, windows, the long residual, the head, the mean
subtracted from the colours; SwinIR, HAT and MambaIR have them so. The scan block is VMamba's
(:class:`zoo.layers.vss.VSSBlock`), the attention is HAT's (:mod:`zoo_restoration.ocab`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Recomputed
from zoo.layers.ss2d import CROSS, SS2D
from zoo.layers.vss import ConvLast, DropPath, VSSBlock

from .ocab import OCAB
from .sizes import check_image, pad_to_multiple

#: of DIV2K's RGB values, as SwinIR and its relatives subtract it
MEAN = (0.4488, 0.4371, 0.4040)
HEADS = ("pixelshuffle", "direct")
BLOCKS = ("vmamba", "mambair")
BASES = ("none", "nearest", "bilinear", "bicubic")


class ChannelAttentionConv(nn.Module):
    """Two 3x3 convolutions through dim / ``compress`` channels, each channel scaled by a gate that sees all positions.

    Layout (batch, height, width, dim). Source: MambaIR, arXiv 2402.15648, section 3.2 (its ``CAB``).
    """

    def __init__(self, dim: int, compress: int = 3, squeeze: int = 30) -> None:
        super().__init__()
        inner, narrow = max(dim // compress, 1), max(dim // squeeze, 1)
        self.conv1, self.conv2 = ConvLast(dim, inner, 3, padding=1), ConvLast(inner, dim, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(dim, narrow), nn.Linear(narrow, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.gelu(self.conv1(x)))
        gate = self.fc2(self.fc1(y.mean(dim=(1, 2), keepdim=True)).relu())
        return y * gate.sigmoid()


class ResidualStateSpaceBlock(Recomputed):
    """``x = s1 x + op(norm x)``, then ``x = s2 x + convs(norm2 x)``, s1 and s2 learned for each channel.

    MambaIR's block, arXiv 2402.15648, equation 3. Input and output (batch, height, width, dim).
    """

    def __init__(self, dim: int, mixer: Mapping[str, Any], drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.op = SS2D(dim, **mixer)
        self.convs = ChannelAttentionConv(dim)
        self.scale, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.drop_path(self.op(self.norm(x)))
        return x * self.scale2 + self.convs(self.norm2(x))


class ResidualGroup(nn.Module):
    """``conv(ocab(blocks(x))) + x``, the paper's formula. Input and output (batch, height, width, dim)."""

    def __init__(self, dim: int, blocks: list[nn.Module], ocab: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.ocab = nn.Identity() if ocab is None else ocab
        self.conv = ConvLast(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.ocab(self.blocks(x))) + x


def upsampler(kind: str, dim: int, out_chans: int, scale: int, width: int) -> nn.Sequential:
    """(batch, dim, H, W) to (batch, out_chans, scale H, scale W), ``scale`` a power of 2, or 3.

    "pixelshuffle": 3x3 convolution to ``width`` channels, LeakyReLU, then for each factor (2, or 3) a convolution to
    factor^2 times as many and PixelShuffle, then a convolution to the colours; "direct": one convolution to scale^2
    times the colours and PixelShuffle. Source: SwinIR, arXiv 2108.10257, section 3.1, and its code.
    """
    if kind not in HEADS:
        raise ValueError(f"head is {kind!r}; expected 'pixelshuffle' or 'direct'")
    if scale != 3 and (scale < 1 or scale & (scale - 1)):
        raise ValueError(f"scale is {scale}; expected 3 or a power of 2")
    if kind == "direct":
        return nn.Sequential(nn.Conv2d(dim, scale * scale * out_chans, 3, padding=1), nn.PixelShuffle(scale))
    layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), nn.LeakyReLU()]
    for factor in [3] if scale == 3 else [2] * (scale.bit_length() - 1):
        layers += [nn.Conv2d(width, factor * factor * width, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers, nn.Conv2d(width, out_chans, 3, padding=1))


class Contrast(GradCheckpointing, nn.Module):
    """``head(conv(groups(f)) + f)`` with ``f = conv(x - mean)``, the mean added again.

    Arguments
        scale: 1 (restoration at the same size), 2, 3, 4, 8.
        in_chans: of the image; ``mean``: what is subtracted from its channels (None: the RGB mean of DIV2K for three
        channels, else nothing).
        dim C; groups N1; blocks N2: VSS blocks in a group.
        block: "vmamba" (:class:`zoo.layers.VSSBlock`, with an MLP where ``vss_mlp_ratio`` is above 0) or "mambair"
        (:class:`ResidualStateSpaceBlock`: convolutions with channel attention behind the scan).
        state, expand, dt_rank, paths, gate, act, conv: of the scan, see :class:`zoo.layers.SS2D`.
        window, overlap (gamma), heads, mlp_ratio, qkv_bias: of the attention; ``attention=False`` leaves it out.
        drop_path_rate; long_residual; head, head_width: see :func:`upsampler`.
        base: what the head's output is added to: "none" (it is the image itself), or the input enlarged by "nearest",
        "bilinear" or "bicubic" interpolation, which a small network learns faster.

    Input (batch, in_chans, H, W), 0 to 1, any size: padded by reflection to multiples of the window, and cropped again.
    Output (batch, in_chans, scale H, scale W). Source: arXiv 2501.13353, section 3; sizes are ours.
    """

    ends: ClassVar[dict[str, Any]] = {
        "scale": NewHead("head"),
        "in_chans": (InputChannels("shallow.weight"), NewHead("head")),
    }

    def __init__(
        self,
        scale: int = 4,
        in_chans: int = 3,
        dim: int = 180,
        groups: int = 6,
        blocks: int = 6,
        *,
        block: str = "vmamba",
        state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        paths: str = CROSS,
        gate: bool = True,
        act: str = "silu",
        conv: int = 3,
        vss_mlp_ratio: float = 0.0,
        attention: bool = True,
        window: int = 16,
        overlap: float = 0.5,
        heads: int = 6,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        long_residual: bool = True,
        head: str = "pixelshuffle",
        head_width: int = 64,
        base: str = "none",
        mean: list[float] | None = None,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block is {block!r}; expected 'vmamba' or 'mambair'")
        if base not in BASES:
            raise ValueError(f"base is {base!r}; expected one of {', '.join(map(repr, BASES))}")
        if groups < 1 or blocks < 0:
            raise ValueError(f"groups is {groups} and blocks {blocks}; expected 1 or more groups of 0 or more blocks")
        subtracted = list(MEAN if in_chans == 3 else [0.0] * in_chans) if mean is None else list(mean)
        if len(subtracted) != in_chans:
            raise ValueError(f"mean is {subtracted}; expected one number for each of the {in_chans} channels")
        self.scale, self.in_chans, self.long_residual, self.mean = scale, in_chans, long_residual, subtracted
        self.base = base
        self.multiple = window if attention else 1
        mixer = {
            "state": state, "expand": expand, "dt_rank": dt_rank, "paths": paths, "gate": gate, "act": act,
            "conv": conv,
        }  # fmt: skip
        rates = iter(torch.linspace(0, drop_path_rate, groups * blocks, device="cpu").tolist())

        def group() -> ResidualGroup:
            inside = [
                VSSBlock(dim, mixer, mlp_ratio=vss_mlp_ratio, drop_path=next(rates))
                if block == "vmamba"
                else ResidualStateSpaceBlock(dim, mixer, next(rates))
                for _ in range(blocks)
            ]
            ocab = OCAB(dim, window, overlap, heads, mlp_ratio, qkv_bias) if attention else None
            return ResidualGroup(dim, inside, ocab)

        self.shallow = ConvLast(in_chans, dim, 3, padding=1)
        self.groups = nn.ModuleList(group() for _ in range(groups))
        self.norm = nn.LayerNorm(dim)
        self.deep = ConvLast(dim, dim, 3, padding=1)
        self.head = upsampler(head, dim, in_chans, scale, head_width)
        if base != "none":  # begin near the enlarged input
            last = [layer for layer in self.head if isinstance(layer, nn.Conv2d)][-1]
            with torch.no_grad():
                last.weight.mul_(0.1)
                last.bias.zero_()

    def features(self, x: Tensor) -> Tensor:
        """Deep features of x (batch, in_chans, H, W), H and W multiples of the window: (batch, H, W, dim)."""
        shallow = y = self.shallow(x.permute(0, 2, 3, 1))
        for group in self.groups:
            y = group(y)
        y = self.deep(self.norm(y))
        return y + shallow if self.long_residual else y

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_chans, H, W). Returns (batch, in_chans, scale H, scale W)."""
        x = check_image("Contrast", x, self.in_chans)
        height, width = x.shape[2:]
        mean = torch.stack([torch.full((1, 1), m, dtype=x.dtype, device=x.device) for m in self.mean])
        y = self.features(pad_to_multiple(x - mean, self.multiple))
        y = self.head(y.permute(0, 3, 1, 2))[..., : height * self.scale, : width * self.scale]
        return y + self._enlarged(x, mean)

    def _enlarged(self, x: Tensor, mean: Tensor) -> Tensor:
        """What the head's output is added to."""
        if self.base == "none":
            return mean
        size = [side * self.scale for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode=self.base, align_corners=None if self.base == "nearest" else False)
