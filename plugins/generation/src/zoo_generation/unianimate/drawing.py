"""Skeletons drawn as the network was shown them: limbs as flat ellipses at 60 %, joints and fingers above them.

Source of colours and sizes: ali-vilab/UniAnimate @ 643c963 ``dwpose/util.py``, whose pictures are written and read
again with red and blue exchanged; the colours here are those that the network sees. Without OpenCV a few pixels at the
edges fall otherwise than the original's.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from .poses import HAND, Poses

SIZE = (512, 768)  #: the original draws on this, whatever the video's size, and resizes
#: pairs of body points, in the order of :data:`COLOURS`
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19),
)  # fmt: skip
COLOURS = (
    (0, 0, 255), (0, 85, 255), (0, 170, 255), (0, 255, 255), (0, 255, 170), (0, 255, 85), (0, 255, 0), (85, 255, 0),
    (170, 255, 0), (255, 255, 0), (255, 170, 0), (255, 85, 0), (255, 0, 0), (255, 0, 85), (255, 0, 170), (255, 0, 255),
    (170, 0, 255), (85, 0, 255), (255, 255, 170), (0, 255, 255),
)  # fmt: skip
FINGERS = tuple((0 if i % 4 == 1 else i - 1, i) for i in range(1, HAND))


def draw(poses: Poses, size: tuple[int, int] = SIZE, *, width: float | None = None, face: bool = False) -> np.ndarray:
    """Every frame as a picture, (frames, height, width, 3) uint8; size (width, height) in pixels.

    width: half a limb's thickness and a joint's radius in pixels; None: 4 for the original's size, in proportion for
    others. face: also its points, which the original leaves out.
    """
    return np.stack([_frame(poses, i, size, width, face) for i in range(len(poses))])


def _frame(poses: Poses, index: int, size: tuple[int, int], width: float | None, face: bool) -> np.ndarray:
    width = 4 * min(size[0] / SIZE[0], size[1] / SIZE[1]) if width is None else width
    scale = np.array(size, float)
    body, image = poses.body[index] * scale, Image.new("RGB", size)
    pen = ImageDraw.Draw(image)
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        if not np.isnan(body[[a, b]]).any():
            pen.polygon(_ellipse(body[a], body[b], width), fill=tuple(int(c * 0.6) for c in colour))
    for point, colour in zip(body, COLOURS, strict=True):
        _dot(pen, point, width, colour)
    for hand in poses.hands[index] * scale:
        for i, (a, b) in enumerate(FINGERS):
            if not np.isnan(hand[[a, b]]).any():
                shade = colorsys.hsv_to_rgb(i / len(FINGERS), 1.0, 1.0)[::-1]
                line = [tuple(hand[a]), tuple(hand[b])]
                pen.line(line, fill=tuple(int(255 * c) for c in shade), width=max(round(width / 2), 1))
        for point in hand:
            _dot(pen, point, width, (255, 0, 0))
    if face:
        for point in poses.face[index] * scale:
            _dot(pen, point, 0.75 * width, (255, 255, 255))
    return np.asarray(image)


def _dot(pen: ImageDraw.ImageDraw, point: np.ndarray, radius: float, colour: tuple[int, ...]) -> None:
    if not np.isnan(point).any():
        x, y = point
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _ellipse(a: np.ndarray, b: np.ndarray, width: float) -> list[tuple[float, float]]:
    """The outline of an ellipse from a to b, ``width`` half as thick."""
    (x, y), half = (a + b) / 2, np.linalg.norm(b - a) / 2
    turn = math.atan2(b[1] - a[1], b[0] - a[0])
    around = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    u, v = half * np.cos(around), max(width, 0.5) * np.sin(around)
    xs, ys = x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))
