"""Tables of series as people have them: CSV or parquet with a date column and any number of columns of numbers.

:func:`read_table` gives a :class:`Table`; :meth:`Table.regular` makes its steps even and fills what is missing, or says
what is wrong and what to do. Everything that was changed is a sentence in ``notes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

EXTENSIONS = (".csv", ".tsv", ".txt", ".parquet")
#: Names that a column of dates has, where its type does not say so.
DATE_NAMES = ("date", "datetime", "timestamp", "time", "ds")
MISSING = ("interpolate", "error")
IRREGULAR = ("error", "resample")


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(accepted)}")


@dataclass(frozen=True)
class Table:
    """``values`` (rows, columns) float64, NaN where missing; ``dates`` (rows,) datetime64[ns] or None; oldest first."""

    values: np.ndarray
    columns: list[str]
    dates: np.ndarray | None = None
    source: str = "the table"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def choose(self, names: Sequence[str]) -> Table:
        """These columns, in this order. Raises ValueError that lists the table's own."""
        unknown = [n for n in names if n not in self.columns]
        if unknown:
            raise ValueError(f"{self.source} has no column {unknown[0]!r}; it has {', '.join(self.columns)}")
        return replace(self, columns=list(names), values=self.values[:, [self.columns.index(n) for n in names]])

    def last(self, rows: int) -> Table:
        """The newest rows."""
        return replace(self, values=self.values[-rows:], dates=None if self.dates is None else self.dates[-rows:])

    def regular(self, missing: str = "interpolate", irregular: str = "error") -> Table:
        """Even steps and no gaps.

        ``missing``: "interpolate" (linear between neighbours; the ends keep the nearest value) or "error".
        ``irregular``: uneven dates are an "error", or "resample"d: rows at the commonest step, by linear interpolation.
        Steps of whole months (months, quarters, years) are even. Dates that are merely out of order are sorted.
        Raises ValueError with the row and what to do; for dates twice, and columns without any value, always.
        """
        return self.regular_dates(irregular).filled(missing)

    def regular_dates(self, irregular: str = "error") -> Table:
        """The first half of :meth:`regular`."""
        check_choice("irregular", irregular, IRREGULAR)
        if self.dates is None or len(self) < 2:
            return self
        table = self
        if (np.diff(self.dates) < np.timedelta64(0)).any():
            order = np.argsort(self.dates, kind="stable")
            note = f"rows were not in the order of their dates; sorted, {moment(self.dates[order[0]])} first"
            table = replace(self, dates=self.dates[order], values=self.values[order], notes=[*self.notes, note])
        dates = table.dates
        assert dates is not None
        steps = np.diff(dates)
        if (steps == np.timedelta64(0)).any():
            twice = dates[int(np.argmax(steps == np.timedelta64(0)))]
            raise ValueError(
                f"{self.source}: the date {moment(twice)} is there twice; expected one row a date (several series in "
                "one file belong in columns side by side)"
            )
        if step_of(dates) is not None:
            return table
        kinds, counts = np.unique(steps, return_counts=True)
        usual = kinds[counts.argmax()]
        if irregular == "error":
            at = int(np.argmax(steps != usual))
            raise ValueError(
                f"{self.source}: dates are not evenly spaced: {counts.max()} of {len(steps)} steps are "
                f"{duration(usual)}, but {moment(dates[at])} is followed by {moment(dates[at + 1])}; fill the gaps, or "
                "resample to the commonest step with irregular='resample' (--irregular resample)"
            )
        count = int((dates[-1] - dates[0]) // usual) + 1
        if count > 50 * len(table):
            raise ValueError(
                f"{self.source}: {len(table)} rows lie in {count} steps of {duration(usual)}; too sparse to resample"
            )
        grid = dates[-1] - usual * np.arange(count)[::-1]  # the newest row stays
        old, new = (x.astype(np.int64).astype(np.float64) for x in (dates, grid))
        values = np.stack([_interpolated(old, column, new) for column in table.values.T], axis=1)
        note = f"dates were uneven: resampled to {count} rows, one every {duration(usual)}"
        return replace(table, dates=grid, values=values, notes=[*table.notes, note])

    def filled(self, missing: str = "interpolate") -> Table:
        """The second half of :meth:`regular`."""
        check_choice("missing", missing, MISSING)
        gaps = ~np.isfinite(self.values)
        if not gaps.any():
            return self
        empty = [name for name, column in zip(self.columns, gaps.T, strict=True) if column.all()]
        if empty:
            raise ValueError(f"{self.source}: the column {empty[0]!r} has no value in the {len(self)} rows used")
        row, column = (int(i) for i in np.argwhere(gaps)[0])
        where = f"row {row + 1}" if self.dates is None else moment(self.dates[row])
        if missing == "error":
            raise ValueError(
                f"{self.source}: {int(gaps.sum())} values are missing or infinite, the first in column "
                f"{self.columns[column]!r} at {where}; fill them, or allow missing='interpolate'"
            )
        at = np.arange(len(self), dtype=np.float64)
        values = np.stack([_interpolated(at, column, at) for column in self.values.T], axis=1)
        note = f"{int(gaps.sum())} of {gaps.size} values were missing, the first at {where}: filled between neighbours"
        return replace(self, values=values, notes=[*self.notes, note])


def _interpolated(old: np.ndarray, values: np.ndarray, new: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    return np.interp(new, old[known], values[known]) if known.any() else np.full(len(new), np.nan)


# -- dates -------------------------------------------------------------------------------------------------------------


def step_of(dates: np.ndarray) -> np.timedelta64 | None:
    """The even step of at least two dates: a time, a number of months, or None where they are uneven."""
    months = dates.astype("datetime64[M]")
    apart = np.diff(months)
    offset = dates - months.astype(dates.dtype)
    ends = (months + 1).astype(dates.dtype) - dates  # the last day of a month is as even as its first
    if _one(apart) and apart[0] > np.timedelta64(0) and (_one(offset) or _one(ends)):
        return apart[0]
    steps = np.diff(dates)
    return steps[0] if _one(steps) else None


def _one(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def continued(dates: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` dates after evenly spaced ones."""
    step = step_of(dates)
    if step is None:
        raise ValueError("dates are not evenly spaced")
    ahead = np.arange(1, count + 1)
    if np.datetime_data(step.dtype)[0] != "M":
        return dates[-1] + step * ahead
    months = dates.astype("datetime64[M]")
    offset = dates - months.astype(dates.dtype)
    to_come = months[-1] + step * ahead
    if _one(offset):
        return to_come.astype(dates.dtype) + offset[-1]
    before_end = (months[-1] + 1).astype(dates.dtype) - dates[-1]
    return (to_come + 1).astype(dates.dtype) - before_end


def moment(date: Any) -> str:
    """A date as people write it, without the parts that are zero."""
    text = str(np.datetime64(date, "s")).replace("T", " ")
    return text.removesuffix(" 00:00:00") if text.endswith(" 00:00:00") else text.removesuffix(":00")


def moments(dates: np.ndarray) -> list[str]:
    """Dates as people write them, all with the parts that any of them needs."""
    texts = [str(d).replace("T", " ") for d in dates.astype("datetime64[s]")]
    for zeros in (":00", " 00:00"):
        if all(text.endswith(zeros) for text in texts):
            texts = [text.removesuffix(zeros) for text in texts]
        else:
            break
    return texts


def duration(step: np.timedelta64) -> str:
    if np.datetime_data(step.dtype)[0] == "M":
        months = int(step / np.timedelta64(1, "M"))
        return f"{months} months" if months > 1 else "1 month"
    seconds = step / np.timedelta64(1, "s")
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit if seconds > size else unit[:-1]}"
    return f"{seconds:g} seconds"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_table(source: Any, date: str | None = None) -> Table:
    """A file (CSV, TSV, parquet), or a table in memory, as a :class:`Table`.

    ``source``: a path; a table of pandas, polars or pyarrow; a mapping of columns; an array or tensor (rows,) or (rows,
    columns). ``date``: the name of the date column; None: the one named date, time, timestamp, ds ..., else the first
    whose values are dates; a table without any counts steps. Columns that are not numbers are left out, with a note.
    Raises ValueError for what is no such table, FileNotFoundError for no file.
    """
    import pyarrow as pa

    if isinstance(source, Table):
        return source
    if isinstance(source, (str, Path)):
        return _from_arrow(_read(Path(source).expanduser()), date, str(source))
    if isinstance(source, pa.Table):
        return _from_arrow(source, date, "the table")
    if isinstance(source, Mapping):
        return _from_arrow(pa.table({str(k): np.asarray(v) for k, v in source.items()}), date, "the table")
    if hasattr(source, "__arrow_c_stream__"):  # pandas, polars and others
        return _from_arrow(pa.table(source), date, "the table")
    values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise ValueError(f"the array has shape {values.shape}; expected (rows,) or (rows, columns) of numbers")
    return Table(values, [f"column_{i + 1}" for i in range(values.shape[1])], source="the array")


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv as csv

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; expected a table, {', '.join(EXTENSIONS)}")
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(path)
        with path.open(encoding="utf-8", errors="replace") as file:
            header = file.readline()
        delimiter = max("\t;,", key=header.count)
        decimal = "," if delimiter == ";" else "."
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=delimiter),
            convert_options=csv.ConvertOptions(
                decimal_point=decimal,
                timestamp_parsers=[csv.ISO8601, *_DATE_FORMATS],
                null_values=["", "NA", "N/A", "NaN", "nan", "null", "None", "-", "?"],
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a table: {str(error).splitlines()[0]}") from error


#: Ways of writing dates that are tried in turn after ISO 8601; all rows of a column must agree.
_DATE_FORMATS = ["%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y-%m-%d %H:%M", "%d.%m.%Y %H:%M", "%d.%m.%Y"]


def _from_arrow(table: Any, date: str | None, source: str) -> Table:
    import pyarrow as pa

    if date is not None and date not in table.column_names:
        raise ValueError(f"{source} has no column {date!r}; it has {', '.join(table.column_names)}")
    temporal = [f.name for f in table.schema if pa.types.is_temporal(f.type)]
    named = [n for n in table.column_names if n.strip().lower() in DATE_NAMES]
    chosen = date or next((n for n in named if n in temporal), None) or next(iter([*temporal, *named]), None)
    dates = None if chosen is None else _dates(table.column(chosen), chosen, source)
    columns, left_out, values = [], [], []
    for field_, column in zip(table.schema, table.columns, strict=True):
        if field_.name == chosen:
            continue
        kind = field_.type
        number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if number or pa.types.is_decimal(kind) or pa.types.is_null(kind):
            columns.append(field_.name)
            values.append(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
        else:
            left_out.append(field_.name)
    if not columns or not table.num_rows:
        raise ValueError(
            f"{source}: {table.num_rows} rows, columns {', '.join(table.column_names) or 'none'}; expected a row with "
            "names, then one row a step with a date and at least one column of numbers"
        )
    notes = [f"left out, not numbers: {', '.join(left_out)}"] if left_out else []
    return Table(np.stack(values, axis=1), columns, dates, source, notes)


def _dates(column: Any, name: str, source: str) -> np.ndarray:
    """A column as datetime64[ns], whatever says when: dates, times, text, seconds since 1970."""
    import pyarrow as pa

    kind = column.type
    try:
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            seconds = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            scale = 1e3 if np.nanmax(np.abs(seconds)) > 1e11 else 1.0  # milliseconds
            found = (seconds / scale * 1e9).round().astype("int64").astype("datetime64[ns]")
        else:
            found = column.cast(pa.timestamp("ns")).to_numpy(zero_copy_only=False).astype("datetime64[ns]")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{source}: the column {name!r} cannot be read as dates ({str(error).splitlines()[0]}); expected one "
            "way of writing them in all rows, such as 2024-01-31 or 2024-01-31 13:00, or seconds since 1970"
        ) from error
    if np.isnat(found).any():
        row = int(np.argmax(np.isnat(found)))
        raise ValueError(f"{source}: the date is missing in row {row + 1} of {len(found)}; every row needs one")
    return found
