"""The demo recommender answers from a real file, and its card's figures hold."""

from pathlib import Path

import pytest

import zoo
import zoo_recommendation

SAMPLES = sorted((Path(zoo_recommendation.__file__).parent / "demo" / "samples").glob("*.csv"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_answers_from_a_file(path):
    answer = zoo.pipeline("mamba4rec_micro.serials", top_k=5)(path)
    seen = set(path.read_text().split())
    assert len(answer.items) == 5
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert not {item for item in answer.items if any(line.startswith(item + ",") for line in seen)}
    assert 0 < answer.confidence <= 1


def test_follows_a_serial():
    """Someone who has just watched four episodes of one serial is offered the fifth."""
    answer = zoo.pipeline("mamba4rec_micro.serials", top_k=3)(["s05e1", "s05e2", "s05e3", "s05e4"])
    assert "s05e5" in answer.items


def test_unknown_items_are_named(tmp_path):
    (tmp_path / "h.csv").write_text("item\ns05e1\nnot-there\n")
    with pytest.raises(ValueError, match="not-there"):
        zoo.pipeline("mamba4rec_micro.serials")(tmp_path / "h.csv")


def test_empty_and_foreign_files(tmp_path):
    pipe = zoo.pipeline("mamba4rec_micro.serials")
    (tmp_path / "a.csv").write_text("item,timestamp\n")
    (tmp_path / "b.csv").write_text("thing\nx\n")
    with pytest.raises(ValueError, match="empty history"):
        pipe(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no column 'item_id' or 'item'"):
        pipe(tmp_path / "b.csv")


@pytest.mark.slow
def test_the_cards_figures_hold():
    """The recipe's data are generated from a seed, so its test scores can be taken again."""
    import importlib.util

    recipe = Path(__file__).parents[2] / "plugins" / "recommendation" / "recipes" / "serials.py"
    spec = importlib.util.spec_from_file_location("serials", recipe)
    serials = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serials)
    from zoo_recommendation.protocol import prepare, split
    from zoo_recommendation.training import evaluate

    table = prepare(*serials.simulate(1000, seed=1))
    model = zoo.load("mamba4rec_micro.serials")
    found = evaluate(model, split(table, model.max_length)[2])
    for metric in zoo.info("mamba4rec_micro.serials").weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.002)
