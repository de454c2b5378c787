"""The layers of detectors: what looks at every place of a pyramid, and what looks at regions.

Source: Ren et al., arXiv 1506.01497 (proposals); Girshick, arXiv 1504.08083 (regions); He et al., "Mask R-CNN", arXiv
1703.06870, section 3 (masks); Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, section
4. Modules have mmdetection's names (``models/dense_heads/{rpn_head,retina_head}.py``, ``models/roi_heads/``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from zoo_vision.pyramids import ConvModule


def started(module: nn.Module, std: float, bias: float = 0.0) -> nn.Module:
    """A convolution or linear layer with normal weights of deviation ``std`` and a constant bias."""
    nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
    nn.init.constant_(module.bias, bias)  # type: ignore[arg-type]
    return module


class RPNHead(nn.Module):
    """Proposals: whether there is an object at each anchor of a map (one logit), and the anchor's four deltas."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.rpn_conv = started(nn.Conv2d(channels, channels, 3, padding=1), 0.01)
        self.rpn_cls = started(nn.Conv2d(channels, anchors, 1), 0.01)
        self.rpn_reg = started(nn.Conv2d(channels, anchors * 4, 1), 0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (batch, channels, h, w) to logits (batch, anchors, h, w) and deltas (batch, anchors * 4, h, w)."""
        seen = [F.relu(self.rpn_conv(m)) for m in maps]
        return [self.rpn_cls(m) for m in seen], [self.rpn_reg(m) for m in seen]


class RetinaHead(nn.Module):
    """RetinaNet's head: the classes' logits and four deltas for each anchor, from two stacks of convolutions.

    ``prior``: the probability that a new head gives every class everywhere.
    """

    def __init__(
        self, channels: int, anchors: int, num_classes: int, depth: int = 4, width: int = 256, prior: float = 0.01
    ) -> None:
        super().__init__()

        def stack() -> nn.ModuleList:
            convs = [ConvModule(channels if i == 0 else width, width, 3, act=True) for i in range(depth)]
            for conv in convs:
                started(conv.conv, 0.01)
            return nn.ModuleList(convs)

        self.cls_convs, self.reg_convs = stack(), stack()
        self.retina_cls = started(
            nn.Conv2d(width, anchors * num_classes, 3, padding=1), 0.01, -math.log((1 - prior) / prior)
        )
        self.retina_reg = started(nn.Conv2d(width, anchors * 4, 3, padding=1), 0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (batch, channels, h, w) to logits (batch, anchors * classes, h, w), anchor by anchor, and deltas
        (batch, anchors * 4, h, w)."""
        logits, deltas = [], []
        for m in maps:
            x = y = m
            for conv in self.cls_convs:
                x = conv(x)
            for conv in self.reg_convs:
                y = conv(y)
            logits.append(self.retina_cls(x))
            deltas.append(self.retina_reg(y))
        return logits, deltas


class BoxHead(nn.Module):
    """What a region shows: logits of the classes and of none of them, and four deltas for each class (or one for all).

    Arguments: ``channels`` of the features, their ``side``; ``num_classes``; ``convs`` convolutions with batch norm and
    ``fcs`` linear layers, shared by both answers; ``width`` of the latter; ``class_agnostic``: one box for all classes.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        convs: int = 0,
        fcs: int = 2,
        width: int = 1024,
        side: int = 7,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.class_agnostic, self.side = num_classes, class_agnostic, side
        self.shared_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm=True, act=True) for _ in range(convs))
        widths = [channels * side * side, *([width] * fcs)]
        self.shared_fcs = nn.ModuleList(nn.Linear(widths[i], width) for i in range(fcs))
        for fc in self.shared_fcs:
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)
        self.fc_cls = started(nn.Linear(widths[-1], num_classes + 1), 0.01)
        self.fc_reg = started(nn.Linear(widths[-1], 4 if class_agnostic else 4 * num_classes), 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, channels, side, side) to logits (n, classes + 1), the last of no object, and deltas
        (n, classes or 1, 4)."""
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return self.fc_cls(x), self.fc_reg(x).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Which part of a region is the object: a map of logits for each class, at twice the features' resolution."""

    def __init__(self, channels: int, num_classes: int, *, convs: int = 4, side: int = 14) -> None:
        super().__init__()
        self.side = side
        self.convs = nn.ModuleList(ConvModule(channels, channels, 3, act=True) for _ in range(convs))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*(conv.conv for conv in self.convs), self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, channels, side, side) to logits (n, classes, 2 * side, 2 * side)."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x)))
