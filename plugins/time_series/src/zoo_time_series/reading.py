"""Tables of series from where people keep them: CSV in its dialects, parquet, tables and arrays in memory."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo_registry import errors

from .tables import Table

EXTENSIONS = (".csv", ".tsv", ".txt", ".csv.gz", ".parquet")
#: Names that a column of dates has, where its type does not say so.
DATE_NAMES = ("date", "datetime", "timestamp", "time", "ds", "year")
#: Names that pandas and spreadsheets give to the number of a row.
_ROW_NUMBERS = re.compile(r"|unnamed: 0|__index_level_0__|index", re.IGNORECASE)
_NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "None", "-", "?"]
#: Ways of writing dates that are tried in turn after ISO 8601.
_DATE_FORMATS = [
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y-%m-%d %H:%M", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M",
    "%d.%m.%Y", "%Y-%m",
]  # fmt: skip
#: A number with a decimal comma that is all of a field.
_DECIMAL_COMMA = r'(?:^|{0})[ "]*[+-]?\d*,\d+(?:[eE][+-]?\d+)?[ "]*(?:{0}|\r|$)'


def read_table(source: Any, date: str | None = None) -> Table:
    """A file (CSV, TSV, parquet), or a table in memory, as a :class:`~zoo_time_series.tables.Table`.

    ``source``: a path; a table of pandas, polars or pyarrow; a mapping of columns; an array or tensor (rows,) or (rows,
    columns). ``date``: the name of the date column; None: the one named date, time, timestamp, ds ..., else the first
    whose values are dates; a table without any counts steps. Whole numbers as dates are years (four digits), days
    (20240131), or seconds, milliseconds, micro- or nanoseconds since 1970, by their size. Columns that are not numbers,
    and those that number the rows, are left out, with a note. Raises ValueError for what is no such table,
    FileNotFoundError for no file.
    """
    import pyarrow as pa

    if isinstance(source, Table):
        return source
    if isinstance(source, (str, Path)):
        found, notes = _read(Path(source).expanduser())
        return _from_arrow(found, date, str(source), notes)
    if isinstance(source, pa.Table):
        return _from_arrow(source, date, "the table", [])
    if isinstance(source, Mapping):
        try:
            found = pa.table({str(k): np.asarray(v) for k, v in source.items()})
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"the columns are no table: {str(error).splitlines()[0]}; expected one-dimensional ones of one length"
            ) from error
        return _from_arrow(found, date, "the table", [])
    if hasattr(source, "__arrow_c_stream__"):  # pandas, polars and others
        whole = source.to_frame() if hasattr(source, "to_frame") else source  # one column of pandas or polars
        return _from_arrow(pa.table(whole), date, "the table", [])
    try:
        values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a {type(source).__name__} is no array of numbers ({error})") from error
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise ValueError(f"the array has shape {values.shape}; expected (rows,) or (rows, columns) of numbers")
    return Table(values, [f"column_{i + 1}" for i in range(values.shape[1])], source="the array")


# -- files


def _read(path: Path) -> tuple[Any, list[str]]:
    """A file's table, and what was done to it."""
    import pyarrow as pa

    if not path.is_file():
        what = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no file {str(path)!r}"
        raise errors.LocalFileMissing(f"{what}; expected a table, {', '.join(EXTENSIONS)}", path=str(path))
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(path), []
        return _read_csv(_text(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a table: {str(error).splitlines()[0]}") from error


def _text(path: Path) -> bytes:
    """A text file's bytes as UTF-8, unpacked, without byte order mark and comments before the table."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a table: cannot be unpacked ({error})") from error
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # "Unicode text" of spreadsheets
            data = data.decode("utf-16").encode()
        else:
            data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a table: no text in UTF-8 (byte {error.start} is {data[error.start]:#04x}); save it as UTF-8"
        ) from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    while data.startswith(b"#"):
        first, _, rest = data.partition(b"\n")
        if any(first.count(d) >= max(rest.partition(b"\n")[0].count(d), 1) for d in b"\t;,"):
            data = data[1:]  # "#date,load" is the row of names
        else:
            data = rest
    return data


def _read_csv(data: bytes) -> tuple[Any, list[str]]:
    import pyarrow as pa
    import pyarrow.csv as pycsv

    end = min((i for i in (data.find(b"\n"), data.find(b"\r")) if i >= 0), default=len(data))
    header = data[:end].decode("utf-8", "replace")
    delimiter = max("\t;,", key=lambda d: len(_fields(header, d)))
    alone = len(_fields(header, delimiter)) == 1
    # A comma is a decimal point where it parts no fields and numbers are written with it.
    comma = delimiter != "," and re.search(_DECIMAL_COMMA.format(delimiter).encode(), data[end:], re.MULTILINE)
    nameless = _nameless(_fields(header, delimiter))
    notes = ["the first row holds values and no names: columns are numbered"] if nameless else []
    names = [f"column_{i + 1}" for i in range(len(_fields(header, delimiter)))] if nameless else None
    found = pycsv.read_csv(
        pa.BufferReader(data.rstrip() if alone else data),
        # An empty line in a table of one column is a value that is missing.
        parse_options=pycsv.ParseOptions(delimiter=delimiter, ignore_empty_lines=not alone),
        read_options=pycsv.ReadOptions(column_names=names),
        convert_options=pycsv.ConvertOptions(
            decimal_point="," if comma else ".",
            timestamp_parsers=[pycsv.ISO8601, *_DATE_FORMATS],
            null_values=_NULLS,
        ),
    )
    return found, notes


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(line), delimiter=delimiter, skipinitialspace=True), [])


def _nameless(fields: list[str]) -> bool:
    """Whether a first row holds values: numbers or dates alone, and not the numbers of the columns."""

    def value(text: str) -> bool:
        if re.match(r"\d{4}[-/]\d|\d{1,2}\.\d{1,2}\.\d{4}", text):
            return True
        try:
            float(text)
        except ValueError:
            return False
        return True

    given = [text.strip() for text in fields if text.strip()]
    count = [str(i) for i in range(len(given) + 1)]
    return bool(given) and all(map(value, given)) and given not in (count[:-1], count[1:])


# -- columns


def _from_arrow(table: Any, date: str | None, source: str, notes: list[str]) -> Table:
    import pyarrow as pa

    table = table.rename_columns([name.strip() for name in table.column_names])
    twice = [name for i, name in enumerate(table.column_names) if name in table.column_names[:i]]
    if twice:
        raise ValueError(f"{source}: the column {twice[0]!r} is there twice; expected a name of its own for each")
    if date is not None and date not in table.column_names:
        raise ValueError(f"{source} has no column {date!r}; it has {', '.join(table.column_names)}")
    table = _without_empty_end(table)
    temporal = [f.name for f in table.schema if pa.types.is_temporal(f.type) and not pa.types.is_time(f.type)]
    named = [n for n in table.column_names if n.lower() in DATE_NAMES]
    chosen = date or next((n for n in named if n in temporal), None) or next(iter([*temporal, *named]), None)
    dates = None
    if chosen is not None:
        dates, said = _dates(table.column(chosen), chosen, source)
        dates, more = _with_time_of_day(dates, table)
        notes = [*notes, *said, *more]
    columns, left_out, values = [], [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name == chosen:
            continue
        kind = field.type
        number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if number or pa.types.is_decimal(kind) or pa.types.is_null(kind):
            found = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            if _ROW_NUMBERS.fullmatch(field.name) and (np.diff(found) == 1).all():
                notes = [*notes, f"left out, numbers of rows: {field.name or 'the column without a name'}"]
                continue
            columns.append(field.name)
            values.append(found)
        else:
            left_out.append(field.name)
    if not columns or not table.num_rows:
        kinds = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise ValueError(
            f"{source}: {table.num_rows} rows, columns {kinds or 'none'}; expected a row with names, then one row a "
            "step with a date and at least one column of numbers (without percent signs and thousands' separators)"
        )
    notes = [*notes, f"left out, not numbers: {', '.join(left_out)}"] if left_out else notes
    return Table(np.stack(values, axis=1), columns, dates, source, notes)


def _without_empty_end(table: Any) -> Any:
    """Without rows in which nothing stands, as spreadsheets write them behind a table."""
    rows = table.num_rows
    while rows and all(not column[rows - 1].is_valid for column in table.columns):
        rows -= 1
    return table.slice(0, rows) if rows and table.num_columns > 1 else table


def _with_time_of_day(dates: np.ndarray, table: Any) -> tuple[np.ndarray, list[str]]:
    """Days that occur several times, moved on by the one column of times of day that stands beside them."""
    import pyarrow as pa

    times = [f.name for f in table.schema if pa.types.is_time(f.type)]
    days = dates.astype("datetime64[D]")
    if len(times) != 1 or (days != dates).any() or len(np.unique(days)) == len(days):
        return dates, []
    column = table.column(times[0])
    if column.null_count:
        return dates, []
    passed = column.cast(pa.time64("ns")).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return dates + passed.astype("timedelta64[ns]"), [f"the time of day is that of the column {times[0]!r}"]


def _dates(column: Any, name: str, source: str) -> tuple[np.ndarray, list[str]]:
    """A column as datetime64[ns], whatever says when (dates, text, numbers), and how that was read."""
    import pyarrow as pa

    kind, notes = column.type, []
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise ValueError(f"{source}: the date is missing in row {row + 1} of {len(column)}; every row needs one")
    try:
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            numbers = column.to_numpy(zero_copy_only=False)
            if not np.isfinite(numbers).all():  # tables in memory and parquet files have NaN where text has gaps
                row = int(np.argmin(np.isfinite(numbers)))
                raise ValueError(
                    f"{source}: the date is {numbers[row]} in row {row + 1} of {len(numbers)}; every row needs one"
                )
            found, said = _from_numbers(numbers, name)
            notes = [said]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            found, notes = _from_text(column)
        else:
            found = column.cast(pa.timestamp("ns")).to_numpy(zero_copy_only=False).astype("datetime64[ns]")
            if pa.types.is_timestamp(kind) and kind.tz is not None:
                notes = ["dates are in UTC"]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{source}: the column {name!r} cannot be read as dates ({str(error).splitlines()[0]}); expected one "
            "way of writing them in all rows, such as 2024-01-31 or 2024-01-31 13:00, or seconds since 1970"
        ) from error
    return found, notes


def _from_numbers(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Finite numbers as datetime64[ns], and what they were taken for."""
    whole = np.issubdtype(values.dtype, np.integer) or bool((values == values.round()).all())
    numbers = values.astype(np.int64) if whole else values
    largest = float(np.abs(numbers).max(initial=0))
    if whole and name.lower() not in ("time", "timestamp") and ((numbers >= 1000) & (numbers <= 2500)).all():
        return (numbers - 1970).astype("datetime64[Y]").astype("datetime64[ns]"), f"{name} was read as years"
    if whole and ((numbers >= 1700_01_01) & (numbers <= 2250_12_31)).all():
        months = (numbers // 10000 - 1970) * 12 + numbers // 100 % 100 - 1
        days = months.astype("datetime64[M]").astype("datetime64[D]") + (numbers % 100 - 1)
        right = (numbers // 100 % 100 >= 1) & (numbers // 100 % 100 <= 12) & (numbers % 100 >= 1)
        if (right & (days.astype("datetime64[M]") == months.astype("datetime64[M]"))).all():
            return days.astype("datetime64[ns]"), f"{name} was read as days (YYYYMMDD)"
    units = (
        (1e17, "nanoseconds", 1),
        (1e14, "microseconds", 10**3),
        (1e11, "milliseconds", 10**6),
        (-1, "seconds", 10**9),
    )
    unit, each = next((unit, each) for least, unit, each in units if largest > least)
    # A float of seconds since 1970 is true to a quarter of a microsecond.
    ticks = numbers * each if whole else (numbers * (each / 1000)).round().astype(np.int64) * 1000
    return ticks.astype("datetime64[ns]"), f"{name} was read as {unit} since 1970"


def _from_text(column: Any) -> tuple[np.ndarray, list[str]]:
    """Text as datetime64[ns]: ISO 8601, or days and months between slashes where no more than one order fits all rows.

    Raises pyarrow's ArrowInvalid for anything else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    slashed = {}
    for order in ("%d/%m/%Y", "%m/%d/%Y"):
        for time in ("", " %H:%M", " %H:%M:%S"):
            found = pc.strptime(column, format=order + time, unit="ns", error_is_null=True)
            if not found.null_count:
                slashed[order] = found.to_numpy(zero_copy_only=False).astype("datetime64[ns]")
    if len(slashed) == 2:
        raise pa.ArrowInvalid("day/month/year or month/day/year, both fit")
    for order, dates in slashed.items():
        return dates, [f"dates were read as {'day/month' if order[1] == 'd' else 'month/day'}/year"]
    return column.cast(pa.timestamp("ns")).to_numpy(zero_copy_only=False).astype("datetime64[ns]"), []
