"""Users as states: updates, stores, answers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import zoo
from zoo_recommendation.baselines import SASRec
from zoo_recommendation.mamba4rec import Mamba4Rec
from zoo_recommendation.protocol import prepare
from zoo_recommendation.serving import MemoryStore, Recommender, SQLiteStore, UnknownItem, write_parquet
from zoo_recommendation.tim4rec import TiM4Rec

ITEMS = ["[PAD]", *[f"i{n}" for n in range(1, 30)]]


def network(cls=Mamba4Rec, **more):
    torch.manual_seed(0)
    return cls(n_items=30, hidden_size=16, num_layers=2, max_length=6, **more).eval()


def events(users=5, length=12, seed=0):
    generator = np.random.default_rng(seed)
    return [(f"u{u}", f"i{generator.integers(1, 30)}", float(t)) for t in range(length) for u in range(users)]


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "users.sqlite")


def test_update_equals_recomputing_the_whole_history(store):
    model = network()
    recommender = Recommender(model, ITEMS, store)
    for event in events():
        recommender.update(*event)
    for user in ("u0", "u4"):
        history = torch.tensor([[recommender.item_ids[i] for u, i, _ in events() if u == user]])
        with torch.no_grad():
            expected = model.scores(model(history, torch.tensor([history.shape[1]])))[0].numpy()
        found = recommender.scores(user)
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_loaded_histories_equal_updates(store):
    model = network()
    one_by_one = Recommender(model, ITEMS)
    rows = [*events(), ("short", "i3", 0.0)]
    for event in rows:
        one_by_one.update(*event)
    at_once = Recommender(model, ITEMS, store)
    table = prepare(*zip(*rows, strict=True), core=1)
    renumbered = np.array([0, *[one_by_one.item_ids[t] for t in table.item_tokens[1:]]])
    object.__setattr__(table, "item", renumbered[table.item])
    at_once.load_histories(table, batch_size=2)
    for user in one_by_one.store.users():
        np.testing.assert_allclose(at_once.scores(user)[1:], one_by_one.scores(user)[1:], rtol=1e-4, atol=1e-5)
        at_once.update(user, "i7", 99.0)
        one_by_one.update(user, "i7", 99.0)
        np.testing.assert_allclose(at_once.scores(user)[1:], one_by_one.scores(user)[1:], rtol=1e-4, atol=1e-5)


def test_models_without_a_state_recompute():
    model = network(SASRec)
    recommender = Recommender(model, ITEMS)
    for event in events():
        recommender.update(*event)
    last = torch.tensor([[recommender.item_ids[i] for u, i, _ in events() if u == "u1"][-6:]])
    with torch.no_grad():
        expected = model.scores(model(last, torch.tensor([6])))[0].numpy()
    np.testing.assert_allclose(recommender.scores("u1")[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_seen_items_are_left_out_unless_asked_for():
    recommender = Recommender(network(), ITEMS)
    for event in events(users=1):
        recommender.update(*event)
    seen = {i for _, i, _ in events(users=1)}
    answer = recommender.recommend("u0", k=100)
    assert not seen & {r.item for r in answer.items}
    assert len(answer.items) == 29 - len(seen)
    assert len(recommender.recommend("u0", k=100, exclude_seen=False).items) == 29
    scores = [r.score for r in answer.items]
    assert scores == sorted(scores, reverse=True)


def test_cold_users_get_what_is_popular():
    counts = np.zeros(30)
    counts[[5, 9]] = 10, 20
    answer = Recommender(network(), ITEMS, popularity=counts).recommend("nobody", k=2)
    assert answer.cold
    assert [r.item for r in answer.items] == ["i9", "i5"]


def test_unknown_items_change_nothing():
    recommender = Recommender(network(), ITEMS)
    recommender.update("u", "i1")
    before = recommender.scores("u")
    with pytest.raises(UnknownItem, match="item 'other' was not in the training data"):
        recommender.update("u", "other")
    np.testing.assert_array_equal(recommender.scores("u"), before)


def test_memory_store_is_a_file(tmp_path):
    recommender = Recommender(network(), ITEMS)
    for event in events():
        recommender.update(*event)
    again = Recommender(network(), ITEMS, MemoryStore.open(recommender.store.save(tmp_path / "users.safetensors")))
    assert len(again.store) == 5
    for user in again.store.users():
        np.testing.assert_array_equal(again.scores(user), recommender.scores(user))
        again.update(user, "i2")
        recommender.update(user, "i2")
        np.testing.assert_array_equal(again.scores(user), recommender.scores(user))


def test_sqlite_store_survives_closing(tmp_path):
    store = SQLiteStore(tmp_path / "users.sqlite")
    Recommender(network(), ITEMS, store).update("u", "i1", 5.0)
    store.close()
    record = SQLiteStore(tmp_path / "users.sqlite").get("u")
    assert record.items.tolist() == [1]
    assert record.times.tolist() == [5.0]


def test_a_store_of_another_model_is_refused():
    recommender = Recommender(network(), ITEMS)
    recommender.update("u", "i1")
    other = Recommender(network(d_state=8), ITEMS, recommender.store)
    with pytest.raises(ValueError, match="belongs to another model"):
        other.update("u", "i2")


def test_parquet(tmp_path):
    import pyarrow.parquet as parquet

    recommender = Recommender(network(), ITEMS)
    for event in events(users=3):
        recommender.update(*event)
    assert write_parquet(recommender.recommend_all(k=4), tmp_path / "out.parquet") == 12
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["rank"] == [1, 2, 3, 4] * 3
    assert set(table["user"]) == {"u0", "u1", "u2"}


def test_wrong_number_of_names():
    with pytest.raises(ValueError, match="3 item names for a model of 30 items"):
        Recommender(network(), ["[PAD]", "a", "b"])


def test_many_answers_are_each_ones(store):
    counts = np.arange(30)
    for cls in (Mamba4Rec, SASRec):
        recommender = Recommender(network(cls), ITEMS, MemoryStore() if cls is SASRec else store, counts)
        for event in events(users=3):
            recommender.update(*event)
        users = ["u2", "nobody", "u0", "u1"]
        for user, answer in zip(users, recommender.recommend_many(users, k=4), strict=True):
            alone = recommender.recommend(user, k=4)
            assert (answer.user, answer.cold) == (user, user == "nobody")
            assert [r.item for r in answer.items] == [r.item for r in alone.items]
            np.testing.assert_allclose([r.score for r in answer.items], [r.score for r in alone.items], rtol=1e-5)
        assert len(list(recommender.recommend_all(k=2, batch_size=2))) == 3


def test_parquet_in_pieces(tmp_path):
    import pyarrow.parquet as parquet

    recommender = Recommender(network(), ITEMS)
    for event in events(users=5):
        recommender.update(*event)
    answers = list(recommender.recommend_all(k=3))
    assert write_parquet(iter(answers), tmp_path / "out.parquet", rows=4) == 15
    file = parquet.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 4
    assert file.read().column("item").to_pylist() == [r.item for a in answers for r in a.items]
    assert write_parquet(iter([]), tmp_path / "none.parquet") == 0
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def test_two_processes_update_one_file(tmp_path):
    """A change is one transaction: what another connection wrote in between is not lost."""
    one, two = SQLiteStore(tmp_path / "users.sqlite"), SQLiteStore(tmp_path / "users.sqlite")
    first, second = Recommender(network(), ITEMS, one), Recommender(network(), ITEMS, two)
    for step in range(6):
        (first if step % 2 else second).update("u", f"i{step + 1}", step)
    assert one.get("u").items.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path):
    store = SQLiteStore(tmp_path / "users.sqlite")
    Recommender(network(), ITEMS, store).update("u", "i1", 5.0)

    def fails(records):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.change(["u"], fails)
    assert store.get("u").items.tolist() == [1]
    Recommender(network(), ITEMS, store).update("u", "i2", 6.0)  # and is not locked


def test_times_are_read_as_in_training():
    recommender = Recommender(network(SASRec), ITEMS, time_scale=(100.0, 300.0))
    recommender.update("u", "i1", 200)
    recommender.update("u", "i2", 500)
    assert recommender.store.get("u").times.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("cls", [Mamba4Rec, SASRec])
def test_many_updates_are_one_after_the_other(cls, store):
    one, many = Recommender(network(cls), ITEMS), Recommender(network(cls), ITEMS, store)
    rows = [*events(users=3), ("u1", "i2", 99.0), ("u1", "i3", 100.0), ("new", "i4", 0.0)]
    for event in rows:
        one.update(*event)
    assert many.update_many(rows, batch_size=2) == len(rows)
    for user in one.store.users():
        assert many.store.get(user).items.tolist() == one.store.get(user).items.tolist()
        np.testing.assert_allclose(many.scores(user)[1:], one.scores(user)[1:], rtol=1e-4, atol=1e-5)


def test_many_updates_with_an_unknown_item_change_nothing(store):
    recommender = Recommender(network(), ITEMS, store)
    with pytest.raises(UnknownItem, match="'other'"):
        recommender.update_many([("u", "i1", 0.0), ("u", "other", 1.0)])
    assert len(store) == 0


def test_a_users_name_is_its_text(store):
    recommender = Recommender(network(), ITEMS, store)
    recommender.update(17, "i1")
    assert not recommender.recommend("17").cold
    assert not recommender.recommend(17).cold
    with pytest.raises(ValueError, match="expected a list of names"):
        recommender.recommend_many("17")


@pytest.mark.parametrize("time", [None, float("nan"), float("inf")])
def test_models_of_times_take_no_event_without_one(store, time):
    recommender = Recommender(network(TiM4Rec, head_dim=8), ITEMS, store)
    recommender.update("u", "i1", 1_600_000_000)
    with pytest.raises(ValueError, match="user 'u', item 'i2'"):
        recommender.update_many([("u", "i3", 1_600_000_100), ("u", "i2", time)])
    assert len(store.get("u").items) == 1


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_k_is_a_whole_number(k):
    with pytest.raises(ValueError, match=f"k is {k}; expected a whole number"):
        Recommender(network(), ITEMS).recommend("u", k=k)


def test_counts_of_another_catalogue():
    with pytest.raises(ValueError, match=r"popularity has shape \(3,\); expected \(30,\)"):
        Recommender(network(), ITEMS, popularity=np.zeros(3))


def test_memory_files_of_another_kind(tmp_path):
    store = MemoryStore()
    Recommender(network(SASRec), ITEMS, store).update("without", "i1")
    Recommender(network(), ITEMS, store).update("with", "i1")
    with pytest.raises(ValueError, match="written by different models"):  # the states were dropped without a word
        store.save(tmp_path / "users.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(zoo.errors.BadFile, match=r"is no file of MemoryStore\.save"):
        MemoryStore.open(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        MemoryStore.open(tmp_path / "none.safetensors")


def test_files_that_are_no_database(tmp_path):
    (tmp_path / "text.sqlite").write_text("nothing of the kind" * 100)
    with pytest.raises(zoo.errors.BadFile, match="no file of users"):
        SQLiteStore(tmp_path / "text.sqlite")
    with pytest.raises(zoo.errors.StoreError, match="cannot be opened"):
        SQLiteStore(tmp_path / "none" / "users.sqlite")


def test_a_read_only_file_answers_and_takes_nothing(tmp_path, monkeypatch):
    store = SQLiteStore(tmp_path / "users.sqlite")
    Recommender(network(), ITEMS, store).update("u", "i1", 5.0)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(zoo.errors.StoreError, match="holds updates that must first be written"):
        SQLiteStore(tmp_path / "users.sqlite")
    store.close()
    recommender = Recommender(network(), ITEMS, SQLiteStore(tmp_path / "users.sqlite"))
    assert not recommender.recommend("u").cold
    with pytest.raises(zoo.errors.StoreError, match="cannot be changed"):
        recommender.update("u", "i2")


def test_parquet_in_a_new_folder(tmp_path):
    recommender = Recommender(network(), ITEMS)
    recommender.update("u", "i1")
    assert write_parquet(recommender.recommend_all(k=4), tmp_path / "new" / "out.parquet") == 4

    def fails():
        yield recommender.recommend("u", k=2)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_parquet(fails(), tmp_path / "new" / "half.parquet", rows=1)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out.parquet"]


def test_threads_share_a_store_in_memory():
    """Two that read a user at once, and wrote back one event each, lost one of them."""
    recommender = Recommender(network(), ITEMS)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: recommender.update("u", f"i{n % 29 + 1}"), range(80)))
    assert len(recommender.store.get("u").items) == 80
