"""What a dense backbone sees in image files: its maps, as arrays and as a picture of their principal components."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.files import check_ending, whole
from zoo.pipelines import Result
from zoo_registry import errors

from .pictures import maps_card
from .pipelines import ImageClassification, finite


@dataclass(kw_only=True)
class Features(Result):
    """The maps of one picture, in the model's order."""

    shapes: list[tuple[int, ...]]  #: (channels, height, width) of each map
    maps: list[np.ndarray] = field(repr=False)  #: float32
    image: Image.Image | None = field(default=None, repr=False)  #: what the network saw of the picture

    def summary(self) -> str:
        return f"{len(self.maps)} map(s): " + ", ".join("x".join(map(str, shape)) for shape in self.shapes)

    def save(self, path: str | Path) -> Path:
        """The maps as ``map_0``, ``map_1`` ... of an ``.npz`` file."""
        check_ending(path, [".npz"])
        with whole(path) as work:
            np.savez(work, **{f"map_{i}": m for i, m in enumerate(self.maps)})  # type: ignore[arg-type]
        return Path(path)

    def picture(self) -> Image.Image | None:
        """Beside the picture each map in colours: its first three principal components as red, green and blue, so
        that places of one colour look alike to the network."""
        if self.image is None:
            return None
        shown = [(f"map {i}: {'x'.join(map(str, m.shape))}", principal(m)) for i, m in enumerate(self.maps)]
        return maps_card(self.image, shown, title=f"{self.model}   {Path(self.source).name}")


def principal(maps: np.ndarray) -> np.ndarray:
    """A map (C, h, w) as colours (h, w, 3), uint8: three principal components, each from its 1st to 99th percentile."""
    channels, height, width = maps.shape
    rows = torch.from_numpy(maps).flatten(1).T.double()
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    found = (rows @ axes[:, -min(3, channels) :].flip(-1)).numpy()
    # A direction has no sign: the one in which its largest value lies.
    found *= np.sign(found[np.abs(found).argmax(0), np.arange(found.shape[1])] + 1e-30)
    low, high = np.percentile(found, [1, 99], axis=0)
    values = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    values = np.pad(values, ((0, 0), (0, 3 - values.shape[1])), mode="edge")
    return (values * 255).round().astype(np.uint8).reshape(height, width, 3)


class ImageFeatures(ImageClassification):
    """Image files to the maps of a dense backbone: any model that gives a list of (channels, height, width), as those
    built with ``features_only=True``. Pictures are resized and cropped to the size that the model was built for."""

    task = "image-backbone"
    needs_classes = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def finish(self, output: Any, sample: Any) -> Features:  # type: ignore[override]
        maps = list(output) if isinstance(output, (list, tuple)) else [output]
        if not maps or any(not isinstance(m, Tensor) or m.dim() != 3 for m in maps):
            raise errors.BadArgument(
                f"{self.name} gives no maps (channels, height, width); build it with features_only=True",
                argument="model",
                accepted=[],
            )
        finite(self.name, *maps)
        seen = None
        if not isinstance(sample, Tensor):
            mean, std = (torch.tensor(self.settings[k]).view(-1, 1, 1) for k in ("mean", "std"))
            pixels = (self.prepare(sample) * std + mean).clamp(0, 1) * 255
            seen = Image.fromarray(pixels.round().byte().permute(1, 2, 0).squeeze(-1).numpy())
        arrays = [m.float().numpy() for m in maps]
        return Features(shapes=[tuple(m.shape) for m in arrays], maps=arrays, image=seen)
