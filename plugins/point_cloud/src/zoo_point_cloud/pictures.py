"""A cloud seen from three sides, as a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE = 320
#: name, the axes to the right and up, the axis towards the eye and its sign
VIEWS = (("front", 0, 2, 1, -1), ("side", 1, 2, 0, 1), ("top", 0, 1, 2, 1))


def palette(count: int) -> np.ndarray:
    """``count`` colours that stay apart: (count, 3) uint8."""
    hues = [(i * 0.618033988749895) % 1.0 for i in range(count)]
    rgb = [colorsys.hsv_to_rgb(h, 0.55 + 0.35 * (i % 2), 0.95 - 0.2 * (i % 3) / 2) for i, h in enumerate(hues)]
    return (np.array(rgb).reshape(count, 3) * 255).astype(np.uint8)


def three_views(
    points: np.ndarray,
    colors: np.ndarray | None = None,
    *,
    title: str = "",
    legend: Sequence[tuple[str, np.ndarray]] = (),
) -> Image.Image:
    """Orthographic views of points (N, 3), z up, coloured by ``colors`` (N, 3) uint8 or by height. Near points cover
    far ones. ``legend``: names with their colours."""
    if not len(points):  # an empty map has a picture too
        points, colors = np.zeros((1, 3), np.float32), np.full((1, 3), 255, np.uint8)
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (points - (low + high) / 2) / max(float((high - low).max()), 1e-9) + 0.5
    if colors is None:
        height = unit[:, 2:3]
        colors = (np.concatenate([40 + 200 * height, 90 + 90 * height, 220 - 180 * height], axis=1)).astype(np.uint8)
    dot = 2 if len(points) > 2000 else 4  # pixels
    rows = (len(legend) + 2) // 3
    sheet = Image.new("RGB", (3 * SIDE, 24 + SIDE + 18 * rows + 4), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, fill="black")
    for k, (name, right, up, eye, sign) in enumerate(VIEWS):
        canvas = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
        order = np.argsort(unit[:, eye] * sign, kind="stable")
        column = (8 + unit[order, right] * (SIDE - 18)).astype(int)
        row = (8 + (1 - unit[order, up]) * (SIDE - 18)).astype(int)
        for dr in range(dot):
            for dc in range(dot):
                canvas[row + dr, column + dc] = colors[order]
        sheet.paste(Image.fromarray(canvas), (k * SIDE, 24))
        draw.text((k * SIDE + 8, 28), name, fill="gray")
    for i, (name, color) in enumerate(legend):
        x, y = (i % 3) * SIDE + 8, 24 + SIDE + 18 * (i // 3)
        draw.rectangle((x, y + 3, x + 10, y + 13), fill=tuple(int(c) for c in color))
        draw.text((x + 16, y + 2), name, fill="black")
    return sheet
