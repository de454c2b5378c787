"""Mamba-FCS: semantic change with spectra of the feature maps fused in, and change maps that guide the semantics.

Paper: "Mamba-FCS: Joint Spatio-Frequency Feature Fusion, Change-Guided Attention, and SeK Inspired Loss for Enhanced
Semantic Change Detection in Remote Sensing", arXiv 2508.08232. Original: Buddhi19/MambaFCS (MIT),
``changedetection/models``. The encoder is ChangeMamba's; its loss is :func:`zoo_remote_sensing.losses.fcs_loss`.

Difference: the width of the last map is the encoder's first width, where the original writes 128 (its Base encoder's).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo.layers.bands import conv_norm
from zoo.layers.inference import reusing_memory

from .changemamba import LEVELS, RELU, Residual, SemanticChange, add_upsampled, upsample
from .encoder import PairModel, check_options, make_block, make_encoder


def squeeze_linear(first: int, hidden: int, last: int) -> nn.Sequential:
    """Linear, ReLU, Linear, sigmoid. ``hidden`` may be 0, as in the original's narrow heads: the last bias decides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last), nn.Sigmoid())


class Spectrum(nn.Module):
    """``log(1 + |FFT2 x|)`` (orthonormal, whole spectrum, not shifted), 1x1 convolution, batch norm, ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # no FFT in half precision
        return self.proj(torch.fft.fft2(wide, norm="ortho").abs().log1p().to(x.dtype))


class ChannelGate(nn.Module):
    """Efficient channel attention: a short convolution over the channels' means, sigmoid, multiply."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        kernel = int(abs((math.log2(dim) + 1) / 2))
        kernel += 1 - kernel % 2
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)
        return x * gate[:, :, None, None]


class SpatialGate(nn.Module):
    """7x7 convolution over two statistics of the channels, sigmoid, multiply.

    The two places that use it order the statistics differently: ``max_first`` in the fusion, mean first in the heads.
    """

    def __init__(self, *, max_first: bool, bias: bool) -> None:
        super().__init__()
        self.max_first = max_first
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mean, most = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([most, mean] if self.max_first else [mean, most], dim=1)))


class UnusedAttention(nn.Module):
    """Parameters that the original creates and never uses: they are in its checkpoints and in its counts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class FFTFusion(Recomputed):
    """Both dates, their spectra and their difference to one map, (batch, dim, h, w) (paper, section III-B)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fft_pre, self.fft_post = Spectrum(dim), Spectrum(dim)
        self.reduce_conv = nn.Conv2d(5 * dim, dim, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(dim)
        self.ch_gate = ChannelGate(dim)
        self.sp_gate = SpatialGate(max_first=True, bias=False)
        self.cross_attn = UnusedAttention(dim)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        parts = [before, self.fft_pre(before), after, self.fft_post(after), (before - after).abs()]
        return self.sp_gate(self.ch_gate(F.relu(self.reduce_bn(self.reduce_conv(torch.cat(parts, dim=1))))))


class ChannelAttention(nn.Module):
    """Multiply by the *sum* of two sigmoids, of the channels' means and of their maxima: a gate in 0 to 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = squeeze_linear(dim, dim // 16, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.fc(x.mean((2, 3))) + self.fc(x.amax((2, 3))))[:, :, None, None]


class PyramidFusion(Recomputed):
    """Three receptive fields, attention over channels and places, residual: (batch, channels, h, w) to ``dim``."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if channels == dim else nn.Conv2d(channels, dim, 1)
        self.branch1 = nn.Sequential(nn.Conv2d(channels, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())
        self.branch3 = nn.Sequential(nn.Conv2d(channels, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU())
        self.branch5 = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, dim, 1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
        )
        self.channel_att = ChannelAttention(3 * dim)
        self.spatial_att = SpatialGate(max_first=False, bias=True)
        self.final_conv = nn.Sequential(nn.Conv2d(3 * dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([self.branch1(x), self.branch3(x), self.branch5(x)], dim=1)
        return self.final_conv(self.spatial_att(self.channel_att(wide))) + self.shortcut(x)


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate computed from the means of all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.excitation = squeeze_linear(dim, dim // 16, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(x.mean((2, 3)))[:, :, None, None]


class SEResidual(Residual):
    """ChangeMamba's residual block with a squeeze-excitation before the sum."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.se = SqueezeExcitation(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(self.conv1, self.bn1, x, act=RELU)
        return F.relu(x + self.se(conv_norm(self.conv2, self.bn2, y)))


class Level(nn.Module):
    """One level of a decoder: [fuse the dates,] add the deeper map, smooth, VSS block, and ``down`` to the next width.

    :meth:`forward` returns the map before ``down``, which is what guides the semantic decoders.
    """

    def __init__(self, dim: int, out: int | None, options: dict[str, Any], *, fuse: bool, deepest: bool) -> None:
        super().__init__()
        self.fuse = FFTFusion(dim) if fuse else nn.Identity()
        self.smooth = nn.Identity() if deepest else SEResidual(dim)
        self.block = make_block(dim, options)
        self.down = nn.Identity() if out is None else PyramidFusion(dim, out)

    def forward(self, x: Tensor, deeper: Tensor | None) -> Tensor:
        if deeper is not None:
            x = self.smooth(add_upsampled(x, deeper))
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _levels(channels: Sequence[int], options: dict[str, Any], *, fuse: bool) -> nn.ModuleList:
    """Level 0 is stride 4. Each level hands on the width of the next finer one."""
    return nn.ModuleList(
        Level(c, channels[i - 1] if i else None, options, fuse=fuse, deepest=i == LEVELS - 1)
        for i, c in enumerate(channels)
    )


class FCSChangeDecoder(nn.Module):
    """Pyramids of both dates to ``(map (batch, C, H/4, W/4), guide at stride 32, 16, 8, 4)``."""

    def __init__(self, channels: Sequence[int], options: dict[str, Any]) -> None:
        super().__init__()
        self.levels = _levels(channels, options, fuse=True)

    def forward(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x: Tensor | None = None
        guides: list[Tensor] = []
        for i in reversed(range(LEVELS)):
            level: Any = self.levels[i]
            guide = level(level.fuse(before[i], after[i]), x)
            guides.append(guide)
            x = level.down(guide)
        assert x is not None
        return (x, *guides)


class FCSSemanticDecoder(nn.Module):
    """The pyramid of one date, each map times the sigmoid of its change guide, to a map (batch, C, H/4, W/4)."""

    def __init__(self, channels: Sequence[int], options: dict[str, Any]) -> None:
        super().__init__()
        self.levels = _levels(channels, options, fuse=False)
        self.smooth = SEResidual(channels[0])

    def forward(self, maps: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
        """``guides``: deepest first, as :class:`FCSChangeDecoder` returns them."""
        x: Tensor | None = None
        for i in reversed(range(LEVELS)):
            level: Any = self.levels[i]
            x = level.down(level(maps[i] * torch.sigmoid(guides[LEVELS - 1 - i]), x))
        assert x is not None
        return self.smooth(x)


class _MambaFCS(PairModel):
    def __init__(
        self, depths: Sequence[int], dims: int | Sequence[int], in_chans: int, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.options, self.in_chans = check_options(options), in_chans
        self.encoder = make_encoder(depths, dims, in_chans, self.options)
        self.channels = list(self.encoder.feature_info.channels())
        self.change = FCSChangeDecoder(self.channels, self.options)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Prefixes of parameters that no output depends on: the original's idle attention and zero-size layers."""
        idle = tuple(f"change.levels.{i}.fuse.cross_attn." for i in range(LEVELS))
        return idle + tuple(n for n, p in self.named_parameters() if p.numel() == 0)


class MambaFCS(_MambaFCS):
    """Semantic change detection: where did it change, and from what to what?

    Arguments
        depths, dims: blocks and widths of the encoder; the decoders work at its widths.
        semantic_classes: land cover classes of both dates, 0 meaning unchanged; change_classes: 2.
        options: of the blocks, see :data:`zoo_remote_sensing.encoder.DEFAULTS`.

    Input: two batches (batch, in_chans, H, W) of one size, any size. Output:
    :class:`~zoo_remote_sensing.changemamba.SemanticChange`, logits at the size of the input.
    Source: arXiv 2508.08232, section III; MambaFCS ``STMambaSCD``.
    """

    heads = {"semantic_classes": "semantic_head", "change_classes": "change_head"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: int | Sequence[int] = 128,
        *,
        semantic_classes: int = 7,
        change_classes: int = 2,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(depths, dims, in_chans, options)
        self.semantic_classes = semantic_classes
        self.before = FCSSemanticDecoder(self.channels, self.options)
        self.after = FCSSemanticDecoder(self.channels, self.options)
        self.change_head = PyramidFusion(self.channels[0], change_classes)
        self.semantic_head = PyramidFusion(self.channels[0], semantic_classes)

    def forward(self, before: Tensor, after: Tensor) -> SemanticChange:
        size = before.shape[2:]
        with reusing_memory(before, after):
            first, second = self.pyramids(before, after)
            change, *guides = self.change(first, second)
            return SemanticChange(
                upsample(self.change_head(change), size),
                upsample(self.semantic_head(self.before(first, guides)), size),
                upsample(self.semantic_head(self.after(second, guides)), size),
            )


class MambaFCSBinary(_MambaFCS):
    """Binary change detection with Mamba-FCS's change decoder alone. Arguments as :class:`MambaFCS`; logits (batch,
    num_classes, H, W). Source: MambaFCS ``MambaBCD.py``."""

    heads = {"num_classes": "head"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: int | Sequence[int] = 128,
        *,
        num_classes: int = 2,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(depths, dims, in_chans, options)
        self.num_classes = num_classes
        self.head = PyramidFusion(self.channels[0], num_classes)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        with reusing_memory(before, after):
            return upsample(self.head(self.change(*self.pyramids(before, after))[0]), before.shape[2:])
