"""Images to learn restoration from without any data: shapes, strokes as of writing, textures, drawn from a number.

What they have in common with photographs is edges at every angle, thin lines, repeating patterns and flat colour;
they are for demos and tests, and a model trained on them is of no use for photographs.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

#: drawn so many times larger and reduced, so that edges lie between pixels
FINE = 4


def drawing(seed: int, size: int = 96) -> np.ndarray:
    """One image (size, size, 3) uint8, ``size`` at least 16; the same for the same seed."""
    if size < 16:
        raise ValueError(f"size is {size}; a line of writing needs 16 pixels")
    random = np.random.default_rng([20240326, seed])
    side = size * FINE
    image = Image.fromarray(_gradient(random, side))
    for _ in range(int(random.integers(5, 10))):
        if random.random() < 0.35:
            layer = Image.fromarray(_texture(random, side))
        else:
            layer = Image.new("RGB", (side, side), _colour(random))
        mask = Image.new("L", (side, side), 0)
        _shape(random, ImageDraw.Draw(mask), side)
        image.paste(layer, (0, 0), mask)
    pen = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 4))):
        _writing(random, pen, side)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in random.integers(0, 256, 3))


def _gradient(random: np.random.Generator, side: int) -> np.ndarray:
    """A plane of colour from one corner to the other."""
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    share = np.clip(0.5 + 0.7 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)[..., None]
    return (share * np.array(_colour(random)) + (1 - share) * np.array(_colour(random))).astype(np.uint8)


def _texture(random: np.random.Generator, side: int) -> np.ndarray:
    """Stripes, checks or waves of two colours."""
    period, angle = random.uniform(3, 10) * FINE, random.uniform(0, math.pi)
    y, x = np.mgrid[0:side, 0:side] * (2 * math.pi / period)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kind = random.integers(3)
    wave = [np.sign(np.sin(u)), np.sign(np.sin(u) * np.sin(v)), np.sin(u)][kind]
    share = (wave[..., None] + 1) / 2
    return (share * np.array(_colour(random)) + (1 - share) * np.array(_colour(random))).astype(np.uint8)


def _shape(random: np.random.Generator, pen: ImageDraw.ImageDraw, side: int) -> None:
    """A filled ellipse, polygon or ring, white on the mask."""
    cx, cy = random.uniform(0, side, 2)
    r = random.uniform(0.08, 0.35) * side
    kind = random.integers(3)
    if kind == 0:
        s = r * random.uniform(0.4, 1)
        pen.ellipse((cx - r, cy - s, cx + r, cy + s), fill=255)
    elif kind == 1:
        turns = np.sort(random.uniform(0, 2 * math.pi, int(random.integers(3, 7))))
        pen.polygon([(cx + r * math.cos(t), cy + r * math.sin(t)) for t in turns], fill=255)
    else:
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), outline=255, width=int(random.uniform(1, 4) * FINE))


def _writing(random: np.random.Generator, pen: ImageDraw.ImageDraw, side: int) -> None:
    """A line of characters of no script: each some strokes between the points of a small grid."""
    height = random.uniform(7, 14) * FINE
    x, y = random.uniform(-0.1, 0.4) * side, random.uniform(0, side - height)
    ink, width = _colour(random), max(int(random.uniform(0.8, 2.0) * FINE), 1)
    for _ in range(int(random.integers(4, 12))):
        for _ in range(int(random.integers(2, 5))):
            a, b = random.integers(0, 3, 2), random.integers(0, 3, 2)
            ends = [(x + p[0] * height * 0.25, y + p[1] * height * 0.5) for p in (a, b)]
            pen.line(ends, fill=ink, width=width)
        x += height * 0.75
