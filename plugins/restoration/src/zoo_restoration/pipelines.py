"""An image file in, the restored or enlarged image out: of the same kind, with its bits, transparency and profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from . import tiles
from .degradations import resize_bicubic
from .images import EXTENSIONS, Picture, read_picture, write_picture

TASKS = ("image-restoration", "super-resolution")
#: pixels above which an image is read in tiles unless the user says otherwise
WHOLE = 1024 * 1024


@dataclass(kw_only=True)
class Restored(Result):
    """The restored image. ``image``: see :class:`~zoo_restoration.images.Picture`; ``width``, ``height`` of it;
    ``scale``: how many times larger than what was given; ``tiles`` it was read in (1: as a whole)."""

    width: int = 0
    height: int = 0
    scale: int = 1
    bits: int = 8
    tiles: int = 1
    notes: str = ""
    image: Picture | None = field(default=None, repr=False)
    before: Picture | None = field(default=None, repr=False)

    def summary(self) -> str:
        size = f"{self.width // self.scale} x {self.height // self.scale}"
        said = f"{size} enlarged to {self.width} x {self.height}" if self.scale > 1 else f"{size} restored"
        return said + (f" ({self.notes})" if self.notes else "")

    def save(self, path: str | Path, *, quality: int = 95) -> Path:
        """Write the image alone; see :func:`~zoo_restoration.images.write_picture`."""
        assert self.image is not None
        return write_picture(self.image, path, quality=quality)

    def picture(self) -> Image.Image:
        """Before and after, side by side, of one size."""
        assert self.image is not None
        assert self.before is not None
        after = self.image.pillow().convert("RGB")
        old = self.before.pillow().convert("RGB").resize(after.size, Image.Resampling.NEAREST)
        both = Image.new("RGB", (2 * after.width + 4, after.height), "white")
        both.paste(old, (0, 0))
        both.paste(after, (after.width + 4, 0))
        return both


class ImageRestoration(Pipeline):
    """Image files to restored images: deblurring, denoising, inpainting, same-size or larger, as the model does.

    An input is a PNG, JPEG, TIFF, WebP or BMP file, a ``PIL.Image`` or an array. EXIF rotation is applied; grey images
    are given to a network of RGB as three equal channels and become grey again; alpha is kept, enlarged by bicubic
    interpolation; 16 bits stay 16 bits.

    Options. ``tile``: side of tiles in pixels of the input, 0 for the whole image at once; by default images above 1024
    x 1024 pixels are read in tiles of 512. ``overlap`` (default: an eighth of the tile) and ``margin`` of tiles: see
    :mod:`zoo_restoration.tiles`. Scans reach from edge to edge, so tiles differ from the whole image: ``tile=0`` where
    memory permits. ``ensemble``: the mean over all eight flips and turns, in eight times the time.
    """

    task = "image-restoration"
    extensions = EXTENSIONS
    enlarges = False

    def __init__(
        self,
        model: nn.Module,
        tile: int | None = None,
        overlap: int | None = None,
        margin: int | None = None,
        ensemble: bool = False,
    ) -> None:
        super().__init__(model)
        card = None if self.info is None else self.info.card
        if card is not None and card.task not in TASKS:
            raise errors.BadArgument(
                f"{self.name} is for {card.task}; expected a model for {' or '.join(TASKS)}",
                argument="model",
                accepted=[],
            )
        self.channels, self.scale = int(getattr(model, "in_chans", 3)), int(getattr(model, "scale", 1))
        self.multiple = int(getattr(model, "multiple", 1))
        if self.channels not in (1, 3):
            raise errors.BadArgument(
                f"{self.name} takes {self.channels} channels; images have 3, or 1", argument="model", accepted=[]
            )
        if self.enlarges and self.scale == 1:
            raise errors.BadArgument(
                f"{self.name} does not enlarge; use the task image-restoration", argument="model", accepted=[]
            )
        if tile is not None and tile < 0:
            raise errors.BadArgument(
                f"tile is {tile}; expected a side in pixels, or 0 for the whole image", argument="tile", accepted=[]
            )
        self.tile, self.overlap, self.margin, self.ensemble = tile, overlap, margin, ensemble

    def read(self, source: Any) -> Picture:
        picture = read_picture(source)
        if self.channels == 1 and not picture.grey:
            raise ValueError(f"{self.name} takes grey images, and this one has colours; convert it to grey first")
        return picture

    def prepare(self, sample: Picture) -> Tensor:
        colours = torch.from_numpy(sample.colours).permute(2, 0, 1)
        return colours.expand(self.channels, -1, -1).contiguous()

    # -- the network

    def tile_for(self, height: int, width: int) -> int:
        """The side of tiles for an image, 0 for none."""
        side = (0 if height * width <= WHOLE else 512) if self.tile is None else self.tile
        return 0 if max(height, width) <= side else side

    def _overlap(self, side: int) -> int:
        return side // 8 if self.overlap is None else self.overlap

    def forward(self, batch: Tensor) -> Tensor:
        """(batch, channels, H, W) to (batch, channels, scale H, scale W)."""
        run = self._eightfold if self.ensemble else self.model
        side = self.tile_for(*batch.shape[2:])
        if not side:
            return run(batch)
        return torch.stack(
            [
                tiles.run(
                    run, x, tile=side, overlap=self._overlap(side), margin=self.margin, scale=self.scale,
                    multiple=self.multiple,
                )
                for x in batch
            ]
        )  # fmt: skip

    def _eightfold(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for turn in (False, True):
            for axes in ((), (2,), (3,), (2, 3)):
                y = x.flip(axes)
                y = self.model(y.transpose(2, 3).contiguous()).transpose(2, 3) if turn else self.model(y)
                y = y.flip(axes)
                total = y if total is None else total + y
        assert total is not None
        return total / 8

    # -- the answer

    def finish(self, output: Tensor, sample: Picture) -> Restored:
        if sample.grey:
            output = output.mean(0, keepdim=True)
        colours = output.clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
        alpha = sample.alpha
        height, width = colours.shape[:2]
        if alpha is not None and self.scale > 1:
            alpha = resize_bicubic(torch.from_numpy(alpha), height, width).clamp(0, 1).numpy()
        side = self.tile_for(height // self.scale, width // self.scale)
        many = 1
        if side:
            many = tiles.count(height // self.scale, width // self.scale, side, self._overlap(side), self.multiple)
        return Restored(
            width=width, height=height, scale=self.scale, bits=sample.bits, tiles=many,
            notes=f"in {many} tiles of {side}: each scan saw its tile" if many > 1 else "",
            image=replace(sample, colours=colours, alpha=alpha), before=sample,
        )  # fmt: skip

    def restorer(self) -> Callable[[Tensor], Tensor]:
        """``function(x)`` on (1, 3, H, W) or (1, 1, H, W), as the pipeline computes it (for measuring)."""

        def restore(x: Tensor) -> Tensor:
            picture = Picture(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()))
            with torch.inference_mode():
                batch = self._to_model(self.prepare(picture)[None])
                output = self.forward(batch)[0].float().cpu()
            return output.mean(0, keepdim=True)[None] if picture.grey else output[None]

        return restore


class SuperResolution(ImageRestoration):
    """Image files to images ``model.scale`` times as wide and high; see :class:`ImageRestoration`."""

    task = "super-resolution"
    enlarges = True
