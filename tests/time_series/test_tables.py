"""Tables as people have them: what is read, what is mended and said, what is refused."""

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from zoo_time_series.reading import read_table
from zoo_time_series.tables import Table, continued, duration, moments, step_of

HOURS = "date,load,wind\n2024-01-01 00:00:00,1,2\n2024-01-01 01:00:00,3,4\n2024-01-01 02:00:00,5,6\n"


def written(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_csv(tmp_path):
    table = read_table(written(tmp_path, HOURS)).regular()
    assert table.columns == ["load", "wind"]
    assert table.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert moments(continued(table.dates, 2)) == ["2024-01-01 03:00", "2024-01-01 04:00"]
    assert table.notes == []


@pytest.mark.parametrize(("text", "first"), [
    ("ds;y\n2024-01-31;1,5\n2024-02-29;2,5\n", 1.5),  # semicolons and decimal commas
    ("date\ty\n2024/01/31\t1.5\n2024/02/01\t2\n", 1.5),
    ("y,when\n1.5,2024-01-01T00:00:00Z\n2,2024-01-01T00:15:00Z\n", 1.5),
    ("timestamp,y\n1700000000,1.5\n1700003600,2\n", 1.5),
    ("timestamp,y\n1700000000000,1.5\n1700003600000,2\n", 1.5),
    ("date,y\n31.12.2023,1.5\n01.01.2024,2\n", 1.5),
    ("y\n1.5\n2\n", 1.5),
])  # fmt: skip
def test_ways_of_writing_a_table(tmp_path, text, first):
    table = read_table(written(tmp_path, text)).regular()
    assert table.columns == ["y"]
    assert table.values[0, 0] == first
    assert (table.dates is None) == text.startswith("y\n")
    if "17000" in text:
        assert table.dates[0] == np.datetime64(1_700_000_000, "s")


def test_parquet_and_memory(tmp_path):
    days = [datetime(2024, 1, 1) + timedelta(days=i) for i in range(4)]
    arrow = pa.table({"day": days, "x": [1, 2, 3, 4], "who": ["a"] * 4})
    parquet.write_table(arrow, tmp_path / "t.parquet")

    class FromElsewhere:  # what pandas and polars offer
        def __arrow_c_stream__(self, requested_schema=None):
            return arrow.__arrow_c_stream__(requested_schema)

    for source in (tmp_path / "t.parquet", arrow, FromElsewhere()):
        table = read_table(source)
        assert table.columns == ["x"]
        assert table.notes == ["left out, not numbers: who"]
        assert duration(step_of(table.dates)) == "1 day"
    assert read_table({"date": np.array(days, dtype="datetime64[ns]"), "x": [1.0, 2, 3, 4]}).dates is not None
    assert read_table(np.arange(5)).values.shape == (5, 1)
    assert read_table(torch.zeros(5, 2)).columns == ["column_1", "column_2"]
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        read_table(np.zeros((2, 2, 2)))


def test_choosing_columns(tmp_path):
    table = read_table(written(tmp_path, HOURS))
    assert table.choose(["wind"]).values.tolist() == [[2], [4], [6]]
    with pytest.raises(ValueError, match="no column 'solar'; it has load, wind"):
        table.choose(["solar"])
    assert read_table(written(tmp_path, HOURS), date="date").columns == ["load", "wind"]
    with pytest.raises(ValueError, match="no column 'day'"):
        read_table(written(tmp_path, HOURS), date="day")
    with pytest.raises(ValueError, match="expected a row with names"):
        read_table(written(tmp_path, "a,b\nx,y\n"))
    with pytest.raises(FileNotFoundError, match="no file"):
        read_table(tmp_path / "none.csv")


def test_missing_values(tmp_path):
    path = written(tmp_path, "date,x\n2024-01-01,\n2024-01-02,1\n2024-01-03,NaN\n2024-01-04,3\n2024-01-05,nan\n")
    table = read_table(path).regular()
    assert table.values[:, 0].tolist() == [1, 1, 2, 3, 3]
    assert table.notes == ["3 of 5 values were missing, the first at 2024-01-01: filled between neighbours"]
    with pytest.raises(ValueError, match="3 values are missing or infinite, the first in column 'x' at 2024-01-01"):
        read_table(path).regular(missing="error")
    with pytest.raises(ValueError, match="'x' has no value"):
        read_table(written(tmp_path, "date,x\n2024-01-01,\n2024-01-02,\n")).regular()
    infinite = Table(np.array([[1.0], [np.inf], [3.0]]), ["x"])
    assert infinite.regular().values[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="missing is 'drop'"):
        infinite.regular(missing="drop")


def test_uneven_dates(tmp_path):
    path = written(tmp_path, "date,x\n2024-01-01,0\n2024-01-02,1\n2024-01-05,4\n2024-01-06,5\n")
    with pytest.raises(ValueError, match=r"2 of 3 steps are 1 day, but 2024-01-02 is followed by 2024-01-05"):
        read_table(path).regular()
    table = read_table(path).regular(irregular="resample")
    assert table.values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert table.notes == ["dates were uneven: resampled to 6 rows, one every 1 day"]
    with pytest.raises(ValueError, match="irregular is 'skip'"):
        read_table(path).regular(irregular="skip")
    sparse = "date,x\n2024-01-01 00:00:00,0\n2024-01-01 00:00:01,1\n2024-02-01 00:00:00,4\n"
    with pytest.raises(ValueError, match="too sparse"):
        read_table(written(tmp_path, sparse)).regular(irregular="resample")


def test_dates_out_of_order_and_twice(tmp_path):
    table = read_table(written(tmp_path, "date,x\n2024-01-02,2\n2024-01-01,1\n2024-01-03,3\n")).regular()
    assert table.values[:, 0].tolist() == [1, 2, 3]
    assert "sorted" in table.notes[0]
    with pytest.raises(ValueError, match="2024-01-02 is there twice"):
        read_table(written(tmp_path, "date,x\n2024-01-02,2\n2024-01-02,1\n")).regular()
    with pytest.raises(ValueError, match="date is missing in row 2 of 2"):
        read_table(written(tmp_path, "date,x\n2024-01-02,2\n,1\n"))
    with pytest.raises(ValueError, match="cannot be read as dates"):
        read_table(written(tmp_path, "date,x\nmonday,2\ntuesday,1\n"))
    with pytest.raises(ValueError, match="both fit"):
        read_table(written(tmp_path, "date,x\n01/02/2024,2\n02/02/2024,1\n"))
    with pytest.raises(ValueError, match="not a table"):
        read_table(written(tmp_path, "date,x\n2024-01-01,1,3\n"))


@pytest.mark.parametrize(("dates", "following"), [
    (["2024-01-01", "2024-02-01", "2024-03-01"], ["2024-04-01", "2024-05-01"]),
    (["2023-11-30", "2023-12-31", "2024-01-31"], ["2024-02-29", "2024-03-31"]),  # month ends
    (["2023-03-31", "2023-06-30", "2023-09-30"], ["2023-12-31", "2024-03-31"]),  # quarters
    (["2020-01-01", "2021-01-01", "2022-01-01"], ["2023-01-01", "2024-01-01"]),  # years, one of them leap
    (["2024-02-27", "2024-02-28"], ["2024-02-29", "2024-03-01"]),
])  # fmt: skip
def test_steps_of_the_calendar(dates, following):
    assert moments(continued(np.array(dates, dtype="datetime64[ns]"), 2)) == following
