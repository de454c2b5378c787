"""EfficientViM for dense prediction: backbone and detection neck, and Semantic FPN.

Original: mlvlab/EfficientViM @ 304340c, ``detection/efficientvit_fpn.py:EfficientViTFPN`` and
``segmentation/efficientViM.py``, MIT; FPN and FPNHead of mmsegmentation 0.30. Detectors: ``detection``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo.rules import Rename, Reshape, Rules

from ._base import check_reference_config, freeze_norms, takes
from .efficientvim import _DEFAULTS, _SWALLOWED, EfficientViM, arguments
from .pyramids import FPNNeck, neck_arguments
from .segmentation import ConvNormAct, pixel_loss


class EfficientViMFPN(GradCheckpointing, nn.Module):
    """Backbone and neck: images (batch, in_chans, H, W) to the neck's maps, largest first.

    ``frozen_norms``: the backbone's batch norms stay in eval mode while training, as in the original.
    """

    def __init__(self, backbone: EfficientViM, neck: FPNNeck, frozen_norms: bool = True) -> None:
        super().__init__()
        self.backbone, self.neck, self.frozen_norms = backbone, neck, frozen_norms
        self.in_chans = backbone.in_chans

    def train(self, mode: bool = True) -> EfficientViMFPN:
        super().train(mode)
        if self.frozen_norms:
            freeze_norms(self.backbone)
        return self

    def forward(self, x: Tensor) -> Any:
        return self.neck(self.backbone(x))


class FPNHead(nn.Module):
    """Semantic FPN's head: each map through 3x3 convolutions and x2 upsampling to the first one's size, summed.

    ``in_chans`` of the maps, ``channels`` of the branches, ``num_classes``; map i of nominal stride 4 * 2^i gets
    max(1, i) steps. Source: Kirillov et al., arXiv 1901.02446; mmsegmentation 0.30 ``decode_heads/fpn_head.py``.
    """

    def __init__(self, in_chans: int = 256, channels: int = 128, num_classes: int = 150, maps: int = 4) -> None:
        super().__init__()
        heads = []
        for i in range(maps):
            layers: list[nn.Module] = []
            for k in range(max(1, i)):
                layers.append(ConvNormAct(in_chans if k == 0 else channels, channels, 3))
                if i > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            heads.append(nn.Sequential(*layers))
        self.scale_heads = nn.ModuleList(heads)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(batch, in_chans, h, w) each, to logits (batch, num_classes, h0, w0) at the first map's size."""
        total = self.scale_heads[0](maps[0])
        for head, x in zip(list(self.scale_heads)[1:], maps[1:], strict=True):
            total = total + F.interpolate(head(x), size=total.shape[2:], mode="bilinear", align_corners=False)
        return self.conv_seg(self.dropout(total))


class SemanticFPN(EfficientViMFPN):
    """Backbone, plain FPN of four maps, and :class:`FPNHead`. Logits have the first map's size (a sixteenth)."""

    def __init__(self, backbone: EfficientViM, neck: FPNNeck, decode_head: FPNHead, frozen_norms: bool = True) -> None:
        super().__init__(backbone, neck, frozen_norms)
        self.decode_head = decode_head
        self.num_classes = decode_head.conv_seg.out_channels

    @property
    def ends(self) -> dict[str, Any]:
        """What ``num_classes=`` and ``in_chans=`` change in a checkpoint."""
        first = self.backbone.ends["in_chans"]
        return {
            "num_classes": NewHead("decode_head.conv_seg"),
            "in_chans": InputChannels(*(f"backbone.{key}" for key in first.keys)),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(super().forward(x))

    def loss(self, x: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
        """Cross entropy at full size; see :meth:`zoo_vision.segmentation.Segmentor.loss`."""
        return pixel_loss(self(x), x, labels, ignore)


def _backbone(config: Mapping[str, Any]) -> EfficientViM:
    model = EfficientViM(**config)
    model.as_pyramid()
    return model


@takes(EfficientViM, pyramid=False)
def efficientvim_fpn(
    *,
    out_channels: int = 256,
    num_outs: int = 5,
    start_level: int = 0,
    extra_trans_convs: int = 2,
    pre_norm: bool = False,
    add_extra_convs: bool | str = False,
    relu_before_extra_convs: bool = False,
    conv_norm: bool = False,
    conv_act: bool = False,
    lateral_norm: bool = True,
    upsample: Mapping[str, Any] | None = None,
    frozen_norms: bool = True,
    **backbone: Any,
) -> EfficientViMFPN:
    """Builder of the cards of backbone and detection neck (:class:`FPNNeck`); other arguments are the backbone's."""
    body = _backbone(backbone)
    neck = FPNNeck(
        body.feature_info.channels(), out_channels, num_outs, start_level, extra_trans_convs, pre_norm,
        add_extra_convs, relu_before_extra_convs, conv_norm=conv_norm, conv_act=conv_act, lateral_norm=lateral_norm,
        upsample=upsample,
    )  # fmt: skip
    return EfficientViMFPN(body, neck, frozen_norms)


@takes(EfficientViM, pyramid=False)
def efficientvim_semantic_fpn(
    *,
    out_channels: int = 256,
    head_channels: int = 128,
    num_classes: int = 150,
    frozen_norms: bool = True,
    **backbone: Any,
) -> SemanticFPN:
    """Builder of the cards of Semantic FPN; other arguments are the backbone's."""
    body = _backbone(backbone)
    neck = FPNNeck(body.feature_info.channels(), out_channels, num_outs=4)
    return SemanticFPN(body, neck, FPNHead(out_channels, head_channels, num_classes), frozen_norms)


#: LayerNorms of the neck: (1, C, 1, 1) there, (C) here
NECK_RULES = Rules(Rename("batch_norm.{i}.{p}", "batch_norm.{i}.{p}", Reshape([-1], [1, -1, 1, 1])))


def build_reference(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> EfficientViMFPN:
    """The dense model from ``{"backbone": arguments, "neck": arguments}`` of the original's classes."""
    known = {**_DEFAULTS, "frozen_stages": -1}  # only the detection copy of the backbone has the latter
    body = check_reference_config("efficientvim", config.get("backbone", {}), known, _SWALLOWED)
    neck = neck_arguments(config.get("neck", {}), len(body["embed_dim"]))
    model = efficientvim_fpn(**{k: v for k, v in arguments(body).items() if k != "num_classes"}, **neck)
    if body["frozen_stages"] >= 0:  # the original freezes the stem alone, whatever the number
        model.backbone.patch_embed.requires_grad_(False)
    return model
