"""Scenes as files: read window by window, checked against each other, and written back to the same place on the ground.

GeoTIFFs and ENVI files go through rasterio (extra ``[geo]``), pictures through Pillow. Nothing here reads a whole
GeoTIFF: memory grows with the window that is asked for.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo_registry import errors, optional

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
GEOTIFFS = (".tif", ".tiff")
EXTENSIONS = PICTURES + GEOTIFFS
#: value of pixels that have no data in one of the scenes, in the maps that are written
NO_DATA = 255
#: GDAL's block cache in MB; its own default is a share of the machine's memory
CACHE_MB = 64


def bad_input(message: str, argument: str = "inputs") -> errors.BadArgument:
    """A ``BadArgument`` about a file that was given."""
    return errors.BadArgument(message, argument=argument, accepted=[])


def require_rasterio(what: str) -> Any:
    """The module, or ``MissingExtra`` saying how to get it."""
    return optional("rasterio", what, "ssm-zoo-remote-sensing[geo]", otherwise="PNG and JPG do not need it")


@contextlib.contextmanager
def without_place_warning() -> Iterator[None]:
    """rasterio warns of files without a georeference; here they are as good as pictures."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextlib.contextmanager
def small_cache() -> Iterator[None]:
    """Keep GDAL's block cache small, where rasterio is installed: memory must not grow with the scene."""
    try:
        import rasterio
    except ImportError:
        yield
        return
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
        yield


@dataclass
class Scene:
    """One date: size, bands and place on the ground, and its pixels window by window.

    ``bands`` are the three (or ``in_chans``) band numbers that :meth:`read` returns, counted from 1. ``value_range``
    (low, high) is mapped to 0 to 255; without it the values must be uint8.
    """

    name: str
    height: int
    width: int
    bands: tuple[int, ...] = (1, 2, 3)
    band_count: int = 3
    dtype: str = "uint8"
    crs: Any = None
    #: what rasterio needs to write a file at the same place: crs and transform, or ground control points
    place: dict[str, Any] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)  #: (H, W, bands), of scenes in memory
    file: Any = field(default=None, repr=False)  #: an open rasterio data set otherwise

    @property
    def transform(self) -> Any:
        return self.place.get("transform")

    @property
    def pixel_area(self) -> float | None:
        """Square metres, for projections in a unit of length; None otherwise."""
        if self.transform is None or self.crs is None or not self.crs.is_projected:
            return None
        metres = float(self.crs.linear_units_factor[1])
        return abs(self.transform.a * self.transform.e - self.transform.b * self.transform.d) * metres**2

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window of the chosen bands, (height, width, bands) uint8."""
        if self.pixels is not None:
            return self.pixels[top : top + height, left : left + width]
        from rasterio.windows import Window

        window = Window(left, top, width, height)
        values = self.file.read(list(self.bands), window=window).transpose(1, 2, 0)
        if self.value_range is not None:
            low, high = self.value_range
            scaled = (values.astype(np.float32) - low) * (255.0 / (high - low))
            values = np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)
        return values

    def read_valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Where a window has data, (height, width) bool; None: everywhere (the file marks no pixels as missing)."""
        if self.file is None:
            return None
        from rasterio.enums import MaskFlags
        from rasterio.windows import Window

        if all(MaskFlags.all_valid in flags for flags in self.file.mask_flag_enums):
            return None
        return self.file.dataset_mask(window=Window(left, top, width, height)) != 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def open_scene(
    source: Any,
    *,
    bands: Sequence[int] | None = None,
    value_range: Sequence[float] | None = None,
    channels: int = 3,
) -> Scene:
    """A GeoTIFF (its header only), a picture, a PIL image or an array (H, W, ``channels``) of uint8.

    Raises BadArgument for what cannot be read, and MissingExtra for a GeoTIFF without rasterio.
    """
    if isinstance(source, Scene):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != channels:
            raise bad_input(
                f"an array of {source.dtype} and shape {source.shape} was given; expected uint8 (H, W, {channels})"
            )
        return _in_memory(source, "array")
    if isinstance(source, Image.Image):
        return _in_memory(_colours(source, channels, "image"), "image")
    if not isinstance(source, (str, Path)):
        raise bad_input(f"a {type(source).__name__} was given; expected a file, a PIL image or an array of uint8")
    path = Path(source)
    if path.suffix.lower() in GEOTIFFS:
        return _open_raster(path, bands, value_range, channels)
    try:
        with Image.open(path) as image:
            return _in_memory(_colours(image, channels, str(path)), str(path))
    except OSError as error:
        raise bad_input(
            f"{path} is not an image that can be read ({error}); expected {', '.join(EXTENSIONS)}"
        ) from error


def _colours(image: Image.Image, channels: int, name: str) -> np.ndarray:
    if channels != 3:
        raise bad_input(f"{name} is a picture of 3 colours; the model takes {channels} bands: give GeoTIFFs or arrays")
    return np.asarray(image.convert("RGB"))


def _in_memory(pixels: np.ndarray, name: str) -> Scene:
    height, width, count = pixels.shape
    return Scene(name, height, width, tuple(range(1, count + 1)), count, pixels=pixels)


def _open_raster(path: Path, bands: Sequence[int] | None, value_range: Sequence[float] | None, channels: int) -> Scene:
    rasterio = require_rasterio(f"reading {path.name}")
    try:
        with without_place_warning():
            file = rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise bad_input(f"{path} is not a raster that can be read ({error})") from error
    chosen = tuple(int(b) for b in bands) if bands is not None else tuple(range(1, channels + 1))
    if len(chosen) != channels:
        raise bad_input(f"bands is {list(chosen)}; the model takes {channels} bands", "bands")
    if file.count < max(chosen) or min(chosen) < 1:
        raise bad_input(
            f"{path} has {file.count} band{'s' if file.count != 1 else ''}; expected bands {list(chosen)} "
            "(red, green, blue; bands=(3, 2, 1) chooses others)"
        )
    dtype = file.dtypes[chosen[0] - 1]
    limits = None
    if value_range is not None:
        limits = (float(value_range[0]), float(value_range[1]))
        if limits[0] >= limits[1]:
            raise bad_input(f"value_range is {limits}; expected (low, high) with low < high", "value_range")
    elif dtype != "uint8":
        raise bad_input(
            f"{path} holds {dtype}; expected uint8. Give the values that become 0 and 255 as value_range=(low, high), "
            "for example (0, 3000) for Sentinel-2 reflectances"
        )
    scene = Scene(
        str(path), file.height, file.width, chosen, file.count, dtype, file.crs, place(file), limits, file=file
    )
    return scene


def place(file: Any) -> dict[str, Any]:
    """Where an open raster lies on the ground, as arguments of ``rasterio.open(..., "w")``; {} if it does not say."""
    points, projection = file.gcps
    if points and file.transform.is_identity:
        return {"gcps": points, "crs": projection}
    if file.crs is None and file.transform.is_identity:
        return {}
    return {"transform": file.transform} | ({} if file.crs is None else {"crs": file.crs})


def check_pair(before: Scene, after: Scene) -> None:
    """Raises BadArgument naming what differs: size, bands, type, projection or place."""
    names = f"{before.name} and {after.name}"
    if (before.height, before.width) != (after.height, after.width):
        sizes = " and ".join(f"{s.width} x {s.height}" for s in (before, after))
        raise bad_input(f"{names} are {sizes} pixels; expected one size: cut or resample them to one grid")
    if before.band_count != after.band_count:
        raise bad_input(
            f"{names} have {before.band_count} and {after.band_count} bands; expected the same bands at both dates"
        )
    if before.dtype != after.dtype:
        raise bad_input(f"{names} hold {before.dtype} and {after.dtype}; expected one type of values")
    if before.crs != after.crs:
        shown = " and ".join(str(s.crs) if s.crs is not None else "none" for s in (before, after))
        raise bad_input(f"{names} have the projections {shown}; expected one: reproject one of them")
    one, other = before.transform, after.transform
    if (one is None) != (other is None) or (one is not None and not _same_grid(one, other)):
        shown = " and ".join("none" if t is None else str(tuple(round(v, 6) for v in t[:6])) for t in (one, other))
        raise bad_input(f"{names} lie on different grids (transforms {shown}); align them to one grid")


def _same_grid(one: Any, other: Any) -> bool:
    """Whether two transforms agree to a hundredth of a pixel."""
    pixel = max(abs(one.a), abs(one.b), abs(one.d), abs(one.e))
    return all(abs(a - b) <= 0.01 * pixel for a, b in zip(one[:6], other[:6], strict=True))


class MapWriter:
    """Maps of classes written block by block, as GeoTIFF at the place of ``like``; use it in a ``with``.

    ``layers``: name -> names of the classes. The file appears under its name once it is complete.
    """

    def __init__(self, path: str | Path, like: Scene, layers: Mapping[str, Sequence[str]], palette: Any = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in GEOTIFFS:
            raise bad_input(f"{self.path} ends in {self.path.suffix or 'nothing'}; expected .tif", "path")
        rasterio = require_rasterio(f"writing {self.path.name}")
        self.layers = dict(layers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part.tif")
        blocks: dict[str, Any] = {}
        if like.height >= 256 and like.width >= 256:
            blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256}
        with without_place_warning():
            self.file = rasterio.open(
                self.part, "w", driver="GTiff", height=like.height, width=like.width, count=len(self.layers),
                dtype="uint8", compress="deflate", nodata=NO_DATA, BIGTIFF="IF_SAFER", **blocks, **like.place,
            )  # fmt: skip
        for i, (name, classes) in enumerate(self.layers.items(), start=1):
            self.file.set_band_description(i, name)
            self.file.update_tags(i, classes=", ".join(f"{k} {label}" for k, label in enumerate(classes)))
        if palette is not None and len(self.layers) == 1:  # TIFF knows a palette for single bands only
            self.file.write_colormap(1, {i: (*map(int, c), 255) for i, c in enumerate(palette)})

    def write(self, top: int, left: int, maps: Mapping[str, np.ndarray]) -> None:
        """``maps``: (height, width) uint8 by the names of the layers."""
        from rasterio.windows import Window

        height, width = next(iter(maps.values())).shape
        window = Window(left, top, width, height)
        self.file.write(np.stack([maps[name] for name in self.layers]), window=window)

    def __enter__(self) -> MapWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


class MapReader:
    """Windows of a file that :class:`MapWriter` wrote; use it in a ``with``, and call it with a box."""

    def __init__(self, path: Path, layers: Mapping[str, Sequence[str]]) -> None:
        rasterio = require_rasterio(f"reading {path.name}")
        with without_place_warning():
            self.file = rasterio.open(path)
        self.names = list(layers)

    def __call__(self, top: int, left: int, height: int, width: int) -> dict[str, np.ndarray]:
        from rasterio.windows import Window

        values = self.file.read(window=Window(left, top, width, height))
        return dict(zip(self.names, values, strict=True))

    def __enter__(self) -> MapReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
