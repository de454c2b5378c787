"""Training a classifier on FOLDER/CLASS/PICTURE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from zoo.training import Shuffled
from zoo_registry import errors
from zoo_vision.pipelines import ImageClassification
from zoo_vision.validation import LabelledPictures, class_folders

from .augment import jittered, mixed, samples, window

#: names of sub-folders that are parts of a data set and no classes
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def classes_in(folder: Path) -> list[str]:
    """The classes of FOLDER/CLASS/PICTURE: the names of its sub-folders, sorted. Raises BadArgument for fewer than two,
    and for sub-folders that are parts of a data set."""
    names = class_folders(folder)
    if parts := [name for name in names if name.casefold() in PARTS]:
        raise errors.BadArgument(
            f"{folder} has the sub-folder {parts[0]}, which is no class; give {folder / parts[0]} (and the part to "
            "measure on as --validation)",
            argument="folder",
            accepted=[],
        )
    if len(names) < 2:
        raise errors.BadArgument(
            f"{folder} has {len(names)} sub-folders; expected two or more, one for each class: {folder}/CLASS/PICTURE",
            argument="folder",
            accepted=[],
        )
    return names


def labelled(folder: Path, classes: list[str], channels: int) -> LabelledPictures:
    """The pictures of FOLDER/CLASS/PICTURE, upright. Raises BadArgument for other classes than ``classes``, and for one
    without pictures."""
    names = class_folders(folder)
    if unknown := sorted(set(names) - set(classes)):
        raise errors.BadArgument(
            f"{folder} has the class {unknown[0]}, which is not trained; expected {', '.join(classes[:8])}",
            argument="folder",
            accepted=classes,
        )
    data = LabelledPictures(folder, {name: classes.index(name) for name in names}, channels, upright=True)
    found = {label for _, label in data.samples}
    if empty := [name for name in names if classes.index(name) not in found]:
        raise errors.BadArgument(f"{folder / empty[0]} holds no pictures", argument="folder", accepted=[])
    return data


class Batches:
    """Batches of augmented pictures for :func:`zoo.training.fit`: x (batch, channels, H, W) and the classes' shares
    (batch, classes), as ``pipe`` prepares pictures, but for what is drawn.

    least: of a picture's area that is shown (see :func:`~zoo_vision.training.augment.window`). flip: half of them from
    right to left. jitter, mixup: see :mod:`zoo_vision.training.augment`.
    """

    def __init__(
        self,
        data: LabelledPictures,
        pipe: ImageClassification,
        classes: int,
        *,
        batch_size: int = 32,
        seed: int = 0,
        least: float = 0.35,
        flip: bool = True,
        jitter: float = 0.2,
        mixup: float = 0.0,
    ) -> None:
        self.data, self.classes = data, classes
        self.least, self.flip, self.jitter, self.mixup = least, flip, jitter, mixup
        self.order = Shuffled(len(data), batch_size, seed)
        self.size = list(pipe.settings["input_size"][1:])
        self.interpolation = str_to_interp_mode(pipe.settings["interpolation"])
        self.mean, self.std = (torch.tensor(pipe.settings[k]).view(-1, 1, 1) for k in ("mean", "std"))

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        random, numbers = self.order.random(index), self.order(index)
        x = torch.stack(samples(self._picture, numbers, random))
        labels = torch.tensor([self.data.samples[i][1] for i in numbers])
        return mixed(x, F.one_hot(labels, self.classes).float(), random, self.mixup)

    def _picture(self, number: int, random: np.random.Generator) -> Tensor:
        image = self.data.read(number)
        left, top, width, height = window(random, *image.size, self.least)
        image = functional.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        pixels = functional.pil_to_tensor(image)
        if self.flip and random.random() < 0.5:
            pixels = pixels.flip(-1)
        return (jittered(pixels, random, self.jitter) / 255 - self.mean) / self.std


class Loss:
    """Cross entropy with ``smoothing`` of the classes' shares. frozen: all but the classifier stays as it is, averages
    of batch norms included."""

    def __init__(self, smoothing: float = 0.0, frozen: bool = False) -> None:
        self.smoothing, self.frozen = smoothing, frozen

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.frozen:
            model.eval()
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=self.smoothing)


def freeze(model: nn.Module) -> None:
    """Leave gradients to the classifier alone. Raises BadArgument for a model that does not say which part that is."""
    if not hasattr(model, "get_classifier"):
        raise errors.BadArgument(
            f"{type(model).__name__} has no get_classifier(); train it without --freeze", argument="frozen", accepted=[]
        )
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
