"""Tables of interactions as people have them: CSV, TSV, parquet and RecBole's atomic files, read column by column."""

from __future__ import annotations

import csv as text_csv
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import existing, unreadable
from zoo_registry import errors

#: What a column may be called, in the order of preference; RecBole's types behind a colon are left out.
USER, ITEM, TIME = ("user_id", "user"), ("item_id", "item"), ("timestamp", "time")


def read_table(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, timestamp) columns of a file, tokens as strings, timestamps as float64 seconds.

    A RecBole atomic file (``.inter``, tab separated, header ``user_id:token item_id:token ... timestamp:float``), or a
    CSV/TSV/parquet file with columns named user, item, timestamp (also user_id, item_id, time). Raises BadFile (a
    ValueError) naming the columns found and expected, or the first line that is not a number of seconds, and
    LocalFileMissing (a FileNotFoundError).
    """
    path = Path(path)
    table = _open(path)
    users, items, times = (_column(table, names, path) for names in (USER, ITEM, TIME))
    return _names(users, path), _names(items, path), _seconds(times, path)


def read_history(path: str | Path) -> tuple[list[str], np.ndarray | None]:
    """The items of one user, oldest first, and their times in float64 seconds, None for a file without that column.

    A file as for :func:`read_table`; timestamps sort it (equal ones keep the file's order), and a column of users must
    hold one. Raises as :func:`read_table`.
    """
    path = Path(path)
    table = _open(path)
    items = _names(_column(table, ITEM, path, "item[,timestamp], one row each"), path)
    if _found(table, USER) is not None:
        users = sorted(set(_names(_column(table, USER, path), path)))
        if len(users) > 1:
            raise errors.BadFile(
                f"{path} holds the interactions of {len(users)} users, the first {users[0]!r} and {users[1]!r}; a "
                "history is one user's: write one file a user, or train and ask by name (zoo train, zoo recommend)",
                path=str(path),
            )
    if _found(table, TIME) is None:
        return items.tolist(), None
    times = _seconds(_column(table, TIME, path), path)
    order = np.argsort(times, kind="stable")
    return items[order].tolist(), times[order]


def _open(path: Path) -> Any:
    """The file as an Arrow table; every column of a text file as text."""
    import pyarrow as pa
    import pyarrow.csv as csv

    existing(path, "a .csv, .tsv, .inter or .parquet file of interactions")
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.ParquetFile(path).read()
        delimiter, names = _header(path)
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=delimiter),
            # Ids are names even where they look like numbers: "007" is not 7.
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise errors.BadFile(f"{path}: not a table: {error}", path=str(path)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _header(path: Path) -> tuple[str, list[str]]:
    """What separates the columns of a text file, and their names as Arrow reads them."""
    import pyarrow as pa

    with pa.input_stream(str(path)) as file:  # unpacks .gz as Arrow's reader does
        line = (file.read(1 << 16).splitlines() or [b""])[0]
    try:
        header = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.BadFile(f"{path} is no text in UTF-8; save it as UTF-8", path=str(path)) from error
    delimiter = "\t" if "\t" in header else ("," if "," in header else ";")
    return delimiter, next(text_csv.reader([header], delimiter=delimiter), [])


def _found(table: Any, wanted: tuple[str, ...]) -> str | None:
    """The table's own name of a column."""
    names = {name.split(":")[0].strip().lower(): name for name in table.column_names}
    return next((names[name] for name in wanted if name in names), None)


def _column(
    table: Any,
    wanted: tuple[str, ...],
    path: Path,
    expected: str = "the columns user_id, item_id and timestamp (seconds)",
) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = _found(table, wanted)
    if found is None:
        raise errors.BadFile(
            f"{path}: no column {' or '.join(map(repr, wanted))}; found {table.column_names}. Expected {expected}",
            path=str(path),
        )
    if table.column_names.count(found) > 1:
        raise errors.BadFile(f"{path}: {table.column_names.count(found)} columns are named {found!r}", path=str(path))
    column = table.column(found)
    if found != found.strip() and pa.types.is_string(column.type):  # "user, item": the values stand behind blanks too
        return pc.utf8_trim_whitespace(column)
    return column


def _names(column: Any, path: Path) -> np.ndarray:
    """A column of users or items as strings. Raises BadFile for gaps."""
    import pyarrow as pa

    try:
        names = np.asarray(column.cast(pa.string()).to_pylist(), dtype=object)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise errors.BadFile(f"{path}: a column of {column.type} holds no names: {error}", path=str(path)) from error
    for row, name in enumerate(names):
        if name is None or name == "":
            raise errors.BadFile(f"{path}, line {row + 2}: a user or an item is missing", path=str(path))
    return names


def _seconds(column: Any, path: Path) -> np.ndarray:
    """A column of timestamps as float64 seconds; dates of a parquet file are seconds since 1970 (UTC)."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        times = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy() / 1e6
    else:
        try:
            times = column.cast(pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            wrong = ((row, cell.as_py()) for row, cell in enumerate(column) if not _is_number(cell))
            row, value = next(wrong, (0, str(column.type)))
            raise errors.BadFile(
                f"{path}, line {row + 2}: the timestamp is {value!r}; expected a number of seconds, for example "
                "1700000000",
                path=str(path),
            ) from error
    infinite = np.flatnonzero(~np.isfinite(times))
    if len(infinite):
        raise errors.BadFile(
            f"{path}, line {infinite[0] + 2}: the timestamp is missing or not finite; expected a number of seconds",
            path=str(path),
        )
    return times


def _is_number(cell: Any) -> bool:
    """Whether one cell, an Arrow scalar, is a number; a gap is told of by itself."""
    import pyarrow as pa

    try:
        cell.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True
