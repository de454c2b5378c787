"""Geometry of detection: anchors, boxes as offsets from other boxes, and which of overlapping boxes stay.

A box is (x0, y0, x1, y1) in pixels of the network's input, x to the right, y down, its corners real numbers: the pixel
in column i reaches from i to i + 1, and a width is x1 - x0. Everything here is float32, whatever the network's dtype.

Source: Ren et al., "Faster R-CNN", arXiv 1506.01497, section 3.1; in the form of mmdetection 3.3 (``prior_generators/
anchor_generator.py``, ``coders/delta_xywh_bbox_coder.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

#: a box grows or shrinks by at most this factor in one step of refinement
LARGEST_STEP = math.log(1000 / 16)


@dataclass(frozen=True)
class Anchors:
    """Boxes of some shapes around every place of a pyramid's maps.

    ``strides``: pixels between two places, for each map, largest map first. ``scales``: square roots of the areas of a
    map's anchors, in strides. ``ratios``: height / width.
    """

    strides: tuple[int, ...]
    scales: tuple[float, ...]
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def per_place(self) -> int:
        return len(self.scales) * len(self.ratios)

    def __call__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """Anchors (h * w * per_place, 4) of each map of size (h, w); places row by row, ratios before scales."""
        if len(sizes) != len(self.strides):
            raise ValueError(f"the pyramid has {len(sizes)} maps, the anchors strides for {len(self.strides)}")
        tall = torch.tensor(self.ratios, device=device).sqrt()
        scales = torch.tensor(self.scales, device=device)
        found = []
        for (h, w), stride in zip(sizes, self.strides, strict=True):
            widths = (stride * (1 / tall)[:, None] * scales).flatten() / 2
            heights = (stride * tall[:, None] * scales).flatten() / 2
            shapes = torch.stack([-widths, -heights, widths, heights], dim=-1)
            x, y = (torch.arange(n, device=device) * stride for n in (w, h))
            places = torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=-1).repeat(1, 2)
            found.append((places[:, None] + shapes).view(-1, 4))
        return found


def decode(boxes: Tensor, deltas: Tensor, stds: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
    """Boxes (..., 4) moved and resized by ``deltas`` (..., 4), which are in units of ``stds``.

    A delta is the centre's way in widths and heights of the box, and the logarithms of the factors of width and height.
    ``size``: (height, width) of the image that the corners are moved into; None: they stay where they are.
    """
    deltas = deltas.float() * torch.tensor(stds, device=deltas.device)
    low, high = boxes[..., :2], boxes[..., 2:]
    extent = high - low
    centre = (low + high) * 0.5 + extent * deltas[..., :2]
    half = extent * deltas[..., 2:].clamp(-LARGEST_STEP, LARGEST_STEP).exp() * 0.5
    moved = torch.cat([centre - half, centre + half], dim=-1)
    return moved if size is None else inside(moved, size)


def encode(boxes: Tensor, wanted: Tensor, stds: Sequence[float]) -> Tensor:
    """The ``deltas`` (N, 4) by which :func:`decode` makes ``wanted`` (N, 4) of ``boxes`` (N, 4), all with an area."""
    had, extent = boxes[:, 2:] - boxes[:, :2], wanted[:, 2:] - wanted[:, :2]
    way = ((wanted[:, :2] + wanted[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) * 0.5 / had
    return torch.cat([way, (extent / had).log()], dim=1) / torch.tensor(stds, device=boxes.device)


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) with every corner moved into an image of ``size`` (height, width)."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def ordered(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) given by two opposite corners in any order, the upper left one first."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)


def best(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, count: int) -> Tensor:
    """Indices of at most ``count`` of ``boxes`` (N, 4) with the highest ``scores`` (N,), highest first, without those
    that a better one of the same group overlaps: intersection over union beyond ``overlap``."""
    return batched_nms(boxes, scores, groups, overlap)[:count]


def best_solid(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, count: int) -> Tensor:
    """:func:`best` of those boxes that have an area."""
    (solid,) = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))
    return solid[best(boxes[solid], scores[solid], groups[solid], overlap, count)]


def pyramid_level(boxes: Tensor, count: int, finest: float = 56.0) -> Tensor:
    """Which of ``count`` maps, largest first, sees each of ``boxes`` (N, 4): the first below twice ``finest`` pixels
    (root of the area), the next below four times, and so on. Lin et al., arXiv 1612.03144, equation 1."""
    root = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return torch.floor(torch.log2(root / finest + 1e-6)).clamp(0, count - 1).long()
