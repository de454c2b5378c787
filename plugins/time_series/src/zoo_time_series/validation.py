"""Measuring a forecaster on a table: what ``zoo validate`` runs."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zoo import errors
from zoo.files import refused
from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .pipelines import Forecasting, roll_forward
from .protocol import SPLITS, Scaler, Windows, borders
from .reading import read_table
from .tables import check_choice
from .training import Errors, baselines


def validate_table(
    model: nn.Module,
    data: str | Path,
    *,
    horizon: int | None = None,
    split: str = "auto",
    columns: str | None = None,
    date: str | None = None,
    missing: str = "interpolate",
    irregular: str = "error",
    batch_size: int = 100,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """MSE and MAE over the test rows, standardised as in the Informer benchmark, beside the last value's and season's.

    DATA is a CSV, TSV or parquet file with a date column and columns of numbers. ``split``: "auto" (the ETT months for
    ETTh*/ETTm* files, else 70/10/20 %), "ratio", "ett-hour", "ett-minute", or "all": every row is test. ``columns``:
    names with commas between them. Every window of the test rows counts (stride 1; ``limit``: at most so many, evenly
    spaced). Columns are standardised by the training rows of the split, or by what the weights were trained on.
    """
    check_choice("split", split, (*SPLITS, "all"))
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    pipe = Forecasting(model, horizon=horizon, columns=names, date=date, missing=missing, irregular=irregular)
    forecaster = pipe.forecaster
    with refused(data):
        table = read_table(data, date)
        table = (table if names is None else table.choose(names)).regular(missing, irregular)
        pipe.check_columns(table)
    lag, steps = forecaster.lag, pipe.horizon
    first, end, fitted = 0, len(table), len(table)
    if split != "all":
        parts = borders(len(table), lag, split, table.source)
        (first, end), fitted = parts["test"], parts["train"][1]
    known = pipe.preprocess.get("scaler")
    if known is not None and all(name in known["columns"] for name in table.columns):
        scaler = Scaler(table.columns, *pipe.scaling(table))
    else:
        scaler = Scaler.fit(table.values[: max(fitted, 1)], table.columns)
    scaled = torch.from_numpy(scaler(table.values[max(first, 0) : end]).astype(np.float32))
    windows = Windows(scaled, lag, steps, apart=forecaster.columns == 1)
    if not len(windows):
        raise errors.BadFile(
            f"{table.source}: {len(scaled)} rows are test rows or the history before them; a history of {lag} and a "
            f"horizon of {steps} need {lag + steps}",
            path=str(data),
        )
    if limit is not None and limit < len(windows):
        windows = replace(windows, chosen=torch.linspace(0, len(windows) - 1, limit).round().long())
    gaps, began = Errors(), time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(windows), pipe.name) as advance, torch.inference_mode():
        for series, target in windows.batches(batch_size):
            gaps.add(roll_forward(forecaster, series.to(pipe.device, pipe.dtype), steps).float().cpu(), target)
            for _ in series:
                advance()
    seconds = time.perf_counter() - began
    metrics: dict[str, float | None] = dict(gaps.result())
    for name, found in baselines(windows, batch_size).items():
        metrics |= {f"{key} of the {name}": found[key] for key in ("mse", "mae")}
    notes = "; ".join(table.notes)
    return Measured(
        model=pipe.name, data=str(data), samples=len(windows), metrics=metrics, seconds=seconds, notes=notes
    )
