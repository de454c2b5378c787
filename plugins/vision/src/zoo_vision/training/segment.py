"""Training a segmentor on pictures with label maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.training import Shuffled
from zoo_registry import errors
from zoo_vision.labelled_scenes import IGNORED, Pair, Values
from zoo_vision.scenes import SemanticSegmentation
from zoo_vision.segmentation import resize

from .augment import jittered, samples

#: a crop is drawn anew, at most so often, while one class covers more of it than this share
TRIES, LARGEST = 10, 0.75


def classes_of(counts: dict[int, int], names: Sequence[str] | None, ignored: Sequence[int]) -> tuple[Values, list[str]]:
    """What the values of label maps mean, and the classes' names. ``counts``: the values that were found. ``names``
    None: each value that is not ignored is a class, named by its number. Raises BadArgument for fewer than two
    classes, and for values beyond those that are named."""
    found = sorted(v for v in counts if v not in ignored)
    if names is None:
        if len(found) < 2:
            raise errors.BadArgument(
                f"the label maps hold {len(found)} classes: the values {sorted(counts)}, of which {sorted(ignored)} "
                "are ignored; expected two or more (--ignore says which values do not count, --ignore -1: all do)",
                argument="ignored",
                accepted=[],
            )
        return Values(tuple(found), tuple(sorted(ignored))), [str(v) for v in found]
    values = Values.counted(len(names), set(ignored))
    if unknown := sorted(set(found) - set(values.classes)):
        raise errors.BadArgument(
            f"the label maps hold the value {unknown[0]}, and {len(names)} classes are named: {values.classes[0]} "
            f"({names[0]}) to {values.classes[-1]} ({names[-1]}); name the others, or ignore them (--ignore)",
            argument="names",
            accepted=[],
        )
    return values, list(names)


class Batches:
    """Batches of augmented pictures for :func:`zoo.training.fit`: x (batch, channels, size, size) as ``pipe`` prepares
    pictures, and classes (batch, size, size) int64, :data:`IGNORED` beyond the picture.

    A picture is resized to the size at which the pipeline sees it times a number between ``scales``, and a square as
    long as the pipeline's shorter side is cut out of it; flip and jitter as for classifiers. As mmsegmentation's
    ``RandomResize``, ``RandomCrop(cat_max_ratio=0.75)`` and ``RandomFlip``.
    """

    def __init__(
        self,
        data: Sequence[Pair],
        values: Values,
        pipe: SemanticSegmentation,
        *,
        batch_size: int = 8,
        seed: int = 0,
        scales: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        jitter: float = 0.2,
    ) -> None:
        self.data, self.values, self.pipe = data, values, pipe
        self.scales, self.flip, self.jitter, self.size = scales, flip, jitter, pipe.short_side
        self.order = Shuffled(len(data), batch_size, seed)

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        random = self.order.random(index)
        made = samples(self._sample, (self.data[i] for i in self.order(index)), random)
        pictures, classes = zip(*made, strict=True)
        return torch.stack(pictures), torch.stack(classes)

    def _sample(self, pair: Pair, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        image = self.pipe.read(pair.picture)
        pixels = torch.from_numpy(np.array(image)).float()
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        classes = torch.from_numpy(self.values.read(pair.labels))
        scale = math.exp(random.uniform(*np.log(self.scales)))
        size = [max(1, round(side * scale)) for side in self.pipe.size_of(*image.size)]
        pixels = resize(pixels[None], size)[0].round()
        classes = F.interpolate(classes[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
        for _ in range(TRIES):
            top, left = (int(random.integers(max(side - self.size, 0) + 1)) for side in size)
            part = classes[top : top + self.size, left : left + self.size]
            counts = (part[part != IGNORED]).bincount()
            if not len(counts) or counts.max() <= LARGEST * counts.sum():
                break
        pixels = pixels[:, top : top + self.size, left : left + self.size].to(torch.uint8)
        if self.flip and random.random() < 0.5:
            pixels, part = pixels.flip(-1), part.flip(-1)
        x = (jittered(pixels, random, self.jitter) / 255 - self.pipe.mean) / self.pipe.std
        beyond = (0, self.size - part.shape[1], 0, self.size - part.shape[0])
        return F.pad(x, beyond), F.pad(part, beyond, value=IGNORED)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The segmentor's own: cross entropy at full size, and 0.4 of its auxiliary head's."""
    return model.loss(*batch, ignore=IGNORED)  # type: ignore[operator]
