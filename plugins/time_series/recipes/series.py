"""Series that the demo forecaster is trained and measured on: seasons of any length, trends, noise, changes of regime.

    python plugins/time_series/recipes/series.py demand.csv --columns 3 --rows 500

writes a table of them with a date column, to try ``zoo forecast`` and ``zoo train-forecaster`` on.

A series is ``level + trend + season * strength + noise``. The season's period is drawn from 6 to 48 steps and its
shape from sines, peaks, steps and ramps, sometimes with a second season seven times as long; the trend bends, the
strength drifts, the noise is autocorrelated, and once in a while the level jumps or the season changes its phase. What
can be known ends at the noise: its deviation is 3 to 25 % of the season's.
"""

from __future__ import annotations

import argparse
import csv
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

SHAPES = ("sine", "peak", "step", "ramp")


def wave(phase: np.ndarray, shape: str, sharpness: float) -> np.ndarray:
    """A season of period 1 and deviation about 1."""
    turn = 2 * np.pi * phase
    if shape == "sine":
        return np.sqrt(2) * np.sin(turn)
    if shape == "peak":
        y = np.exp(sharpness * (np.cos(turn) - 1))
    elif shape == "step":
        y = np.tanh(sharpness * (np.sin(turn) - 0.4))
    else:
        y = np.mod(phase, 1.0)
    return y


def series(length: int, random: np.random.Generator, period: float | None = None) -> np.ndarray:
    """One series of ``length`` steps, float64; ``period`` None: drawn."""
    t = np.arange(length)
    drawn = float(random.integers(6, 49))
    period = drawn if period is None else period
    phase = t / period + random.uniform()
    if random.uniform() < 0.3:  # a change of phase
        phase = phase + random.uniform(0.2, 0.8) * (t > random.integers(length))
    shape = SHAPES[random.integers(len(SHAPES))]
    once = wave(np.arange(512) / 512, shape, sharpness := random.uniform(1.5, 5.0))
    season = (wave(phase, shape, sharpness) - once.mean()) / once.std()
    season = season * np.exp(0.3 * np.sin(2 * np.pi * t / random.uniform(200, 800) + random.uniform(0, 6)))
    if random.uniform() < 0.35:  # a second season, as a week over days
        longer = np.sin(2 * np.pi * (t / (7 * period) + random.uniform()))
        season = season * (1 + random.uniform(0.2, 0.7) * longer) + random.uniform(0, 1.0) * longer
    slope = random.normal() * 0.01
    bend = random.normal() * 0.02 * np.maximum(t - random.integers(length), 0)
    level = slope * t + (bend if random.uniform() < 0.5 else 0.0)
    if random.uniform() < 0.3:  # a jump
        level = level + random.normal() * 2 * (t > random.integers(length))
    shocks = random.normal(size=length + 50)
    memory = random.uniform(0, 0.8)
    noise = np.zeros(length + 50)
    for i in range(1, length + 50):
        noise[i] = memory * noise[i - 1] + shocks[i]
    noise = noise[50:] * np.sqrt(1 - memory**2) * random.uniform(0.03, 0.25)
    return (season + level + noise) * np.exp(random.normal()) + random.normal() * 5


def tables(count: int, length: int, columns: int, seed: int) -> np.ndarray:
    """(count, length, columns) float32; in half of the tables all columns have seasons of one period."""
    random = np.random.default_rng(seed)
    found = np.empty((count, length, columns), np.float32)
    for table in found:
        period = float(random.integers(6, 49)) if random.uniform() < 0.5 else None
        for i in range(columns):
            table[:, i] = series(length, random, period)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    values = tables(1, arguments.rows, arguments.columns, arguments.seed)[0]
    start = datetime(2024, 1, 1)
    with arguments.path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *(f"series_{i + 1}" for i in range(arguments.columns))])
        for i, row in enumerate(values):
            writer.writerow([(start + timedelta(hours=i)).isoformat(sep=" "), *(f"{v:.4f}" for v in row)])


if __name__ == "__main__":
    main()
