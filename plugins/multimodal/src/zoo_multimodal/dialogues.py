"""Dialogues from files: features of every utterance in up to three modalities, speakers, words and emotions.

| file | what it holds |
| --- | --- |
| ``.json`` | ``{"dialogues": [{"name": "d1", "utterances": [...]}]}`` or one dialogue; an utterance has ``text``, ``audio``, ``visual`` (a list of numbers, or null where it is missing), and may have ``speaker``, ``words``, ``label`` |
| ``.npz`` | arrays ``text``, ``audio``, ``visual`` (utterances, features), a row of NaN where it is missing; ``lengths`` (dialogues,), else the file is one; optionally ``speaker``, ``words``, ``label`` (utterances,), ``name`` (dialogues,) |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.files import read_arrays, read_json

from .broad_mamba import MODALITIES, BroadMamba

EXTENSIONS = (".json", ".npz")
#: The customary label sets of the two benchmarks.
LABELS = {
    "iemocap": ("happy", "sad", "neutral", "angry", "excited", "frustrated"),
    "meld": ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
}


@dataclass
class Dialogue:
    """Utterances in their order. features: by modality (utterances, numbers), NaN rows where one is missing; speakers,
    words and labels: one for each utterance, or None."""

    features: dict[str, np.ndarray]
    speakers: list[str] | None = None
    words: list[str] | None = None
    labels: list[str] | None = None
    name: str = "dialogue"

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """The dialogues of a file. Raises ValueError that names file, dialogue and utterance."""
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    if path.suffix.lower() == ".json":
        return _from_json(path)
    raise ValueError(f"{path.name} is no dialogue file; expected one of {', '.join(EXTENSIONS)}")


def _from_npz(path: Path) -> list[Dialogue]:
    arrays = read_arrays(path)
    found = {m: _numbers(arrays[m], np.float32, f"{path.name}: {m}") for m in MODALITIES if m in arrays}
    if not found:
        raise ValueError(f"{path.name} has no text, audio or visual; it holds {', '.join(arrays) or 'nothing'}")
    count = len(next(iter(found.values())))
    for name, array in found.items():
        if array.ndim != 2 or len(array) != count:
            raise ValueError(f"{path.name}: {name} has shape {array.shape}; expected ({count}, features)")
    lengths = _numbers(arrays.get("lengths", np.array([count])), int, f"{path.name}: lengths")
    if lengths.ndim != 1 or lengths.sum() != count or (lengths < 1).any():
        raise ValueError(f"{path.name}: lengths add up to {lengths.sum()}; expected positive ones, {count} in all")
    sides: dict[str, list[str] | None] = {}
    for name in ("speaker", "words", "label"):
        sides[name] = None
        if name in arrays:
            if arrays[name].shape != (count,):
                raise ValueError(f"{path.name}: {name} has shape {arrays[name].shape}; expected ({count},)")
            sides[name] = [str(v) for v in arrays[name].tolist()]
    names = (
        [str(v) for v in arrays["name"].tolist()] if "name" in arrays else [f"d{i + 1}" for i in range(len(lengths))]
    )
    if len(names) != len(lengths):
        raise ValueError(f"{path.name}: there are {len(names)} names and {len(lengths)} dialogues")
    dialogues, start = [], 0
    for name, length in zip(names, lengths, strict=True):
        own = slice(start, start + length)
        parts = {k: None if v is None else v[own] for k, v in sides.items()}
        dialogue = Dialogue(
            {m: a[own] for m, a in found.items()}, parts["speaker"], parts["words"], parts["label"], name
        )
        dialogues.append(_checked(dialogue, path.name))
        start += length
    return dialogues


def _numbers(array: np.ndarray, kind: Any, name: str) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} is an array of {array.dtype}; expected numbers")
    return array.astype(kind)


def _from_json(path: Path) -> list[Dialogue]:
    value = read_json(path)
    entries = value.get("dialogues", [value]) if isinstance(value, dict) else [{"utterances": value}]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path.name} has no dialogues; expected {{"dialogues": [{{"utterances": [...]}}, ...]}}')
    return [_from_entry(entry, f"d{i + 1}", path.name) for i, entry in enumerate(entries)]


def _from_entry(entry: Any, name: str, file: str) -> Dialogue:
    utterances = entry.get("utterances") if isinstance(entry, dict) else None
    if not isinstance(utterances, list) or not utterances or not all(isinstance(u, dict) for u in utterances):
        raise ValueError(f'{file}: {name} has no utterances; expected {{"utterances": [{{"text": [...], ...}}, ...]}}')
    name = str(entry.get("name", name))
    features: dict[str, np.ndarray] = {}
    for m in MODALITIES:
        rows = [u.get(m) for u in utterances]
        widths = {len(r) for r in rows if isinstance(r, list)}
        if not widths and not any(m in u for u in utterances):
            continue
        if len(widths) > 1 or any(r is not None and not isinstance(r, list) for r in rows):
            raise ValueError(f"{file}: {name}: {m} has {sorted(widths)} numbers; expected as many in every utterance")
        if not widths:
            continue  # null everywhere
        array = np.full((len(rows), widths.pop()), np.nan, np.float32)
        for i, row in enumerate(rows):
            if row is not None:
                try:
                    array[i] = row
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{file}: {name}: {m} of utterance {i + 1} is no list of numbers") from error
        features[m] = array
    sides: list[list[str] | None] = []
    for key in ("speaker", "words", "label"):
        given = [u.get(key) for u in utterances]
        some = [v for v in given if v is not None]
        if some and len(some) < len(given) and key != "words":
            raise ValueError(f"{file}: {name}: utterance {given.index(None) + 1} has no {key}, and others have one")
        sides.append([str(v or "") if key == "words" else str(v) for v in given] if some else None)
    if not features:
        raise ValueError(f"{file}: {name} has no features; an utterance has text, audio or visual, a list of numbers")
    speakers, words, labels = sides
    return _checked(Dialogue(features, speakers, words, labels, name), file)


def _checked(dialogue: Dialogue, file: str) -> Dialogue:
    """A row is numbers or all NaN, and every utterance has at least one modality."""
    missing = {m: np.isnan(a).all(1) for m, a in dialogue.features.items()}
    for m, array in dialogue.features.items():
        bad = ~np.isfinite(array).all(1) & ~missing[m]
        if bad.any():
            raise ValueError(
                f"{file}: {dialogue.name}: {m} of utterance {int(bad.argmax()) + 1} holds values that are not finite; "
                "expected numbers, or all NaN (null in JSON) where it is missing"
            )
    nothing = np.logical_and.reduce(list(missing.values()))
    if nothing.any():
        raise ValueError(f"{file}: {dialogue.name}: utterance {int(nothing.argmax()) + 1} has no modality at all")
    return dialogue


# -- batches


class Batch(NamedTuple):
    """Padded dialogues. ``inputs``: what the model takes; labels (batch, utterances), -1 where unknown or padding."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch({k: v.to(device) for k, v in self.inputs.items()}, self.labels.to(device))


def join(dialogues: Sequence[Dialogue], model: BroadMamba) -> Batch:
    """One batch for a model: what it reads, speakers numbered by their first words, labels by the model's classes.

    Raises ValueError for a modality that no dialogue has or that is of another width, for too many speakers and for
    labels that the model does not have.
    """
    longest = max(len(d) for d in dialogues)
    shape = len(dialogues), longest
    inputs: dict[str, Tensor] = {"lengths": torch.tensor([len(d) for d in dialogues])}
    present = torch.zeros(*shape, len(model.modalities), dtype=torch.bool)
    for i, m in enumerate(model.modalities):
        features = torch.zeros(*shape, model.dims[m])
        for row, d in enumerate(dialogues):
            if m not in d.features:
                continue  # missing throughout
            array = d.features[m]
            if array.shape[1] != model.dims[m]:
                raise ValueError(f"{d.name}: {m} has {array.shape[1]} numbers; the model reads {model.dims[m]}")
            here = ~np.isnan(array).all(1)
            present[row, : len(d), i] = torch.from_numpy(here)
            features[row, : len(d)] = torch.from_numpy(np.where(here[:, None], array, 0))
        inputs[m] = features
    inputs["present"] = present
    for row, d in enumerate(dialogues):
        if not bool(present[row, : len(d)].any(-1).all()):
            first = int((~present[row, : len(d)].any(-1)).long().argmax()) + 1
            raise ValueError(
                f"{d.name}: utterance {first} has none of {', '.join(model.modalities)}, which the model reads"
            )
    if model.speaker is not None:
        inputs["speaker"] = torch.zeros(shape, dtype=torch.long)
        for row, d in enumerate(dialogues):
            inputs["speaker"][row, : len(d)] = torch.tensor(numbers(d, model.speaker.num_embeddings))
    labels = torch.full(shape, -1)
    for row, d in enumerate(dialogues):
        if d.labels is not None:
            labels[row, : len(d)] = torch.tensor([class_number(label, model.classes, d.name) for label in d.labels])
    return Batch(inputs, labels)


def numbers(dialogue: Dialogue, most: int) -> list[int]:
    """The speakers by the order in which they first speak, from 0; 0 throughout where none are named."""
    if dialogue.speakers is None:
        return [0] * len(dialogue)
    order = list(dict.fromkeys(dialogue.speakers))
    if len(order) > most:
        raise ValueError(f"{dialogue.name} has {len(order)} speakers; the model tells {most} apart")
    return [order.index(s) for s in dialogue.speakers]


def class_number(label: str, classes: Sequence[str], name: str) -> int:
    if label not in classes:
        raise ValueError(f"{name} has the label {label!r}; the model knows {', '.join(classes)}")
    return list(classes).index(label)


def class_names(dialogues: Sequence[Dialogue]) -> list[str]:
    """The labels that occur, in the order of a benchmark's set where all are of one, else sorted."""
    found = {label for d in dialogues for label in d.labels or []}
    for known in LABELS.values():
        if found <= set(known):
            return [label for label in known if label in found]
    return sorted(found)


@dataclass
class Split:
    """Dialogues to train on, to choose the epoch by, to measure on."""

    train: list[Dialogue] = field(default_factory=list)
    valid: list[Dialogue] = field(default_factory=list)
    test: list[Dialogue] = field(default_factory=list)


def split(dialogues: Sequence[Dialogue], seed: int) -> Split:
    """80, 10 and 10 %. Raises ValueError for fewer than ten dialogues."""
    if len(dialogues) < 10:
        raise ValueError(f"there are {len(dialogues)} dialogues; at least 10 are needed")
    order = [dialogues[i] for i in np.random.default_rng(seed).permutation(len(dialogues))]
    first, second = int(0.8 * len(order)), int(0.9 * len(order))
    return Split(order[:first], order[first:second], order[second:])
