"""A whisker recording in, the category of what was touched out; and the network's activity at every time step."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.files import check_ending, read_text, whole
from zoo.pipelines import Pipeline, Result
from zoo_registry import optional

from .model import TactileNetwork
from .recordings import EXTENSIONS, Layout, read_recording

#: endings of files with activity
WRITTEN = (".npz", ".h5", ".hdf5")
COLUMNS = ("window", "first_sample", "label", "confidence")


@dataclass(kw_only=True)
class TouchCategory(Result):
    """What a recording's whiskers touched. Longer recordings are answered window by window, and on average."""

    label: str
    shares: dict[str, float] = field(default_factory=dict)  #: the likeliest categories, best first
    windows: list[tuple[int, str, float]] = field(default_factory=list)  #: first sample, category, confidence of each
    truth: str | None = None  #: the category that the file names
    notes: list[str] = field(default_factory=list)

    @property
    def confidence(self) -> float:
        return next(iter(self.shares.values()))

    def summary(self) -> str:
        return self.label

    def __str__(self) -> str:
        rows = [f"{self.source}: " + ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())]
        if len(self.windows) > 1:
            rows += [f"  from sample {first}: {label} ({sure:.1%})" for first, label, sure in self.windows]
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])

    def save_csv(self, path: str | Path) -> Path:
        """One row a window, columns :data:`COLUMNS`."""
        path = Path(path)
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([i, first, label, f"{sure:.6f}"] for i, (first, label, sure) in enumerate(self.windows))
        return path


class Sample(NamedTuple):
    recording: np.ndarray
    label: int | None


class TouchClassification(Pipeline):
    """Recordings (npz, npy, h5; samples, whiskers, forces and torques) to categories.

    top_k: categories in ``shares``. labels: category names for weights whose card has none, a list or a text file with
    a name a line. key: the array's name in npz and h5 files.
    """

    task = "touch-classification"
    extensions = EXTENSIONS

    def __init__(
        self,
        model: nn.Module,
        top_k: int = 3,
        labels: str | Sequence[str] | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, TactileNetwork):
            raise ValueError(f"{type(model).__name__} classifies no touch; expected a TactileNetwork")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected 1 or more")
        self.layout, self.top_k, self.key = Layout.of(model), top_k, key
        named = read_text(labels).split("\n") if isinstance(labels, str) else labels
        named = [name.strip() for name in named if name.strip()] if named is not None else self.labels()
        self.names = list(named or [f"category {i}" for i in range(model.num_classes)])
        if len(self.names) != model.num_classes:
            raise ValueError(
                f"there are {len(self.names)} labels, and the model has {model.num_classes} categories; give labels="
            )

    def read(self, source: Any) -> Sample:
        """A path, the file's bytes, or an array (samples, whiskers, 6)."""
        return Sample(*read_recording(source, self.key))

    def prepare(self, sample: Sample) -> Tensor:
        """(windows, time, channels, rows, columns)."""
        size = self.layout.samples
        count = len(sample.recording) // size
        if not count:
            raise ValueError(f"the recording has {len(sample.recording)} samples; the model reads {size}")
        return torch.stack([self.layout.frames(sample.recording[i * size : (i + 1) * size]) for i in range(count)])

    def forward(self, batch: Any) -> Tensor:
        """(recordings, windows, time, ...) to shares (recordings, windows, categories)."""
        return self.model(batch.flatten(0, 1)).float().softmax(1).unflatten(0, batch.shape[:2])  # type: ignore[no-any-return]

    def finish(self, output: Tensor, sample: Sample) -> TouchCategory:
        best = output.mean(0).topk(min(self.top_k, len(self.names)))
        shares = {self.names[i]: float(p) for p, i in zip(*(t.tolist() for t in best), strict=True)}
        size = self.layout.samples
        sure, which = output.max(1)
        windows = [(i * size, self.names[int(c)], float(p)) for i, (p, c) in enumerate(zip(sure, which, strict=True))]
        notes = []
        if rest := len(sample.recording) % size:
            notes.append(f"the last {rest} samples make no whole window of {size} and were not read")
        known = sample.label is not None and 0 <= sample.label < len(self.names)
        truth = self.names[sample.label] if known and sample.label is not None else None
        return TouchCategory(label=next(iter(shares)), shares=shares, windows=windows, truth=truth, notes=notes)


@torch.inference_mode()
def activity(model: TactileNetwork, frames: Tensor) -> dict[str, np.ndarray]:
    """What every part of the network does at every time step, for comparisons with neurons.

    frames: (time, channels, rows, columns) of one recording, or with a batch in front. Returns arrays
    ([batch,] time, ...): each node of a ConvRNN by its name (or the stages of other encoders), "encoder", "attender",
    and ``logits`` ([batch,] categories).
    """
    like = next(model.parameters())
    x = frames.to(like.device, like.dtype)
    single = x.dim() == 4
    x = x[None] if single else x
    mids: dict[str, Tensor] = {}
    found = {"logits": model(x, mids)}
    steps: dict[str, dict[int, Tensor]] = {}
    for name, value in mids.items():
        head, _, node = name.partition("_")
        if head[:1] == "t" and head[1:].isdigit() and node:
            steps.setdefault(node, {})[int(head[1:])] = value
        elif name.startswith(("relu", "maxpool", "layer", "avgpool", "fc")):
            found[name] = value.unflatten(0, x.shape[:2])  # a ResNet goes through all frames at once
        elif not name.startswith("dec_"):
            found[name] = value
    found |= {node: torch.stack([values[t] for t in sorted(values)], 1) for node, values in steps.items()}
    return {name: (value[0] if single else value).float().cpu().numpy() for name, value in found.items()}


def save_activity(path: str | Path, arrays: dict[str, np.ndarray]) -> Path:
    """One array a name: ``.npz``, or ``.h5`` with the extra of that name. Raises ValueError for another ending."""
    path = Path(path)
    check_ending(path, WRITTEN)
    with whole(path) as work:
        if path.suffix.lower() == ".npz":
            np.savez_compressed(work, **arrays)  # type: ignore[arg-type]
            return path
        h5py = optional("h5py", "writing HDF5", "ssm-zoo-neuro[hdf5]")
        with h5py.File(work, "w") as file:
            for name, value in arrays.items():
                file.create_dataset(name, data=value, compression="gzip")
    return path
