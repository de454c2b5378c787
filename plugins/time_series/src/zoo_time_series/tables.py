"""Tables of series: a date column and any number of columns of numbers, made even and whole.

:func:`zoo_time_series.reading.read_table` gives a :class:`Table`; :meth:`Table.regular` makes its steps even and fills
what is missing, or says what is wrong and what to do. Everything that was changed is a sentence in ``notes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zoo_registry import errors

MISSING = ("interpolate", "error")
IRREGULAR = ("error", "resample")


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raise BadArgument for a value that is none of the ``accepted``."""
    if value not in accepted:
        raise errors.BadArgument(
            f"{name} is {value!r}; expected one of {', '.join(accepted)}", argument=name, accepted=list(accepted)
        )


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
        Steps of whole months (months, quarters, years) and of working days (Monday to Friday) are even. Dates that are
        merely out of order are sorted. Raises ValueError with the row and what to do; for dates twice, and columns
        without any value, always.
        """
        return self.regular_dates(irregular, missing).filled(missing)

    def regular_dates(self, irregular: str = "error", missing: str = "interpolate") -> Table:
        """The first half of :meth:`regular`; ``missing`` as there, for resampling fills what is missing."""
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
        if step_of(dates) is not None or workdays(dates):
            return table
        stamps, steps = _stamps(dates), np.diff(_stamps(dates))
        kinds, counts = np.unique(steps, return_counts=True)
        usual = kinds[counts.argmax()]
        if irregular == "error":
            at = int(np.argmax(steps != usual))
            raise ValueError(
                f"{self.source}: dates are not evenly spaced: {counts.max()} of {len(steps)} steps are "
                f"{duration(usual)}, but {moment(dates[at])} is followed by {moment(dates[at + 1])}; fill the gaps, or "
                "resample to the commonest step with irregular='resample' (--irregular resample)"
            )
        count = int((stamps[-1] - stamps[0]) // usual) + 1
        if count > 50 * len(table):
            raise ValueError(
                f"{self.source}: {len(table)} rows lie in {count} steps of {duration(usual)}; too sparse to resample"
            )
        table = table.filled(missing) if missing == "error" else table
        grid = _dated(stamps[-1] - usual * np.arange(count)[::-1], dates)  # the newest row stays
        old, new = (x.astype(np.int64).astype(np.float64) for x in (dates, grid))
        values = np.stack([_interpolated(old, column, new) for column in table.values.T], axis=1)
        notes = [*table.notes, f"dates were uneven: resampled to {count} rows, one every {duration(usual)}"]
        if gaps := int((~np.isfinite(table.values)).sum()):
            notes.append(f"{gaps} of {table.values.size} values were missing: filled between neighbours")
        return replace(table, dates=grid, values=values, notes=notes)

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
    stamps = _stamps(dates)
    steps = np.diff(stamps)
    if _one(steps):
        return steps[0]
    steps = np.diff(dates)  # months of one length after another are even as days, too
    return steps[0] if _one(steps) else None


def _stamps(dates: np.ndarray) -> np.ndarray:
    """Dates as months where each is the same moment of another month, else as they are."""
    months = dates.astype("datetime64[M]")
    ends = (months + 1).astype(dates.dtype) - dates  # the last day of a month is as even as its first
    each = (np.diff(months) > np.timedelta64(0)).all()
    return months if each and (_one(dates - months.astype(dates.dtype)) or _one(ends)) else dates


def _dated(stamps: np.ndarray, like: np.ndarray) -> np.ndarray:
    """What :func:`_stamps` made of dates as dates again, months at the same moment as in ``like``."""
    if stamps.dtype == like.dtype:
        return stamps
    months = like.astype("datetime64[M]")
    begins, ends = stamps.astype(like.dtype), (stamps + 1).astype(like.dtype)
    offset = like - months.astype(like.dtype)
    if not _one(offset):
        return ends - ((months[-1] + 1).astype(like.dtype) - like[-1])
    # The 30th of February is its last day, at the same time of day.
    last = ends - np.timedelta64(1, "D") + offset[-1] % np.timedelta64(1, "D")
    return np.minimum(begins + offset[-1], last)


def workdays(dates: np.ndarray) -> bool:
    """Whether dates are every Monday to Friday, at one time of day."""
    days = dates.astype("datetime64[D]")
    if not _one(dates - days) or not np.is_busday(days).all():
        return False
    return bool((np.busday_count(days[:-1], days[1:]) == 1).all())


def _one(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def continued(dates: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` dates after evenly spaced ones. Raises ValueError for uneven ones."""
    ahead, step = np.arange(1, count + 1), step_of(dates)
    if step is None:
        if not workdays(dates):
            raise ValueError("dates are not evenly spaced")
        day = dates[-1].astype("datetime64[D]")
        return np.busday_offset(day, ahead).astype(dates.dtype) + (dates[-1] - day)
    if np.datetime_data(step.dtype)[0] != "M":
        return dates[-1] + step * ahead
    return _dated(_stamps(dates)[-1] + step * ahead, dates)


def moment(date: Any) -> str:
    """A date as people write it, to the second, without the parts that are zero."""
    text = str(np.datetime64(date, "s")).replace("T", " ")
    return text.removesuffix(" 00:00:00") if text.endswith(" 00:00:00") else text.removesuffix(":00")


def moments(dates: np.ndarray) -> list[str]:
    """Dates as people write them, all with the parts that any of them needs."""
    unit = next(u for u in ("s", "ms", "us", "ns") if u == "ns" or (dates.astype(f"datetime64[{u}]") == dates).all())
    texts = [str(d).replace("T", " ") for d in dates.astype(f"datetime64[{unit}]")]
    for zeros in (":00", " 00:00") if unit == "s" else ():
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
