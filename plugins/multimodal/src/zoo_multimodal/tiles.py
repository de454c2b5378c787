"""A picture as tiles of one size: InternVL's dynamic tiling.

Source: hustvl/mmMamba @ 85143d0, MIT (``docs/usage.md``), after OpenGVLab/InternVL: the grid of tiles whose sides are
in the ratio nearest to the picture's, a bicubic resize to it, and a thumbnail of the whole where there are several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def grid_for(width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, size: int = 448) -> tuple[int, int]:
    """(columns, rows) for a picture of this size in pixels.

    Among the grids of ``min_tiles`` to ``max_tiles`` tiles the one whose ratio is nearest; of equally near ones the
    last, by number of tiles, that holds less than twice the picture's pixels.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles is {min_tiles} and max_tiles {max_tiles}; expected 1 <= min_tiles <= max_tiles")
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width} x {height} pixels; expected at least one each way")
    grids = {
        (columns, rows)
        for total in range(min_tiles, max_tiles + 1)
        for columns in range(1, total + 1)
        for rows in range(1, total + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda g: (g[0] * g[1], g)):
        away = abs(width / height - columns / rows)
        if away < nearest:
            best, nearest = (columns, rows), away
        elif away == nearest and width * height > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best


def open_picture(source: Any) -> Any:
    """A ``PIL.Image`` in RGB from a file, an image or an array (height, width, 3) of bytes."""
    return images.read_picture(Path(source).expanduser() if isinstance(source, (str, Path)) else source)


def cut(picture: Any, *, size: int = 448, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True) -> list[Any]:
    """The tiles of a picture, row by row, each ``size`` x ``size``, and the thumbnail behind them."""
    from PIL import Image

    columns, rows = grid_for(*picture.size, min_tiles=min_tiles, max_tiles=max_tiles, size=size)
    whole = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(c * size, r * size) for r in range(rows) for c in range(columns)]
    found = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
    if thumbnail and len(found) > 1:
        found.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    return found


def normalised(tile: Any, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """A tile to (3, height, width), values of 0 to 1 shifted and scaled."""
    import numpy as np

    pixels = torch.from_numpy(np.array(tile, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def pixels_of(picture: Any, **how: Any) -> Tensor:
    """A picture to (tiles, 3, size, size); arguments of :func:`cut`."""
    return torch.stack([normalised(tile) for tile in cut(open_picture(picture), **how)])
