"""Detection in image files: what is where, with a score, and which pixels of the picture belong to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """A box's mask at the picture's resolution.

    ``mask`` (side, side): probabilities on an even grid over ``box`` (4,), in pixels of a picture of ``size`` (height,
    width). Returns the pixels (h, w) bool around the box that belong to it, those whose centre has a probability of at
    least one half (bilinear between the grid's, zero outside), and the row and column where they begin.
    """
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    right, bottom = min(int(-(-x1 // 1)) + 1, width), min(int(-(-y1 // 1)) + 1, height)
    x = (torch.arange(left, max(right, left), device=mask.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(top, max(bottom, top), device=mask.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5, (top, left)
