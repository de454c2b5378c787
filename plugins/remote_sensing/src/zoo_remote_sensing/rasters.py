"""Scenes as files: read window by window, checked against each other, and written back to the same place on the ground.

GeoTIFFs and ENVI files go through rasterio (extra ``[geo]``), pictures through Pillow. Nothing here reads a whole
GeoTIFF: memory grows with the window that is asked for.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from zoo.files import check_place, existing, whole
from zoo.images import read_picture
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
    (low, high) is mapped to 0 to 255; without it the values must be uint8. A scene in a file is opened when it is read
    and after :meth:`close` again.
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
    pixels: np.ndarray | None = field(default=None, repr=False)  #: (H, W, chosen bands), of scenes in memory
    valid: np.ndarray | None = field(default=None, repr=False)  #: (H, W) bool, of scenes in memory: where data are
    path: Path | None = None  #: of scenes in files
    file: Any = field(default=None, repr=False)  #: the open rasterio data set

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
        """A window of the chosen bands, (height, width, bands) uint8. Raises BadFile for a damaged file."""
        if self.pixels is not None:
            return scaled(self.pixels[top : top + height, left : left + width], self.value_range)
        return scaled(self._values(top, left, height, width), self.value_range)

    def read_valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Where a window has data, (height, width) bool; None: everywhere (nothing marks pixels as missing).

        Missing are pixels of the file's nodata value, alpha or mask band, and those that are no finite numbers.
        """
        if self.path is None:
            return None if self.valid is None else self.valid[top : top + height, left : left + width]
        from rasterio.enums import MaskFlags
        from rasterio.windows import Window

        file = self._opened()
        found = None
        if not all(MaskFlags.all_valid in flags for flags in file.mask_flag_enums):
            with self._named():
                found = file.dataset_mask(window=Window(left, top, width, height)) != 0
        if self.dtype.startswith("float"):
            finite = np.isfinite(self._values(top, left, height, width)).all(-1)
            found = finite if found is None else found & finite
        return found

    def _values(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        from rasterio.windows import Window

        file = self._opened()
        with self._named():
            return file.read(list(self.bands), window=Window(left, top, width, height)).transpose(1, 2, 0)

    def _opened(self) -> Any:
        if self.file is None:
            assert self.path is not None
            self.file = open_raster(self.path)
        return self.file

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """GDAL's errors do not say which file they are about."""
        from rasterio.errors import RasterioIOError

        try:
            yield
        except RasterioIOError as error:
            reason = error.__cause__ or error
            raise errors.BadFile(f"{self.name} cannot be read; is it cut short? ({reason})", path=self.name) from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def scaled(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Values of a scene as uint8: (low, high) become 0 and 255; what is no number becomes 0."""
    if value_range is None:
        return values
    low, high = value_range
    found = (values.astype(np.float32) - low) * (255.0 / (high - low))
    return np.nan_to_num(found).clip(0, 255).round().astype(np.uint8)


def open_scene(
    source: Any,
    *,
    bands: Sequence[int] | None = None,
    value_range: Sequence[float] | None = None,
    channels: int = 3,
) -> Scene:
    """A GeoTIFF (its header only), a picture, a PIL image or an array (H, W, bands).

    ``bands``: which ``channels`` of them are read, counted from 1 (default: the first ones of a GeoTIFF, all of an
    array). ``value_range``: (low, high), for values that are not uint8. Transparent parts of pictures have no data.

    Raises BadArgument for what does not fit, BadFile for what cannot be read, LocalFileMissing for no file, and
    MissingExtra for a GeoTIFF without rasterio.
    """
    if isinstance(source, Scene):
        return source
    limits = None if value_range is None else _limits(value_range)
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.dtype.kind not in "uif" or 0 in source.shape:
            raise bad_input(
                f"an array of {source.dtype} and shape {source.shape} was given; expected uint8 (H, W, {channels})"
            )
        chosen = _chosen(bands, source.shape[2], channels, "the array", every=True)
        finite = np.asarray(np.isfinite(source).all(-1)) if source.dtype.kind == "f" else None
        return _in_memory(source, "array", chosen, limits, finite)
    if isinstance(source, Image.Image):
        return _picture(source, "image", bands, limits, channels)
    if not isinstance(source, (str, Path)):
        raise bad_input(f"a {type(source).__name__} was given; expected a file, a PIL image or an array of uint8")
    path = existing(Path(source).expanduser(), "a picture or a GeoTIFF")
    if path.suffix.lower() in GEOTIFFS:
        return _scene_of_raster(path, bands, limits, channels)
    return _picture(path, str(path), bands, limits, channels)


def _picture(
    source: Any, name: str, bands: Sequence[int] | None, limits: tuple[float, float] | None, channels: int
) -> Scene:
    colours = read_picture(source)
    if bands is None and channels != 3:
        raise bad_input(f"{name} is a picture of 3 colours; the model takes {channels} bands: give GeoTIFFs or arrays")
    return _in_memory(np.asarray(colours), name, _chosen(bands, 3, channels, name), limits, _opaque(source))


def _opaque(source: Any) -> np.ndarray | None:
    """Where a picture is not transparent, (H, W) bool; None: everywhere."""
    with contextlib.ExitStack() as stack:
        image = source if isinstance(source, Image.Image) else stack.enter_context(Image.open(source))
        if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
            return None
        alpha = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3]
    return None if alpha.all() else alpha > 0


def _in_memory(
    pixels: np.ndarray, name: str, chosen: tuple[int, ...], limits: tuple[float, float] | None, valid: np.ndarray | None
) -> Scene:
    dtype = pixels.dtype.name
    _check_type(dtype, limits, name)
    height, width, count = pixels.shape
    if chosen != tuple(range(1, count + 1)):
        pixels = pixels[..., [band - 1 for band in chosen]]
    return Scene(name, height, width, chosen, count, dtype, value_range=limits, pixels=pixels, valid=valid)


def _chosen(
    bands: Sequence[int] | None, count: int, channels: int, name: str, *, every: bool = False
) -> tuple[int, ...]:
    """The numbers of the bands that are read, from 1. ``every``: without ``bands`` there must be no others."""
    chosen = tuple(int(b) for b in bands) if bands is not None else tuple(range(1, channels + 1))
    if len(chosen) != channels:
        raise bad_input(f"bands is {list(chosen)}; the model takes {channels} bands", "bands")
    if count < max(chosen) or min(chosen) < 1 or (every and bands is None and count != channels):
        raise bad_input(
            f"{name} has {count} band{'s' if count != 1 else ''}; expected bands {list(chosen)} "
            "(red, green, blue; bands=(3, 2, 1) chooses others)"
        )
    return chosen


def _limits(value_range: Sequence[float]) -> tuple[float, float]:
    found = tuple(float(value) for value in value_range)
    if len(found) != 2 or not all(map(math.isfinite, found)) or found[0] >= found[1]:
        raise bad_input(f"value_range is {found}; expected (low, high), two numbers with low < high", "value_range")
    return found[0], found[1]


def _check_type(dtype: str, limits: tuple[float, float] | None, name: str) -> None:
    if limits is None and dtype != "uint8":
        raise bad_input(
            f"{name} holds {dtype}; expected uint8. Give the values that become 0 and 255 as value_range=(low, high), "
            "for example (0, 3000) for Sentinel-2 reflectances"
        )


def open_raster(path: Path) -> Any:
    """An open rasterio data set. Raises BadFile for what is none, MissingExtra without rasterio."""
    rasterio = require_rasterio(f"reading {path.name}")
    try:
        with without_place_warning():
            return rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise errors.BadFile(f"{path} is not a raster that can be read ({error})", path=str(path)) from error


def _scene_of_raster(
    path: Path, bands: Sequence[int] | None, limits: tuple[float, float] | None, channels: int
) -> Scene:
    file = open_raster(path)
    try:
        chosen = _chosen(bands, file.count, channels, str(path))
        dtype = file.dtypes[chosen[0] - 1]
        _check_type(dtype, limits, str(path))
    except errors.BadArgument:
        file.close()
        raise
    return Scene(
        str(path), file.height, file.width, chosen, file.count, dtype, file.crs, place(file), limits,
        path=path, file=file,
    )  # fmt: skip


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

    ``layers``: name -> names of the classes. The file appears under its name once it is complete. Raises BadArgument
    for another ending, StoreError where the file cannot be written.
    """

    def __init__(self, path: str | Path, like: Scene, layers: Mapping[str, Sequence[str]], palette: Any = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in GEOTIFFS:
            raise bad_input(f"{self.path} ends in {self.path.suffix or 'nothing'}; expected .tif", "path")
        require_rasterio(f"writing {self.path.name}")
        check_place(self.path)
        self.like, self.layers, self.palette = like, dict(layers), palette

    def _open(self, work: Path) -> Any:
        import rasterio

        like, blocks = self.like, {}
        if like.height >= 256 and like.width >= 256:
            blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256}
        with without_place_warning():
            file = rasterio.open(
                work, "w", driver="GTiff", height=like.height, width=like.width, count=len(self.layers),
                dtype="uint8", compress="deflate", nodata=NO_DATA, BIGTIFF="IF_SAFER", **blocks, **like.place,
            )  # fmt: skip
        for i, (name, classes) in enumerate(self.layers.items(), start=1):
            file.set_band_description(i, name)
            file.update_tags(i, classes=", ".join(f"{k} {label}" for k, label in enumerate(classes)))
        if self.palette is not None and len(self.layers) == 1:  # TIFF knows a palette for single bands only
            file.write_colormap(1, {i: (*map(int, c), 255) for i, c in enumerate(self.palette)})
        return file

    def write(self, top: int, left: int, maps: Mapping[str, np.ndarray]) -> None:
        """``maps``: (height, width) uint8 by the names of the layers."""
        from rasterio.windows import Window

        height, width = next(iter(maps.values())).shape
        window = Window(left, top, width, height)
        with self._named():
            self.file.write(np.stack([maps[name] for name in self.layers]), window=window)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        from rasterio.errors import RasterioIOError

        try:
            yield
        except RasterioIOError as error:
            reason = error.__cause__ or error
            raise errors.StoreError(f"{self.path} cannot be written: {reason}", path=str(self.path)) from error

    def __enter__(self) -> MapWriter:
        with contextlib.ExitStack() as stack, self._named():
            self.file = self._open(stack.enter_context(whole(self.path)))
            stack.callback(self._close)  # before the file gets its name
            self._stack = stack.pop_all()
        return self

    def _close(self) -> None:
        with self._named():
            self.file.close()

    def __exit__(self, *reason: Any) -> None:
        self._stack.__exit__(*reason)


class MapReader:
    """Windows of a file that :class:`MapWriter` wrote; use it in a ``with``, and call it with a box."""

    def __init__(self, path: Path, layers: Mapping[str, Sequence[str]]) -> None:
        self.file = open_raster(path)
        self.names = list(layers)

    def __call__(self, top: int, left: int, height: int, width: int) -> dict[str, np.ndarray]:
        from rasterio.windows import Window

        values = self.file.read(window=Window(left, top, width, height))
        return dict(zip(self.names, values, strict=True))

    def __enter__(self) -> MapReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
