"""What changed between two dates: counts and areas, from-to tables, buildings by damage, and pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.files import check_ending, whole
from zoo.pipelines import Result

from .palettes import colours
from .rasters import GEOTIFFS, NO_DATA, MapWriter, Scene

#: longer side of an overlay in pixels; larger scenes are thinned to it
PICTURE_SIDE = 2048
#: endings of the files that maps are written to
MAPS = (*GEOTIFFS, ".png")
#: rows of a map that are looked at together when its objects are counted
STRIP = 64
#: a reader of a map: (top, left, height, width) -> {layer: (height, width) uint8}
ReadMaps = Callable[[int, int, int, int], dict[str, np.ndarray]]


@dataclass(kw_only=True)
class ChangeSummary(Result):
    """What changed, in numbers. Pixels without data at one of the dates count nowhere."""

    kind: str = "binary"  #: "binary", "semantic" or "damage"
    pixels: int = 0  #: with data
    changed_pixels: int = 0  #: of these, changed (damage: minor damage and worse)
    share: float = 0.0  #: changed_pixels / pixels
    hectares: float | None = None  #: changed, where the size of a pixel on the ground is known
    pixel_area: float | None = None  #: square metres
    #: from -> to -> pixels (semantic models)
    from_to: dict[str, dict[str, int]] = field(default_factory=dict)
    #: damage grade -> pixels, and -> buildings (damage models; a building has the grade of most of its pixels)
    damage_pixels: dict[str, int] = field(default_factory=dict)
    buildings: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  #: what was written

    def summary(self) -> str:
        area = "" if self.hectares is None else f" ({self.hectares:.2f} ha)"
        text = f"{self.share:.1%} {'damaged' if self.kind == 'damage' else 'changed'}{area}"
        pairs = sorted(((n, a, b) for a, row in self.from_to.items() for b, n in row.items()), reverse=True)
        text += "".join(f"; {a} > {b}: {self._size(n)}" for n, a, b in pairs[:3])
        return text + "".join(f"; {grade}: {n} buildings" for grade, n in self.buildings.items())

    def _size(self, pixels: int) -> str:
        return f"{pixels} px" if self.pixel_area is None else f"{pixels * self.pixel_area / 1e4:.2f} ha"

    def rows(self) -> list[tuple[str, str, int, float | None]]:
        """(from, to, pixels, hectares) of every kind of change, largest first; for damage (grade, "", ...)."""
        found = [(a, b, n) for a, row in self.from_to.items() for b, n in row.items()]
        found += [(grade, "", n) for grade, n in self.damage_pixels.items()]
        area = self.pixel_area
        return [
            (a, b, n, None if area is None else n * area / 1e4) for a, b, n in sorted(found, key=lambda row: -row[2])
        ]


@dataclass(kw_only=True)
class ChangeMap(ChangeSummary):
    """A :class:`ChangeSummary` and its maps, (H, W) uint8; 255 where one of the dates has no data."""

    changed: np.ndarray = field(repr=False)  #: 1 where anything changed (damage: where a building stood)
    before: np.ndarray | None = field(default=None, repr=False)  #: classes of the earlier date, 0 where unchanged
    after: np.ndarray | None = field(default=None, repr=False)  #: classes of the later date, or damage grades
    scene: Scene | None = field(default=None, repr=False)  #: the later date
    layers: dict[str, list[str]] = field(default_factory=dict, repr=False)  #: map -> names of its classes

    def read(self, top: int, left: int, height: int, width: int) -> dict[str, np.ndarray]:
        """A window of the maps, by name."""
        window = (slice(top, top + height), slice(left, left + width))
        return {name: getattr(self, name)[window] for name in self.layers}

    def picture(self) -> Image.Image | None:
        """The later date with the map over it, half transparent; thinned to at most 2048 pixels a side."""
        if self.scene is None:
            return None
        try:
            return overlay(self.scene, self.read, self.layers)
        finally:
            self.scene.close()

    def save(self, path: str | Path) -> Path:
        """Write the maps: ``.tif`` with the scene's own georeference (extra ``[geo]``), or ``.png`` (the last map)."""
        if Path(path).suffix.lower() in GEOTIFFS:
            return self.save_geotiff(path)
        check_ending(path, MAPS)
        name, names = list(self.layers.items())[-1]
        image = Image.fromarray(getattr(self, name)).convert("P")
        image.putpalette([v for colour in colours(names) for v in colour])
        with whole(path) as work:
            image.save(work)
        return Path(path)

    def save_geotiff(self, path: str | Path) -> Path:
        """Write the maps as bands of a GeoTIFF at the scene's place (needs the extra ``[geo]``)."""
        assert self.scene is not None
        with MapWriter(path, self.scene, self.layers, colours(list(self.layers.values())[-1])) as writer:
            writer.write(0, 0, self.read(0, 0, *self.changed.shape))
        return Path(path)


class Tally:
    """Counts over blocks of maps, and the summary of them."""

    def __init__(self, kind: str, layers: dict[str, list[str]]) -> None:
        self.kind, self.layers = kind, layers
        classes = len(list(layers.values())[-1])
        self.pixels = self.changed = 0
        self.pairs = np.zeros((classes, classes), np.int64)
        self.grades = np.zeros(classes, np.int64)

    def add(self, maps: dict[str, np.ndarray]) -> None:
        valid = maps["changed"] != NO_DATA
        self.pixels += int(valid.sum())
        last = next(reversed(maps.values()))
        if self.kind == "damage":
            self.grades += np.bincount(last[valid], minlength=len(self.grades))
            self.changed += int((last[valid] > 1).sum())  # "no damage" is no change
            return
        changed = valid & (maps["changed"] > 0)
        self.changed += int(changed.sum())
        if self.kind == "semantic":
            size = len(self.pairs)
            codes = maps["before"][changed].astype(np.int64) * size + maps["after"][changed]
            self.pairs += np.bincount(codes, minlength=size**2).reshape(size, size)

    def fill(self, result: ChangeSummary, pixel_area: float | None) -> None:
        """Write the counts into ``result``."""
        names = list(self.layers.values())[-1]
        result.kind, result.pixels, result.changed_pixels = self.kind, self.pixels, self.changed
        result.share = self.changed / self.pixels if self.pixels else 0.0
        result.pixel_area = pixel_area
        result.hectares = None if pixel_area is None else self.changed * pixel_area / 1e4
        if self.kind == "semantic":
            result.from_to = {
                names[a]: {names[b]: int(n) for b, n in enumerate(row) if n}
                for a, row in enumerate(self.pairs)
                if row.any()
            }
        elif self.kind == "damage":
            result.damage_pixels = {names[g]: int(self.grades[g]) for g in range(1, len(names))}


def windows(height: int, width: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) in pixels of the squares of ``side`` that cover a scene without overlap."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield top, left, min(side, height - top), min(side, width - left)


def overlay(scene: Scene, read: ReadMaps, layers: dict[str, list[str]], side: int = PICTURE_SIDE) -> Image.Image:
    """The scene with its last map over it, half transparent. Every n-th pixel of scenes longer than ``side``."""
    name, names = list(layers.items())[-1]
    palette = np.zeros((256, 3), np.float32)
    palette[: len(names)] = colours(names)
    step = -(-max(scene.height, scene.width) // side)
    shown = np.empty((-(-scene.height // step), -(-scene.width // step), 3), np.uint8)
    for top, left, height, width in windows(scene.height, scene.width, 512):
        picked = (slice(-top % step, None, step), slice(-left % step, None, step))
        classes = read(top, left, height, width)[name][picked]
        pixels = scene.read(top, left, height, width)[picked]
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
        over = ((classes > 0) & (classes != NO_DATA))[..., None]
        mixed = np.where(over, 0.5 * pixels + 0.5 * palette[classes], pixels).astype(np.uint8)
        y, x = -(-top // step), -(-left // step)
        shown[y : y + mixed.shape[0], x : x + mixed.shape[1]] = mixed
    return Image.fromarray(shown)


def count_buildings(read: ReadMaps, height: int, width: int, names: list[str], band: str) -> dict[str, int]:
    """Connected groups of damage grades (1 on), each counted under the grade of most of its pixels (ties: the worse).

    The map is read in strips; groups that cross strips are joined along the seam.
    """
    from scipy.ndimage import label

    parents: list[int] = [0]
    grades: list[np.ndarray] = [np.zeros(len(names), np.int64)]

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    above = np.zeros(width, np.int64)
    for top in range(0, height, STRIP):
        classes = read(top, 0, min(STRIP, height - top), width)[band]
        classes = np.where(classes == NO_DATA, 0, classes)
        found, count = label(classes > 0, structure=np.ones((3, 3)))
        table = np.bincount(found.ravel() * len(names) + classes.ravel(), minlength=(count + 1) * len(names))
        numbers = np.where(found > 0, found.astype(np.int64) + len(parents) - 1, 0)
        parents.extend(range(len(parents), len(parents) + count))
        grades.extend(table.reshape(count + 1, len(names))[1:])
        for move in (-1, 0, 1):  # 8 neighbours
            upper = np.zeros_like(above)
            upper[max(move, 0) : width + min(move, 0)] = above[max(-move, 0) : width - max(move, 0)]
            both = (upper > 0) & (numbers[0] > 0)
            for a, b in np.unique(np.stack([upper[both], numbers[0][both]]), axis=1).T:
                parents[root(int(b))] = root(int(a))
        above = numbers[-1]
    totals: dict[int, np.ndarray] = {}
    for i in range(1, len(parents)):
        totals[root(i)] = totals.get(root(i), 0) + grades[i]
    counts = dict.fromkeys(names[1:], 0)
    for table in totals.values():
        best: Any = len(names) - 1 - int(np.argmax(table[:0:-1]))
        counts[names[best]] += 1
    return counts
