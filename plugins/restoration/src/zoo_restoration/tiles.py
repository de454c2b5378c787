"""Large images through a network tile by tile, in the memory of one tile, with soft seams.

Tiles overlap. A tile's outermost ``margin`` pixels count for nothing where another tile covers them, because what the
network made of them lacked its surroundings; between the margins neighbours fade into each other. A network whose
output depends on input within ``margin`` pixels alone gives the very image that it gives as a whole (tested). Serpent
and Contrast scan from edge to edge: their tiles differ from the whole image, a little, and the seams are blended.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sizes import pad_to_multiple


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of one axis begin so that neighbours share at least ``overlap``: as few as there can be, evenly."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def weights(length: int, tile: int, begins: list[int], overlap: int, margin: int) -> Tensor:
    """(tiles, length): how much each tile of an axis counts at each position; every column's sum is 1."""
    at = torch.arange(length, dtype=torch.float64) + 0.5
    rows = []
    for i, begin in enumerate(begins):
        fade = float(overlap - 2 * margin)
        row = ((at > begin) & (at < begin + tile)).double()
        if i:
            row = row * ((at - begin - margin) / fade).clamp(0, 1)
        if i + 1 < len(begins):
            row = row * ((begin + tile - margin - at) / fade).clamp(0, 1)
        rows.append(row)
    table = torch.stack(rows)
    return (table / table.sum(0)).float()


def run(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, margin: int | None = None,
    scale: int = 1, multiple: int = 1, on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """``function`` on tiles (1, channels, h, w) of x (channels, H, W), blended: (channels, scale H, scale W), float32,
    on the CPU, where an image has room that a GPU may not have.

    ``tile``, ``overlap``, ``margin`` (default: a quarter of the overlap) in pixels of x; tile and overlap are rounded
    up to ``multiple``, the grid of the network's patches or windows, so that it lies as in the whole image.
    ``on_tile(done, all)`` is called after each. Raises ValueError for an overlap that leaves no room.
    """
    asked = f"tile is {tile}, overlap {overlap}"
    tile, overlap = (-(-n // multiple) * multiple for n in (tile, overlap))
    margin = overlap // 4 if margin is None else margin
    if not 0 <= 2 * margin < overlap < tile or tile < 1:
        raise ValueError(
            f"{asked} and margin {margin}; expected an overlap below the tile and above twice the margin, both "
            f"in multiples of {multiple}"
        )
    height, width = x.shape[-2:]
    x = pad_to_multiple(x, multiple)
    along = []
    for length in x.shape[-2:]:
        side = min(tile, length)
        begins = [b * multiple for b in starts(length // multiple, side // multiple, overlap // multiple)]
        along.append((side, begins, weights(length, side, begins, overlap, margin).repeat_interleave(scale, 1)))
    (tall, tops, down), (wide, lefts, across) = along
    result: Tensor | None = None
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            y = function(x[None, :, top : top + tall, left : left + wide])[0].float().cpu()
            if result is None:
                result = y.new_zeros(y.shape[0], scale * x.shape[-2], scale * x.shape[-1])
            rows, columns = slice(scale * top, scale * (top + tall)), slice(scale * left, scale * (left + wide))
            share = down[i, rows, None] * across[j, columns]
            result[:, rows, columns] += share * y
            if on_tile is not None:
                on_tile(i * len(lefts) + j + 1, len(tops) * len(lefts))
    assert result is not None
    return result[:, : scale * height, : scale * width]


def count(height: int, width: int, tile: int, overlap: int, multiple: int = 1) -> int:
    """How many tiles :func:`run` takes for an image."""
    tile, overlap = (-(-n // multiple) * multiple for n in (tile, overlap))
    each = []
    for length in (height, width):
        units = -(-length // multiple)
        each.append(len(starts(units, min(tile // multiple, units), overlap // multiple)))
    return each[0] * each[1]
