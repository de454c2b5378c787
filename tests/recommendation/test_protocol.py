"""RecBole's data protocol: filter, ids, samples, split, metrics."""

import math

import numpy as np
import pytest
import torch

from zoo_recommendation.protocol import Ranking, prepare, split
from zoo_recommendation.tables import read_table


def table(rows, core=1, **options):
    users, items, times = zip(*rows, strict=True)
    return prepare(users, items, times, core=core, **options)


def test_core_filter_repeats_until_stable():
    # i3 has one taker; without i3 user c has one item; without c, i2 has one taker; and so on to nothing but a and b.
    rows = [
        ("a", "i1", 1),
        ("b", "i1", 2),
        ("a", "i4", 3),
        ("b", "i4", 4),
        ("c", "i2", 5),
        ("c", "i3", 6),
        ("a", "i2", 7),
    ]
    found = table(rows, core=2)
    assert found.user_tokens == ["[PAD]", "a", "b"]
    assert found.item_tokens == ["[PAD]", "i1", "i4"]


def test_nothing_left_says_so():
    with pytest.raises(ValueError, match="nothing is left of 2 interactions"):
        table([("a", "x", 1), ("b", "y", 2)], core=2)


def test_ids_by_first_appearance_and_rows_by_user_and_time():
    found = table([("z", "late", 9), ("a", "x", 5), ("z", "early", 1), ("a", "y", 4)])
    assert found.user_tokens == ["[PAD]", "z", "a"]
    assert found.item_tokens == ["[PAD]", "late", "x", "early", "y"]
    assert found.user.tolist() == [1, 1, 2, 2]
    assert [found.item_tokens[i] for i in found.item] == ["early", "late", "y", "x"]


def test_ties_of_float32_seconds_keep_the_files_order():
    found = table([("a", "first", 1_600_000_010), ("a", "second", 1_600_000_001)])  # one float32 step
    assert [found.item_tokens[i] for i in found.item] == ["first", "second"]


def test_leave_one_out_and_window():
    found = table([("a", f"i{t}", t) for t in range(1, 7)])
    train, valid, test = split(found, max_length=3)
    assert (len(train), len(valid), len(test)) == (3, 1, 1)
    batch = test.batch(np.arange(1))
    assert batch["item_seq"].tolist() == [[3, 4, 5]]
    assert batch["target"].tolist() == [6]
    first = train.batch(np.arange(1))
    assert first["item_seq"].tolist() == [[1, 0, 0]]
    assert first["item_seq_len"].tolist() == [1]
    assert first["times"].tolist() == [[1.0, 0.0, 0.0]]


def test_users_with_few_samples():
    found = table(
        [("one", "x", 1), ("two", "x", 1), ("two", "y", 2), ("three", "x", 1), ("three", "y", 2), ("three", "z", 3)]
    )
    train, valid, test = split(found, 5)
    name = [found.user_tokens[u] for u in (*train.user, *valid.user, *test.user)]
    assert name == ["two", "three", "three"]  # one sample: train; two samples: train and test, none for validation
    assert (len(train), len(valid), len(test)) == (2, 0, 1)


def test_scaled_time():
    found = table([("a", "x", 100), ("a", "y", 300), ("a", "z", 200)], scale_time=True)
    assert found.time.tolist() == [0.0, 0.5, 1.0]


def test_metrics_by_hand():
    ranking = Ranking((1, 2))
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 3.0, 2.0, 1.0]])  # item 0 never ranks
    ranking.add(scores, torch.tensor([3, 3]))  # ranks 2 and 3
    found = ranking.result()
    assert found["hit@1"] == 0
    assert found["hit@2"] == 0.5
    assert found["ndcg@2"] == pytest.approx(0.5 / math.log2(3))
    assert found["mrr@2"] == pytest.approx(0.25)


def test_metrics_without_samples():
    with pytest.raises(ValueError, match="no samples"):
        Ranking().result()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "user,item,timestamp\nu1,007,5\nu2,8,6\n"),
        ("a.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\t007\t3\t5\nu2\t8\t4\t6\n"),
        ("a.tsv", "user_id\titem_id\ttime\nu1\t007\t5\nu2\t8\t6\n"),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    users, items, times = read_table(tmp_path / name)
    assert users.tolist() == ["u1", "u2"]
    assert items.tolist() == ["007", "8"]  # names stay names
    assert times.tolist() == [5.0, 6.0]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"user": [1, 2], "item": [3, 4], "timestamp": [5, 6]}), tmp_path / "a.parquet")
    users, items, times = read_table(tmp_path / "a.parquet")
    assert (users.tolist(), items.tolist(), times.tolist()) == (["1", "2"], ["3", "4"], [5.0, 6.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,thing,timestamp\na,b,1\n", "no column 'item_id' or 'item'"),
        ("user,item,timestamp\na,b,1\na,c,soon\n", "line 3: the timestamp is 'soon'; expected a number of seconds"),
        ("user,item,timestamp\na,,1\n", "line 2"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.csv")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "none.csv")
