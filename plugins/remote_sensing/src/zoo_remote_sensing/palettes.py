"""Label sets of the change data sets: names come from ``labels/*.txt``, colours from the data sets."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from zoo_registry import package_path

Colour = tuple[int, int, int]
#: SECOND and xBD: as ChangeMamba's code draws them; Landsat-SCD: names and colours as in Open-CD's
#: ``opencd/datasets/landsat.py``, unchanged in black instead of white
COLOURS: dict[str, list[Colour]] = {
    "change": [(0, 0, 0), (255, 0, 0)],
    "second": [(0, 0, 0), (0, 128, 0), (128, 128, 128), (0, 255, 0), (0, 0, 255), (128, 0, 0), (255, 0, 0)],
    "landsat_scd": [(0, 0, 0), (0, 155, 0), (255, 165, 0), (230, 30, 100), (0, 170, 240)],
    "xbd": [(0, 0, 0), (70, 181, 121), (167, 187, 27), (228, 189, 139), (181, 70, 70)],
}


def label_set(name: str) -> list[str]:
    """The names of a label set of this plugin ("second"), class 0 first."""
    return package_path("zoo_remote_sensing", f"labels/{name}.txt").read_text(encoding="utf-8").splitlines()


def colours(names: Sequence[str]) -> list[Colour]:
    """One colour for each class: the data set's own for a known label set, evenly spaced hues otherwise (0: black)."""
    for key, palette in COLOURS.items():
        if len(palette) == len(names) and list(names) == label_set(key):
            return palette
    hues = [colorsys.hsv_to_rgb(i / max(len(names) - 1, 1), 0.75, 0.9) for i in range(len(names) - 1)]
    return [(0, 0, 0)] + [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in hues]


def class_names(names: Sequence[str] | None, count: int) -> list[str]:
    """``names`` if there is one for each of ``count`` classes, else "class 0", "class 1" ..."""
    return list(names) if names is not None and len(names) == count else [f"class {i}" for i in range(count)]
