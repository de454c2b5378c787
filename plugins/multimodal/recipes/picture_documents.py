"""Documents of small pictures and their captions, for the Mixture-of-Mamba demo.

A picture has 16 by 16 pixels, a white ground and a shape in some of its quarters: square, disc, triangle or ring in one
of four colours. Its caption names the quarters in reading order: "red disc, empty, blue ring, green square". A document
has two pictures with their captions, both captions before their pictures or both behind. There are 83521 pictures, so
those of another seed are new but for a few.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (240, 200, 40)}
SHAPES = ("square", "disc", "triangle", "ring")
KINDS = ["empty", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)]
Quarters = tuple[int, int, int, int]  # numbers of KINDS, in reading order


def caption(quarters: Quarters) -> str:
    return ", ".join(KINDS[i] for i in quarters)


def draw(quarters: Quarters) -> np.ndarray:
    """(16, 16, 3) bytes."""
    y, x = np.mgrid[0:8, 0:8] - 3.5
    away = np.hypot(x, y)
    inside = {
        "square": np.ones((8, 8), bool),
        "disc": away < 4.1,
        "ring": (away < 4.1) & (away > 2.0),
        "triangle": np.abs(x) <= (y + 4.5) / 2,
    }
    picture = np.full((16, 16, 3), 255, np.uint8)
    for place, kind in enumerate(quarters):
        if kind:
            colour, shape = KINDS[kind].split()
            top, left = 8 * (place // 2), 8 * (place % 2)
            picture[top : top + 8, left : left + 8][inside[shape]] = COLOURS[colour]
    return picture


def document(pictures: list[Quarters], caption_first: bool) -> list[dict]:
    """Segments, pictures as arrays."""
    pairs = [({"text": caption(q)}, {"image": draw(q)}) for q in pictures]
    return [s for text, image in pairs for s in ((text, image) if caption_first else (image, text))]


def pictures(count: int, seed: int) -> list[Quarters]:
    r = np.random.default_rng(seed)
    return [tuple(row) for row in r.integers(0, len(KINDS), (count, 4)).tolist()]


def documents(count: int, seed: int) -> list[list[dict]]:
    own, first = pictures(2 * count, seed), np.random.default_rng(seed + 1_000_000).integers(0, 2, count)
    return [document(own[2 * i : 2 * i + 2], bool(first[i])) for i in range(count)]


def write_folder(folder: str | Path, count: int, seed: int) -> Path:
    """``documents.jsonl`` with its pictures beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, segments in enumerate(documents(count, seed)):
        own = []
        for j, segment in enumerate(segments):
            if "image" in segment:
                Image.fromarray(segment["image"]).save(folder / f"{i}_{j}.png")
                segment = {"image": f"{i}_{j}.png"}
            own.append(segment)
        lines.append(json.dumps({"segments": own}))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
