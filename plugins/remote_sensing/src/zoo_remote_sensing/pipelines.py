"""Pairs of images to maps of change: binary, from-to, or building damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .tiling import tiled

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
#: colours of the published label sets by the number of classes: SECOND (7), xBD (5), changed or not (2)
COLOURS = {
    2: [(0, 0, 0), (255, 0, 0)],
    5: [(0, 0, 0), (70, 181, 121), (167, 187, 27), (228, 189, 139), (181, 70, 70)],
    7: [(0, 0, 0), (0, 128, 0), (128, 128, 128), (0, 255, 0), (0, 0, 255), (128, 0, 0), (255, 0, 0)],
}
SECOND = ("background", "low vegetation", "non-vegetated ground", "tree", "water", "building", "playground")
XBD = ("background", "no damage", "minor damage", "major damage", "destroyed")


@dataclass
class Scene:
    """One date: (H, W, 3) uint8, and its place on the ground where the file has one."""

    pixels: np.ndarray
    name: str
    crs: Any = None
    transform: Any = None  #: rasterio's affine transform

    @property
    def pixel_area(self) -> float | None:
        """Square metres, for projections in metres; None otherwise."""
        if self.transform is None or self.crs is None or not self.crs.is_projected:
            return None
        metres = float(self.crs.linear_units_factor[1])
        return abs(self.transform.a * self.transform.e - self.transform.b * self.transform.d) * metres**2


def _bad(message: str) -> errors.BadArgument:
    return errors.BadArgument(message, argument="inputs", accepted=[])


def open_scene(source: Any) -> Scene:
    """A PNG or JPG, an (H, W, 3) uint8 array, a PIL image, or a GeoTIFF (which needs the extra ``[geo]``)."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise _bad(f"an array of {source.dtype} and shape {source.shape} was given; expected uint8 (H, W, 3)")
        return Scene(source, "array")
    if isinstance(source, Image.Image):
        return Scene(np.asarray(source.convert("RGB")), "image")
    path = Path(source)
    if path.suffix.lower() in (".tif", ".tiff"):
        return _open_tiff(path)
    try:
        with Image.open(path) as image:
            return Scene(np.asarray(image.convert("RGB")), str(path))
    except OSError as error:
        raise _bad(f"{path} is not an image that can be read ({error}); expected {', '.join(EXTENSIONS)}") from error


def _open_tiff(path: Path) -> Scene:
    try:
        import rasterio
    except ImportError as error:
        raise errors.MissingExtra(
            f"reading {path.name} needs rasterio: pip install 'ssm-zoo-remote-sensing[geo]' (PNG and JPG do not)",
            extra="geo",
            command="pip install 'ssm-zoo-remote-sensing[geo]'",
        ) from error
    with rasterio.open(path) as file:
        if file.count < 3 or file.dtypes[0] != "uint8":
            raise _bad(f"{path} has {file.count} bands of {file.dtypes[0]}; expected 3 of uint8, in the order RGB")
        pixels = file.read([1, 2, 3]).transpose(1, 2, 0)
        return Scene(pixels, str(path), file.crs, file.transform if file.crs else None)


def check_pair(before: Scene, after: Scene) -> None:
    """Raises BadArgument naming what differs: size, projection or place."""
    names = f"{before.name} and {after.name}"
    if before.pixels.shape != after.pixels.shape:
        sizes = " and ".join(f"{s.pixels.shape[1]} x {s.pixels.shape[0]}" for s in (before, after))
        raise _bad(f"{names} are {sizes} pixels; expected one size: cut or resample them to one grid")
    if before.crs != after.crs:
        raise _bad(f"{names} have the projections {before.crs} and {after.crs}; expected one: reproject one of them")
    if before.transform is not None and not before.transform.almost_equals(after.transform, precision=1e-6):
        raise _bad(f"{names} lie on different grids ({before.transform[:6]} and {after.transform[:6]}); align them")


@dataclass(kw_only=True)
class ChangeMap(Result):
    """What changed between two dates. Maps are (H, W) uint8."""

    changed: np.ndarray = field(repr=False)  #: 1 where anything changed (damage: where a building stood)
    before: np.ndarray | None = field(default=None, repr=False)  #: classes of the earlier date, 0 where unchanged
    after: np.ndarray | None = field(default=None, repr=False)  #: classes of the later date, or damage grades
    share: float = 0.0  #: of the pixels that changed, 0 to 1
    hectares: float | None = None  #: where the pixels' size on the ground is known
    counts: dict[str, int] = field(default_factory=dict)  #: pixels of each "from > to", or of each damage grade
    scene: Scene | None = field(default=None, repr=False)

    def summary(self) -> str:
        area = "" if self.hectares is None else f", {self.hectares:.2f} ha"
        most = sorted(self.counts.items(), key=lambda item: -item[1])[:3]
        return f"{self.share:.1%} changed{area}" + "".join(f"; {name}: {n} px" for name, n in most)

    def picture(self) -> Image.Image | None:
        """The later date with the map over it, half transparent."""
        if self.scene is None:
            return None
        classes = self.changed if self.after is None else self.after
        count = next(n for n in (2, 7 if self.before is not None else 5, 256) if classes.max() < n)
        palette = np.array(COLOURS.get(count, COLOURS[2]), np.float32)
        colour = palette[np.minimum(classes, len(palette) - 1)]
        mixed = np.where((classes > 0)[..., None], 0.5 * self.scene.pixels + 0.5 * colour, self.scene.pixels)
        return Image.fromarray(mixed.astype(np.uint8))

    def save_geotiff(self, path: str | Path) -> Path:
        """Write the maps as bands of a GeoTIFF with the scene's own georeference (needs the extra ``[geo]``)."""
        import rasterio

        bands = [m for m in (self.changed, self.before, self.after) if m is not None]
        where = {} if self.scene is None else {"crs": self.scene.crs, "transform": self.scene.transform}
        with rasterio.open(
            path, "w", driver="GTiff", height=bands[0].shape[0], width=bands[0].shape[1], count=len(bands),
            dtype="uint8", compress="deflate", **{k: v for k, v in where.items() if v is not None},
        ) as file:  # fmt: skip
            for i, band in enumerate(bands, start=1):
                file.write(band, i)
        return Path(path)


class ChangeDetection(Pipeline):
    """Two images of one place to a :class:`ChangeMap`: ``pipe(("before.png", "after.png"))``.

    ``tile``, ``overlap``: pixels; scenes larger than a tile are cut into tiles that overlap and are blended.
    ``pixel_area``: square metres a pixel covers, where the file does not say. The kind of answer follows from the
    model: binary (logits), semantic (:class:`SemanticChange`) or damage (:class:`Damage`).
    """

    task = "binary-change-detection"
    extensions = EXTENSIONS
    files_per_sample = 2

    def __init__(self, model: nn.Module, tile: int = 512, overlap: int = 64, pixel_area: float | None = None) -> None:
        super().__init__(model)
        if tile < 32 or not 0 <= overlap < tile:
            raise errors.BadArgument(
                f"tile is {tile} and overlap {overlap}; expected tile >= 32 and 0 <= overlap < tile",
                argument="tile",
                accepted=[],
            )
        self.tile, self.overlap, self.pixel_area = tile, overlap, pixel_area
        settings = self.preprocess
        self.mean = torch.tensor(settings.get("mean", (0.485, 0.456, 0.406))).view(3, 1, 1)
        self.std = torch.tensor(settings.get("std", (0.229, 0.224, 0.225))).view(3, 1, 1)

    def read(self, source: Any) -> tuple[Scene, Scene]:
        before, after = (open_scene(one) for one in source)
        check_pair(before, after)
        return before, after

    def prepare(self, sample: Any) -> tuple[Tensor, Tensor]:
        before, after = (
            (torch.from_numpy(s.pixels.copy()).permute(2, 0, 1) / 255 - self.mean) / self.std for s in sample
        )
        return before, after

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return tiled(self._probabilities, batch, self.tile, self.overlap)

    def _probabilities(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        output = self.model(before, after)
        maps = {"change": output} if isinstance(output, Tensor) else output._asdict()
        return {name: logits.softmax(1) for name, logits in maps.items()}

    def finish(self, output: Any, sample: Any) -> ChangeMap:
        maps = {name: p.argmax(0).numpy().astype(np.uint8) for name, p in output.items()}
        changed = maps.get("change", maps.get("building"))
        assert changed is not None
        result = ChangeMap(changed=changed, scene=sample[1])
        if "damage" in maps:
            result.after = maps["damage"] * (changed > 0)
            result.counts = {_name(XBD, g): int((result.after == g).sum()) for g in range(1, len(output["damage"]))}
            changed = result.after > 1  # "no damage" is no change
        elif "before" in maps:
            result.before, result.after = (maps[k] * (changed > 0) for k in ("before", "after"))
            pairs, numbers = np.unique(
                np.stack([result.before, result.after])[:, changed > 0], axis=1, return_counts=True
            )
            names = SECOND if len(output["before"]) == len(SECOND) else ()
            result.counts = {
                f"{_name(names, a)} > {_name(names, b)}": int(n) for (a, b), n in zip(pairs.T, numbers, strict=True)
            }
        result.share = float((changed > 0).mean())
        area = self.pixel_area if self.pixel_area is not None else sample[0].pixel_area
        result.hectares = None if area is None else float((changed > 0).sum()) * area / 1e4
        return result


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"


class SemanticChangeDetection(ChangeDetection):
    """:class:`ChangeDetection` with a from-to table."""

    task = "semantic-change-detection"


class DamageAssessment(ChangeDetection):
    """:class:`ChangeDetection` with damage grades of buildings."""

    task = "damage-assessment"
