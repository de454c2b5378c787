"""Audio files of any rate and number of channels, whole or in pieces, as mono samples at the rate that a model
wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from zoo.files import check_place, whole
from zoo_registry import errors

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
#: Formats whose endings libsndfile does not know by themselves.
FORMATS = {".oga": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"), ".aif": ("AIFF", "PCM_16")}
#: Nothing louder than this (-80 decibels) is silence.
SILENCE = 1e-4
#: Floats beyond this (30 decibels above full scale) are integers that nobody scaled.
UNSCALED = 32.0
#: More channels than this, and than samples, are samples that lie along the wrong axis.
CHANNELS = 64
#: So many neighbouring samples at full scale are clipping rather than a loud peak.
CLIPPED = 3


class Mono:
    """Turns pieces of samples at one rate into mono pieces at another; the filter's state is carried between them."""

    def __init__(self, source_rate: float, rate: float) -> None:
        for name, value in (("source", source_rate), ("target", rate)):
            if not 100 <= value <= 1_000_000:
                raise bad_samples(f"the {name} sampling rate is {value}; expected 100 to 1000000 samples a second")
        self.resampler = None if source_rate == rate else soxr.ResampleStream(source_rate, rate, 1, dtype="float32")

    def push(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        """(n,) or (n, channels), floats in [-1, 1] or integers of their full range, to (m,) float32."""
        mono = to_mono(upright(np.asarray(samples)))
        return mono if self.resampler is None else self.resampler.resample_chunk(mono, last=last)


def to_mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels as float32; integers are scaled by their range (8-bit unsigned: 128 is silence).

    Raises BadArgument, which is a ValueError, for other shapes, for samples that are not finite, and for floats far
    outside [-1, 1].
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2):
        raise bad_samples(f"audio has shape {samples.shape}; expected (samples,) or (samples, channels)")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i" and samples.dtype.itemsize <= 4:
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind != "f":
        raise bad_samples(
            f"audio is of {samples.dtype}; expected floats in [-1, 1], or integers of 8, 16 or 32 bits, whose range "
            "says how loud they are"
        )
    samples = samples.astype(np.float32, copy=False)
    loudest = float(np.abs(samples).max()) if samples.size else 0.0
    if not np.isfinite(loudest):
        raise bad_samples("audio has samples that are not finite (NaN or infinity)")
    if loudest > UNSCALED:
        raise bad_samples(
            f"audio has floats of up to {loudest:g}; expected -1 to 1. Divide integers by their range (32768 for 16 "
            "bits), or hand them over as integers"
        )
    return np.ascontiguousarray(samples.mean(axis=1) if samples.ndim == 2 else samples)


def upright(samples: np.ndarray) -> np.ndarray:
    """``samples``, whose channels lie last. Raises BadArgument for (channels, samples), as torchaudio has them."""
    if samples.ndim == 2 and samples.shape[1] > max(CHANNELS, len(samples)):
        raise bad_samples(
            f"audio has shape {samples.shape}, which is {samples.shape[1]} channels; expected (samples, channels): "
            "transpose it"
        )
    return samples


def bad_samples(message: str) -> errors.BadArgument:
    """The error for samples in memory that cannot be read."""
    return errors.BadArgument(message, argument="samples", accepted=[])


@dataclass
class Audio:
    """One recording: a file that is read when it is needed, or samples in memory."""

    name: str
    rate: float
    channels: int
    samples: np.ndarray | None = field(default=None, repr=False)
    path: Path | None = None
    frames: int = 0  #: samples of one channel that the header promises

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    def pieces(self, rate: float, seconds: float = 10.0) -> Iterator[tuple[np.ndarray, Levels]]:
        """Mono pieces at ``rate``, of about ``seconds``, with what was seen so far; a file is never held as a whole."""
        mono, levels = Mono(self.rate, rate), Levels()
        for block in self._blocks(max(1, round(seconds * self.rate))):
            levels.see(block)
            yield mono.push(block), levels
        rest = mono.push(np.zeros(0, np.float32), last=True)
        if len(rest):
            yield rest, levels

    def _blocks(self, size: int) -> Iterator[np.ndarray]:
        if self.samples is not None:
            for start in range(0, len(self.samples), size):
                yield to_mono(self.samples[start : start + size])
            return
        assert self.path is not None
        try:
            with soundfile.SoundFile(str(self.path)) as file:
                while len(block := file.read(size, dtype="float32", always_2d=True)):
                    yield to_mono(block)
        except soundfile.LibsndfileError as error:
            raise unreadable(self.path, error) from error
        except ValueError as error:
            raise errors.BadFile(f"{self.path}: {error}", path=str(self.path)) from error

    def whole(self, rate: float) -> tuple[np.ndarray, Levels]:
        """All of it as mono samples at ``rate``."""
        found, levels = [], Levels()
        for piece, seen in self.pieces(rate):
            found.append(piece)
            levels = seen
        return (np.concatenate(found) if found else np.zeros(0, np.float32)), levels


@dataclass
class Levels:
    """What a recording has shown so far: how loud it was, and whether it was cut off at full scale."""

    peak: float = 0.0
    samples: int = 0
    clipped: int = 0  #: samples in runs at full scale
    _run: int = 0

    def see(self, mono: np.ndarray) -> None:
        self.samples += len(mono)
        if not len(mono):
            return
        loud = np.abs(mono)
        self.peak = max(self.peak, float(loud.max()))
        full = loud >= 0.999
        if not full.any():
            self._run = 0
            return
        edges = np.flatnonzero(np.diff(np.concatenate([[0], full.view(np.int8), [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            before = self._run if start == 0 else 0  # of the run that the piece before ended with
            length = int(end - start) + before
            self.clipped += (length if length >= CLIPPED else 0) - (before if before >= CLIPPED else 0)
        self._run = length if full[-1] else 0

    def notes(self) -> list[str]:
        """What a listener should know, in words."""
        found = []
        if self.samples == 0:
            found.append("no samples")
        elif self.peak < SILENCE:
            found.append("silence")
        if self.clipped:
            found.append(f"clipped at full scale ({self.clipped} samples)")
        return found


def open_audio(source: Any, rate: float | None = None) -> Audio:
    """A file (its header is read at once), or samples: an array (samples,) or (samples, channels), a tensor, or a tuple
    (samples, rate); a bare array needs ``rate``.

    Raises ``zoo.errors.LocalFileMissing`` for no file and BadArgument, which is a ValueError, for one that is no audio.
    """
    if isinstance(source, Audio):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if not path.is_file():
            raise errors.LocalFileMissing(f"there is no file {str(source)!r}", path=str(source))
        try:
            info = soundfile.info(str(path))
        except soundfile.LibsndfileError as error:
            raise unreadable(path, error) from error
        return Audio(str(source), info.samplerate, info.channels, path=path, frames=info.frames)
    if isinstance(source, tuple) and len(source) == 2:
        source, rate = source
    if rate is None:
        raise bad_samples(f"a {type(source).__name__} was given without a sampling rate; give (samples, rate)")
    try:
        rate = float(rate)
    except (TypeError, ValueError) as error:
        raise bad_samples(f"the sampling rate is {rate!r}; expected a number of samples a second") from error
    samples = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    to_mono(upright(samples)[:1] if samples.ndim else samples)  # refuses what it cannot read
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    return Audio(f"samples{samples.shape}", rate, channels, samples=samples, frames=len(samples))


def unreadable(path: Path, error: Exception) -> Exception:
    """The error for a file that libsndfile refused, with its reason."""
    reason = str(error).rpartition(": ")[2].rstrip(".") or "unknown format"
    return errors.BadArgument(
        f"{path} cannot be read as audio ({reason}); expected an intact file of one of {', '.join(EXTENSIONS)}",
        argument="source", accepted=list(EXTENSIONS),
    )  # fmt: skip


def write_audio(path: str | Path, samples: np.ndarray, rate: int) -> Path:
    """Samples (n,) in [-1, 1] to a file, whole or not at all; the ending chooses the format (wav: 16 bits).

    Raises BadArgument for another ending, other shapes and samples that are not finite, and StoreError where the file
    cannot be written.
    """
    path = Path(path)
    check_target(path)
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise bad_samples(f"samples of shape {samples.shape} were given; expected (n,), all of them finite")
    kind, subtype = FORMATS.get(path.suffix.lower(), (None, None))
    with whole(path) as work:
        try:
            soundfile.write(str(work), samples.clip(-1, 1), rate, format=kind, subtype=subtype)
        except soundfile.LibsndfileError as error:
            raise errors.StoreError(
                f"{path} cannot be written at {rate} samples a second: {error}", path=str(path)
            ) from error
    return path


def check_target(path: str | Path) -> None:
    """Raise BadArgument for an ending of no audio format, StoreError where no file can be: before the work is done."""
    path = Path(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise errors.BadArgument(
            f"{path} has an ending of no audio format; expected one of {', '.join(EXTENSIONS)}",
            argument="path", accepted=list(EXTENSIONS),
        )  # fmt: skip
    check_place(path)
