"""Folders of labelled clouds read for training: what is trained on, and what is held out to be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import refused
from zoo.pipelines import progress_bar
from zoo.training import held_out
from zoo_registry import errors

from .files import Cloud
from .labelled import Classes, class_folders, clouds_in, kind_of, read_each, wrong
from .measures import accuracies
from .pipelines import CloudClassification, thinned
from .training import Moves, Samples
from .validation import points_pipes, score_classes, score_points


@dataclass(frozen=True)
class Reading:
    """How folders are read: the held-out ``share`` by ``seed``, or a ``validation`` folder of its own; ``invalid``
    points; ``least`` points that the model takes; whether a bar shows how far it is (``progress``)."""

    share: float = 0.2
    validation: Path | None = None
    seed: int = 0
    invalid: str = "error"
    least: int = 1
    progress: bool = False

    def parted(self, groups: Sequence[Any], folder: Path) -> tuple[list[int], list[int]]:
        """Numbers to train on and to hold out. Raises BadArgument where there are too few."""
        try:
            return held_out(groups, self.share, self.seed)
        except ValueError as error:
            raise wrong(f"{folder}: {error}, or another folder to measure on (--validation)") from error

    def clouds(self, files: Sequence[Path], *, labels: bool = False) -> Iterator[tuple[Path, Cloud]]:
        """Each file and its cloud. Raises BadFile for one that cannot be read or has too few points."""
        with progress_bar(self.progress, len(files), "reading") as advance:
            for file, cloud in read_each(files, self.invalid, labels=labels):
                if len(cloud) < self.least:
                    raise errors.BadFile(
                        f"{file} has {len(cloud)} points; the model needs at least {self.least}", path=str(file)
                    )
                yield file, cloud
                advance()


@dataclass
class Data:
    """``names`` of the classes; ``train`` and ``rest``, that is held out: clouds, the class of each or of its points,
    the kind of each (labels of points: ``kinds`` by number). ``settings``: how clouds are prepared, to be saved."""

    names: list[str]
    settings: dict[str, Any]
    train: Samples
    rest: list[tuple[Cloud, Any, str]]
    kinds: list[str] = field(default_factory=list)

    def scores(self, model: Any) -> dict[str, float]:
        """The figures of the held-out clouds, as ``zoo validate`` takes them; none where there are none."""
        if not self.rest:
            return {}
        clouds, truth, kinds = zip(*self.rest, strict=True)
        if isinstance(truth[0], int):
            return accuracies(score_classes(CloudClassification(model), clouds, truth))
        return score_points(points_pipes(model, kinds), self.rest).compute()


def read_classes(folder: Path, settings: dict[str, Any], size: int | None, moves: Moves, reading: Reading) -> Data:
    """FOLDER/CLASS/clouds. ``size``: points of a sample (None: those of ``settings``, or of half of the clouds where
    these have fewer).

    Raises BadArgument for a folder that is laid out otherwise and BadFile for a file that cannot be read."""
    names, files, classes = class_folders(folder)
    if len(names) < 2:
        raise wrong(f"{folder} has the sub-folder {names[0]} alone; expected one for each class, two or more")
    numbers, rest = reading.parted(classes, folder)
    samples = Samples(settings, size or int(settings["points"]), moves)
    counts = []
    for number, (file, cloud) in zip(numbers, reading.clouds([files[n] for n in numbers]), strict=True):
        with refused(file):
            samples.add(cloud, classes[number])
        counts.append(len(cloud))
    if size is None:
        samples.points = min(samples.points, int(np.median(counts)))
    settings = samples.settings = settings | {"points": samples.points}
    others, other_classes = [files[n] for n in rest], [classes[n] for n in rest]
    if reading.validation is not None:
        _, others, other_classes = class_folders(reading.validation, names)
    clouds = (thinned(cloud, samples.points) for _, cloud in reading.clouds(others))
    return Data(names, settings, samples, [(cloud, own, "") for cloud, own in zip(clouds, other_classes, strict=True)])


def read_points(
    folder: Path,
    settings: dict[str, Any],
    size: int | None,
    moves: Moves,
    reading: Reading,
    *,
    shapes: bool = False,
    ignored: Sequence[int] = (-1,),
    names: Sequence[str] | None = None,
) -> Data:
    """Clouds with a label for every point. ``shapes``: the model is told the kind of object, the sub-folder; which
    kinds there are is ``settings["kinds"]``, otherwise what is found. ``ignored``: labels to leave out; ``names`` of
    label 0, 1, 2 ... ``size``, errors: as :func:`read_classes`.
    """
    files = clouds_in(folder)
    kinds = [kind_of(file, folder) for file in files]
    train, rest = reading.parted(kinds, folder)
    known = sorted(set(kinds))
    if shapes:
        known = settings.get("kinds") or known
        if strange := set(kinds) - set(known):
            raise wrong(f"{folder} has the sub-folder {min(strange)!r}; expected {', '.join(known)}")
        settings = settings | {"kinds": list(known)}
    read = dict(reading.clouds(files, labels=True))
    classes = Classes.found(read.values(), ignored, names)
    settings = settings | {"label_values": classes.values}
    samples = Samples(settings, size or int(settings["points"]), moves)
    if size is None:
        samples.points = min(samples.points, int(np.median([len(read[files[n]]) for n in train])))
        settings = samples.settings = settings | {"points": samples.points}
    for number in train:
        file = files[number]
        cloud = read.pop(file)  # of which the samples keep what they need
        with refused(file):
            samples.add(cloud, classes.of(cloud, file, ignored), known.index(kinds[number]))
    measured = [(files[n], read[files[n]], kinds[n]) for n in rest]
    if reading.validation is not None:
        others = clouds_in(reading.validation)
        measured = [(f, c, kind_of(f, reading.validation)) for f, c in reading.clouds(others, labels=True)]
        if shapes and (strange := {kind for _, _, kind in measured} - set(known)):
            raise wrong(f"{reading.validation} has the sub-folder {min(strange)!r}; expected {', '.join(known)}")
    found = [(cloud, classes.of(cloud, file, ignored), kind) for file, cloud, kind in measured]
    return Data(classes.names, settings, samples, found, list(known))
