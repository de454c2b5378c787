"""Label maps over grey slices, or over a picture, as one picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

#: colours of the labels, repeated when there are more
COLOURS = ((230, 60, 60), (60, 160, 230), (80, 190, 90), (240, 180, 40), (170, 90, 210), (60, 200, 190), (240, 130, 60))
_TILE = 160  # pixels of a slice's longer side, at least
_LINE = 14  # pixels of a line of the legend


def montage(
    image: np.ndarray, labels: np.ndarray, affine: np.ndarray, legend: Mapping[int, str], slices: int = 9
) -> Image.Image:
    """Axial slices spread over those that hold labels (or all), voxels square, the legend and a warning below.

    ``image``, ``labels``: (i, j, k) on one grid, ``affine`` of that grid. Drawn as radiologists look: the patient's
    right on the left, the front on top. ``legend``: label value -> text.
    """
    grey, colours, zooms = _standing(image, labels, affine)
    holding = np.flatnonzero((colours > 0).any(axis=(0, 1)))
    if len(holding) == 0:
        holding = np.arange(colours.shape[2])
    chosen = holding[np.linspace(0, len(holding) - 1, min(slices, len(holding))).round().astype(int)]
    low, high = np.percentile(grey, (1, 99))
    grey = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1) * 255
    extent = [n * z for n, z in zip(grey.shape[:2], zooms, strict=False)]
    scale = max(_TILE, *grey.shape[:2]) / max(extent)
    size = (max(1, round(extent[0] * scale)), max(1, round(extent[1] * scale)))
    columns = int(np.ceil(np.sqrt(len(chosen))))
    rows = -(-len(chosen) // columns)
    lines = [(value, legend[value]) for value in sorted(legend)]
    sheet = Image.new("RGB", (columns * size[0], rows * size[1] + _LINE * (len(lines) + 1)))
    for i, z in enumerate(chosen):
        tile = np.repeat(grey[:, :, z].T[::-1, ::-1, None], 3, axis=2)
        label = colours[:, :, z].T[::-1, ::-1]
        for value in np.unique(label[label > 0]):
            tile[label == value] = 0.5 * tile[label == value] + 0.5 * np.array(colour(int(value)), float)
        row, column = divmod(i, columns)
        drawn = Image.fromarray(tile.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        sheet.paste(drawn, (column * size[0], row * size[1]))
    draw = ImageDraw.Draw(sheet)
    for i, (value, text) in enumerate(lines):
        draw.text((4, rows * size[1] + i * _LINE), text, fill=colour(value))
    draw.text((4, rows * size[1] + len(lines) * _LINE), "not for clinical use", fill=(200, 200, 200))
    return sheet


def overlay(image: np.ndarray, labels: np.ndarray, legend: Mapping[int, str]) -> Image.Image:
    """A picture with its labels in colour, the legend and a warning below.

    ``image``: (channels, height, width), shown in its own range; the first three channels are colours, else grey.
    ``labels``: (height, width). ``legend``: label value -> text.
    """
    shown = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    low, high = float(shown.min()), float(shown.max())
    if low < 0 or high > 255 or high <= 1:  # no bytes
        shown = (shown - low) / max(high - low, 1e-6) * 255
    tile = np.ascontiguousarray(shown.transpose(1, 2, 0), np.float32)
    for value in np.unique(labels[labels > 0]):
        tile[labels == value] = 0.5 * tile[labels == value] + 0.5 * np.array(colour(int(value)), np.float32)
    lines = [(colour(value), legend[value]) for value in sorted(legend)] + [((200, 200, 200), "not for clinical use")]
    sheet = Image.new("RGB", (max(tile.shape[1], _TILE), tile.shape[0] + _LINE * len(lines)))
    sheet.paste(Image.fromarray(tile.round().astype(np.uint8)), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (ink, text) in enumerate(lines):
        draw.text((4, tile.shape[0] + i * _LINE), text, fill=ink)
    return sheet


def colour(value: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of label ``value``, 1 or more; colours repeat after the last."""
    return COLOURS[(value - 1) % len(COLOURS)]


def _standing(
    image: np.ndarray, labels: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Both with axes to the right, the front and up, and the voxel sizes in mm of these axes."""
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    zooms = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    order = np.argsort(turn[:, 0])
    return apply_orientation(image, turn), apply_orientation(labels, turn), tuple(float(zooms[i]) for i in order)
