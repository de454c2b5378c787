"""Recordings of whiskers: files with forces and torques, and the frames that the networks read.

A recording is (samples, whiskers, 6): three forces and three torques at every whisker's base, whiskers row by row
(35 = 5 x 7), the published ones 110 samples at 1000 a second. Source: neuroagents-lab/2025-tactile-whisking
``tactile_dataset.py``, ``utils/data_transform.py``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.files import read_arrays
from zoo_registry import errors, optional

EXTENSIONS = (".npz", ".npy", ".h5", ".hdf5")
VALUES = 6


@dataclass(frozen=True)
class Layout:
    """How samples become frames, of a network that reads ``n_times`` frames of ``input_shape``."""

    n_times: int = 22
    input_shape: tuple[int, ...] = (30, 5, 7)

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or self.input_shape[0] % VALUES:
            raise ValueError(
                f"input_shape is {self.input_shape}; expected (samples a frame times {VALUES}, rows, columns)"
            )

    @property
    def step(self) -> int:
        """Samples in a frame."""
        return self.input_shape[0] // VALUES

    @property
    def samples(self) -> int:
        """Samples that the network reads."""
        return self.step * self.n_times

    def frames(self, recording: np.ndarray | Tensor) -> Tensor:
        """(..., samples, whiskers, 6) to (..., frames, samples a frame * 6, rows, columns), float32.

        whiskers may be two axes, (rows, columns). Raises ValueError for another shape.
        """
        x = torch.as_tensor(recording).float()
        if tuple(x.shape[-3:]) == (*self.input_shape[1:], VALUES):
            x = x.flatten(-3, -2)
        whiskers = self.input_shape[1] * self.input_shape[2]
        if x.dim() < 3 or tuple(x.shape[-2:]) != (whiskers, VALUES) or x.shape[-3] % self.step or not x.shape[-3]:
            raise ValueError(
                f"the recording has shape {tuple(recording.shape)}; expected (samples, {whiskers}, {VALUES}) with a "
                f"multiple of {self.step} samples"
            )
        return to_frames(x, self.step, self.input_shape[1:])

    @classmethod
    def of(cls, model: Any) -> Layout:
        """What a network reads."""
        return cls(model.n_times, tuple(model.input_shape))


def to_frames(x: Tensor, step: int = 5, map_size: Sequence[int] = (5, 7)) -> Tensor:
    """(..., samples, whiskers, values) to (..., samples / step, step * values, rows, columns).

    Channel ``s * values + v`` of a frame holds value v of its sample s.
    """
    x = x.unflatten(-3, (-1, step)).unflatten(-2, tuple(map_size))
    return x.movedim(-1, -3).flatten(-4, -3)


def read_recording(source: Any, key: str | None = None) -> tuple[np.ndarray, int | None]:
    """A recording and its label (None without one) from a file (npz, npy, h5), its bytes of npz or npy, or an array.

    key: the name of the array in an npz or h5 file; without it "data" or the only array of three axes or more. A
    "label" beside it is a category's index. Raises ValueError for a file that holds no recording, naming what it holds.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _checked(np.asarray(source), "the array"), None
    if not isinstance(source, (str, Path, bytes)):
        raise ValueError(f"a recording is given as {type(source).__name__}; expected a file, its bytes or an array")
    name = str(source) if isinstance(source, (str, Path)) else "the bytes"
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in (".h5", ".hdf5"):
        h5py = optional("h5py", "an HDF5 recording", "ssm-zoo-neuro[hdf5]")
        try:
            with h5py.File(source, "r") as file:
                arrays = {k: v[()] for k, v in file.items() if hasattr(v, "shape")}
        except OSError as error:
            raise ValueError(f"{name} cannot be read as HDF5: {error}") from error
        return _chosen(arrays, key, name)
    arrays = read_arrays(io.BytesIO(source) if isinstance(source, bytes) else source)
    return (_checked(arrays[""], name), None) if "" in arrays else _chosen(arrays, key, name)


def _chosen(arrays: Mapping[str, np.ndarray], key: str | None, name: str) -> tuple[np.ndarray, int | None]:
    many = [k for k, v in arrays.items() if np.ndim(v) >= 3]
    key = key or ("data" if "data" in many else many[0] if len(many) == 1 else None)
    if key is None or key not in arrays:
        held = ", ".join(f"{k} {np.shape(v)}" for k, v in arrays.items()) or "nothing"
        raise ValueError(
            f"{name} holds {held}; expected an array 'data' (samples, whiskers, {VALUES}), or give its key"
        )
    label = arrays.get("label")
    if label is not None and np.size(label) == 1 and np.asarray(label).dtype.kind not in "iub":
        raise ValueError(f"{name}: label is {np.asarray(label).item()!r}; expected a category's number, counted from 0")
    return _checked(arrays[key], f"{name}: {key}"), None if label is None or np.size(label) != 1 else int(label)


def _checked(x: np.ndarray, name: str) -> np.ndarray:
    if x.ndim not in (3, 4) or x.shape[-1] != VALUES or x.dtype.kind not in "fiu":
        raise ValueError(f"{name} has shape {x.shape} of {x.dtype}; expected numbers (samples, whiskers, {VALUES})")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has {int((~np.isfinite(x)).sum())} values that are not finite")
    return x


@dataclass
class Recordings:
    """Recordings of a data set: frames (n, time, channels, rows, columns), labels (n,), category names."""

    frames: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, which: Any) -> Recordings:
        which = torch.as_tensor(which)
        return Recordings(self.frames[which], self.labels[which], self.classes)


def read_folder(folder: str | Path, layout: Layout, classes: Sequence[str] | None = None) -> Recordings:
    """FOLDER/CATEGORY/FILES, or files in one folder whose "label" says their category (the authors' data).

    classes: the categories in the order of the labels; without it the subfolders in order, or "0", "1" ... Raises
    ValueError for a folder without recordings, one of another length, or a category that is not among ``classes``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise errors.LocalFileMissing(f"there is no folder {str(folder)!r}", path=str(folder))
    named = sorted(p for p in folder.iterdir() if p.is_dir() and _files(p))
    frames, labels = [], []
    if named:
        known = list(classes) if classes is not None else [p.name for p in named]
        for place in named:
            if place.name not in known:
                raise ValueError(f"{folder} has a category {place.name!r}, which is none of {', '.join(known)}")
            for file in _files(place):
                frames.append(_whole(read_recording(file)[0], layout, file))
                labels.append(known.index(place.name))
    else:
        for file in _files(folder):
            recording, label = read_recording(file)
            if label is None:
                raise ValueError(f"{file} has no label; expected one in the file, or subfolders named by category")
            frames.append(_whole(recording, layout, file))
            labels.append(label)
        known = list(classes) if classes is not None else [str(i) for i in range(max(labels, default=0) + 1)]
        if labels and not 0 <= min(labels) <= max(labels) < len(known):
            raise ValueError(f"{folder} has labels from {min(labels)} to {max(labels)}; expected 0 to {len(known) - 1}")
    if not frames:
        raise ValueError(f"{folder} holds no recordings; expected {', '.join(EXTENSIONS)} in subfolders of categories")
    return Recordings(torch.stack(frames), torch.tensor(labels), known)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS)


def _whole(recording: np.ndarray, layout: Layout, file: Path) -> Tensor:
    if len(recording) != layout.samples:
        raise ValueError(f"{file} has {len(recording)} samples; expected {layout.samples}")
    return layout.frames(recording)


def read_splits(folder: str | Path, layout: Layout, seed: int = 0) -> tuple[Recordings, Recordings, Recordings]:
    """Training, validation and test: the folders train, validate (or valid, val) and test, else 80, 10 and 10 %."""
    folder = Path(folder)
    if (folder / "train").is_dir():
        train = read_folder(folder / "train", layout)
        rest = [next((folder / n for n in names if (folder / n).is_dir()), None)
                for names in (("validate", "valid", "val"), ("test",))]  # fmt: skip
        if None in rest:
            raise ValueError(f"{folder} has a folder train; expected validate and test beside it")
        valid, test = (read_folder(place, layout, train.classes) for place in rest if place is not None)
        return train, valid, test
    whole = read_folder(folder, layout)
    if len(whole) < 10:
        raise ValueError(f"{folder} has {len(whole)} recordings; at least 10 are needed to split them")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    held = max(1, len(whole) // 10)
    return whole.chosen(order[2 * held :]), whole.chosen(order[:held]), whole.chosen(order[held : 2 * held])
