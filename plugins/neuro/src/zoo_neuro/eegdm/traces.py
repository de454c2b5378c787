"""EEG as people look at it: channels below each other, time to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: Shades behind windows, by class.
SHADES = ("#e8eef7", "#fbe9d9", "#e3f2e1", "#f8e1e4", "#ece4f4", "#f4f1d8", "#dff1f3", "#eeeeee")
MARGIN, ROW, TOP = 70, 34, 22


def traces(
    signal: np.ndarray,
    sfreq: float,
    channels: Sequence[str],
    spans: Sequence[tuple[float, float, str, int]] = (),
    width: int = 1200,
) -> Any:
    """A ``PIL.Image`` of (channels, samples) volts. ``spans``: (start, end, text, number of its shade), in seconds."""
    from PIL import Image, ImageDraw

    count, samples = signal.shape
    height = TOP + ROW * count + 20
    image = Image.new("RGB", (MARGIN + width + 10, height), "white")
    draw = ImageDraw.Draw(image)
    seconds = samples / sfreq
    across = width / max(seconds, 1e-9)
    for start, end, text, shade in spans:
        box = (MARGIN + start * across, TOP, MARGIN + min(end, seconds) * across - 1, height - 20)
        draw.rectangle(box, fill=SHADES[shade % len(SHADES)])
        draw.text((box[0] + 2, 4), text, fill="black")
    # One scale for all, so that strong channels look strong; the largest thousandth may be cut off.
    scale = max(float(np.quantile(np.abs(signal), 0.999)), 1e-9)
    columns = np.linspace(0, width, samples)
    for i, name in enumerate(channels):
        middle = TOP + ROW * (i + 0.5)
        y = middle - np.clip(signal[i] / scale, -1, 1) * ROW * 0.6
        draw.line([(MARGIN + x, v) for x, v in zip(columns.tolist(), y.tolist(), strict=True)], fill="#203040")
        draw.text((4, middle - 6), name, fill="black")
    for second in range(0, int(seconds) + 1, max(1, int(seconds) // 10)):
        draw.text((MARGIN + second * across, height - 16), f"{second} s", fill="black")
    draw.text((4, height - 16), f"{scale * 1e6:.0f} uV", fill="black")
    return image
