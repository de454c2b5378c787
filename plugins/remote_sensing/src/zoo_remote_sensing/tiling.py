"""Scenes of any size through a network in tiles that overlap and are blended: memory grows with the tile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: a tile or a finished block: top, left, height, width
Box = tuple[int, int, int, int]


def tile_side(size: int, tile: int, overlap: int, multiple: int = 32) -> int:
    """The smallest side, a multiple of ``multiple``, that covers ``size`` with as few tiles as ``tile`` does.

    Otherwise the last tile would repeat most of the one before it: 1024 pixels in tiles of 512 that overlap by 64 take
    three, and three of 384 do as well.
    """
    if size <= tile:
        return size
    count = -(-(size - overlap) // (tile - overlap))
    needed = -(-(size + (count - 1) * overlap) // count)
    return min(tile, -(-needed // multiple) * multiple)


def starts(size: int, side: int, overlap: int) -> list[int]:
    """Where tiles of ``side`` begin along a side of the scene, the last one flush with the end."""
    if size <= side:
        return [0]
    step = side - overlap
    return [*range(0, size - side, step), size - side]


def ramp(size: int, overlap: int) -> Tensor:
    """Weights along a side of a tile: rising over the overlap, one inside, falling again; never zero."""
    place = torch.arange(size, dtype=torch.float32)
    edge = torch.minimum(place, size - 1 - place) + 1
    return (edge / (overlap + 1)).clamp(max=1.0)


def shares(size: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """(start, weights) of every tile along a side; at every pixel the weights of all tiles add up to one."""
    side = tile_side(size, tile, overlap)
    weight, total = ramp(side, overlap), torch.zeros(size)
    places = starts(size, side, overlap)
    for start in places:
        total[start : start + side] += weight
    return [(start, weight / total[start : start + side]) for start in places]


def blended(
    run: Callable[[Box], Mapping[str, Tensor]], height: int, width: int, tile: int, overlap: int
) -> Iterator[tuple[Box, dict[str, Tensor]]]:
    """``run`` on every tile of a scene; yields blocks that are complete, (box, maps (K, h, w) by name).

    ``run`` gets a box of at most ``tile`` pixels a side and returns maps (K, h, w) of it. Blocks cover the scene once.
    What tiles of the next row will add to waits in a temporary file, so that one tile is all that is in memory, however
    wide the scene is.
    Raises ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile {tile}; expected 0 <= overlap < tile")
    rows, columns = shares(height, tile, overlap), shares(width, tile, overlap)
    below = _Waiting()
    try:
        for r, (top, down) in enumerate(rows):
            last_row = r + 1 == len(rows)
            keep = len(down) if last_row else rows[r + 1][0] - top  # rows that no later tile reaches
            right: dict[str, Tensor] = {}
            for c, (left, across) in enumerate(columns):
                done = len(across) if c + 1 == len(columns) else columns[c + 1][0] - left
                weight = down[:, None] * across
                maps = {k: v.float().cpu() * weight for k, v in run((top, left, len(down), len(across))).items()}
                for name, waiting in right.items():
                    maps[name][:, :, : waiting.shape[2]] += waiting
                right = {name: x[:, :, done:].clone() for name, x in maps.items()}
                maps = {name: x[:, :, :done] for name, x in maps.items()}
                for name, waiting in below.take(c).items():
                    maps[name][:, : waiting.shape[1]] += waiting
                if not last_row:
                    below.put(c, {name: x[:, keep:] for name, x in maps.items()})
                yield (top, left, keep, done), {name: x[:, :keep] for name, x in maps.items()}
    finally:
        below.close()


class _Waiting:
    """One record of maps for each column of tiles, on disk: written by a row of tiles, taken by the next."""

    def __init__(self) -> None:
        self.file: Any = None
        self.slots: dict[int, tuple[int, int]] = {}  #: column -> (offset, bytes reserved)
        self.shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def put(self, column: int, maps: Mapping[str, Tensor]) -> None:
        data = b"".join(np.ascontiguousarray(x.numpy()).tobytes() for x in maps.values())
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        offset, room = self.slots.get(column, (0, -1))
        if room < len(data):
            offset = self.file.seek(0, 2)
            self.slots[column] = (offset, len(data))
        self.file.seek(offset)
        self.file.write(data)
        self.shapes[column] = {name: tuple(x.shape) for name, x in maps.items()}

    def take(self, column: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        shapes = self.shapes.pop(column, {})
        if shapes:
            self.file.seek(self.slots[column][0])
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            found[name] = torch.from_numpy(np.frombuffer(self.file.read(4 * count), np.float32).copy()).view(shape)
        return found

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
