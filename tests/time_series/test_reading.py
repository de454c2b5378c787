"""The dialects in which people keep tables: each is read as it was meant, and what was guessed is said."""

import gzip
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest

from zoo import errors
from zoo_time_series.reading import read_table
from zoo_time_series.tables import Table, continued, moments, workdays


def written(tmp_path, text, name="t.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


ROWS = "2024-01-01,1.5\n2024-01-02,2.5\n2024-01-03,4\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("date,x\n" + ROWS, "utf-8-sig"),
        (("date,x\n" + ROWS).replace(",", "\t"), "utf-16"),
        (("date,x\n" + ROWS).replace("\n", "\r\n"), "utf-8"),
        (("date,x\n" + ROWS).replace(",", ";"), "utf-8"),  # semicolons, decimal points
        (("date,x\n" + ROWS).replace(",", ";").replace(".", ","), "utf-8"),
        (("date,x\n" + ROWS).replace(",", "\t").replace(".", ","), "utf-8"),
        (("date,x\n" + ROWS).replace(",", ", "), "utf-8"),
        ("# measured on the roof\n# twice\ndate,x\n" + ROWS, "utf-8"),
        ("#date,x\n" + ROWS, "utf-8"),
        ('"date","x"\n' + ROWS, "utf-8"),
        ("date,x\n" + ROWS + ",\n,\n", "utf-8"),  # rows of a spreadsheet that are empty
        (",date,x\n0,2024-01-01,1.5\n1,2024-01-02,2.5\n2,2024-01-03,4\n", "utf-8"),  # numbers of rows are no series
    ],
)
def test_dialects(tmp_path, text, encoding):
    table = read_table(written(tmp_path, text, encoding=encoding))
    assert table.columns == ["x"]
    assert table.values[:, 0].tolist() == [1.5, 2.5, 4]
    assert moments(table.dates) == ["2024-01-01", "2024-01-02", "2024-01-03"]


def test_packed(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"date,x\n" + ROWS.encode()))
    assert read_table(tmp_path / "t.csv.gz").values[:, 0].tolist() == [1.5, 2.5, 4]
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"date,x\n" + ROWS.encode())[:20])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_table(tmp_path / "cut.csv.gz")


def test_a_table_without_names(tmp_path):
    """The first row is a value and not a name; numbers of columns are names."""
    table = read_table(written(tmp_path, ROWS))
    assert table.values[:, 0].tolist() == [1.5, 2.5, 4]
    assert "no names" in table.notes[0]
    assert read_table(written(tmp_path, "3,4\n5,6\n")).values.tolist() == [[3, 4], [5, 6]]
    assert read_table(written(tmp_path, "0,1\n5,6\n")).values.tolist() == [[5, 6]]


def test_an_empty_line_of_one_column_is_a_missing_value(tmp_path):
    assert np.isnan(read_table(written(tmp_path, "x\n1\n\n3\n\n")).values[:, 0]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "values", "first", "said"),
    [
        ("date", ["20240131", "20240201"], "2024-01-31", "YYYYMMDD"),
        ("date", ["1990", "1991"], "1990-01-01", "years"),
        ("year", ["1990", "1991"], "1990-01-01", "years"),
        ("date", ["2024-01", "2024-02"], "2024-01-01", ""),
        ("date", ["1/31/2024", "2/1/2024"], "2024-01-31", "month/day"),
        ("date", ["31/1/2024 13:00", "1/2/2024 13:00"], "2024-01-31 13:00", "day/month"),
        ("time", ["1700000000000000", "1700000060000000"], "2023-11-14 22:13:20", "microseconds"),
        ("time", ["1700000000000000000", "1700000060000000000"], "2023-11-14 22:13:20", "nanoseconds"),
        ("time", ["1990", "1991"], "1970-01-01 00:33:10", "seconds"),
    ],
)
def test_ways_of_writing_dates(tmp_path, name, values, first, said):
    table = read_table(written(tmp_path, f"{name},x\n" + "".join(f"{v},1\n" for v in values)))
    assert moments(table.dates[:1]) == [first]
    assert said in "".join(table.notes)
    assert table.columns == ["x"]


@pytest.mark.parametrize(
    "values", [[np.nan, 1.7e9, 1.7e9 + 60], [1.7e9, np.inf, 1.7e9 + 120], [2020.0, 2021.0, np.nan]]
)
def test_numbers_that_are_no_dates_are_told_by_their_row(values):
    """Arrow's NaN is no gap: it must not become a date, nor infinity."""
    row = int(np.argmin(np.isfinite(values))) + 1
    table = pa.table({"date": pa.array(values, from_pandas=False), "x": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=f"the date is (nan|inf) in row {row} of 3"):
        read_table(table)


def test_parts_of_a_second_stay(tmp_path):
    text = "time,x\n" + "".join(f"{1700000000 + i / 10:.1f},1\n" for i in range(20))
    dates = read_table(written(tmp_path, text)).regular().dates
    assert moments(continued(dates, 2)) == ["2023-11-14 22:13:22.000", "2023-11-14 22:13:22.100"]


def test_a_day_and_a_time_apart(tmp_path):
    table = read_table(written(tmp_path, "date,time,x\n2024-01-01,22:00:00,1\n2024-01-01,23:00:00,2\n"))
    assert moments(table.regular().dates) == ["2024-01-01 22:00", "2024-01-01 23:00"]
    assert table.columns == ["x"]


def test_zones_are_said():
    hours = [datetime(2024, 3, 30, 23, tzinfo=timezone(timedelta(hours=1))) + timedelta(hours=i) for i in range(3)]
    table = read_table(pa.table({"when": pa.array(hours, pa.timestamp("ns", "Europe/Berlin")), "x": [1.0, 2, 3]}))
    assert moments(table.dates)[0] == "2024-03-30 22:00"
    assert table.notes == ["dates are in UTC"]


def test_the_index_of_a_frame_is_no_series():
    table = read_table(pa.table({"x": [1.0, 2, 3], "__index_level_0__": [7, 8, 9]}))
    assert table.columns == ["x"]
    days = pa.array([datetime(2024, 1, i + 1) for i in range(3)])
    assert read_table(pa.table({"x": [1.0, 2, 3], "__index_level_0__": days})).dates is not None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("date,höhe\n2024-01-01,1\n".encode("latin-1"), "no text in UTF-8"),
        (b"date,x,x\n2024-01-01,1,2\n", "'x' is there twice"),
        (b"", "Empty CSV file"),
        (b"date,x\n", "0 rows"),
        (b"date,x\n2024-01-01,5%\n", "percent signs"),
        (b"date,x\n2024-01-01,1\n,2\n", "date is missing in row 2"),
    ],
)
def test_what_is_no_table(tmp_path, content, match):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_table(tmp_path / "t.csv")


def test_folders_and_columns_in_memory(tmp_path):
    with pytest.raises(errors.LocalFileMissing, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(ValueError, match="of one length"):
        read_table({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(ValueError, match="no array of numbers"):
        read_table(np.array(["a", "b"]))


# -- steps


def test_working_days_are_even():
    friday = np.busday_offset("2024-01-01", np.arange(5)).astype("datetime64[ns]")
    days = np.busday_offset("2024-01-01", np.arange(10)).astype("datetime64[ns]")
    assert workdays(days)
    assert Table(np.zeros((10, 1)), ["x"], days).regular().notes == []
    assert moments(continued(days, 2)) == ["2024-01-15", "2024-01-16"]
    assert moments(continued(friday, 1)) == ["2024-01-06"]  # five days alone are days
    with pytest.raises(ValueError, match="not evenly spaced"):
        Table(np.zeros((9, 1)), ["x"], np.delete(days, 4)).regular()  # a holiday


def test_the_thirtieth_of_a_short_month():
    dates = np.array(["2023-11-30T06", "2023-12-30T06"], dtype="datetime64[ns]")
    assert moments(continued(dates, 3)) == ["2024-01-30 06:00", "2024-02-29 06:00", "2024-03-30 06:00"]


def test_months_with_a_gap_are_resampled_to_months():
    dates = np.array(["2023-01-31", "2023-02-28", "2023-03-31", "2023-05-31"], dtype="datetime64[ns]")
    table = Table(np.array([[1.0], [2], [3], [5]]), ["x"], dates)
    with pytest.raises(ValueError, match="2 of 3 steps are 1 month"):
        table.regular()
    even = table.regular(irregular="resample")
    assert moments(even.dates) == ["2023-01-31", "2023-02-28", "2023-03-31", "2023-04-30", "2023-05-31"]
    assert even.values[3, 0] == pytest.approx(3 + 2 * 30 / 61)


def test_resampling_hides_no_missing_values():
    dates = np.array(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-05"], dtype="datetime64[ns]")
    table = Table(np.array([[1.0], [np.nan], [3], [5]]), ["x"], dates)
    with pytest.raises(ValueError, match="missing or infinite"):
        table.regular("error", "resample")
    assert "1 of 4 values were missing" in table.regular(irregular="resample").notes[1]
