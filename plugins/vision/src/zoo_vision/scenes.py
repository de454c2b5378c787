"""Semantic segmentation of image files: a class for every pixel, at the picture's own size."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.files import check_ending, whole
from zoo.pipelines import Result
from zoo_registry import errors

from .pictures import legend_card
from .pipelines import finite
from .resized import ResizedPictures
from .segmentation import resize

#: numbers of full-size logits that are held at once
HELD = 1 << 24


@dataclass(kw_only=True)
class Scene(Result):
    """A picture's classes. ``shares``: part of the picture, largest first; ``sureness``: mean probability of the
    likeliest class, at the network's own resolution."""

    shares: dict[str, float]
    sureness: float = field(repr=False)
    size: tuple[int, int]  #: width, height
    classes: np.ndarray = field(repr=False)  #: (height, width) uint8, or uint16 beyond 256 classes
    names: list[str] = field(repr=False)  #: of all classes
    image: Image.Image | None = field(default=None, repr=False)

    def summary(self) -> str:
        most = [f"{name} {share:.0%}" for name, share in list(self.shares.items())[:4]]
        more = len(self.shares) - len(most)
        return ", ".join(most) + (f" and {more} more" if more else "")

    @property
    def confidence(self) -> float:
        return self.sureness

    def save(self, path: str | Path) -> Path:
        """The class numbers as a PNG: indexed colours (grey values of 16 bits beyond 256 classes)."""
        check_ending(path, [".png"])  # which loses nothing
        image = Image.fromarray(self.classes)
        if self.classes.dtype == np.uint8:
            image.putpalette([channel for colour in palette(len(self.names)) for channel in colour])
        with whole(path) as work:
            image.save(work)
        return Path(path)

    def picture(self) -> Image.Image | None:
        """The picture under its classes in colour, and which colour is what."""
        if self.image is None:
            return None
        colours = palette(len(self.names))
        painted = Image.fromarray(np.asarray(colours, dtype=np.uint8)[self.classes])
        mixed = Image.blend(self.image.convert("RGB"), painted, 0.55)
        rows = [(f"{n} {share:.1%}", colours[self.names.index(n)]) for n, share in list(self.shares.items())[:14]]
        return legend_card(self.image, mixed, rows, title=f"{self.model}   {Path(self.source).name}")


def palette(count: int) -> list[tuple[int, int, int]]:
    """A colour for each of ``count`` classes. Hues go round by the golden section, so that neighbours in the list, and
    any few classes, are far apart; lightness changes every few classes."""
    found = []
    for i in range(count):
        value, saturation = (0.95, 0.7, 0.82)[i % 3], (0.75, 0.6, 0.9, 0.5)[i % 4]
        r, g, b = colorsys.hsv_to_rgb(i * 0.6180339887 % 1, saturation, value)
        found.append((round(r * 255), round(g * 255), round(b * 255)))
    return found


class SemanticSegmentation(ResizedPictures):
    """Image files to a class for every pixel.

    As mmsegmentation tests: the picture is resized, its sides in proportion, until the shorter is ``short_side`` long,
    or the longer ``long_side`` if that comes first (None: what the weights were tested at, else 512 and four times the
    shorter); logits go to that size and then to the picture's own, where the largest is taken. Pictures: paths, PIL
    images or arrays (H, W, 3) of uint8.
    """

    task = "semantic-segmentation"

    def __init__(self, model: nn.Module, short_side: int | None = None, long_side: int | None = None) -> None:
        super().__init__(model, short_side, long_side, usual=(512, 2048))
        if hasattr(model, "forward_head") or hasattr(model, "detect"):
            raise errors.BadArgument(
                f"{self.name} gives no map of logits (a class for every pixel); it is a classifier or detector",
                argument="model",
                accepted=[],
            )
        self.names = self.labels()

    def finish(self, output: Tensor, sample: Image.Image) -> Scene:
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise errors.BadArgument(
                f"{self.name} gives no map of logits (classes, h, w); is it a classifier or a backbone?",
                argument="model",
                accepted=[],
            )
        finite(self.name, output)
        inner = self.size_of(sample.width, sample.height)
        classes = largest(output.float(), inner, (sample.height, sample.width))
        count = len(output)
        known = self.names if self.names is not None and len(self.names) == count else None
        names = known or [f"class {i}" for i in range(count)]
        pixels = np.bincount(classes.ravel(), minlength=count) / classes.size
        order = np.argsort(-pixels, kind="stable")
        return Scene(
            shares={names[i]: float(pixels[i]) for i in order if pixels[i]},
            sureness=float(output.float().softmax(0).amax(0).mean()), size=sample.size, classes=classes,
            names=list(names), image=sample,
        )  # fmt: skip


def largest(logits: Tensor, *sizes: tuple[int, int]) -> np.ndarray:
    """The class of each pixel (H, W) of logits (classes, h, w) that are resized to each of ``sizes`` in turn. Some
    classes at a time: never all of them at full size."""
    best = torch.full(sizes[-1], -torch.inf)
    found = torch.zeros(sizes[-1], dtype=torch.int32)
    step = max(1, HELD // math.prod(sizes[-1]))
    for start in range(0, len(logits), step):
        part = logits[None, start : start + step]
        for size in sizes:
            part = resize(part, size)
        value, index = part[0].max(dim=0)
        torch.where(value > best, index.int().add_(start), found, out=found)
        torch.maximum(best, value, out=best)
    return found.numpy().astype(np.uint8 if len(logits) <= 256 else np.uint16)
