"""Drawing answers about an image: the image, bars of the likeliest labels, maps beside it. Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_BACK, _INK, _SOFT, _BAR = (255, 255, 255), (25, 25, 30), (110, 110, 120), (66, 114, 196)
#: dark blue, green, yellow: five stops of a colour scale that also reads in grey
_STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)
SIDE = 320  #: longer side of the shown image, and of each map


def fit(image: Image.Image, side: int = SIDE) -> Image.Image:
    """``image`` as RGB with its longer side ``side`` long; small ones are enlarged without smoothing."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers (h, w) to colours (h, w, 3), uint8, on a scale from ``low`` to ``high``."""
    at = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_STOPS) - 1)
    below = np.minimum(at.astype(int), len(_STOPS) - 2)
    part = (at - below)[..., None]
    return (_STOPS[below] * (1 - part) + _STOPS[below + 1] * part).astype(np.uint8)


def answer_card(
    image: Image.Image,
    rows: Sequence[tuple[str, float]],
    *,
    title: str = "",
    maps: Sequence[tuple[str, np.ndarray]] = (),
    note: str = "",
) -> Image.Image:
    """The image with ``rows`` (label, probability) as bars beside it, and ``maps`` (name, (h, w)) in a row below.

    The maps share one colour scale, whose ends are written in ``note``'s line.
    """
    shown, font, small = fit(image), ImageFont.load_default(16), ImageFont.load_default(13)
    margin, panel = 16, 400
    head = 30 if title else 0
    top = max(shown.height, 34 * len(rows))
    width = margin * 3 + shown.width + panel
    per_row = max(1, (width - margin) // (SIDE // 2 + margin))
    lines = -(-len(maps) // per_row)
    tile = SIDE // 2
    height = margin * 2 + head + top + (lines * (tile + 26) + 24 if maps else 0)
    canvas = Image.new("RGB", (width, height), _BACK)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin - 4), title, _INK, font)
    canvas.paste(shown, (margin, margin + head))
    left = margin * 2 + shown.width
    for i, (label, probability) in enumerate(rows):
        y = margin + head + 34 * i
        draw.text((left, y), _cut(label, panel - 70, font), _INK if i == 0 else _SOFT, font)
        draw.text((left + panel - 56, y), f"{probability:6.1%}", _INK if i == 0 else _SOFT, small)
        draw.rectangle((left, y + 21, left + round((panel - 64) * probability), y + 26), fill=_BAR)
    if maps:
        low = float(min(m.min() for _, m in maps))
        high = float(max(m.max() for _, m in maps))
        y0 = margin + head + top + 8
        draw.text((margin, y0), f"{note} (dark {low:.2f} to bright {high:.2f})".strip(), _SOFT, small)
        for i, (name, values) in enumerate(maps):
            x = margin + (i % per_row) * (tile + margin)
            y = y0 + 22 + (i // per_row) * (tile + 26)
            picture = Image.fromarray(colours(values, low, high)).resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
            draw.text((x, y + tile + 3), _cut(name, tile, small), _INK, small)
    return canvas


def legend_card(
    image: Image.Image, painted: Image.Image, rows: Sequence[tuple[str, tuple[int, int, int]]], *, title: str = ""
) -> Image.Image:
    """The image, ``painted`` beside it, and what each colour means: ``rows`` of (words, colour)."""
    side, font, small = SIDE + SIDE // 2, ImageFont.load_default(16), ImageFont.load_default(13)
    shown, beside = fit(image, side), fit(painted, side)
    margin, panel, line, head = 16, 220, 24, 30 if title else 0
    height = margin * 2 + head + max(shown.height, line * len(rows))
    canvas = Image.new("RGB", (margin * 4 + shown.width + beside.width + panel, height), _BACK)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 4), title, _INK, font)
    canvas.paste(shown, (margin, margin + head))
    canvas.paste(beside, (margin * 2 + shown.width, margin + head))
    left = margin * 3 + shown.width + beside.width
    for i, (words, colour) in enumerate(rows):
        y = margin + head + line * i
        draw.rectangle((left, y + 2, left + 16, y + 16), fill=colour)
        draw.text((left + 24, y), _cut(words, panel - 24, small), _INK, small)
    return canvas


def maps_card(image: Image.Image, maps: Sequence[tuple[str, np.ndarray]], *, title: str = "") -> Image.Image:
    """The image and, beside it, ``maps`` (words, colours (h, w, 3)) in rows of four."""
    shown, font, small = fit(image, SIDE), ImageFont.load_default(16), ImageFont.load_default(13)
    margin, head, side = 16, 30 if title else 0, SIDE // 2 + 20
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    height = margin * 2 + head + max(shown.height, lines * (side + 26))
    canvas = Image.new("RGB", (margin * 2 + shown.width + columns * (side + margin), height), _BACK)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 4), title, _INK, font)
    canvas.paste(shown, (margin, margin + head))
    for i, (words, values) in enumerate(maps):
        x = margin * 2 + shown.width + i % columns * (side + margin)
        y = margin + head + i // columns * (side + 26)
        canvas.paste(fit(Image.fromarray(values), side), (x, y))
        draw.text((x, y + side + 3), _cut(words, side, small), _INK, small)
    return canvas


def _cut(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """``text`` shortened to ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
