"""Hyperspectral cubes to class maps: read, reduce to whitened principal components, one window for each pixel."""

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


def read_cube(source: Any) -> np.ndarray:
    """(H, W, bands) float32 from an array, an ``.npy`` file, or a ``.mat`` file (its largest array of three axes)."""
    if isinstance(source, np.ndarray):
        cube, name = source, "the array"
    else:
        path, name = Path(source), str(source)
        if path.suffix.lower() == ".npy":
            cube = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".mat":
            from scipy.io import loadmat

            try:
                found = [v for v in loadmat(path).values() if isinstance(v, np.ndarray) and v.ndim == 3]
            except NotImplementedError as error:
                raise _bad(f"{name} is a MATLAB 7.3 file; save it again with -v7, or as .npy") from error
            if not found:
                raise _bad(f"{name} holds no array of three axes; expected a cube (height, width, bands)")
            cube = max(found, key=lambda v: v.size)
        else:
            raise _bad(f"{name} ends in {path.suffix or 'nothing'}; expected .npy or .mat")
    if cube.ndim != 3 or not np.issubdtype(cube.dtype, np.number):
        raise _bad(f"{name} has shape {cube.shape} and type {cube.dtype}; expected numbers (height, width, bands)")
    return cube.astype(np.float32)


def _bad(message: str) -> errors.BadArgument:
    return errors.BadArgument(message, argument="inputs", accepted=[])


def principal_components(cube: np.ndarray, count: int) -> np.ndarray:
    """Whitened principal components of the pixels: (H, W, bands) to (H, W, count), each of mean 0 and deviation 1.

    The sign of a component is fixed so that its largest loading is positive. Raises BadArgument for too few bands.
    """
    height, width, bands = cube.shape
    if bands < count or height * width <= count:
        raise _bad(f"the cube is {height} x {width} with {bands} bands; the model needs at least {count} bands")
    pixels = cube.reshape(-1, bands).astype(np.float64)
    pixels -= pixels.mean(0)
    values, vectors = np.linalg.eigh(pixels.T @ pixels / (len(pixels) - 1))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    found = pixels @ vectors / np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    return found.reshape(height, width, count).astype(np.float32)


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
    """The class of every pixel, (H, W) uint8, and how many pixels each class has."""

    classes: np.ndarray = field(repr=False)
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        most = sorted(self.counts.items(), key=lambda item: -item[1])[:3]
        return "; ".join(f"{name}: {n} px" for name, n in most)

    def picture(self) -> Image.Image:
        """One colour a class, spread over the hues."""
        hues = (np.arange(256) * 97 % 256).astype(np.uint8)
        colour = np.stack([hues, np.full(256, 200, np.uint8), np.full(256, 230, np.uint8)], axis=-1)
        return Image.fromarray(colour[self.classes], mode="HSV").convert("RGB")


class PixelClassification(Pipeline):
    """A hyperspectral cube (``.npy``, ``.mat``, array) to a :class:`ClassMap`; ``rows`` image rows go at once.

    The components are computed from the cube itself, as the originals do, so a map belongs to a model trained on that
    scene's components.
    """

    task = "pixel-classification"
    extensions = (".npy", ".mat")

    def __init__(self, model: nn.Module, rows: int = 16) -> None:
        super().__init__(model)
        self.rows = int(rows)
        self.names = self.labels()

    def read(self, source: Any) -> np.ndarray:
        return read_cube(source)

    def prepare(self, sample: np.ndarray) -> Tensor:
        return torch.from_numpy(principal_components(sample, int(self.model.bands)))  # type: ignore[arg-type]

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
        numbers = {int(c): int((classes == c).sum()) for c in np.unique(classes)}
        names = self.names or []
        return ClassMap(
            classes=classes, counts={names[c] if c < len(names) else f"class {c}": n for c, n in numbers.items()}
        )
