"""Next-item prediction off the path: what a history may be, times, half precision, options."""

import copy
import pickle

import pytest
import torch

import zoo
from zoo_recommendation.mamba4rec import Mamba4Rec
from zoo_recommendation.pipelines import NextItem
from zoo_recommendation.tim4rec import TiM4Rec


@pytest.fixture(scope="module")
def demo():
    return zoo.pipeline("mamba4rec_micro.serials", top_k=3)


def timed(**more):
    torch.manual_seed(0)
    return TiM4Rec(n_items=12, hidden_size=16, head_dim=8, max_length=6, **more).eval()


def test_several_histories_in_memory(demo):
    one, two = demo.names[:3], demo.names[5:9]
    both = demo([one, two])
    assert [answer.items for answer in both] == [demo(one).items, demo(two).items]
    assert demo(tuple(one)).items == demo(one).items


def test_an_unknown_name_among_known_ones_is_named(demo):
    with pytest.raises(ValueError, match="not trained on, the first: 'zzz'"):
        demo([demo.names[0], "zzz"])
    with pytest.raises(zoo.errors.BadArgument, match="an input is a NoneType"):
        demo(None)
    with pytest.raises(ValueError, match="an empty history"):
        demo(())


def test_every_item_seen(demo):
    answer = demo(list(demo.names))
    assert answer.items == []
    assert "every item" in answer.summary()
    assert zoo.pipeline("mamba4rec_micro.serials", exclude_seen=False)(list(demo.names)).items


def test_a_batch_of_histories_gives_each_its_answer(demo):
    histories = [demo.names[i : i + n] for i, n in ((0, 1), (3, 70), (9, 4), (2, 60))]
    for alone, among in zip(demo(histories), demo(histories, batch_size=4), strict=True):
        assert alone.items == among.items
        assert alone.scores == pytest.approx(among.scores, rel=1e-4)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_is_at_least_one(top_k):
    with pytest.raises(zoo.errors.BadArgument, match=f"top_k is {top_k}; expected 1 or more"):
        zoo.pipeline("mamba4rec_micro.serials", top_k=top_k)


def test_a_model_of_times_needs_them(tmp_path):
    pipe = NextItem(timed())
    (tmp_path / "a.csv").write_text("item\n1\n2\n")
    with pytest.raises(zoo.errors.BadArgument, match="reads the time of each interaction"):
        pipe(tmp_path / "a.csv")
    with pytest.raises(zoo.errors.BadArgument, match="reads the time of each interaction"):
        pipe([1, 2])


def test_times_are_scaled_as_in_training(tmp_path):
    """A model trained on scaled times reads the seconds of a file on the same scale."""
    (tmp_path / "a.csv").write_text("item,timestamp\n1,1600000000\n2,1600000900\n3,1600001000\n")
    read = []
    for scale in (None, (1_600_000_000, 1_600_001_000)):
        model = timed(time_scale=scale)
        model.register_forward_pre_hook(lambda _, args, given: read.append(given["times"].tolist()), with_kwargs=True)
        NextItem(model)(tmp_path / "a.csv")
    assert read == [[[1.6e9, 1.6e9 + 896, 1.6e9 + 1024, 0, 0, 0]], [[0, pytest.approx(0.9), 1, 0, 0, 0]]]  # float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_seconds_survive_half_precision(tmp_path, dtype):
    """1.6e9 is beyond float16: the answer was empty."""
    (tmp_path / "a.csv").write_text("item,timestamp\n1,1600000000\n2,1600900000\n3,1700000000\n")
    model = timed()
    full = NextItem(copy.deepcopy(model))(tmp_path / "a.csv")
    half = NextItem(model.to(dtype))(tmp_path / "a.csv")
    assert len(half.items) == 8
    assert dict(zip(half.items, half.scores, strict=True)) == pytest.approx(
        dict(zip(full.items, full.scores, strict=True)), abs=0.05
    )


def test_scores_that_are_not_numbers():
    model = Mamba4Rec(n_items=12, hidden_size=16, max_length=6, d_state=4)
    with torch.no_grad():
        model.item_embedding.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        NextItem(model)([1, 2])


def test_nothing_of_the_callers_is_touched(demo):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    demo(demo.names[:3])
    assert torch.equal(torch.rand(3), expected)
    again = pickle.loads(pickle.dumps(demo.model))
    assert NextItem(again, top_k=3)(demo.names[:3]).items == demo(demo.names[:3]).items
