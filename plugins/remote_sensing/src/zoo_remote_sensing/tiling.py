"""Scenes of any size through a network in tiles that overlap and are blended: memory grows with the tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side, the last one flush with the end."""
    if size <= tile:
        return [0]
    step = tile - overlap
    return [*range(0, size - tile, step), size - tile]


def ramp(size: int, overlap: int) -> Tensor:
    """Weights along a side of a tile: rising over the overlap, one inside, falling again; never zero."""
    place = torch.arange(size, dtype=torch.float32)
    edge = torch.minimum(place, size - 1 - place) + 1
    return (edge / (overlap + 1)).clamp(max=1.0)


def boxes(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of every tile, row by row."""
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            yield top, left, min(tile, height), min(tile, width)


def tiled(
    run: Callable[..., dict[str, Tensor]], images: tuple[Tensor, ...], tile: int, overlap: int
) -> dict[str, Tensor]:
    """``run`` on tiles of ``images`` ((batch, C, H, W), one size), blended: maps (batch, K, H, W) on the CPU by name.

    ``run`` gets the tiles and returns maps of their size. Raises ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile {tile}; expected 0 <= overlap < tile")
    height, width = images[0].shape[2:]
    total: dict[str, Tensor] = {}
    weights = torch.zeros(height, width)
    for top, left, h, w in boxes(height, width, tile, overlap):
        weight = ramp(h, overlap)[:, None] * ramp(w, overlap)
        weights[top : top + h, left : left + w] += weight
        for name, part in run(*(x[:, :, top : top + h, left : left + w] for x in images)).items():
            part = part.float().cpu()
            if name not in total:
                total[name] = torch.zeros(*part.shape[:2], height, width)
            total[name][:, :, top : top + h, left : left + w] += part * weight
    return {name: maps / weights for name, maps in total.items()}
