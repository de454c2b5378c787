"""Sequences of numbers from files and arrays: (length, channels), or (length,) tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo.files import read_arrays, read_text
from zoo_registry import errors

TABLES = (".csv", ".tsv", ".txt")
EXTENSIONS = (".npy", *TABLES)


def read_sequence(source: Any, columns: Sequence[str | int] | None = None) -> np.ndarray:
    """A .npy file, a table or an array as numbers, (length, channels) or (length,).

    Tables: one position a line, one channel a column, with or without a line of names; separated by commas, semicolons
    (numbers may then have decimal commas), tabs or blanks. ``columns``: which of them, by name or number from 0.
    Raises BadFile or BadArgument for files that hold no such thing; missing values are NaN here.
    """
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    names: list[str] = []
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() == ".npy":
            found = read_arrays(path)
            if "" not in found:
                raise _wrong(
                    f"{path} is an archive of arrays ({', '.join(found)}); expected one array, as np.save writes"
                )
            values = found[""]
        else:
            values, names = read_table(path)
    else:
        values = np.asarray(source)
    if values.dtype.kind not in "biuf":
        raise _wrong(f"{_named(source)} holds {values.dtype}; expected real numbers")
    if values.ndim not in (1, 2):
        raise _wrong(
            f"{_named(source)} has shape {values.shape}; expected (length, channels). Give several sequences as a list"
        )
    return values if columns is None else values[:, _chosen(columns, names, values, source)]


def read_table(path: Path) -> tuple[np.ndarray, list[str]]:
    """(numbers (rows, columns) float64 with NaN for empty cells, names of the columns or [])."""
    lines = read_text(path).splitlines()
    rows = [(i, line) for i, line in enumerate(lines, start=1) if line.strip() and not line.lstrip().startswith("#")]
    if not rows:
        raise _wrong(f"{path} is empty; expected a table, one position a line")
    first = rows[0][1]
    separator = next((mark for mark in (";", "\t", ",") if mark in first), None)
    cells = [(i, [cell.strip() for cell in line.split(separator)]) for i, line in rows]
    names: list[str] = []
    if any(cell and _number(cell, separator) is None for cell in cells[0][1]):
        names = [cell.strip("\"'") for cell in cells.pop(0)[1]]
    width = len(names or cells[0][1]) if cells or names else 0
    values = np.empty((len(cells), width))
    for row, (line, found) in zip(values, cells, strict=True):
        if len(found) != width:
            raise _wrong(f"{path}, line {line}: {len(found)} columns; the first line has {width}")
        for j, cell in enumerate(found):
            number = _number(cell, separator) if cell else np.nan
            if number is None:
                which = f"column {names[j]!r}" if names else f"column {j}"
                raise _wrong(f"{path}, line {line}, {which}: {cell!r:.40} is no number; columns= takes those that are")
            row[j] = number
    return values, names


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise BadArgument that says where the first missing or infinite value is."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    where = f"position {at[0]}" + (f", channel {at[1]}" if len(at) > 1 else "")
    raise _wrong(
        f"{what}: {values[at]} at {where} ({int(bad.sum())} such values of {values.size}); fill them, for example with "
        "the mean of the channel"
    )


def _number(cell: str, separator: str | None) -> float | None:
    try:
        return float(cell.replace(",", ".") if separator == ";" else cell)
    except ValueError:
        return None


def _chosen(columns: Sequence[str | int], names: list[str], values: np.ndarray, source: Any) -> list[int]:
    if values.ndim != 2:
        raise _wrong(f"columns={list(columns)!r} was given; {_named(source)} has shape {values.shape}", "columns")
    found = []
    for column in columns:
        at = names.index(column) if isinstance(column, str) and column in names else column
        if not isinstance(at, int) or not 0 <= at < values.shape[1]:
            has = ", ".join(names) if names else f"0 to {values.shape[1] - 1}"
            raise _wrong(f"{_named(source)} has no column {column!r}; it has {has}", "columns")
        found.append(at)
    return found


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the array"


def _wrong(text: str, argument: str = "inputs") -> errors.BadArgument:
    return errors.BadArgument(text, argument=argument, accepted=[])
