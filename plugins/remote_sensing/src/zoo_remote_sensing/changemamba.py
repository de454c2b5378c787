"""ChangeMamba: change between two dates of a scene, as binary maps, semantic maps or building damage.

Paper: Chen et al., "ChangeMamba: Remote Sensing Change Detection with Spatiotemporal State Space Model", arXiv
2404.03425. Original: ChenHongruixuan/MambaCD (Apache-2.0), ``changedetection/models``. A shared VMamba encodes both
dates; the change decoder lets the scan run over both at once, in three arrangements of space and time.

Differences: both dates pass the encoder as one batch; the linear 1x1 convolutions are applied to each date where it
lies, and the arrangements are axes along which the dates are stacked, so that the same four-way paths walk them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo.layers.bands import conv_norm, folded
from zoo.layers.inference import by_rows, results_only, reusing_memory, settled
from zoo.layers.linear import call, linear
from zoo_kernels.runtime import empty

from .encoder import PairModel, check_options, make_block, make_encoder

LEVELS = 4
Arrangement = Literal["parallel", "interleaved", "side_by_side"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("parallel", "interleaved", "side_by_side")
#: the axis of (batch, h, w, channels) before which the dates are stacked; flattened into the width afterwards
_AXIS = {"interleaved": 3, "side_by_side": 2}
RELU = nn.ReLU()


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned: (batch, C, h, w) to (batch, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def add_upsampled(x: Tensor, deeper: Tensor) -> Tensor:
    """The deeper map at the size of x, plus x."""
    y = upsample(deeper, x.shape[2:])
    return y.add_(x) if not torch.is_grad_enabled() and results_only(y) and y.dtype == x.dtype else y + x


class SpatioTemporal(nn.Module):
    """A projection and a VSS block over both dates, in one arrangement (paper, section III-C).

    ``parallel``: the dates are channels of one map; ``interleaved``: their columns alternate, so that every step of a
    scan changes the date; ``side_by_side``: the earlier date lies left of the later one.
    Input: two maps (batch, h, w, C). Output: one map (``parallel``) or one for each date, (batch, h, w, dim).
    """

    def __init__(self, channels: int, dim: int, arrangement: Arrangement, options: dict[str, Any]) -> None:
        super().__init__()
        self.arrangement, self.dim = arrangement, dim
        self.proj = nn.Linear(channels * 2 if arrangement == "parallel" else channels, dim)
        self.block = make_block(dim, options)

    def forward(self, before: Tensor, after: Tensor) -> list[Tensor]:
        if self.arrangement == "parallel":
            x = by_rows(lambda *dates: call(self.proj, torch.cat(dates, dim=-1)), before, after, module=self.proj)
            return [self.block(x)]
        axis = _AXIS[self.arrangement]
        if results_only(before, after) and not torch.is_grad_enabled():  # each date straight to its place
            shape = [*before.shape[:-1], self.dim]
            x = empty(*shape[:axis], 2, *shape[axis:], dtype=before.dtype)
            for i, date in enumerate((before, after)):
                by_rows(lambda rows: call(self.proj, rows), date, module=self.proj, out=x.select(axis, i))
        else:
            x = torch.stack([self.proj(before), self.proj(after)], dim=axis)
        return list(self.block(x.flatten(2, 3)).view(x.shape).unbind(axis))


class ConvNormAct(nn.Module):
    """1x1 convolution with bias, batch norm, ReLU."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.norm, x, act=RELU)

    def of_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """The same of several maps (batch, h, w, C) side by side; (batch, dim, h, w)."""
        if results_only(*maps) and not torch.is_grad_enabled() and settled(self):
            weight, bias = folded(self.conv, self.norm)
            weight = weight.flatten(1)
            y = by_rows(lambda *rows: linear(torch.cat(rows, dim=-1), weight, bias, act="relu"), *maps)
            return y.permute(0, 3, 1, 2)
        return self(torch.cat(list(maps), dim=-1).permute(0, 3, 1, 2))


class Residual(Recomputed):
    """``relu(x + bn2(conv2(relu(bn1(conv1 x)))))``, 3x3 convolutions without bias, (batch, C, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(self.conv1, self.bn1, x, act=RELU)
        return conv_norm(self.conv2, self.bn2, y, add=x, act=RELU)


class ChangeLevel(nn.Module):
    """The three arrangements at one level, fused: two maps (batch, C, h, w) to (batch, dim, h, w)."""

    def __init__(self, channels: int, dim: int, options: dict[str, Any], *, deepest: bool) -> None:
        super().__init__()
        for name in ARRANGEMENTS:
            self.add_module(name, SpatioTemporal(channels, dim, name, options))
        self.fuse = ConvNormAct(5 * dim, dim)
        self.smooth = nn.Identity() if deepest else Residual(dim)

    def forward(self, before: Tensor, after: Tensor, deeper: Tensor | None) -> Tensor:
        dates = before.permute(0, 2, 3, 1), after.permute(0, 2, 3, 1)
        maps = [y for name in ARRANGEMENTS for y in getattr(self, name)(*dates)]
        x = self.fuse.of_maps(maps)
        if deeper is None:
            return x
        return self.smooth(add_upsampled(x, deeper))


class ChangeDecoder(nn.Module):
    """Four levels, deepest first: the pyramids of both dates to one map (batch, dim, H/4, W/4). Level 0 is stride 4."""

    def __init__(self, channels: Sequence[int], dim: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ChangeLevel(c, dim, options, deepest=i == LEVELS - 1) for i, c in enumerate(channels)
        )

    def forward(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        x: Tensor | None = None
        for i in reversed(range(LEVELS)):
            x = self.levels[i](before[i], after[i], x)
        assert x is not None
        return x


class SemanticLevel(nn.Module):
    """One level of :class:`SemanticDecoder`: add the lateral map to the upsampled deeper one, smooth, VSS block."""

    def __init__(self, channels: int, dim: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.lateral = ConvNormAct(channels, dim)
        self.smooth = Residual(dim)
        self.block = make_block(dim, options)

    def forward(self, x: Tensor, deeper: Tensor) -> Tensor:
        x = self.lateral(x)
        x = self.smooth(add_upsampled(x, deeper))
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SemanticDecoder(nn.Module):
    """The pyramid of one date to a map (batch, dim, H/4, W/4)."""

    def __init__(self, channels: Sequence[int], dim: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.proj = nn.Linear(channels[-1], dim)
        self.block = make_block(dim, options)
        self.levels = nn.ModuleList(SemanticLevel(c, dim, options) for c in channels[:-1])
        self.smooth = Residual(dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.block(self.proj(maps[-1].permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        for i in reversed(range(LEVELS - 1)):
            x = self.levels[i](maps[i], x)
        return self.smooth(x)


class SemanticChange(NamedTuple):
    """Logits (batch, classes, H, W): change, land cover before, land cover after."""

    change: Tensor
    before: Tensor
    after: Tensor


class Damage(NamedTuple):
    """Logits (batch, classes, H, W): buildings before the event, damage after it."""

    building: Tensor
    damage: Tensor


class _ChangeMamba(PairModel):
    """Common part: the encoder. See :class:`MambaBCD` for the arguments."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 96,
        *,
        decoder_dim: int = 128,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = check_options(options)
        self.decoder_dim, self.in_chans = decoder_dim, in_chans
        self.encoder = make_encoder(depths, dims, in_chans, self.options)
        self.channels = list(self.encoder.feature_info.channels())


class MambaBCD(_ChangeMamba):
    """Binary change detection: where did anything change?

    Arguments
        depths, dims: blocks and widths of the encoder's four stages (an int C: C, 2C, 4C, 8C).
        decoder_dim: width of the decoders. num_classes: channels of the answer (2: unchanged, changed).
        options: the blocks of encoder and decoders, in VMamba's terms: ``expand``, ``state``, ``dt_rank``, ``gate``,
        ``paths``, ``norm``, ``mlp_ratio``, ``drop_path_rate`` ... (see :data:`zoo_remote_sensing.encoder.DEFAULTS`).

    Input: two batches of images (batch, in_chans, H, W) of one size, any size. Output: logits (batch, num_classes, H,
    W). Source: arXiv 2404.03425, section III; MambaCD ``STMambaBCD``.
    """

    heads = {"num_classes": "head"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 96,
        *,
        num_classes: int = 2,
        decoder_dim: int = 128,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(depths, dims, decoder_dim=decoder_dim, in_chans=in_chans, **options)
        self.num_classes = num_classes
        self.change = ChangeDecoder(self.channels, decoder_dim, self.options)
        self.head = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        with reusing_memory(before, after):
            return upsample(self.head(self.change(*self.pyramids(before, after))), before.shape[2:])


class MambaSCD(_ChangeMamba):
    """Semantic change detection: where did it change, and from what to what?

    ``semantic_classes``: land cover classes of both dates (0: unchanged or background); ``change_classes``: 2. The
    other arguments and the input are :class:`MambaBCD`'s. Output: :class:`SemanticChange`. A class map is the argmax
    of a date's logits, 0 where the argmax of ``change`` is 0. Source: MambaCD ``STMambaSCD``.
    """

    heads = {"semantic_classes": "semantic_head", "change_classes": "change_head"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 96,
        *,
        semantic_classes: int = 7,
        change_classes: int = 2,
        decoder_dim: int = 128,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(depths, dims, decoder_dim=decoder_dim, in_chans=in_chans, **options)
        self.semantic_classes = semantic_classes
        self.change = ChangeDecoder(self.channels, decoder_dim, self.options)
        self.before = SemanticDecoder(self.channels, decoder_dim, self.options)
        self.after = SemanticDecoder(self.channels, decoder_dim, self.options)
        self.change_head = nn.Conv2d(decoder_dim, change_classes, 1)
        self.semantic_head = nn.Conv2d(decoder_dim, semantic_classes, 1)

    def forward(self, before: Tensor, after: Tensor) -> SemanticChange:
        size = before.shape[2:]
        with reusing_memory(before, after):
            first, second = self.pyramids(before, after)
            return SemanticChange(
                upsample(self.change_head(self.change(first, second)), size),
                upsample(self.semantic_head(self.before(first)), size),
                upsample(self.semantic_head(self.after(second)), size),
            )


class MambaBDA(_ChangeMamba):
    """Building damage assessment: where were buildings, and how badly are they damaged?

    ``damage_classes``: damage grades (0: background, never a target in training); ``building_classes``: 2. The other
    arguments and the input are :class:`MambaBCD`'s. Output: :class:`Damage`. The damage map is the argmax of
    ``damage``, 0 where the argmax of ``building`` is 0. Source: MambaCD ``STMambaBDA``.
    """

    heads = {"damage_classes": "damage_head", "building_classes": "building_head"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 96,
        *,
        damage_classes: int = 5,
        building_classes: int = 2,
        decoder_dim: int = 128,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(depths, dims, decoder_dim=decoder_dim, in_chans=in_chans, **options)
        self.damage_classes = damage_classes
        self.damage = ChangeDecoder(self.channels, decoder_dim, self.options)
        self.building = SemanticDecoder(self.channels, decoder_dim, self.options)
        self.damage_head = nn.Conv2d(decoder_dim, damage_classes, 1)
        self.building_head = nn.Conv2d(decoder_dim, building_classes, 1)

    def forward(self, before: Tensor, after: Tensor) -> Damage:
        size = before.shape[2:]
        with reusing_memory(before, after):
            first, second = self.pyramids(before, after)
            return Damage(
                upsample(self.building_head(self.building(first)), size),
                upsample(self.damage_head(self.damage(first, second)), size),
            )
