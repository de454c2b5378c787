"""Labelled scans for training: what a folder holds, the grid it asks for, and patches of its scans.

A folder is laid out as nnU-Net's raw data or as images/ and labels/ (:func:`zoo_medical.validation.find_cases`), with
nnU-Net's dataset.json or without. :func:`survey` reads every case once, so that a damaged one is named before training
begins. :func:`prepare` brings the cases to the network's grid and intensities, as the pipeline does, and keeps them on
disk; :class:`Patches` maps these files, so that memory holds one scan while they are prepared and the patches of a few
batches while a network trains, however large the folder is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import errors
from zoo.files import read_json
from zoo.pipelines import progress_bar
from zoo.training import Shuffled, held_out

from .augmentation import augmented
from .pipelines import VolumePipeline
from .scans import Scan, read_scan
from .validation import find_cases, read_labels

Case = tuple[Any, Path]  #: image file, or a tuple of channel files; label file

#: Voxels of each label of a scan that are remembered, for patches that hold it and for the window of intensities.
REMEMBERED = 10_000
#: One patch of so many is laid around a voxel that has a label.
EVERY = 3


@dataclass(frozen=True)
class Description:
    """What a dataset.json says: names of labels (background first) and of channels; None where there is none."""

    labels: list[str] | None = None
    channels: list[str] | None = None


def describe(folder: Path) -> Description:
    """``folder/dataset.json`` of nnU-Net, of version 1 or 2. Raises BadFile for one that says something else."""
    path = folder / "dataset.json"
    if not path.exists():
        return Description()
    said = read_json(path)
    labels = said.get("labels") if isinstance(said, dict) else None
    try:
        assert isinstance(labels, dict)
        numbers = {int(v): k for k, v in labels.items()} if _turned(labels) else {int(k): v for k, v in labels.items()}
    except (AssertionError, TypeError, ValueError) as error:
        raise errors.BadFile(
            f"{path}: labels is {labels!r:.200}; expected names with one number each, as "
            '{"background": 0, "liver": 1} (regions of several labels are not trained here)',
            path=str(path),
        ) from error
    if sorted(numbers) != list(range(len(numbers))) or len(numbers) < 2 or "ignore" in numbers.values():
        raise errors.BadFile(
            f"{path}: labels has the numbers {sorted(numbers)}; expected 0, 1, 2 ... without a gap, and no label "
            '"ignore"',
            path=str(path),
        )
    channels = said.get("channel_names", said.get("modality"))
    names = [str(channels[k]) for k in sorted(channels, key=int)] if isinstance(channels, dict) else None
    return Description([str(numbers[i]) for i in range(len(numbers))], names)


def _turned(labels: dict[str, Any]) -> bool:
    """Whether names stand before numbers, as in version 2."""
    return not all(k.isdigit() for k in labels)


@dataclass
class Survey:
    """What :func:`survey` found, each list in the order of the cases."""

    channels: int
    flat: bool  #: of pictures
    spacings: list[tuple[float, ...]]  #: mm of the network's axes; of pictures none
    labels: list[set[int]]  #: values that each case holds
    window: tuple[float, float]  #: 0.5 and 99.5 percentiles of the intensities that have a label

    @property
    def spacing(self) -> list[float]:
        """The median of each axis."""
        return [round(float(s), 6) for s in np.median(self.spacings, axis=0)]

    @property
    def anisotropy(self) -> float:
        """The largest ratio of the sides of a voxel."""
        return max((max(s) / min(s) for s in self.spacings), default=1.0)


@dataclass
class Labelled:
    """Cases to train on and held-out ones, what the former hold, and names of labels and channels."""

    train: list[Case]
    held: list[Case]
    found: Survey
    names: list[str]
    channels: list[str] | None


def labelled(
    folder: Path,
    validation: Path | None,
    share: float,
    seed: int,
    channels_of: Callable[[Case], Sequence[int]],
    orientation: str | None,
    *,
    quiet: bool = False,
) -> Labelled:
    """Look through a folder. Held out are the cases of ``validation``, or a ``share`` of the folder's drawn by
    ``seed``. ``channels_of``: numbers of channels that cases like this one may have.

    Raises BadArgument where there is nothing to learn or to measure, BadFile for files that do not fit.
    """
    train, held = find_cases(folder), [] if validation is None else find_cases(validation)
    if validation is None:
        kept, rest = held_out([None] * len(train), share, seed)
        train, held = [train[i] for i in kept], [train[i] for i in rest]
    said = describe(folder)
    names, channels = said.labels, channels_of(train[0])
    with reading(len(train) + len(held), quiet) as advance:
        found = survey(train, channels, None if names is None else len(names), orientation, seed, advance)
        if names is None:
            names = ["background", *(f"label {i}" for i in range(1, _classes(found)))]
        test = survey(held, channels, len(names), orientation, seed, advance) if held else None
    _check_labels(found, test)
    if said.channels is not None and len(said.channels) != found.channels:
        raise errors.BadFile(
            f"{folder / 'dataset.json'} names {len(said.channels)} channels ({', '.join(said.channels)}); "
            f"{_named(train[0][0])} {_kind(found.channels, found.flat)}",
            path=str(folder / "dataset.json"),
        )
    return Labelled(train, held, found, names, said.channels)


def survey(
    cases: Sequence[Case],
    channels: Sequence[int],
    classes: int | None,
    orientation: str | None,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Survey:
    """Read every case. ``channels``: numbers of channels that are taken; ``classes``: of labels (None: any);
    ``orientation``: of the network's axes, None: the files'.

    Raises BadFile where an image and its labels do not fit, or one case has other channels than the rest.
    """
    found = Survey(0, False, [], [], (0.0, 0.0))
    values: list[np.ndarray] = []
    for number, (images, truth) in enumerate(cases):
        scan = read_scan(images, channels)
        labels = case_labels(truth, scan, classes)
        if number == 0:
            found.channels, found.flat = len(scan.data), scan.flat
        elif (len(scan.data), scan.flat) != (found.channels, found.flat):
            raise errors.BadFile(
                f"{_named(images)}: {_kind(len(scan.data), scan.flat)}, but {_named(cases[0][0])} "
                f"{_kind(found.channels, found.flat)}; expected the same of all",
                path=_named(images),
            )
        if not scan.flat:
            found.spacings.append(_turned_spacing(scan, orientation))
        found.labels.append({int(v) for v in np.unique(labels)})
        inside = scan.data[:, labels > 0]
        if inside.shape[1] > REMEMBERED:
            inside = inside[:, np.random.default_rng((seed % 2**63, number)).choice(inside.shape[1], REMEMBERED, False)]
        values.append(inside.ravel())
        advance()
    together = np.concatenate(values)
    if together.size:
        low, high = np.percentile(together, [0.5, 99.5])
        found.window = (float(low), float(high))
    return found


def case_labels(path: Path, scan: Scan, classes: int | None) -> np.ndarray:
    """(i, j, k) label numbers on the grid of the scan's file."""
    shape = scan.data.shape[1:3] if scan.flat else scan.data.shape[1:]
    labels = read_labels(path, shape, None if scan.flat else scan.affine, classes)
    return labels[..., None] if scan.flat else labels


def _named(images: Any) -> str:
    return str(images[0] if isinstance(images, tuple) else images)


def _kind(channels: int, flat: bool) -> str:
    return f"is a {'picture' if flat else 'volume'} of {channels} channel{'s' * (channels > 1)}"


def _turned_spacing(scan: Scan, orientation: str | None) -> tuple[float, ...]:
    """mm of the axes after they were turned to ``orientation``."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    if orientation is None:
        return scan.spacing
    turn = ornt_transform(io_orientation(scan.affine), axcodes2ornt(orientation))
    found = [0.0] * 3
    for axis, (place, _) in enumerate(turn):
        found[int(place)] = scan.spacing[axis]
    return tuple(found)


def _classes(found: Survey) -> int:
    """Of folders without a dataset.json: labels up to the largest; 0 and 255 are two."""
    values = set().union(*found.labels)
    return 2 if found.flat and values <= {0, 255} else max(values, default=0) + 1


def _check_labels(found: Survey, test: Survey | None) -> None:
    if not any(values - {0} for values in found.labels):
        raise errors.BadArgument(
            "no case has a label but the background; there is nothing to learn", argument="folder", accepted=[]
        )
    if test is None:
        return
    if not any(values - {0} for values in test.labels):
        raise errors.BadArgument(
            "no held-out case has a label but the background; give another --seed or --held-out",
            argument="held_out", accepted=[],
        )  # fmt: skip
    if (test.channels, test.flat) != (found.channels, found.flat):
        raise errors.BadArgument(
            f"the cases to measure on have {test.channels} channels and those to train on {found.channels}",
            argument="validation", accepted=[],
        )  # fmt: skip


@contextlib.contextmanager
def reading(count: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """Progress over the cases that are read, on a terminal."""
    with progress_bar(not quiet and sys.stderr.isatty(), count, "reading") as advance:
        yield advance


# -- on disk, as the network reads them --------------------------------------------------------------------------------


def prepare(
    pipe: VolumePipeline, case: tuple[Any, Path | None], classes: int, folder: Path, number: int, seed: int = 0
) -> None:
    """Write case ``number``: ``N.image.npy`` (channels, x, y, z) float32 as the pipeline gives it to the network,
    ``N.labels.npy`` (x, y, z), and ``N.places.npy``, rows of (label, x, y, z), at most ``REMEMBERED`` of each label.
    A case without labels (None) has the first alone."""
    scan = pipe.read(case[0])
    image = pipe.prepare(scan)
    np.save(folder / f"{number}.image.npy", image.numpy())
    if case[1] is None:
        return
    labels = torch.from_numpy(case_labels(case[1], scan, classes))
    found = on_grid(labels, scan, image).numpy().astype(np.uint8 if classes <= 256 else np.uint16)
    draw = np.random.default_rng((seed % 2**63, number))
    places = [np.zeros((0, 4), np.int32)]
    for value in range(1, classes):
        rows = np.argwhere(found == value)
        if len(rows) > REMEMBERED:
            rows = rows[np.sort(draw.choice(len(rows), REMEMBERED, replace=False))]
        places.append(np.insert(rows, 0, value, axis=1).astype(np.int32))
    np.save(folder / f"{number}.labels.npy", found)
    np.save(folder / f"{number}.places.npy", np.concatenate(places))


def on_grid(labels: Tensor, scan: Scan, image: Tensor) -> Tensor:
    """Labels (i, j, k) of a scan on the grid (x, y, z) of its prepared ``image`` (channels, x, y, z): each voxel has
    the label of the nearest one."""
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    found = labels[None].float()
    if not scan.flat:
        placed = MetaTensor(found, affine=torch.from_numpy(scan.affine))
        sides = image.shape[1:] if scan.sides is None else (*scan.sides, image.shape[3])
        move = SpatialResample(mode="nearest", padding_mode="border")
        found = move(placed, dst_affine=torch.from_numpy(scan.grid), spatial_size=list(sides)).as_subclass(Tensor)
    if scan.sides is not None:  # resized to the window of a network of pictures
        slices = found.permute(3, 0, 1, 2)
        found = F.interpolate(slices, size=image.shape[1:3], mode="nearest-exact").permute(1, 2, 3, 0)
    return found[0].round().long()


@dataclass
class Patches:
    """Batches of patches of the ``count`` cases in ``folder``, by number: (images (batch, channels, *patch) float32,
    labels (batch, 1, *patch) int64).

    One patch of three is laid around a random voxel of a random label of its scan, as nnU-Net does (its share for
    batches of any size). Beyond a scan's border, where it is smaller, there are zeros, as in the pipeline's windows.
    A patch of two sides is a slice.
    """

    folder: Path
    count: int
    patch: Sequence[int]
    batch_size: int
    seed: int = 0
    augment: bool = True
    flips: bool = True
    order: Shuffled = field(init=False)

    def __post_init__(self) -> None:
        self.order = Shuffled(self.count, self.batch_size, self.seed)

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = self.order.random(index)
        made = []
        for place, number in enumerate(self.order(index)):
            inside = (index * self.batch_size + place) % EVERY == EVERY - 1
            image, labels = self.cut(number, draw, inside=inside)
            seed = int(draw.integers(2**32))
            made.append(augmented(image, labels, seed, flips=self.flips) if self.augment else (image, labels))
        return torch.stack([image for image, _ in made]), torch.stack([labels for _, labels in made]).long()

    def cut(self, number: int, draw: np.random.Generator, *, inside: bool) -> tuple[Tensor, Tensor]:
        """A patch of case ``number``; ``inside``: around a label, where the case has one."""
        image, labels, places = (
            np.load(self.folder / f"{number}.{what}.npy", mmap_mode="r") for what in ("image", "labels", "places")
        )
        sides = (*self.patch, 1)[:3]
        start = anywhere(labels.shape, sides, draw)
        if inside and len(places):
            rows = places[places[:, 0] == draw.choice(np.unique(places[:, 0]))]
            voxel = rows[draw.integers(len(rows)), 1:]
            start = [int(v) - p // 2 for v, p in zip(voxel, sides, strict=True)]
        found = cut(image, start, sides), cut(labels[None], start, sides).astype(np.int32)
        image_cut, labels_cut = (torch.from_numpy(one[..., 0] if len(self.patch) == 2 else one) for one in found)
        return image_cut, labels_cut


@dataclass
class Cubes:
    """Batches (batch, 1, side, side, side) of random cubes of the ``count`` volumes in ``folder``, by number."""

    folder: Path
    count: int
    side: int
    batch_size: int
    seed: int = 0
    order: Shuffled = field(init=False)

    def __post_init__(self) -> None:
        self.order = Shuffled(self.count, self.batch_size, self.seed)

    def __call__(self, index: int) -> Tensor:
        draw, sides = self.order.random(index), (self.side,) * 3
        volumes = [np.load(self.folder / f"{number}.image.npy", mmap_mode="r") for number in self.order(index)]
        return torch.stack([torch.from_numpy(cut(v, anywhere(v.shape[1:], sides, draw), sides)) for v in volumes])


def anywhere(shape: Sequence[int], sides: Sequence[int], draw: np.random.Generator) -> list[int]:
    """Where a patch begins that lies in a volume of ``shape``."""
    return [int(draw.integers(max(n - p, 0) + 1)) for n, p in zip(shape, sides, strict=True)]


def cut(volume: np.ndarray, start: Sequence[int], sides: Sequence[int]) -> np.ndarray:
    """A patch of (channels, x, y, z), in memory, moved into the volume where it would leave it; a volume that is
    smaller lies in the middle of zeros, as in MONAI's windows."""
    found = np.zeros((len(volume), *sides), volume.dtype)
    here, there = [], []
    for first, p, n in zip(start, sides, volume.shape[1:], strict=True):
        first, before = min(max(first, 0), max(n - p, 0)), max(p - n, 0) // 2
        there.append(slice(first, first + p))
        here.append(slice(before, before + min(n, p)))
    found[(slice(None), *here)] = volume[(slice(None), *there)]
    return found
