"""Pictures as mmsegmentation and mmdetection test them: resized in proportion, never cropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.images import EXTENSIONS, open_image
from zoo.pipelines import Pipeline
from zoo_registry import errors

from .pipelines import channels_of_files, transform_settings
from .segmentation import resize


class ResizedPictures(Pipeline):
    """Reads pictures, resizes and normalises them; a subclass says what becomes of the network's output.

    The sides are resized, in proportion, until the shorter is ``short_side`` long, or the longer ``long_side`` if that
    comes first. None: what the weights were tested at (``preprocess`` of their card), else ``usual``; with
    ``short_side`` given, the longer in proportion to it.
    """

    extensions = EXTENSIONS

    def __init__(
        self, model: nn.Module, short_side: int | None, long_side: int | None, *, usual: tuple[int, int]
    ) -> None:
        super().__init__(model)
        self.in_chans = channels_of_files(model)
        settings = transform_settings(model, self.preprocess)
        self.mean, self.std = (torch.tensor(settings[k]).view(-1, 1, 1) for k in ("mean", "std"))
        shortest = int(self.preprocess.get("short_side", usual[0]))
        longest = int(self.preprocess.get("long_side", shortest * usual[1] / usual[0]))
        self.short_side = shortest if short_side is None else int(short_side)
        self.long_side = int(self.short_side * longest / shortest) if long_side is None else int(long_side)
        if not 0 < self.short_side <= self.long_side:
            raise errors.BadArgument(
                f"short_side is {self.short_side}, long_side {self.long_side}; expected 0 < short_side <= long_side",
                argument="short_side",
                accepted=[],
            )

    def read(self, source: Any) -> Image.Image:
        if isinstance(source, Tensor):
            raise errors.BadArgument(
                "a tensor was given; expected a file, a PIL image or an array. Call the model on tensors",
                argument="inputs",
                accepted=[],
            )
        return open_image(source, self.in_chans)

    def prepare(self, sample: Image.Image) -> Tensor:
        """(in_chans, h, w), resized and normalised."""
        values = torch.from_numpy(np.array(sample)).float()
        values = values.unsqueeze(0) if values.dim() == 2 else values.permute(2, 0, 1)
        resized = resize(values[None], self.size_of(sample.width, sample.height))[0]
        return (resized.round() / 255 - self.mean) / self.std

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(h, w) that a picture of ``width`` and ``height`` goes through the network at."""
        scale = min(self.short_side / min(width, height), self.long_side / max(width, height))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
