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


#: numbers of the maps that regions are gathered from at once: 16 MB
HELD = 1 << 22


def by_products(m: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """``roi_align(m, rois, side, scale, sampling_ratio=0, aligned=True)`` on a CPU, several times as fast.

    The points at which a region is sampled are a grid, so the averages are two products with small matrices, along the
    rows and along the columns of the part of the map that the region covers, with all channels at once. Regions of
    about one size go together: on a busy machine a thousand small products would wait for one another's threads.
    """
    channels, height, width = m.shape[1:]
    left, top, right, bottom = (rois[:, 1:] * scale - 0.5).unbind(1)
    down, row, rows = _averages(top, bottom - top, side, height)
    across, column, columns = _averages(left, right - left, side, width)
    pixels = m.permute(0, 2, 3, 1).reshape(-1, channels)
    out = m.new_empty(len(rois), side, side, channels)
    for chosen in _alike(rows, columns, channels):
        r, c = int(rows[chosen].max()), int(columns[chosen].max())
        y = (row[chosen, None] + torch.arange(r)).clamp(max=height - 1) + rois[chosen, :1].long() * height
        x = (column[chosen, None] + torch.arange(c)).clamp(max=width - 1)
        part = pixels.index_select(0, (y[:, :, None] * width + x[:, None]).flatten())
        lines = torch.bmm(down[chosen, :, :r], part.view(len(chosen), r, -1)).view(-1, c, channels)
        out[chosen] = torch.bmm(across[chosen, :, :c].repeat_interleave(side, 0), lines).view(-1, side, side, channels)
    return out.permute(0, 3, 1, 2)


def _alike(rows: Tensor, columns: Tensor, channels: int) -> list[Tensor]:
    """Indices of regions of about as many ``rows`` and ``columns`` (n,), in groups that gather at most :data:`HELD`
    numbers (or are one region)."""
    order = torch.argsort((rows // 4) * 100_000 + columns)
    heights, widths = rows[order].tolist(), columns[order].tolist()
    groups, begin, tallest, widest = [], 0, 0, 0
    for i, (r, c) in enumerate(zip(heights, widths, strict=True)):
        taller, wider = max(tallest, r), max(widest, c)
        if i > begin and (i + 1 - begin) * taller * wider * channels > HELD:
            groups.append(order[begin:i])
            begin, taller, wider = i, r, c
        tallest, widest = taller, wider
    return [*groups, order[begin:]] if len(order) else []


def _averages(start: Tensor, extent: Tensor, side: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regions along one axis: what each of ``side`` parts is made of, and which pixels these are.

    ``start``, ``extent`` (n,) in pixels of a map that is ``length`` long. Returns weights (n, side, most pixels) of the
    pixels from the first one on, and each region's first pixel and number of pixels, (n,) int64. A point beyond the
    map's border by more than a pixel is zero, one within that pixel is the border's.
    """
    size = extent / side
    points = size.ceil().clamp(min=1)[:, None, None]  # in one part; a region turned inside out has none
    k = torch.arange(int(points.max()))
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
    weights = torch.zeros(len(start), side, int(above.max()) + 1)
    share = counted / points
    weights.scatter_add_(2, below, share * (1 - beyond)).scatter_add_(2, above, share * beyond)
    return weights, first, above.amax(dim=(1, 2)) + 1
