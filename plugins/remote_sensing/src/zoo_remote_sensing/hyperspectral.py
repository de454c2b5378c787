"""Hyperspectral cubes to class maps: read, reduce to whitened principal components, one window for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.files import check_ending, existing, read_arrays, whole
from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .palettes import class_names as named
from .palettes import colours, label_set
from .rasters import GEOTIFFS, NO_DATA, MapWriter, Scene, bad_input, place, require_rasterio, without_place_warning

#: pixels that are brought to components at once
BLOCK = 65536
#: endings of numpy's and MATLAB's files
ARRAYS = (".npy", ".npz", ".mat")
#: endings of ENVI's data files, whose header lies beside them as NAME.hdr; some have no ending at all
ENVI = (".hdr", ".dat", ".img", ".bsq", ".bil", ".bip", ".raw", "")


#: endings of the files that class maps are written to
MAPS = (*GEOTIFFS, ".png", ".npy")


@dataclass
class Cube:
    """A hyperspectral scene in memory: (H, W, bands) float32, and its place on the ground where the file says it."""

    values: np.ndarray
    name: str = "the array"
    valid: np.ndarray | None = None  #: (H, W) bool: where there are data; None: everywhere
    place: dict[str, Any] = field(default_factory=dict)  #: what rasterio needs to write a map of it


def read_cube(source: Any) -> Cube:
    """From an array (H, W, bands), an ``.npy``, ``.npz`` or ``.mat`` file (its largest array of three axes) or ENVI.

    An ENVI scene is named by its header (NAME.hdr) or its data file; reading it needs the extra ``[geo]``. Pixels of
    the file's nodata value and pixels with a band that is no finite number have no data.
    Raises BadArgument for what is no cube, BadFile for what cannot be read.
    """
    place: dict[str, Any] = {}
    valid: np.ndarray | None = None
    if isinstance(source, Cube):
        return source
    if isinstance(source, np.ndarray):
        cube, name = source, "the array"
    else:
        path, name = existing(Path(source).expanduser(), "a hyperspectral scene"), str(source)
        if path.suffix.lower() in ARRAYS:
            cube = _from_arrays(path, 3)
        elif path.suffix.lower() in (*ENVI, *GEOTIFFS):
            cube, place, valid = _from_raster(path)
        else:
            raise bad_input(f"{name} ends in {path.suffix}; expected .npy, .npz, .mat, ENVI (.hdr) or .tif")
    if cube.ndim != 3 or cube.dtype.kind not in "uif" or 0 in cube.shape:
        raise bad_input(f"{name} has shape {cube.shape} and type {cube.dtype}; expected numbers (height, width, bands)")
    if cube.dtype.kind == "f" and not (finite := np.asarray(np.isfinite(cube).all(-1))).all():
        valid = finite if valid is None else valid & finite
    if valid is not None and not valid.any():
        raise bad_input(f"{name} has no pixel whose bands are all finite numbers")
    return Cube(cube.astype(np.float32), name, valid, place)


def _from_arrays(path: Path, axes: int) -> np.ndarray:
    """The largest array of ``axes`` axes in an .npy, .npz or MATLAB file."""
    arrays = _matlab(path) if path.suffix.lower() == ".mat" else read_arrays(path)
    if list(arrays) == [""]:
        return arrays[""]
    found = [v for v in arrays.values() if isinstance(v, np.ndarray) and v.ndim == axes and v.size > 1]
    if not found:
        raise bad_input(
            f"{path} holds no array of {axes} axes; expected (height, width{', bands' if axes == 3 else ''})"
        )
    return max(found, key=lambda v: v.size)


def _matlab(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return loadmat(path)
    except NotImplementedError as error:
        raise bad_input(f"{path} is a MATLAB 7.3 file; save it again with -v7, or as .npy") from error
    except Exception as error:  # scipy's reader meets damaged files with errors of many kinds
        raise errors.BadFile(
            f"{path} is no MATLAB file that can be read; is it empty, cut short or of another format? ({error})",
            path=str(path),
        ) from error


def _from_raster(path: Path) -> tuple[np.ndarray, dict[str, Any], np.ndarray | None]:
    """An ENVI scene (either of its two files) or a GeoTIFF, as (H, W, bands), its place and where it has data."""
    rasterio = require_rasterio(f"reading {path.name}")
    data = path
    if path.suffix.lower() == ".hdr":
        beside = [path.with_suffix(""), *(path.with_suffix(end) for end in ENVI[1:-1])]
        existing = [p for p in beside if p.is_file()]
        if not existing:
            raise bad_input(f"{path} has no data file beside it; expected one of {', '.join(p.name for p in beside)}")
        data = existing[0]
    try:
        with without_place_warning(), rasterio.open(data) as file:
            mask = file.dataset_mask() != 0
            return file.read().transpose(1, 2, 0), place(file), None if mask.all() else mask
    except rasterio.errors.RasterioIOError as error:
        raise errors.BadFile(
            f"{data} cannot be read ({error.__cause__ or error}); an ENVI scene needs its header {data.stem}.hdr",
            path=str(data),
        ) from error


def read_labels(source: str | Path) -> np.ndarray:
    """(H, W) int64: 0 for unlabelled pixels, then 1 for the first class; from an array file, MATLAB or a picture."""
    path = Path(source)
    if path.suffix.lower() in ARRAYS:
        found = _from_arrays(path, 2)
    else:
        from .labelled import read_label

        found = read_label(path)
    if found.ndim != 2 or found.dtype.kind not in "buif" or (found != np.floor(found)).any():
        raise bad_input(
            f"{path} has shape {found.shape} and type {found.dtype}; expected class numbers (height, width)"
        )
    return found.astype(np.int64)


def cube_files(folder: Path) -> tuple[Path, Path]:
    """The cube and the labels (a name that ends in _gt or _labels) in a folder. Raises BadArgument for others."""
    if not folder.is_dir():
        raise bad_input(f"{folder} is a file; expected a folder with a cube and its labels")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
    labels = [p for p in files if p.stem.lower().endswith(("_gt", "_labels")) and p.suffix.lower() != ".hdr"]
    headers = [p for p in files if p.suffix.lower() == ".hdr" and not p.stem.lower().endswith(("_gt", "_labels"))]
    cubes = headers or [p for p in files if p not in labels and p.suffix.lower() in (*ARRAYS, *GEOTIFFS)]
    if len(cubes) != 1 or len(labels) != 1:
        raise bad_input(
            f"{folder} holds {len(cubes)} cubes and {len(labels)} files of labels; expected one of each, the labels "
            "under a name that ends in _gt or _labels"
        )
    return cubes[0], labels[0]


def labelled_scene(folder: Path) -> tuple[Cube, np.ndarray]:
    """The cube of a folder and the class of every pixel, (H, W) int64 from 0; 255 where it has no label or no data.

    Raises BadArgument for labels of another size."""
    place, labels = cube_files(folder)
    cube, truth = read_cube(place), read_labels(labels)
    if truth.shape != cube.values.shape[:2]:
        raise bad_input(
            f"{labels} has {truth.shape} pixels and {place} {cube.values.shape[:2]}; expected as many", "data"
        )
    missing = truth == 0 if cube.valid is None else (truth == 0) | ~cube.valid
    return cube, np.where(missing, NO_DATA, truth - 1)


def principal_components(cube: np.ndarray, count: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Whitened principal components of the pixels: (H, W, bands) to (H, W, count), each of mean 0 and deviation 1.

    ``valid`` (H, W) bool: the pixels that count; all others are 0, the mean. The sign of a component is fixed so that
    its largest loading is positive; one beyond the rank of the pixels is 0. Raises BadArgument for too few bands or
    pixels.
    """
    height, width, bands = cube.shape
    pixels = cube.reshape(-1, bands) if valid is None else cube[valid]
    if bands < count or len(pixels) <= count:
        raise bad_input(
            f"the cube has {bands} bands and {len(pixels)} pixels with data; the model needs at least {count} bands "
            f"and {count + 1} pixels"
        )
    parts = [slice(i, i + BLOCK) for i in range(0, len(pixels), BLOCK)]  # double precision takes twice the memory
    mean = pixels.mean(0, dtype=np.float64)
    products = np.zeros((bands, bands))
    for part in parts:
        centred = pixels[part] - mean
        products += centred.T @ centred
    values, vectors = np.linalg.eigh(products / (len(pixels) - 1))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    spread = values > 1e-12 * max(float(values[0]), np.finfo(np.float64).tiny)  # else rounding would be blown up
    whiten = vectors * np.where(spread, 1 / np.sqrt(np.where(spread, values, 1)), 0)
    found = np.concatenate([((pixels[part] - mean) @ whiten).astype(np.float32) for part in parts])
    if valid is None:
        return found.reshape(height, width, count)
    components = np.zeros((height, width, count), np.float32)
    components[valid] = found
    return components


def windows(components: np.ndarray, window: int) -> np.ndarray:
    """One window for each pixel, zeros outside: (H, W, bands) to (H, W, window, window, bands).

    The pixel (r, c) sees rows r - window // 2 to r - window // 2 + window - 1, and columns likewise. A view.
    """
    half = window // 2
    padded = np.pad(components, ((half, window - half), (half, window - half), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (window, window), axis=(0, 1))
    height, width = components.shape[:2]
    return views[:height, :width].transpose(0, 1, 3, 4, 2)


@dataclass(kw_only=True)
class ClassMap(Result):
    """The class of every pixel, (H, W) uint8 (255 where there are no data), and how many pixels each class has."""

    classes: np.ndarray = field(repr=False)
    counts: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list, repr=False)
    place: dict[str, Any] = field(default_factory=dict, repr=False)

    def summary(self) -> str:
        most = sorted(self.counts.items(), key=lambda item: -item[1])[:3]
        return "; ".join(f"{name}: {n} px" for name, n in most)

    def picture(self) -> Image.Image:
        """One colour a class; the numbers of the classes are the indices of the palette."""
        image = Image.fromarray(self.classes).convert("P")
        palette = [value for colour in self._colours() for value in colour]
        image.putpalette(palette + [0] * (3 * 256 - len(palette)))  # black where there are no data
        return image

    def _colours(self) -> list[tuple[int, int, int]]:
        return colours(["none", *self.names])[1:]  # no class is background

    def save(self, path: str | Path) -> Path:
        """Write the map: ``.tif`` with the cube's georeference (extra ``[geo]``), ``.png`` or ``.npy``."""
        path = Path(path)
        if path.suffix.lower() == ".png":
            return self.save_picture(path)
        check_ending(path, MAPS)
        if path.suffix.lower() == ".npy":
            with whole(path) as work, work.open("wb") as file:
                np.save(file, self.classes)
            return path
        height, width = self.classes.shape
        with MapWriter(
            path, Scene("map", height, width, place=self.place), {"classes": self.names}, self._colours()
        ) as w:
            w.write(0, 0, {"classes": self.classes})
        return path


class PixelClassification(Pipeline):
    """A hyperspectral cube (``.npy``, ``.mat``, ENVI, array) to a :class:`ClassMap`; ``rows`` image rows go at once.

    The components are computed from the cube itself, as the originals do, so a map belongs to a model trained on that
    scene's components.
    """

    task = "pixel-classification"
    extensions = (*ARRAYS, ".hdr")

    def __init__(self, model: nn.Module, rows: int = 16, class_names: Sequence[str] | None = None) -> None:
        super().__init__(model)
        if not all(hasattr(model, name) for name in ("bands", "window", "num_classes")):
            raise bad_input(
                f"{self.name} is a {type(model).__name__}; expected a model of cubes, as MorpMamba", "model"
            )
        if int(rows) < 1:
            raise errors.BadArgument(f"rows is {rows}; expected 1 or more", argument="rows", accepted=[])
        self.rows = int(rows)
        count = int(model.num_classes)  # type: ignore[arg-type]
        if count > NO_DATA:
            raise bad_input(f"the model has {count} classes; maps hold at most {NO_DATA}", "model")
        if class_names is not None and len(class_names) != count:
            raise bad_input(f"class_names has {len(class_names)} names; the model has {count} classes", "class_names")
        self.class_names = named(class_names or self.labels() or self._known(count), count)

    def _known(self, count: int) -> list[str] | None:
        """The label set that the card's output is in the order of, for models without weights of their own."""
        card = self.info.card if self.info is not None else None
        return label_set("houston") if card is not None and card.name == "morpmamba_houston" and count == 15 else None

    def read(self, source: Any) -> Cube:
        return read_cube(source)

    def prepare(self, sample: Cube) -> Tensor:
        return torch.from_numpy(principal_components(sample.values, int(self.model.bands), sample.valid))  # type: ignore[arg-type]

    def forward(self, batch: Any) -> Tensor:
        maps = []
        for components in batch:
            views = windows(components.float().cpu().numpy(), int(self.model.window))  # type: ignore[arg-type]
            parts = []
            for top in range(0, len(views), self.rows):
                some = torch.from_numpy(np.ascontiguousarray(views[top : top + self.rows])).to(batch)
                parts.append(self.model(some.flatten(0, 1)).argmax(-1).unflatten(0, some.shape[:2]))
            maps.append(torch.cat(parts))
        return torch.stack(maps)

    def finish(self, output: Any, sample: Any) -> ClassMap:
        classes = output.numpy().astype(np.uint8)
        if sample.valid is not None:
            classes[~sample.valid] = NO_DATA
        numbers = {int(c): int((classes == c).sum()) for c in np.unique(classes) if c != NO_DATA}
        return ClassMap(
            classes=classes, counts={self.class_names[c]: n for c, n in numbers.items()}, names=self.class_names,
            place=sample.place,
        )  # fmt: skip
