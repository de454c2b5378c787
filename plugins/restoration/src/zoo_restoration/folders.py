"""Folders of clean images to train on and to measure with, read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .images import EXTENSIONS, read_picture

#: bytes of pixels that are kept in memory; the rest is read again each time
KEEP = 1 << 30


class ImageFolder:
    """The images in a folder and its subfolders: ``folder[i]`` is (height, width, channels) uint8 or uint16.

    ``channels`` 3 (grey images become RGB of three equal channels) or 1 (of grey images alone). Alpha is left out.
    Raises ValueError for a folder without images.
    """

    def __init__(self, folder: str | Path, channels: int = 3, files: Sequence[Path] | None = None) -> None:
        self.folder, self.channels = Path(folder), channels
        self.files = list(files) if files is not None else sorted(
            p for p in self.folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")
        )  # fmt: skip
        if files is None and not self.files:
            raise ValueError(f"the folder {self.folder} holds no image; expected {', '.join(EXTENSIONS)}")
        self._kept: dict[int, np.ndarray] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self.files):
            raise IndexError(f"image {index} of {len(self.files)}")
        found = self._kept.get(index)
        if found is not None:
            return found
        picture = read_picture(self.files[index])
        if self.channels == 1 and not picture.grey:
            raise ValueError(f"{self.files[index]}: has colours, and the model takes grey images; convert it first")
        top = (1 << picture.bits) - 1
        pixels = np.rint(picture.colours * top).astype(np.uint8 if picture.bits == 8 else np.uint16)
        if pixels.shape[2] != self.channels:
            pixels = np.repeat(pixels, self.channels, axis=2)
        if self._bytes + pixels.nbytes <= KEEP:
            self._kept[index], self._bytes = pixels, self._bytes + pixels.nbytes
        return pixels

    def split(self, share: float, seed: int = 0) -> tuple[ImageFolder, ImageFolder]:
        """(to train on, held out): ``share`` of the files by lot; where it is above 0, at least one of two files."""
        count = round(share * len(self.files))
        if share > 0 and len(self.files) > 1:
            count = min(max(count, 1), len(self.files) - 1)
        order = np.random.default_rng(seed).permutation(len(self.files))
        parts = (sorted(order[count:]), sorted(order[:count]))
        first, second = (ImageFolder(self.folder, self.channels, [self.files[i] for i in part]) for part in parts)
        return first, second
