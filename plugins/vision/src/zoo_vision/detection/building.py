"""Detectors on any backbone, and what the cards build."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo_vision._base import check_count, feature_info_of, pyramid, takes
from zoo_vision.efficientvim import EfficientViM
from zoo_vision.mambavision import MambaVision, mambavision
from zoo_vision.pyramids import FPNNeck
from zoo_vision.vmamba import VMamba, vmamba

from .boxes import Anchors
from .detectors import OneStageDetector, TwoStageDetector

#: RetinaNet's anchors: three sizes in an octave, the smallest of four strides
RETINA_SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))


def mask_rcnn(
    backbone: nn.Module,
    *,
    num_classes: int = 80,
    neck_channels: int = 256,
    box_width: int = 1024,
    mask_convs: int | None = 4,
    anchor_scale: float = 8.0,
) -> TwoStageDetector:
    """Mask R-CNN on a backbone that gives a list of maps (``features_only=True``), as mmdetection's
    ``mask-rcnn_r50_fpn`` has it: a pyramid of the maps and one more of half the size. ``mask_convs`` None: no masks,
    Faster R-CNN.

    Example::

        model = mask_rcnn(zoo.load("a2mamba_tiny.in1k", features_only=True), num_classes=7)
        sum(model.loss(images, targets).values()).backward()
        objects = model.eval().detect(images)
    """
    return _two_stages(
        backbone, neck_channels, anchor_scale, num_classes=num_classes, box_width=box_width, mask_convs=mask_convs
    )


def cascade_mask_rcnn(
    backbone: nn.Module,
    *,
    num_classes: int = 80,
    neck_channels: int = 256,
    box_width: int = 1024,
    mask_convs: int | None = 4,
    anchor_scale: float = 8.0,
) -> TwoStageDetector:
    """Cascade Mask R-CNN with three stages whose box heads have four convolutions with batch norm and one linear layer,
    as ConvNeXt's and MambaVision's configurations for mmdetection have it. Arguments as for :func:`mask_rcnn`."""
    return _two_stages(
        backbone, neck_channels, anchor_scale, num_classes=num_classes, box_width=box_width, mask_convs=mask_convs,
        stages=3, box_convs=4, box_fcs=1, box_loss="giou", smooth=1 / 9,
    )  # fmt: skip


def retinanet(
    backbone: nn.Module, *, num_classes: int = 80, neck_channels: int = 256, head_depth: int = 4, head_width: int = 256
) -> OneStageDetector:
    """RetinaNet on a backbone that gives a list of maps, as mmdetection's ``retinanet_r50_fpn`` has it: the pyramid
    leaves out the largest map, and has two more that convolutions make of the smallest."""
    info = feature_info_of(backbone)
    neck = FPNNeck(info.channels(), neck_channels, len(info.channels()) + 1, start_level=1, add_extra_convs="on_input")
    last = info.reduction()[-1]
    return OneStageDetector(
        backbone, neck, Anchors((*info.reduction()[1:], last * 2, last * 4), RETINA_SCALES), channels=neck_channels,
        num_classes=num_classes, head_depth=head_depth, head_width=head_width,
    )  # fmt: skip


def _two_stages(backbone: nn.Module, neck_channels: int, anchor_scale: float, **heads: Any) -> TwoStageDetector:
    info = feature_info_of(backbone)
    neck = FPNNeck(info.channels(), neck_channels, len(info.channels()) + 1)
    strides = (*info.reduction(), info.reduction()[-1] * 2)
    return TwoStageDetector(backbone, neck, Anchors(strides, (anchor_scale,)), channels=neck_channels, **heads)


# -- of the cards ----------------------------------------------------------------------------------------------------

_HEADS = ("num_classes", "neck_channels", "box_width", "mask_convs", "anchor_scale", "head_depth", "head_width")


def _parted(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the backbone's arguments, the heads')"""
    heads = {k: config[k] for k in _HEADS if k in config}
    return {k: v for k, v in config.items() if k not in heads}, heads


@takes(mask_rcnn, VMamba, pyramid=False, without=("backbone",))
def vmamba_mask_rcnn(**config: Any) -> TwoStageDetector:
    """Builder of the cards: Mask R-CNN on a VMamba pyramid."""
    body, heads = _parted(config)
    return mask_rcnn(vmamba(features_only=True, **body), **heads)


@takes(cascade_mask_rcnn, MambaVision, pyramid=False, without=("backbone", "pyramid_norm"))
def mambavision_cascade_mask_rcnn(**config: Any) -> TwoStageDetector:
    """Builder of the cards: Cascade Mask R-CNN on a MambaVision pyramid whose maps are normalised."""
    body, heads = _parted(config)
    return cascade_mask_rcnn(mambavision(features_only=True, pyramid_norm="ln2d", **body), **heads)


def named_mask_rcnn(*, backbone: str = "vmamba_tiny", **config: Any) -> TwoStageDetector:
    """Builder of the cards: Mask R-CNN on the pyramid of any classifier of this plugin, by its name; other arguments
    are :func:`mask_rcnn`'s and the backbone's."""
    body, heads = _parted(config)
    return mask_rcnn(pyramid(backbone, **body), **heads)


def named_cascade_mask_rcnn(*, backbone: str = "vmamba_tiny", **config: Any) -> TwoStageDetector:
    """As :func:`named_mask_rcnn`, of :func:`cascade_mask_rcnn`."""
    body, heads = _parted(config)
    return cascade_mask_rcnn(pyramid(backbone, **body), **heads)


def named_retinanet(*, backbone: str = "vmamba_tiny", **config: Any) -> OneStageDetector:
    """As :func:`named_mask_rcnn`, of :func:`retinanet`."""
    body, heads = _parted(config)
    return retinanet(pyramid(backbone, **body), **heads)


def _efficientvim(config: dict[str, Any]) -> tuple[EfficientViM, dict[str, Any], int]:
    body, heads = _parted(config)
    check_count("in_chans", body.get("in_chans", 3))
    backbone = EfficientViM(**body)
    backbone.as_pyramid()
    return backbone, heads, heads.pop("neck_channels", 256)


@takes(mask_rcnn, EfficientViM, pyramid=False, without=("backbone",))
def efficientvim_mask_rcnn(**config: Any) -> TwoStageDetector:
    """Builder of the cards: Mask R-CNN on EfficientViM, whose neck makes maps at strides 4 and 8 of that at 16.

    The backbone's batch norms stay as they are in training, as in the original."""
    backbone, heads, channels = _efficientvim(config)
    scale = heads.pop("anchor_scale", 8.0)
    neck = FPNNeck(backbone.feature_info.channels(), channels, 5, extra_trans_convs=2, pre_norm=True)
    return TwoStageDetector(
        backbone, neck, Anchors((4, 8, 16, 32, 64), (scale,)), channels=channels, frozen_norms=True, **heads
    )


@takes(retinanet, EfficientViM, pyramid=False, without=("backbone",))
def efficientvim_retinanet(**config: Any) -> OneStageDetector:
    """Builder of the cards: RetinaNet on EfficientViM, whose neck makes a map at stride 8 and one at 128.

    The backbone's batch norms stay as they are in training, as in the original."""
    backbone, heads, channels = _efficientvim(config)
    neck = FPNNeck(
        backbone.feature_info.channels(), channels, 5, extra_trans_convs=1, pre_norm=True, add_extra_convs="on_input"
    )
    return OneStageDetector(
        backbone, neck, Anchors((8, 16, 32, 64, 128), RETINA_SCALES), channels=channels, frozen_norms=True, **heads
    )
