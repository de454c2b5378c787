"""Files of interactions as people have them: other encodings, quotes, blanks, dates, gaps."""

import datetime
import gzip

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import zoo
from zoo_recommendation.tables import read_history, read_table


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffuser,item,timestamp\n007,0012,1\n",
        '"user","item","timestamp"\n"007","0012",1\n',
        "user, item, timestamp\n007, 0012, 1\n",
        "user,item,timestamp\r\n007,0012,1\r\n",
        "user;item;timestamp\n007;0012;1\n",
        "USER,ITEM,TIMESTAMP\n007,0012,1\n",
    ],
    ids=["byte order mark", "quotes", "blanks", "crlf", "semicolons", "capitals"],
)
def test_names_stay_names(tmp_path, text):
    """Ids that look like numbers are not read as such, however the header is written."""
    path = tmp_path / "über die Woche.csv"
    path.write_bytes(text.encode())
    assert [column.tolist() for column in read_table(path)] == [["007"], ["0012"], [1.0]]
    assert read_history(path)[0] == ["0012"]


def test_a_compressed_file(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"user,item,timestamp\n007,0012,1\n"))
    assert read_table(tmp_path / "a.csv.gz")[0].tolist() == ["007"]


def test_dates_of_a_parquet_file_are_seconds(tmp_path):
    when = pa.array([datetime.datetime(1970, 1, 2), datetime.datetime(1970, 1, 1, 0, 0, 1)], pa.timestamp("ns"))
    parquet.write_table(pa.table({"user": [1, 2], "item": [3, 4], "timestamp": when}), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet")[2].tolist() == [86400.0, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "user,item,timestamp\nä,b,1\n".encode("latin-1"), "not a table: .*invalid UTF8"),
        ("a.csv", "user,item,timestamp\na,b,1\n".encode("utf-16"), "no text in UTF-8; save it as UTF-8"),
        ("a.csv", b"", "not a table: Empty CSV file"),
        ("a.csv", b"user,item,item,timestamp\na,b,c,1\n", "2 columns are named 'item'"),
        ("a.csv", b"user,item,timestamp\na,b,nan\n", "line 2: the timestamp is missing or not finite"),
        ("a.csv", b"user,item,timestamp\na,b,2020-01-01\n", "line 2: the timestamp is '2020-01-01'"),
        ("a.csv", b"user,item,timestamp\na,b\n", "not a table: .*Expected 3 columns, got 2"),
        ("a.parquet", b"PAR1", "not a table"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(zoo.errors.BadFile, match=message):
        read_table(tmp_path / name)


def test_columns_that_hold_no_names(tmp_path):
    table = pa.table({"user": [["a"], ["b"]], "item": [1, 2], "timestamp": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(zoo.errors.BadFile, match="holds no names"):
        read_table(tmp_path / "a.parquet")
    with pytest.raises(zoo.errors.BadFile, match="is a folder"):
        read_table(tmp_path)


def test_a_history_is_one_users(tmp_path):
    (tmp_path / "one.csv").write_text("user,item,timestamp\na,x,2\na,y,1\na,z,1\n")
    items, times = read_history(tmp_path / "one.csv")
    assert (items, times.tolist()) == (["y", "z", "x"], [1.0, 1.0, 2.0])  # by time; equal times in the file's order
    (tmp_path / "two.csv").write_text("user,item,timestamp\na,x,2\nb,y,1\n")
    with pytest.raises(zoo.errors.BadFile, match="the interactions of 2 users"):
        read_history(tmp_path / "two.csv")
    (tmp_path / "no_times.csv").write_text("item\nx\ny\n")
    assert read_history(tmp_path / "no_times.csv") == (["x", "y"], None)
