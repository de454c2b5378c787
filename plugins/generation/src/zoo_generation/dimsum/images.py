"""Folders of pictures as tensors of one size, for training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo import images as pictures

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class ImageSet:
    """``images`` (count, C, side, side) in [-1, 1], ``labels`` (count,) or None, and the names of the classes."""

    images: Tensor
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def split(self, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """The set without a random ``share``, and that share (at least one image)."""
        if not 0 <= share < 1:
            raise ValueError(f"the share of images to keep apart is {share}; expected 0 or more and below 1")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        cut = len(self) - max(1, round(share * len(self)))
        if cut < 1:
            raise ValueError(f"there are {len(self)} images; at least 2 are needed to keep some apart")
        first, second = (
            ImageSet(self.images[rows], None if self.labels is None else self.labels[rows], self.classes)
            for rows in (order[:cut], order[cut:])
        )
        return first, second


def read_picture(path: Path, side: int, channels: int) -> Tensor:
    """The middle square of a picture at ``side`` pixels, (channels, side, side) in [-1, 1]; grey or RGB."""
    image = pictures.read_picture(path)
    image = image.convert("L") if channels == 1 else image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    image = image.resize((side, side), Image.Resampling.LANCZOS if short > side else Image.Resampling.BICUBIC, box)
    pixels = torch.from_numpy(np.array(image, np.float32)) / 127.5 - 1
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def read_folder(folder: str | Path, side: int, channels: int, classes: list[str] | None = None) -> ImageSet:
    """FOLDER/CLASS/PICTURES with labels, classes in sorted order or in that of ``classes``; FOLDER/PICTURES without.

    Raises ValueError for a folder without pictures, a class that ``classes`` lacks, and a file that is no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected FOLDER/CLASS/PICTURES or FOLDER/PICTURES")
    groups = {p.name: _pictures(p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    groups = {name: files for name, files in groups.items() if files}
    if not groups:
        files = _pictures(folder)
        if not files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
        return ImageSet(torch.stack([read_picture(f, side, channels) for f in files]), None, [])
    names = list(classes) if classes else list(groups)
    if unknown := [name for name in groups if name not in names]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which is none of {', '.join(names[:8])}")
    images = [read_picture(f, side, channels) for files in groups.values() for f in files]
    labels = [names.index(name) for name, files in groups.items() for _ in files]
    return ImageSet(torch.stack(images), torch.tensor(labels), names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES and f.is_file())
