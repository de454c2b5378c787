"""A table of series in, their next steps out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.files import refused, whole
from zoo.pipelines import Pipeline, Result

from ._base import Forecaster
from .reading import EXTENSIONS, read_table
from .tables import IRREGULAR, MISSING, Table, check_choice, continued, moments


@dataclass(kw_only=True)
class Forecast(Result):
    """The next steps of every column, in the table's own units. ``values`` (horizon, columns); ``dates`` as text, or
    steps counted from 1 where the table has no dates; ``notes``: what was done to the table before."""

    columns: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    notes: list[str] = field(default_factory=list)
    history: Table | None = field(default=None, repr=False)
    ahead: np.ndarray | None = field(default=None, repr=False)  #: ``dates`` as datetime64[ns], None: no dates

    def summary(self) -> str:
        shown = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.columns[:3], self.values[-1], strict=False))
        more = f" and {len(self.columns) - 3} more" if len(self.columns) > 3 else ""
        notes = f" [{'; '.join(self.notes)}]" if self.notes else ""
        return f"{len(self.values)} steps to {self.dates[-1]}: {shown}{more}{notes}"

    def to_csv(self, path: str | Path) -> Path:
        """Write one row a step: the date (or the step's number) and the columns."""
        path = Path(path)
        first = "date" if self.ahead is not None else "step"
        digits = self._digits()
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([first, *self.columns])
            for date, row in zip(self.dates, self.values, strict=True):
                writer.writerow([date, *(f"{v:.{n}g}" for v, n in zip(row, digits, strict=True))])
        return path

    def _digits(self) -> list[int]:
        """How many digits each column's values need: eight, and those before its history begins to differ."""
        if self.history is None:
            return [17] * len(self.columns)
        largest, spread = np.abs(self.history.values).max(axis=0), np.ptp(self.history.values, axis=0)
        ratio = np.divide(largest, spread, out=np.ones_like(spread), where=spread > 0)
        return [int(np.clip(7 + np.ceil(np.log10(max(r, 10.0))), 8, 17)) for r in ratio]

    def picture(self) -> Image.Image | None:
        """The last of the history and the forecast, one panel a column (at most eight)."""
        if self.history is None:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure

        names = self.columns[:8]
        past = self.history.last(max(3 * len(self.values), 48))
        figure = Figure(figsize=(9, 1.0 + 1.9 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        if past.dates is not None and self.ahead is not None:
            before, after = past.dates, self.ahead
        else:
            before, after = np.arange(1 - len(past), 1), np.arange(1, len(self.values) + 1)
        for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
            axes.plot(before, past.values[:, i], color="0.35", linewidth=1.2, label="history")
            joined = np.concatenate([past.values[-1:, i], self.values[:, i]])
            axes.plot(np.concatenate([before[-1:], after]), joined, color="tab:blue", linewidth=1.6, label="forecast")
            axes.axvline(before[-1], color="0.7", linestyle=":", linewidth=1)
            axes.set_title(name, fontsize=9, loc="left")
            axes.grid(alpha=0.3)
        panels[0].legend(loc="upper left", fontsize=8, framealpha=0.7)
        if past.dates is not None:
            locator = AutoDateLocator()
            panels[-1].xaxis.set_major_locator(locator)
            panels[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
        else:
            panels[-1].set_xlabel("steps from now")
        if len(self.columns) > len(names):
            panels[-1].set_xlabel(f"and {len(self.columns) - len(names)} more columns")
        held = io.BytesIO()
        figure.savefig(held, format="png", dpi=110)
        held.seek(0)
        return Image.open(held).convert("RGB")


class Sample(NamedTuple):
    """What is read of a table: its newest rows, each column's mean and deviation, and the dates to come, or None."""

    table: Table
    mean: np.ndarray
    std: np.ndarray
    ahead: np.ndarray | None


class Forecasting(Pipeline):
    """Forecast every column of a table.

    Inputs: CSV, TSV or parquet files with a date column, oldest first; a table of pandas, polars or pyarrow, a mapping
    of columns, an array (rows,) or (rows, columns). Options: ``horizon``: steps, any number (default: the model's);
    ``columns``: names (default: all that hold numbers); ``date``: name of the date column; ``history``: rows used
    (default: as many as the model was made for); ``missing``: "interpolate" or "error"; ``irregular``: uneven dates are
    an "error", or "resample"d.

    A model of one column forecasts each column by itself. Columns are standardised by what the weights were trained on
    where they were trained on columns of these names (``zoo train-forecaster``), else by the history itself.
    """

    task = "forecasting"
    extensions = EXTENSIONS

    def __init__(
        self,
        model: nn.Module,
        horizon: int | None = None,
        columns: Sequence[str] | str | None = None,
        date: str | None = None,
        history: int | None = None,
        missing: str = "interpolate",
        irregular: str = "error",
    ) -> None:
        super().__init__(model)
        if not isinstance(model, Forecaster):
            raise errors.BadArgument(f"{type(model).__name__} is no forecaster", argument="model", accepted=[])
        if self.device.type == "cpu" and self.dtype in (torch.float16, torch.bfloat16):
            model.float()  # half precision saves space on disk; a CPU gains nothing from computing in it
        self.forecaster: Forecaster = model
        if horizon is not None and horizon < 1:
            raise errors.BadArgument(f"horizon is {horizon}; expected at least 1", argument="horizon", accepted=[])
        if history is not None and history != model.lag and not model.any_length:
            raise errors.BadArgument(
                f"history is {history}; {self.name} reads {model.lag} rows, no more and no fewer",
                argument="history",
                accepted=[],
            )
        if history is not None and history < 2:
            raise errors.BadArgument(f"history is {history}; expected at least 2 rows", argument="history", accepted=[])
        check_choice("missing", missing, MISSING)
        check_choice("irregular", irregular, IRREGULAR)
        if columns is not None and not len(columns):
            raise errors.BadArgument(
                "columns is empty; expected names, or None for all that hold numbers", argument="columns", accepted=[]
            )
        self.horizon = horizon or model.horizon
        self.columns = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
        self.date, self.history = date, history or model.lag
        self.missing, self.irregular = missing, irregular

    # -- the steps of a pipeline

    def read(self, source: Any) -> Sample:
        """The rows that are read, what they are standardised by, and the dates of the steps to come."""
        with refused(source):
            return self._read(source)

    def _read(self, source: Any) -> Sample:
        table = read_table(source, self.date)
        if self.columns is not None:
            table = table.choose(self.columns)
        self.check_columns(table)
        # Uneven dates are resampled before rows are counted; what lies further back need not be without gaps.
        table = table.regular_dates(self.irregular, self.missing)
        if len(table) < (self.history if not self.forecaster.any_length else 2):
            raise ValueError(
                f"{table.source} has {len(table)} rows; {self.name} needs at least "
                f"{2 if self.forecaster.any_length else self.history}"
            )
        # By all dates: a few may be even in more than one way (five working days, two ends of months).
        ahead = None if table.dates is None else continued(table.dates, self.horizon)
        table = table.last(self.history).filled(self.missing)
        if len(table) < self.history:
            note = f"{len(table)} rows of history; {self.name} was made for {self.history}"
            table = replace(table, notes=[*table.notes, note])
        return Sample(table, *self.scaling(table), ahead)

    def check_columns(self, table: Table) -> None:
        """Raises ValueError where the model takes another number of columns together."""
        together = self.forecaster.columns
        if together not in (None, 1, len(table.columns)):
            raise ValueError(
                f"{table.source} has {len(table.columns)} columns of numbers ({', '.join(table.columns)}); {self.name} "
                f"forecasts {together} together: choose them with columns="
            )

    def scaling(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each column: the training's where it knew these columns, else the history's."""
        known = self.preprocess.get("scaler")
        if known is not None and all(name in known["columns"] for name in table.columns):
            at = [known["columns"].index(name) for name in table.columns]
            return np.asarray(known["mean"])[at], np.asarray(known["std"])[at]
        std = table.values.std(axis=0)
        return table.values.mean(axis=0), np.where(std > 0, std, 1.0)

    def prepare(self, sample: Sample) -> Tensor:
        scaled = torch.from_numpy(((sample.table.values - sample.mean) / sample.std).astype(np.float32))
        return scaled.T[..., None].contiguous() if self.forecaster.columns == 1 else scaled[None]

    def forward(self, batch: Tensor) -> Tensor:
        """(batch, series, rows, columns) to (batch, series, horizon, columns)."""
        found = roll_forward(self.forecaster, batch.flatten(0, 1), self.horizon)
        return found.unflatten(0, batch.shape[:2])

    def finish(self, output: Tensor, sample: Sample) -> Forecast:
        table, mean, std, ahead = sample
        values = output.double().numpy()
        values = values[..., 0].T if self.forecaster.columns == 1 else values[0]
        values = values * std + mean
        if not np.isfinite(values).all():
            raise ValueError(
                f"{table.source}: the forecast is not finite; the model's rollout grows without bound over "
                f"{self.horizon} steps, or a column is constant under a transform that divides by its deviation"
            )
        notes = list(table.notes)
        own = self.forecaster.horizon
        if self.horizon > own and not self.forecaster.any_horizon:
            notes.append(f"beyond {own} steps the forecast reads its own forecast")
        dates = [str(i) for i in range(1, len(values) + 1)] if ahead is None else moments(ahead)
        return Forecast(
            columns=list(table.columns), dates=dates, values=values, notes=notes, history=table, ahead=ahead
        )


def roll_forward(model: Forecaster, series: Tensor, horizon: int) -> Tensor:
    """(batch, length, columns) to (batch, horizon, columns) for any horizon.

    Where the model's own rollout ends at its horizon, what it forecast joins the history and it goes on from there.
    """
    if model.any_horizon:
        return model(series, horizon=horizon)
    found = model(series)
    while found.shape[1] < horizon:
        window = torch.cat([series, found], dim=1)[:, -series.shape[1] :]
        found = torch.cat([found, model(window)], dim=1)
    return found[:, :horizon]
