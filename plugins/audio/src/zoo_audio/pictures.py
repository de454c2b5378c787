"""Waveforms to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .streaming import Word

BACK, WAVE, AXIS, MARK = (255, 255, 255), (38, 84, 142), (190, 190, 190), (160, 60, 40)


def waveform(
    samples: np.ndarray, rate: int, words: Sequence[Word] = (), *, width: int = 1000, height: int = 240
) -> Image.Image:
    """The loudest and lowest sample of every column, a scale in seconds, and words where they begin."""
    image = Image.new("RGB", (width, height), BACK)
    draw = ImageDraw.Draw(image)
    bottom, top = height - 22, 26 if words else 6
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    seconds = len(samples) / rate
    draw.line([(0, middle), (width, middle)], fill=AXIS)
    if len(samples):
        edges = np.linspace(0, len(samples), width + 1).astype(int)
        for x in range(width):
            piece = samples[edges[x] : max(edges[x + 1], edges[x] + 1)]
            high, low = float(np.clip(piece.max(), -1, 1)), float(np.clip(piece.min(), -1, 1))
            draw.line([(x, middle - half * high), (x, middle - half * low)], fill=WAVE)
        step = next((s for s in (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300) if seconds / s <= 12), 600)
        for i in range(int(seconds / step) + 1):
            x = int(i * step / seconds * (width - 1))
            draw.line([(x, bottom), (x, bottom + 4)], fill=(0, 0, 0))
            draw.text((min(x + 2, width - 40), bottom + 5), f"{i * step:g} s", fill=(0, 0, 0))
        for word in words:
            if word.start is not None:
                x = int(word.start / seconds * (width - 1))
                draw.line([(x, 16), (x, bottom)], fill=MARK)
                draw.text((x + 2, 4), word.text, fill=MARK)
    return image
