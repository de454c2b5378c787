"""What a region of an image looks like in the pyramid's maps: RoIAlign.

Source: He et al., "Mask R-CNN", arXiv 1703.06870, section 3; sampled as densely as the map is, whose pixels have their
centres half a pixel off its corner (mmcv's ``RoIAlign(sampling_ratio=0, aligned=True)``, which torchvision has too).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from zoo.layers.inference import results_only

from .boxes import pyramid_level


def region_features(maps: Sequence[Tensor], strides: Sequence[int], regions: Sequence[Tensor], side: int) -> Tensor:
    """``side`` x ``side`` averages inside each region, from the map that fits its size.

    ``maps``: (batch, C, h, w), largest first, with ``strides``; ``regions``: one (n_i, 4) for each image. Returns
    (sum of n_i, C, side, side) in the maps' dtype. A part of a region that covers three by two pixels of the map is the
    average of the map at six points, bilinear between its pixels.
    """
    flat = torch.cat(list(regions))
    image = torch.cat([flat.new_full((len(r), 1), i) for i, r in enumerate(regions)])
    rois = torch.cat([image, flat], dim=1)
    level = pyramid_level(flat, len(maps))
    dtype = maps[0].dtype
    out = flat.new_zeros(len(flat), maps[0].shape[1], side, side)
    for i, (m, stride) in enumerate(zip(maps, strides, strict=True)):
        m = m.float()  # torchvision has no kernel for bfloat16
        if torch.compiler.is_compiling():  # how many regions a map sees is not known then: it looks at all
            seen = roi_align(m, rois, side, 1 / stride, sampling_ratio=0, aligned=True)
            out = torch.where((level == i)[:, None, None, None], seen, out)
            continue
        (at,) = torch.where(level == i)
        if not len(at):
            continue
        if results_only(m, rois):
            out[at] = by_products(m, rois[at], side, 1 / stride)
        else:
            seen = roi_align(m, rois[at], side, 1 / stride, sampling_ratio=0, aligned=True)
            out = out.index_copy(0, at, seen)
    return out.to(dtype)


def by_products(m: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """``roi_align(m, rois, side, scale, sampling_ratio=0, aligned=True)`` on a CPU, three to four times as fast.

    The points at which a region is sampled are a grid, so the averages are two products with small matrices, along the
    columns and along the rows of the part of the map that the region covers, with all channels at once.
    """
    height, width = m.shape[2:]
    left, top, right, bottom = (rois[:, 1:] * scale - 0.5).unbind(1)
    down, first_row, last_row = _averages(top, bottom - top, side, height)
    across, first_column, last_column = _averages(left, right - left, side, width)
    lines = m.permute(0, 2, 3, 1).contiguous()  # (batch, h, w, C)
    out = m.new_empty(len(rois), side, side, m.shape[1])
    for i, image in enumerate(rois[:, 0].long().tolist()):
        rows, columns = slice(first_row[i], last_row[i]), slice(first_column[i], last_column[i])
        part = torch.matmul(across[i, :, : columns.stop - columns.start], lines[image, rows, columns])
        torch.mm(down[i, :, : rows.stop - rows.start], part.flatten(1), out=out[i].view(side, -1))
    return out.permute(0, 3, 1, 2)


def _averages(start: Tensor, extent: Tensor, side: int, length: int) -> tuple[Tensor, list[int], list[int]]:
    """Regions along one axis: what each of ``side`` parts is made of, and which pixels these are.

    ``start``, ``extent`` (n,) in pixels of a map that is ``length`` long. Returns weights (n, side, most pixels) of the
    pixels from the first one on, and the first and the end of each region's pixels. A point beyond the map's border by
    more than a pixel is zero, one within that pixel is the border's.
    """
    size = extent / side
    points = size.ceil().clamp(min=1)[:, None, None]  # in one part; a region turned inside out has none
    k = torch.arange(int(points.max()) if len(start) else 1)
    at = start[:, None, None] + torch.arange(side)[:, None] * size[:, None, None]
    at = at + (k + 0.5) * size[:, None, None] / points
    counted = (k < points) & (at >= -1) & (at <= length) & (size > 0)[:, None, None]
    at = at.clamp(0, length - 1)
    low = at.floor()
    beyond = at - low
    below = low.long()
    first = below.amin(dim=(1, 2))
    below = below - first[:, None, None]
    above = (below + 1).minimum((length - 1 - first)[:, None, None])
    weights = torch.zeros(len(start), side, int(above.max()) + 1 if len(start) else 1)
    share = counted / points
    weights.scatter_add_(2, below, share * (1 - beyond)).scatter_add_(2, above, share * beyond)
    return weights, first.tolist(), (first + above.amax(dim=(1, 2)) + 1).tolist()
