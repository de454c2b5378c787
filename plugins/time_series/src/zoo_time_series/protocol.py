"""The Informer benchmark's protocol on any table: splits in time, a scaler fitted to the training rows, all windows.

Source: Zhou et al., "Informer", arXiv 2012.07436, section 5; as SpaceTime's data loaders have it
(HazyResearch/spacetime ``dataloaders/datasets/informer.py``). Differs: no batch is dropped at the end of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .tables import Table, check_choice

#: Rows of training, validation and test of the ETT files: 12, 4 and 4 months of 30 days.
ETT_HOURS = (12 * 30 * 24, 4 * 30 * 24, 4 * 30 * 24)
SPLITS = ("auto", "ratio", "ett-hour", "ett-minute")
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Scaler:
    """Columns in deviations from the mean of the training rows (deviation with n, a constant column's is 1)."""

    columns: list[str]
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray, columns: list[str]) -> Scaler:
        std = values.std(axis=0)
        return cls(columns, values.mean(axis=0), np.where(std > 0, std, 1.0))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.std

    def to_dict(self) -> dict[str, list[float] | list[str]]:
        return {"columns": self.columns, "mean": self.mean.tolist(), "std": self.std.tolist()}


def borders(rows: int, lag: int, split: str = "ratio", source: str = "") -> dict[str, tuple[int, int]]:
    """First and one-past-last row of each part; validation and test begin ``lag`` rows early, to have a history.

    "ratio": 70 % training, 20 % test (each rounded down), validation between; "ett-hour", "ett-minute": 12, 4 and 4
    months of hours or quarters of an hour from the first row, later rows unused; "auto": by the name of the file
    (ETTh*, ETTm*), else "ratio". Raises ValueError for a table that is too short for an ETT split.
    """
    check_choice("split", split, SPLITS)
    name = source.rpartition("/")[2].lower()
    if split == "auto":
        split = "ett-hour" if name.startswith("etth") else "ett-minute" if name.startswith("ettm") else "ratio"
    if split == "ratio":
        train, test = int(rows * 0.7), int(rows * 0.2)
        ends = (train, rows - test, rows)
    else:
        scale = 4 if split == "ett-minute" else 1
        train, val, test = (scale * n for n in ETT_HOURS)
        ends = (train, train + val, train + val + test)
        if rows < ends[-1]:
            raise ValueError(f"{source or 'the table'} has {rows} rows; the split {split} needs {ends[-1]}")
    return {"train": (0, ends[0]), "val": (ends[0] - lag, ends[1]), "test": (ends[1] - lag, ends[2])}


@dataclass(frozen=True)
class Windows:
    """Every window of ``lag + horizon`` rows of a part, stride 1, scaled: (count, lag + horizon, columns) as a view.

    ``apart``: each column is a series of its own, windows (count * columns, lag + horizon, 1). ``chosen``: numbers of
    the windows that count, None: all.
    """

    values: Tensor
    lag: int
    horizon: int
    apart: bool = False
    chosen: Tensor | None = None

    def __len__(self) -> int:
        return self._count() if self.chosen is None else len(self.chosen)

    def _count(self) -> int:
        starts = max(len(self.values) - self.lag - self.horizon + 1, 0)
        return starts * (self.values.shape[1] if self.apart else 1)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(histories, targets) of the windows of these numbers."""
        index = index if self.chosen is None else self.chosen[index]
        view = self.values.unfold(0, self.lag + self.horizon, 1)  # (starts, columns, steps)
        if self.apart:
            columns = self.values.shape[1]
            found = view[index // columns, index % columns].unsqueeze(-1)
        else:
            found = view[index].transpose(1, 2)
        return found[:, : self.lag], found[:, self.lag :]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All windows in batches; shuffled by ``generator``, in their order without."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in order.split(size):
            yield self.take(index)


def prepare(
    table: Table, lag: int, horizon: int, *, split: str = "auto", apart: bool = False
) -> tuple[dict[str, Windows], Scaler]:
    """The windows of the three parts, and the scaler of the training rows.

    ``apart``: for models of one column. Raises ValueError where a part holds no window, with the rows it needs.
    """
    parts = borders(len(table), lag, split, table.source)
    scaler = Scaler.fit(table.values[: parts["train"][1]], table.columns)
    values = torch.from_numpy(scaler(table.values).astype(np.float32))
    found = {name: Windows(values[max(a, 0) : b], lag, horizon, apart) for name, (a, b) in parts.items()}
    for name in PARTS:
        if not len(found[name]) or parts[name][0] < 0:
            first, end = parts[name]
            raise ValueError(
                f"{table.source} has {len(table)} rows, of which {end - max(first, 0)} fall to the part {name!r}; a "
                f"history of {lag} and a horizon of {horizon} need {lag + horizon} there: take a longer table, or a "
                "shorter history or horizon"
            )
    return found, scaler
