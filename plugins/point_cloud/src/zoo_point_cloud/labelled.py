"""Labelled clouds as people keep them: a sub-folder for each class, or files with a label for every point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.files import refused
from zoo_registry import errors

from .files import EXTENSIONS, Cloud, read_cloud, read_labelled

#: The class of points that nothing is learnt from and nothing is measured on.
NONE = -1
#: Names of sub-folders that are parts of a data set and no classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def wrong(message: str, argument: str = "data") -> errors.BadArgument:
    return errors.BadArgument(message, argument=argument, accepted=[])


def clouds_in(folder: Path) -> list[Path]:
    """The cloud files in a folder and all below it, by name. Raises BadArgument where there are none."""
    if not folder.is_dir():
        raise wrong(f"{folder} is no folder; expected a folder with {', '.join(EXTENSIONS)}")
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS and not f.name.startswith("."))
    if not found:
        raise wrong(f"{folder} holds no clouds; expected {', '.join(EXTENSIONS)}")
    return found


def kind_of(file: Path, data: Path) -> str:
    """The sub-folder of ``data`` in which a file lies; "" for files in ``data`` itself."""
    return file.relative_to(data).parts[0] if file.parent != data else ""


def sub_folders(folder: Path) -> list[str]:
    """The names of a folder's own folders. Raises BadArgument for something else than a folder."""
    if not folder.is_dir():
        raise wrong(f"{folder} is no folder; expected one sub-folder for each class, {folder}/CLASS/CLOUD")
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def class_folders(folder: Path, names: Sequence[str] | None = None) -> tuple[list[str], list[Path], list[int]]:
    """FOLDER/CLASS/clouds: names of the classes, the files, and the number of each one's class.

    names: the classes to be found (None: what is there, by name), which need not all be. Raises BadArgument for a
    folder without sub-folders, one of another name, and one without clouds.
    """
    found = sub_folders(folder)
    if not found:
        raise wrong(f"{folder} has no sub-folders; expected one for each class, {folder}/CLASS/CLOUD")
    if parts := [name for name in found if name.casefold() in PARTS]:
        raise wrong(f"{folder} has the sub-folder {parts[0]}, which is no class; give {folder / parts[0]}")
    known = list(names or found)
    if unknown := [name for name in found if name not in known]:
        raise wrong(f"{folder} has the sub-folder {unknown[0]}, which is no class; expected {', '.join(known[:9])}")
    files = [(file, known.index(name)) for name in found for file in clouds_in(folder / name)]
    return known, [file for file, _ in files], [number for _, number in files]


def read_each(files: Iterable[Path], invalid: str, *, labels: bool = False) -> Iterable[tuple[Path, Cloud]]:
    """(file, its cloud) one after the other; with the points' labels where these are wanted. Raises BadFile."""
    for file in files:
        with refused(file):
            yield file, (read_labelled if labels else read_cloud)(file, invalid)


@dataclass(frozen=True)
class Classes:
    """The labels that points have in the files, and what the classes are called, in the order of a model's outputs."""

    values: list[int]
    names: list[str]

    @classmethod
    def found(cls, clouds: Iterable[Cloud], ignored: Sequence[int], names: Sequence[str] | None) -> Classes:
        """All labels of ``clouds`` that are not ``ignored``; ``names``: of label 0, 1, 2 ...

        Raises BadArgument where there are less than two, and where one has no name."""
        values: set[int] = set()
        for cloud in clouds:
            assert cloud.labels is not None
            values.update(np.unique(cloud.labels).tolist())
        kept = sorted(values - set(ignored))
        if len(kept) < 2:
            raise wrong(f"the points have the labels {sorted(values)}; expected two or more to tell apart")
        if names is None:
            return cls(kept, [f"label {value}" for value in kept])
        if kept[0] < 0 or kept[-1] >= len(names):
            raise wrong(f"the points have the labels {kept}, and {len(names)} names are given; expected one for each")
        return cls(kept, [names[value] for value in kept])

    def of(self, cloud: Cloud, where: object = "the cloud", ignored: Sequence[int] | None = None) -> np.ndarray:
        """The class of every point (N,), :data:`NONE` for labels that are ``ignored`` (None: for all others).

        Raises BadArgument for a label that is neither."""
        labels = cloud.labels
        assert labels is not None
        place = np.searchsorted(self.values, labels).clip(max=len(self.values) - 1)
        classes = np.where(np.asarray(self.values)[place] == labels, place, NONE)
        if ignored is not None:
            strange = set(np.unique(labels[classes == NONE]).tolist()) - set(ignored)
            if strange:
                raise wrong(f"{where} has the label {min(strange)}, which is none of {self.values}")
        return classes
