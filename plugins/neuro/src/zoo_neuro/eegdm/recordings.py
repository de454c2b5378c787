"""Recordings from files: EDF, BDF and what else MNE reads, .npz and .npy arrays; annotations of TUEV (.rec)."""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.files import check_ending, read_arrays, read_text, whole
from zoo_registry import errors, optional

EXTRA = "ssm-zoo-neuro[eeg]"
ARRAYS = (".npz", ".npy")
#: What MNE opens by its ending.
MNE_FILES = (".edf", ".bdf", ".gdf", ".fif", ".fif.gz", ".vhdr", ".set", ".cnt", ".eeg")
RECORDINGS = (*MNE_FILES, *ARRAYS)
_UNITS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "µV": 1e-6, "μV": 1e-6}  # both micro signs are met
#: Volts that half of a recording's samples lie away from their channel's middle: EEG has tens of microvolts. What lies
#: outside was given in another unit.
_EEG = (1e-9, 1e-2)


@dataclass
class Recording:
    """EEG of several channels."""

    signal: np.ndarray = field(repr=False)  #: (channels, samples) volts
    sfreq: float  #: Hz
    channels: list[str]
    source: str = ""

    def __post_init__(self) -> None:
        self.signal = np.asarray(self.signal, dtype=np.float64)
        if self.signal.ndim != 2 or not self.signal.size:
            raise ValueError(f"a recording has shape {self.signal.shape}; expected (channels, samples)")
        if len(self.channels) != len(self.signal):
            raise ValueError(f"there are {len(self.channels)} channel names for {len(self.signal)} channels")
        if not 0 < self.sfreq < np.inf:
            raise ValueError(f"sfreq is {self.sfreq}; expected a positive number of Hz")
        if not np.isfinite(self.signal).all():
            raise ValueError(f"{self.source or 'the recording'} has values that are not finite; repair or cut them out")

    @property
    def seconds(self) -> float:
        return self.signal.shape[1] / self.sfreq


class Event(NamedTuple):
    """One annotation of a .rec file."""

    channel: int
    start: float  #: seconds
    end: float
    code: int


def read_recording(
    path: str | Path,
    *,
    sfreq: float | None = None,
    unit: str | None = None,
    channels: list[str] | None = None,
) -> Recording:
    """A recording from a file.

    .npz: ``signal`` (channels, samples), ``sfreq``, ``channels``, optionally ``unit``; .npy: the signal alone.
    ``sfreq`` (Hz), ``unit`` ("V", "mV", "uV"; V unless given) and ``channels`` say what such files leave out. Other
    files are read by MNE, which knows their unit; a file that ends before its header says so gives a warning. Raises
    ValueError for what cannot be read as EEG, and for values that no EEG has in their unit.
    """
    path = Path(path)
    if not path.name.lower().endswith(RECORDINGS):
        raise ValueError(f"{path} is no recording that can be read; expected one of {', '.join(RECORDINGS)}")
    if path.suffix.lower() in ARRAYS:
        return _from_arrays(path, sfreq, unit, channels)
    if not path.exists():
        raise errors.LocalFileMissing(f"there is no file {str(path)!r} (in {Path.cwd()})", path=str(path))
    mne: Any = optional("mne", f"{path}: a recording of {path.suffix}", EXTRA)
    try:
        with np.errstate(all="ignore"):  # broken headers: what comes of them is looked at below
            raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
        raw.pick("eeg", verbose="ERROR")
    except Exception as error:  # MNE raises every kind for broken files, plain Exception among them
        said = str(error).strip(" \n\"'") or "its header makes no sense"
        raise errors.BadFile(f"{path} cannot be read as a recording of EEG: {said}", path=str(path)) from error
    recording = Recording(raw.get_data(), float(raw.info["sfreq"]), list(raw.ch_names), str(path))
    promised = _promised_seconds(path)
    if recording.seconds < promised - 1e-6:
        warnings.warn(
            f"{path} ends after {recording.seconds:g} of the {promised:g} s that its header says; it may have been cut "
            "short",
            stacklevel=2,
        )
    return recording


def _promised_seconds(path: Path) -> float:
    """The length that the header of an EDF or BDF file says, 0 where it says none (-1 records: still recording)."""
    if path.suffix.lower() not in (".edf", ".bdf"):
        return 0.0
    with path.open("rb") as file:
        header = file.read(252)
    return max(float(header[236:244]), 0.0) * float(header[244:252])


def _from_arrays(path: Path, sfreq: float | None, unit: str | None, channels: list[str] | None) -> Recording:
    held = {name or "signal": array for name, array in read_arrays(path).items()}  # of .npy: the signal
    if "signal" not in held:
        raise ValueError(f"{path} holds {', '.join(held) or 'nothing'}; expected 'signal', 'sfreq' and 'channels'")
    for name in held.keys() & {"signal", "sfreq"}:
        if held[name].dtype.kind not in "fiu" or (name == "sfreq" and held[name].size != 1):
            raise ValueError(f"{path}: {name} has shape {held[name].shape} of {held[name].dtype}; expected numbers")
    rate = held["sfreq"].item() if "sfreq" in held else sfreq
    named = channels
    if "channels" in held:
        named = [c.decode() if isinstance(c, bytes) else str(c) for c in held["channels"].reshape(-1).tolist()]
    if rate is None or named is None:
        lacks = [n for n, v in (("sfreq", rate), ("channels", named)) if v is None]
        give = " and ".join(f"{n}=" for n in lacks)
        raise ValueError(
            f"{path} does not say its {' and '.join(lacks)}; give {give}, or keep them in an .npz beside 'signal'"
        )
    measured = str(held["unit"]) if "unit" in held else unit or "V"
    if measured not in _UNITS:
        raise ValueError(f"the unit is {measured!r}; expected V, mV or uV")
    recording = Recording(np.asarray(held["signal"], np.float64) * _UNITS[measured], rate, named, str(path))
    some = recording.signal[:, :: 1 + recording.signal.shape[1] // 100_000]
    size = float(np.median(np.abs(some - np.median(some, axis=1, keepdims=True))))
    if size and not _EEG[0] <= size <= _EEG[1]:
        raise ValueError(
            f"{path}: its values are {size:.2g} V large if they are {measured}, which no EEG is; say their unit: "
            "unit=uV (-o unit=uV), or keep it in the .npz as 'unit'"
        )
    return recording


def read_events(path: str | Path) -> list[Event]:
    """Annotations of TUEV's .rec files: rows of channel, start, end (seconds), code. Raises ValueError for others."""
    path = Path(path)
    events = []
    for number, row in enumerate(csv.reader(read_text(path).splitlines()), 1):
        if not row:
            continue
        try:
            channel, start, end, code = row
            events.append(Event(int(float(channel)), float(start), float(end), int(float(code))))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: {','.join(row)!r}; expected channel,start,end,code") from error
    return events


#: endings that :func:`write_recording` knows
WRITTEN = (".edf", ".bdf", ".fif", ".npz")


def write_recording(recording: Recording, path: str | Path) -> Path:
    """.edf, .bdf or .fif (by MNE; needs its extra), or .npz. Raises ValueError for other endings."""
    path = Path(path)
    check_ending(path, WRITTEN)
    with whole(path) as work:
        _write(recording, work)
    return path


def _write(recording: Recording, path: Path) -> None:
    ending = path.suffix.lower()
    if ending == ".npz":
        np.savez_compressed(
            path,
            signal=recording.signal.astype(np.float32),
            sfreq=recording.sfreq,
            channels=np.array(recording.channels),
        )
        return
    mne: Any = optional("mne", f"writing {ending}", EXTRA)
    info = mne.create_info(recording.channels, recording.sfreq, "eeg", verbose="ERROR")
    raw = mne.io.RawArray(recording.signal, info, verbose="ERROR")
    if ending == ".fif":
        raw.save(path, overwrite=True, verbose="ERROR")
        return
    optional("edfio", f"writing {ending}", EXTRA)
    mne.export.export_raw(path, raw, fmt=ending[1:], overwrite=True, verbose="ERROR")
