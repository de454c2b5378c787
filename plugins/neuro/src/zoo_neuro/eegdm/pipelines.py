"""A recording in, the class of every window out; class ids in, generated EEG out."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.files import whole
from zoo.pipelines import Pipeline, Result

from .backbone import DiffusionBackbone
from .data import windows
from .diffusion import sample
from .fusion import EEGClassifier
from .preparation import electrode
from .recordings import RECORDINGS, Recording, read_recording, write_recording
from .signals import SCALE, inverse_mu_law
from .traces import traces

COLUMNS = ("start", "end", "label", "confidence")


@dataclass
class WindowClass:
    """One window's answer."""

    start: float  #: seconds
    end: float
    label: str
    confidence: float
    shares: dict[str, float] = field(default_factory=dict)  #: the likeliest classes, best first


@dataclass(kw_only=True)
class EEGClasses(Result):
    """The windows of one recording, in time."""

    windows: list[WindowClass] = field(default_factory=list)
    seconds: float = 0.0  #: of the recording
    notes: list[str] = field(default_factory=list)  #: what a reader must know
    labels: list[str] = field(default_factory=list)  #: all classes that there could be
    shown: Recording | None = field(default=None, repr=False)  #: the montage, for the picture

    def summary(self) -> str:
        counts = Counter(w.label for w in self.windows)
        return f"{len(self.windows)} windows: " + ", ".join(f"{n} {label}" for label, n in counts.most_common())

    def __str__(self) -> str:
        rows = [f"{self.source}: {self.summary()}"]
        rows += [f"  {w.start:7.2f} to {w.end:7.2f} s  {w.label} ({w.confidence:.1%})" for w in self.windows]
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])

    def save_csv(self, path: str | Path) -> Path:
        """One row a window, columns :data:`COLUMNS` and the share of every class that was kept."""
        path = Path(path)
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for w in self.windows:
                writer.writerow([f"{w.start:.4f}", f"{w.end:.4f}", w.label, f"{w.confidence:.6f}"])
        return path

    def picture(self) -> Any:
        """The montage with the windows' classes behind it."""
        if self.shown is None:
            return None
        spans = [(w.start, w.end, f"{w.label} {w.confidence:.0%}", self.labels.index(w.label)) for w in self.windows]
        return traces(self.shown.signal, self.shown.sfreq, self.shown.channels, spans)


class Sample(NamedTuple):
    recording: Recording
    starts: np.ndarray
    x: np.ndarray


class EEGClassification(Pipeline):
    """Recordings (EDF, BDF and others, npz, npy) to the class of each window.

    step: seconds between windows (their length unless given). top_k: classes in ``shares``. labels: class names for
    weights whose card has none (for one logit two: no, yes). missing: "zeros" puts zeros where the recording lacks
    channels of the montage (default: an error). filtered: the recording is filtered and has the model's rate already.
    sfreq, unit, channels: what a .npy or .npz leaves out. windows_per_batch: how many go through the model at a time.
    """

    task = "eeg-classification"
    extensions = RECORDINGS

    def __init__(
        self,
        model: nn.Module,
        step: float | None = None,
        top_k: int = 3,
        labels: Sequence[str] | None = None,
        missing: str = "error",
        filtered: bool = False,
        sfreq: float | None = None,
        unit: str | None = None,
        channels: Sequence[str] | None = None,
        windows_per_batch: int = 16,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, EEGClassifier):
            raise ValueError(f"{type(model).__name__} classifies no EEG; expected an EEGClassifier")
        if top_k < 1 or windows_per_batch < 1:
            raise ValueError(f"top_k is {top_k} and windows_per_batch {windows_per_batch}; expected 1 or more of each")
        self.step, self.top_k, self.missing, self.filtered = step, top_k, missing, filtered
        self.file_options: dict[str, Any] = {
            "sfreq": sfreq,
            "unit": unit,
            "channels": None if channels is None else list(channels),
        }
        self.windows_per_batch = windows_per_batch
        self.preparation, self.ids = model.preparation, model.extractor.cond.flatten().tolist()
        self.binary = model.num_classes == 1
        count = 2 if self.binary else model.num_classes
        self.names = list(labels or self.labels() or (["no", "yes"] if self.binary else map(str, range(count))))
        if len(self.names) != count:
            raise ValueError(f"there are {len(self.names)} labels, and the model has {count} classes; give labels=")

    def read(self, source: Any) -> Sample:
        """A path, or a :class:`~zoo_neuro.eegdm.recordings.Recording`."""
        if not isinstance(source, (str, Path, Recording)):
            raise ValueError(f"a recording is given as {type(source).__name__}; expected a file or a Recording")
        recording = source if isinstance(source, Recording) else read_recording(source, **self.file_options)
        x, starts = windows(
            recording, self.preparation, self.ids, step=self.step, missing=self.missing, filtered=self.filtered
        )
        return Sample(recording, starts, x)

    def prepare(self, sample: Sample) -> Tensor:
        """(windows, channels, samples)."""
        return torch.from_numpy(sample.x)

    def forward(self, batch: Any) -> Tensor:
        """(recordings, windows, channels, samples) to shares (recordings, windows, classes)."""
        parts = [self.model(part).float() for part in batch.flatten(0, 1).split(self.windows_per_batch)]
        logits = torch.cat(parts)
        if self.binary:
            yes = logits.sigmoid()
            shares = torch.cat([1 - yes, yes], dim=1)
        else:
            shares = logits.softmax(1)
        return shares.unflatten(0, batch.shape[:2])

    def finish(self, output: Tensor, sample: Sample) -> EEGClasses:
        found = []
        for start, row in zip(sample.starts.tolist(), output, strict=True):
            best = row.topk(min(self.top_k, len(self.names)))
            shares = {self.names[i]: float(p) for p, i in zip(*(t.tolist() for t in best), strict=True)}
            label, sure = next(iter(shares.items()))
            found.append(WindowClass(start, start + self.preparation.seconds, label, sure, shares))
        signal, sfreq = self.preparation.continuous(
            sample.recording, self.ids, missing=self.missing, filtered=self.filtered
        )
        return EEGClasses(
            windows=found,
            seconds=sample.recording.seconds,
            notes=self.preparation.notes(sample.recording),
            labels=self.names,
            shown=Recording(signal, sfreq, self.preparation.names(self.ids)),
        )


@dataclass(kw_only=True)
class GeneratedEEG(Result):
    """Channels that the backbone drew, each by itself."""

    channels: list[str] = field(default_factory=list)
    seconds: float = 0.0
    microvolts: float = 0.0  #: standard deviation over all channels
    recording: Recording | None = field(default=None, repr=False)

    def summary(self) -> str:
        return f"{len(self.channels)} channels of {self.seconds:g} s, {self.microvolts:.0f} uV"

    def save(self, path: str | Path) -> Path:
        """.edf, .bdf, .fif (MNE's extra) or .npz."""
        assert self.recording is not None
        return write_recording(self.recording, path)

    def picture(self) -> Any:
        if self.recording is None:
            return None
        return traces(self.recording.signal, self.recording.sfreq, self.recording.channels)


class EEGGeneration(Pipeline):
    """Channel names ("FP1-F7,T3-T5", or "all") to generated EEG of these channels, each drawn by itself.

    samples: of each channel (as many as the model was trained on unless given). seed: of the noise. last_step: 1 as
    the authors sample, who leave out step 0. A classifier's backbone generates, too.
    """

    task = "eeg-generation"
    text_input = True

    def __init__(
        self, model: nn.Module, samples: int | None = None, seed: int = 0, last_step: int = 1, each_step: Any = None
    ) -> None:
        super().__init__(model)
        inner = model.extractor.model if isinstance(model, EEGClassifier) else model
        if not isinstance(inner, DiffusionBackbone) or inner.in_channels != 1:
            raise ValueError(f"{type(model).__name__} generates no one-channel EEG; expected a DiffusionBackbone")
        self.backbone, self.preparation = inner, inner.preparation
        self.samples = self.preparation.samples if samples is None else samples
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; expected 2 or more")
        self.seed, self.last_step, self.each_step = seed, last_step, each_step
        self.names = self.preparation.names(range(inner.channels))

    def read(self, source: Any) -> list[int]:
        """Names in a string, or a list of names or class ids."""
        if not isinstance(source, (str, Sequence)) or not source:
            raise ValueError(f"channels are given as {source!r:.40}; expected names in a string, or a list of them")
        wanted = source.split(",") if isinstance(source, str) else list(source)
        if [str(w).strip().lower() for w in wanted] == ["all"]:
            return list(range(len(self.names)))
        spelled = [electrode(name) for name in self.names]
        found = []
        for name in wanted:
            if isinstance(name, int) and 0 <= name < len(self.names):
                found.append(name)
            elif isinstance(name, str) and electrode(name) in spelled:
                found.append(spelled.index(electrode(name)))
            else:
                raise ValueError(f"{name!r} is no channel of this model; expected all, or of {', '.join(self.names)}")
        return found

    def prepare(self, sample: list[int]) -> Tensor:
        return torch.tensor(sample)

    def forward(self, batch: Any) -> Tensor:
        """(inputs, channels) class ids to (inputs, channels, samples)."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        cond = batch.flatten()[:, None]
        start = torch.randn(len(cond), 1, self.samples, generator=generator).to(self.device, self.dtype)
        x = sample(
            self.backbone, self.backbone.schedule, start, cond, last_step=self.last_step, generator=generator,
            each_step=self.each_step,
        )  # fmt: skip
        return x[:, 0].unflatten(0, batch.shape)

    def finish(self, output: Tensor, sample: list[int]) -> GeneratedEEG:
        x = inverse_mu_law(output.double()) if self.preparation.mu_law else output.double()
        recording = Recording(x.numpy() / SCALE, self.preparation.sfreq, [self.names[i] for i in sample])
        return GeneratedEEG(
            channels=recording.channels,
            seconds=recording.seconds,
            microvolts=float(recording.signal.std() * 1e6),
            recording=recording,
        )
