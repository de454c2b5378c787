"""What a model wants of a recording: montage, band, sampling rate, unit. The authors' preprocessing, done by MNE.

Source: jhpuah/EEGDM ``src/preprocessing.py`` (TUEV) and ``src/util.py`` (CHB-MIT), with the values of ``conf``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zoo_registry import optional

from .recordings import EXTRA, Recording
from .signals import SCALE, mu_law

#: The bipolar channels of the temporal central parasagittal (TCP) montage, in the order of the class ids.
TCP = (
    "FP1-F7", "F7-T3", "T3-T5", "T5-O1", "FP2-F8", "F8-T4", "T4-T6", "T6-O2", "A1-T3", "T3-C3", "C3-CZ", "C4-CZ",
    "T4-C4", "A2-T4", "FP1-F3", "F3-C3", "C3-P3", "P3-O1", "FP2-F4", "F4-C4", "C4-P4", "P4-O2",
)  # fmt: skip
#: Names of the 10-10 system for electrodes of the 10-20 system, and mastoids for ears.
_OTHER_NAMES = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6", "M1": "A1", "M2": "A2"}


def electrode(name: str) -> str:
    """A channel's name in one spelling: "EEG Fp1-REF" is FP1, "T8-P8-0" (a duplicate) is T4-T6."""
    text = re.sub(r"^EEG[ _]*", "", name.strip().upper()).replace(" ", "")
    text = re.sub(r"-(REF|LE|AVG|AR|CAR)$", "", text)
    text = re.sub(r"(?<=[A-Z0-9])-\d+$", "", text)
    return "-".join(_OTHER_NAMES.get(part, part) for part in text.split("-"))


def bipolar(recording: Recording, channels: Sequence[str], missing: str = "error") -> np.ndarray:
    """(channels, samples) of the pairs ``channels`` ("FP1-F7"): a channel of that name, or the difference of two.

    missing: "error", or "zeros" for pairs that the recording has not. Raises ValueError naming those.
    """
    if missing not in ("error", "zeros"):
        raise ValueError(f"missing is {missing!r}; expected 'error' or 'zeros'")
    rows: dict[str, np.ndarray] = {}
    for name, row in zip(recording.channels, recording.signal, strict=True):
        rows.setdefault(electrode(name), row)
    found, lacking = [], []
    for pair in channels:
        first, _, second = (electrode(part) for part in pair.partition("-"))
        if electrode(pair) in rows:
            found.append(rows[electrode(pair)])
        elif second and first in rows and second in rows:
            found.append(rows[first] - rows[second])
        else:
            lacking.append(pair)
            found.append(np.zeros(recording.signal.shape[1]))
    if len(lacking) == len(channels) or (lacking and missing == "error"):
        raise ValueError(
            f"{recording.source or 'the recording'} has no {', '.join(lacking)}; its channels are "
            f"{', '.join(recording.channels[:40])}. Expected electrodes with a common reference (FP1, F7 ...) or "
            "bipolar channels (FP1-F7); missing='zeros' puts zeros in their place"
        )
    return np.stack(found)


@dataclass(frozen=True)
class Preparation:
    """How a recording becomes a model's input.

    ``channels``: names of the model's class ids, in order; ``sfreq`` Hz; ``l_freq``, ``h_freq``, ``notch`` Hz, None
    or 0 for none; ``samples`` of a window; ``per_window``: resampled and filtered window by window, as for CHB-MIT,
    instead of the recording at once (then resampling is last); ``mu_law``: values above 1 (100 microvolts) are
    suppressed.
    """

    channels: Sequence[str] = TCP
    sfreq: float = 200.0
    l_freq: float | None = 0.1
    h_freq: float | None = 75.0
    notch: float | None = 50.0
    samples: int = 1000
    per_window: bool = False
    mu_law: bool = True
    #: seconds of a window
    seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.sfreq <= 0 or self.samples < 1:
            raise ValueError(f"sfreq is {self.sfreq} and samples {self.samples}; expected positive numbers")
        object.__setattr__(self, "channels", tuple(self.channels))
        for name in ("l_freq", "h_freq", "notch"):
            object.__setattr__(self, name, getattr(self, name) or None)
        object.__setattr__(self, "seconds", self.samples / self.sfreq)

    def names(self, ids: Sequence[int] | None = None) -> list[str]:
        """Channel names of the class ids ``ids`` (all if None)."""
        ids = range(len(self.channels)) if ids is None else ids
        return [self.channels[i] if i < len(self.channels) else f"channel {i}" for i in ids]

    def notes(self, recording: Recording) -> list[str]:
        """What a reader of the answers should know."""
        found = []
        if self.l_freq and not self.per_window and recording.seconds < (wanted := 3.3 / min(2.0, self.l_freq)):
            found.append(
                f"the recording has {recording.seconds:.0f} s, the high-pass filter at {self.l_freq} Hz has "
                f"{wanted:.0f} s: slow waves are distorted"
            )
        if recording.sfreq < self.sfreq:
            found.append(f"the recording was sampled at {recording.sfreq:g} Hz, the model reads {self.sfreq:g} Hz")
        return found

    def continuous(
        self, recording: Recording, ids: Sequence[int] | None = None, *, missing: str = "error", filtered: bool = False
    ) -> tuple[np.ndarray, float]:
        """Bipolar channels in volts (channels, samples) and their rate: filtered, notched and resampled.

        ``filtered``: this has been done. With ``per_window`` only the montage is. Raises ValueError for a recording
        that lacks channels or the band.
        """
        names = self.names(ids)
        signal = bipolar(recording, names, missing)
        if self.per_window:
            return signal, recording.sfreq
        if filtered:
            if recording.sfreq != self.sfreq:
                raise ValueError(f"a filtered recording has {recording.sfreq:g} Hz; expected {self.sfreq:g} Hz")
            return signal, self.sfreq
        if recording.sfreq == self.sfreq and not (self.l_freq or self.h_freq or self.notch):
            return signal, self.sfreq
        raw = self._raw(signal, recording.sfreq, names)
        self._filter(raw, recording.sfreq)
        if recording.sfreq != self.sfreq:
            raw.resample(self.sfreq, verbose="ERROR")
        return raw.get_data(), self.sfreq

    def window(self, signal: np.ndarray) -> np.ndarray:
        """One window of ``continuous`` signals, finished: with ``per_window`` resampled and filtered, in any case in
        the models' unit, large values suppressed. (channels, samples) float32."""
        if self.per_window:
            scipy_signal: Any = optional("scipy.signal", "resampling windows", EXTRA)
            signal = scipy_signal.resample(signal, self.samples, axis=-1)
            raw = self._raw(signal, self.sfreq, [str(i) for i in range(len(signal))])
            self._filter(raw, self.sfreq)
            signal = raw.get_data()
        x = signal * SCALE
        if self.mu_law:
            x = mu_law(torch.from_numpy(np.ascontiguousarray(x))).numpy()
        return x.astype(np.float32)

    def _raw(self, signal: np.ndarray, sfreq: float, names: list[str]) -> Any:
        """MNE's object; the rate must reach the band's upper edge."""
        if self.h_freq is not None and self.h_freq >= sfreq / 2:
            raise ValueError(
                f"the recording was sampled at {sfreq:g} Hz and the model reads up to {self.h_freq:g} Hz; expected a "
                f"recording of more than {2 * self.h_freq:g} Hz"
            )
        mne: Any = optional("mne", "filtering a recording", EXTRA)
        return mne.io.RawArray(signal, mne.create_info(names, sfreq, "eeg", verbose="ERROR"), verbose="ERROR")

    def _filter(self, raw: Any, sfreq: float) -> None:
        if self.l_freq is not None or self.h_freq is not None:
            raw.filter(self.l_freq, self.h_freq, verbose="ERROR")
        if self.notch is not None and self.notch < sfreq / 2:
            raw.notch_filter(self.notch, verbose="ERROR")


def windows_at(signal: np.ndarray, samples: int, starts: Sequence[int]) -> list[np.ndarray]:
    """Windows of ``samples`` from ``starts``, which may lie before or reach beyond the recording: it repeats itself."""
    places = np.arange(samples)
    return [signal[:, (start + places) % signal.shape[1]] for start in starts]


def window_starts(length: int, samples: int, step: int) -> list[int]:
    """Beginnings of windows every ``step``; the last one ends where the recording ends."""
    if step < 1:
        raise ValueError(f"the step between windows is {step} samples; expected 1 or more")
    if length <= samples:
        return [0]
    starts = list(range(0, length - samples + 1, step))
    if starts[-1] + samples < length:
        starts.append(length - samples)
    return starts
