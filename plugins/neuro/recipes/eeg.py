"""Generated EEG of six kinds, as made-up subjects would have it: for demos and tests. No sample is from a person.

A subject has an own alpha rhythm, background, electrode gains and strength of events; a recording is of one subject and
one kind, ten electrodes against a common reference at 100 Hz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo_neuro.eegdm.recordings import Recording

ELECTRODES = ("FP1", "F7", "T3", "T5", "O1", "FP2", "F8", "T4", "T6", "O2")
#: The temporal chains of the TCP montage.
CHAINS = ("FP1-F7", "F7-T3", "T3-T5", "T5-O1", "FP2-F8", "F8-T4", "T4-T6", "T6-O2")
KINDS = ("background", "blinks", "muscle", "periodic_discharges", "rhythmic_delta", "spike_and_wave")
SFREQ = 100.0
LEFT = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], float)
#: How strongly front, temple and back see what arises there.
FRONT = np.array([1.0, 0.45, 0.12, 0.04, 0.02] * 2)
MIDDLE = np.array([0.3, 0.8, 1.0, 0.8, 0.3] * 2)
BACK = np.array([0.08, 0.12, 0.3, 0.7, 1.0] * 2)


@dataclass
class Subject:
    """What stays the same in all recordings of a person. Amplitudes in microvolts."""

    alpha_hz: float
    alpha: float
    background: float
    slope: float
    event: float
    gains: np.ndarray


def subject(r: np.random.Generator) -> Subject:
    return Subject(
        alpha_hz=r.uniform(8.3, 11.7),
        alpha=r.uniform(5, 25),
        background=r.uniform(5, 11),
        slope=r.uniform(0.8, 1.5),
        event=r.uniform(0.8, 1.7),
        gains=r.uniform(0.85, 1.15, len(ELECTRODES)),
    )


def coloured(r: np.random.Generator, rows: int, n: int, slope: float) -> np.ndarray:
    """Noise whose power falls as frequency^-slope above 1 Hz, deviation 1."""
    f = np.fft.rfftfreq(n, 1 / SFREQ)
    shape = np.maximum(f, 1.0) ** (-slope / 2)
    spectrum = (r.normal(size=(rows, f.size)) + 1j * r.normal(size=(rows, f.size))) * shape
    x = np.fft.irfft(spectrum, n=n, axis=-1)
    return x / x.std(-1, keepdims=True)


def wave(r: np.random.Generator, n: int, hz: float, jitter: float) -> np.ndarray:
    """Phases (radians) of a rhythm whose frequency wanders by ``jitter`` of itself over seconds."""
    wander = np.interp(
        np.arange(n), np.arange(0, n + 50, 50), r.normal(size=n // 50 + 1 + (n % 50 > 0))[: (n + 99) // 50]
    )
    return 2 * np.pi * np.cumsum(hz * (1 + jitter * wander)) / SFREQ + r.uniform(0, 2 * np.pi)


def moments(r: np.random.Generator, n: int, every: float, spread: float) -> np.ndarray:
    """Samples at which something happens, about ``every`` seconds."""
    gaps = every * (1 + spread * r.uniform(-1, 1, int(n / SFREQ / every * 2) + 4))
    times = np.cumsum(gaps) - r.uniform(0, every)
    return times[(times > 0) & (times < n / SFREQ)] * SFREQ


def bump(n: int, at: float, width: float) -> np.ndarray:
    """A Gaussian of ``width`` seconds at sample ``at``."""
    return np.exp(-0.5 * ((np.arange(n) - at) / (width * SFREQ)) ** 2)


def discharge(n: int, at: float, sharp: float, slow: float) -> np.ndarray:
    """A sharp negative wave and the slow one of the other sign behind it."""
    return -bump(n, at, sharp) + 0.55 * bump(n, at + slow * 1.6 * SFREQ, slow)


def events(r: np.random.Generator, kind: str, who: Subject, n: int) -> np.ndarray:
    """What the kind adds to the background, (electrodes, n) microvolts."""
    if kind == "background":
        return np.zeros((len(ELECTRODES), n))
    if kind == "blinks":
        trace = sum(r.uniform(0.6, 1.2) * bump(n, t, r.uniform(0.06, 0.11)) for t in moments(r, n, 1.6, 0.6))
        return 90 * who.event * FRONT[:, None] * trace
    if kind == "muscle":
        knots = np.arange(0, n + 40, 40)
        burst = np.interp(np.arange(n), knots, r.uniform(-0.3, 1.2, knots.size)).clip(0, 1)
        hiss = coloured(r, len(ELECTRODES), n, -0.6)
        return 13 * who.event * MIDDLE[:, None] * r.uniform(0.5, 1.2, (len(ELECTRODES), 1)) * burst * hiss
    if kind == "rhythmic_delta":
        trace = np.sin(wave(r, n, r.uniform(1.6, 3.6), 0.05)) * r.uniform(0.8, 1.2)
        return 34 * who.event * (FRONT + 0.35)[:, None] * trace
    if kind == "spike_and_wave":
        trace = sum(discharge(n, t, 0.018, 0.075) for t in moments(r, n, 1 / r.uniform(2.5, 3.6), 0.06))
        return 42 * who.event * (FRONT + 0.35)[:, None] * trace
    if kind == "periodic_discharges":
        side = LEFT if r.random() < 0.5 else 1 - LEFT
        trace = sum(discharge(n, t, 0.03, 0.09) for t in moments(r, n, r.uniform(0.8, 1.5), 0.12))
        return 48 * who.event * (MIDDLE * (0.1 + 0.9 * side))[:, None] * trace
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")


def rest(r: np.random.Generator, who: Subject, n: int) -> np.ndarray:
    """Background and alpha rhythm, (electrodes, n) microvolts."""
    x = who.background * coloured(r, len(ELECTRODES), n, who.slope)
    x += 1.5 * who.background * coloured(r, 1, n, who.slope)  # what all electrodes share
    waxing = 0.6 + 0.4 * np.sin(2 * np.pi * np.arange(n) / SFREQ * r.uniform(0.1, 0.3) + r.uniform(0, 6))
    return x + who.alpha * BACK[:, None] * waxing * np.sin(wave(r, n, who.alpha_hz, 0.03))


def measured(r: np.random.Generator, x: np.ndarray, who: Subject) -> Recording:
    """Through the electrodes' gains, with an amplifier's noise, in volts."""
    x = x * who.gains[:, None] + r.normal(0, 1.5, x.shape)
    return Recording(x * 1e-6, SFREQ, [f"EEG {name}-REF" for name in ELECTRODES])


def recording(r: np.random.Generator, kind: str, who: Subject, seconds: float = 20.0) -> Recording:
    """One recording of one kind."""
    n = round(seconds * SFREQ)
    x = rest(r, who, n)
    return measured(r, x + events(r, kind, who, n), who)


def sequence(r: np.random.Generator, kinds: Sequence[str], who: Subject, seconds: float = 2.5) -> Recording:
    """One recording in which kinds follow each other, ``seconds`` of each; what a kind adds fades in and out."""
    n = round(seconds * SFREQ)
    x = rest(r, who, n * len(kinds))
    edge = np.clip(np.minimum(np.arange(n), np.arange(n)[::-1]) / 10, 0, 1)
    for i, kind in enumerate(kinds):
        x[:, i * n : (i + 1) * n] += events(r, kind, who, n) * edge
    return measured(r, x, who)
