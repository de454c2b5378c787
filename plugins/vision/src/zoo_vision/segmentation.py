"""Semantic segmentation: UPerNet on any backbone of this plugin.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221, section 3; the pooling of
Zhao et al., "Pyramid Scene Parsing Network", arXiv 1612.01105. The published segmentors of VMamba and MambaVision are
mmsegmentation 1.2's (``models/decode_heads/{uper_head,psp_head,fcn_head}.py``); modules here have its names, so that
below ``backbone.`` alone a key table is needed.

Order of reading: the layers, the two heads, :class:`Segmentor`, its builders, the original's format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo.layers.inference import results_only, settled

from ._base import check_count, check_reference_config, feature_info_of, pyramid, takes
from .mambavision import MambaVision, mambavision
from .openmmlab import NetworkAdapter, build_backbone
from .vmamba import VMamba, vmamba

POOL_SCALES = (1, 2, 3, 6)


class ConvNormAct(nn.Module):
    """Convolution without bias (``conv``), batch norm (``bn``), ReLU; the map keeps its size."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (batch, C, h, w) at another ``size`` (H, W), bilinear between the centres of pixels."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def convolve_resized(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """``conv2d(resize(x, size), weight, padding=1)`` for a smaller x (batch, I, h, w) and weight (O, I, 3, 3).

    Interpolating and convolving are linear, and a weight's nine taps act on channels alone. So they are applied to the
    small map, and what each makes of it is interpolated and moved by one pixel, axis by axis, as a product with a
    matrix (H, h): with x half as long and wide a quarter of the products, an eighth a 64th. Returns (batch, O, H, W).
    """
    batch, _, h, w = x.shape
    out = len(weight)
    down, right = (_moved_interpolation(full, small, x) for full, small in zip(size, (h, w), strict=True))
    taps = F.conv2d(x, weight.permute(2, 3, 0, 1).reshape(9 * out, -1, 1, 1))
    # (batch, vertical tap, h, w, horizontal tap, out): the sum over the first tap is then one product, and so is the
    # other, with channels last.
    taps = taps.permute(0, 2, 3, 1).unflatten(-1, (3, 3 * out)).permute(0, 3, 1, 2, 4).reshape(batch, 3 * h, -1)
    rows = torch.matmul(down.permute(1, 0, 2).flatten(1), taps)
    return torch.matmul(right.permute(1, 2, 0).flatten(1), rows.view(batch, -1, 3 * w, out)).permute(0, 3, 1, 2)


def _moved_interpolation(full: int, small: int, like: Tensor) -> Tensor:
    """(3, full, small): what output i of :func:`resize` along one axis is made of, for i - 1, i and i + 1; zeros where
    that lies outside."""
    eye = torch.eye(small, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    table = F.interpolate(eye[None], size=full, mode="linear", align_corners=False)[0].mT  # (full, small)
    padded = F.pad(table, (0, 0, 1, 1))
    return torch.stack([padded[i : i + full] for i in range(3)]).to(like.dtype)


# -- heads -----------------------------------------------------------------------------------------------------------


class UPerHead(nn.Module):
    """UPerNet's head: pyramid pooling on the smallest map, a feature pyramid, all levels joined at the largest.

    Arguments: ``in_channels`` of the maps, largest map first; ``channels`` of every level; ``num_classes``;
    ``pool_scales``: side lengths that the smallest map is averaged to; ``dropout`` before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        num_classes: int = 150,
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *lower, top = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormAct(top, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(top + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (batch, in_channels[i], h_i, w_i) to logits (batch, num_classes, h_0, w_0)."""
        top = maps[-1]
        pooled = [resize(pool(top), top.shape[2:]) for pool in self.psp_modules]
        laterals = [conv(m) for conv, m in zip(self.lateral_convs, maps, strict=False)]
        laterals.append(self._joined(self.bottleneck, [top, *pooled]))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1].shape[2:])
        levels = [conv(m) for conv, m in zip(self.fpn_convs, laterals, strict=False)]
        x = self._joined(self.fpn_bottleneck, [*levels, laterals[-1]])
        return self.conv_seg(self.dropout(x))

    @staticmethod
    def _joined(layer: ConvNormAct, maps: Sequence[Tensor]) -> Tensor:
        """``layer`` of the maps side by side, all at the first one's size."""
        size = maps[0].shape[2:]
        if torch.is_grad_enabled() or not results_only(*maps) or not settled(layer):
            return layer(torch.cat([maps[0], *(resize(m, size) for m in maps[1:])], dim=1))
        y: Tensor | None = None
        for m, weight in zip(maps, layer.conv.weight.split([m.shape[1] for m in maps], dim=1), strict=True):
            part = F.conv2d(m, weight, padding=1) if m.shape[2:] == size else convolve_resized(m, weight, size)
            y = part if y is None else y.add_(part)
        return layer.bn(y).relu_()


class FCNHead(nn.Module):
    """The auxiliary head: one convolution on one map, and a classifier. It is for training alone.

    Source: Shelhamer et al., arXiv 1605.06211, in mmsegmentation's form (``num_convs=1``, ``concat_input=False``).
    """

    def __init__(self, in_channels: int, channels: int = 256, num_classes: int = 150, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """A map (batch, in_channels, h, w) to logits (batch, num_classes, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))


# -- segmentors ------------------------------------------------------------------------------------------------------


class Segmentor(GradCheckpointing, nn.Module):
    """A backbone that gives a list of maps, largest first, UPerNet's head, and an auxiliary head on the map before
    the last.

    Arguments: ``backbone`` (a model built with ``features_only=True``), ``channels`` of its maps (None: asked of its
    ``feature_info``), ``num_classes``, ``head_channels``, ``auxiliary_channels``, ``pool_scales``.
    Images (batch, in_chans, H, W) to logits (batch, num_classes, H / 4, W / 4), as the originals' ``forward``.

    Example::

        model = Segmentor(zoo.load("a2mamba_tiny.in1k", features_only=True), num_classes=7)
        model.loss(images, labels).backward()
    """

    auxiliary_weight = 0.4
    unused_parameters = ("auxiliary_head.",)  # of ``forward``; :meth:`loss` uses them

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int] | None = None,
        *,
        num_classes: int = 150,
        head_channels: int = 512,
        auxiliary_channels: int = 256,
        pool_scales: Sequence[int] = POOL_SCALES,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        if channels is None:
            channels = feature_info_of(backbone).channels()
        if len(channels) < 2:
            raise ValueError(f"the backbone gives maps of {list(channels)} channels; UPerNet joins two or more")
        self.backbone = backbone
        self.in_chans, self.num_classes = getattr(backbone, "in_chans", 3), num_classes
        self.decode_head = UPerHead(channels, head_channels, num_classes, pool_scales)
        self.auxiliary_head = FCNHead(channels[-2], auxiliary_channels, num_classes)

    @property
    def ends(self) -> dict[str, Any]:
        """What ``num_classes=`` and ``in_chans=`` change in a checkpoint."""
        found: dict[str, Any] = {"num_classes": NewHead("decode_head.conv_seg", "auxiliary_head.conv_seg")}
        first = getattr(self.backbone, "ends", {}).get("in_chans")
        if isinstance(first, InputChannels):
            found["in_chans"] = InputChannels(*(f"backbone.{key}" for key in first.keys))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))

    def loss(self, x: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
        """Cross entropy at full size, 0.4 of the auxiliary head's added; pixels labelled ``ignore`` count as zero in
        the mean, as in mmsegmentation. x: (batch, in_chans, H, W); labels: (batch, H, W) int64. Returns a scalar.
        """
        maps = self.backbone(x)
        main = pixel_loss(self.decode_head(maps), x, labels, ignore)
        return main + self.auxiliary_weight * pixel_loss(self.auxiliary_head(maps[-2]), x, labels, ignore)


def pixel_loss(logits: Tensor, x: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Cross entropy of logits (batch, classes, h, w), resized, with ``labels`` (batch, H, W) of images x (batch,
    in_chans, H, W); pixels labelled ``ignore`` count as zero in the mean. Raises ValueError for other labels."""
    classes = logits.shape[1]
    if labels.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {(x.shape[0], *x.shape[2:])}")
    labels = labels.long()
    if not ((labels == ignore) | ((labels >= 0) & (labels < classes))).all():
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1}, or {ignore} for "
            "pixels that do not count"
        )
    full = resize(logits, labels.shape[1:])
    return F.cross_entropy(full, labels, ignore_index=ignore, reduction="none").mean()


_HEADS = ("num_classes", "head_channels", "auxiliary_channels", "pool_scales")


@takes(Segmentor, VMamba, pyramid=False, without=("backbone", "channels"))
def vmamba_upernet(**config: Any) -> Segmentor:
    """Builder of the cards: UPerNet on a VMamba pyramid."""
    heads = {k: config.pop(k) for k in _HEADS if k in config}
    return Segmentor(vmamba(features_only=True, **config), **heads)


@takes(Segmentor, MambaVision, pyramid=False, without=("backbone", "channels", "pyramid_norm"))
def mambavision_upernet(**config: Any) -> Segmentor:
    """Builder of the cards: UPerNet on a MambaVision pyramid whose maps are normalised."""
    heads = {k: config.pop(k) for k in _HEADS if k in config}
    return Segmentor(mambavision(features_only=True, pyramid_norm="ln2d", **config), **heads)


def upernet(
    *,
    backbone: str = "vmamba_tiny",
    num_classes: int = 150,
    head_channels: int = 512,
    auxiliary_channels: int = 256,
    pool_scales: Sequence[int] = POOL_SCALES,
    **config: Any,
) -> Segmentor:
    """UPerNet on the pyramid of any classifier of this plugin, by its name; ``config``: the backbone's arguments."""
    return Segmentor(
        pyramid(backbone, **config), num_classes=num_classes, head_channels=head_channels,
        auxiliary_channels=auxiliary_channels, pool_scales=pool_scales,
    )  # fmt: skip


# -- the original's format -------------------------------------------------------------------------------------------


class UPerNetAdapter(NetworkAdapter):
    """mmsegmentation's ``EncoderDecoder`` with ``UPerHead`` and ``FCNHead`` on a backbone of MzeroMiko/VMamba
    (``MM_VSSM``) or NVlabs/MambaVision (``MM_mamba_vision``); the configuration is its ``model`` dictionary."""

    system = "upernet"
    network = Segmentor

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> Segmentor:
        backbone = build_backbone(config.get("backbone", {}), state)
        head = _head(config.get("decode_head", {}), {"in_channels": None, "in_index": (0, 1, 2, 3), "channels": 512,
            "pool_scales": POOL_SCALES})  # fmt: skip
        auxiliary = _head(config.get("auxiliary_head", {}), {"in_channels": None, "in_index": 2, "channels": 256,
            "num_convs": 1, "concat_input": False})  # fmt: skip
        if tuple(head["in_index"]) != (0, 1, 2, 3) or (auxiliary["in_index"], auxiliary["num_convs"]) != (2, 1):
            raise ValueError(
                f"decode_head reads the maps {tuple(head['in_index'])}, auxiliary_head map {auxiliary['in_index']} by "
                f"{auxiliary['num_convs']} convolutions; the published segmentors, which are built here, have "
                "(0, 1, 2, 3), and map 2 by 1"
            )
        if auxiliary["concat_input"]:
            raise ValueError("auxiliary_head.concat_input is true; the published segmentors have it false")
        model = Segmentor(
            backbone,
            num_classes=head["num_classes"],
            head_channels=head["channels"],
            auxiliary_channels=auxiliary["channels"],
            pool_scales=tuple(head["pool_scales"]),
        )
        return self.load(model, state)  # type: ignore[return-value]

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``image`` (batch, 3, H, W) to ``logits`` and ``auxiliary_logits``."""
        assert isinstance(model, Segmentor)
        maps = model.backbone(inputs["image"])
        return {"logits": model.decode_head(maps), "auxiliary_logits": model.auxiliary_head(maps[-2])}


def _head(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A head's arguments; those that only training reads, and mmsegmentation's usual ones, are accepted unread."""
    if config.get("align_corners", False):
        raise ValueError("align_corners is true; the published segmentors have it false")
    unread = {"type", "dropout_ratio", "norm_cfg", "align_corners", "loss_decode"}
    return check_reference_config("head", config, {"num_classes": 150, **known}, unread)
