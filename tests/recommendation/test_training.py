"""Training: early stopping, resuming bit by bit, evaluation."""

import copy
import math

import numpy as np
import pytest
import torch

import zoo_kernels
from zoo_recommendation import training
from zoo_recommendation.mamba4rec import Mamba4Rec
from zoo_recommendation.protocol import prepare, split
from zoo_recommendation.training import Settings, evaluate, fit, plot, train_step


def data(users=40):
    """Everyone walks a circle of 12 items: the next item follows from the last."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(users):
        start = generator.integers(12)
        rows += [(f"u{user}", f"i{(start + t) % 12}", float(t)) for t in range(8)]
    table = prepare(*zip(*rows, strict=True), core=1)
    return table, split(table, 6)


def network(n_items):
    torch.manual_seed(3)
    return Mamba4Rec(n_items=n_items, hidden_size=16, num_layers=1, max_length=6, d_state=4, dropout=0.1)


SETTINGS = Settings(epochs=4, batch_size=32, learning_rate=1e-2, patience=4, seed=5)


def test_learns_the_circle(tmp_path):
    table, (train, valid, test) = data()
    model = network(table.n_items)
    history = fit(model, train, valid, tmp_path, Settings(epochs=15, batch_size=16, learning_rate=1e-2, patience=15))
    assert history.finished
    assert evaluate(model, test, (1, 10))["hit@1"] > 0.9
    assert plot(history, tmp_path / "curve.png").stat().st_size > 5000


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path):
    table, (train, valid, _) = data()
    whole = network(table.n_items)
    fit(whole, train, valid, tmp_path / "whole", SETTINGS)

    class Killed(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(network(table.n_items), train, valid, tmp_path / "cut", SETTINGS, on_epoch=stop)
    torch.manual_seed(99)  # the new process has another random state
    again = network(table.n_items)
    history = fit(again, train, valid, tmp_path / "cut", SETTINGS)
    assert len(history.epochs) == 4
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_a_step_in_pieces_is_the_step_of_the_whole_batch(monkeypatch, loss_type):
    table, (train, _, _) = data()
    batch = train.batch(np.arange(50))
    torch.manual_seed(0)
    if loss_type == "BPR":
        batch["negative"] = torch.randint(1, table.n_items, (50,))
    first = Mamba4Rec(n_items=table.n_items, hidden_size=16, max_length=6, d_state=4, dropout=0.0, loss_type=loss_type)
    found = {}
    for rows, pieces in ((10_000, 1), (20 * 6, 3)):
        monkeypatch.setattr(training, "ROWS", rows)
        assert [len(piece["target"]) for piece in training._pieces(batch)] == ([50] if pieces == 1 else [17, 17, 16])
        model = copy.deepcopy(first)
        loss = train_step(model, torch.optim.SGD(model.parameters(), 1.0), batch)
        found[pieces] = loss, dict(model.named_parameters())
    (whole, want), (loss, got) = found[1], found[3]
    assert loss == pytest.approx(whole, rel=1e-6)
    for name, before in first.named_parameters():
        moved, expected = (weights[name].detach() - before.detach() for weights in (got, want))
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()), msg=name)
    with zoo_kernels.backend("reference"):
        assert len(list(training._pieces(batch))) == 1


def test_other_settings_are_refused(tmp_path):
    table, (train, valid, _) = data(10)
    fit(network(table.n_items), train, valid, tmp_path, Settings(epochs=1, batch_size=32))
    with pytest.raises(ValueError, match="other settings \\(batch_size\\)"):
        fit(network(table.n_items), train, valid, tmp_path, Settings(epochs=1, batch_size=64))


@pytest.mark.parametrize(
    "setting",
    [{"epochs": 0}, {"batch_size": 0}, {"patience": -1}, {"learning_rate": -1.0}, {"learning_rate": math.inf}],
)
def test_settings_that_train_nothing(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        Settings(**setting)


def test_early_stopping_keeps_the_best(tmp_path):
    table, (train, valid, _) = data(10)
    model = network(table.n_items)
    history = fit(model, train, valid, tmp_path, Settings(epochs=50, batch_size=64, learning_rate=0.0, patience=2))
    assert len(history.epochs) == 3  # nothing is learnt: the first epoch stays the best
    assert history.best_epoch == 1


def test_a_broken_loss_ends_the_run(tmp_path):
    table, (train, valid, _) = data(10)
    model = network(table.n_items)
    with torch.no_grad():
        model.item_embedding.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not a number"):
        fit(model, train, valid, tmp_path, Settings(epochs=1))


@pytest.mark.parametrize("changed", [{"dropout": 0.5}, {"loss_type": "BPR"}])
def test_a_run_does_not_go_on_with_another_model(tmp_path, changed):
    """Neither shows in the shapes of the weights."""
    table, (train, valid, _) = data(10)
    arguments = {"n_items": table.n_items, "hidden_size": 16, "max_length": 6, "d_state": 4, "dropout": 0.1}
    fit(Mamba4Rec(**arguments), train, valid, tmp_path, Settings(epochs=1, batch_size=32))
    with pytest.raises(ValueError, match=f"other settings \\({next(iter(changed))}\\)"):
        fit(Mamba4Rec(**arguments | changed), train, valid, tmp_path, Settings(epochs=2, batch_size=32))
    assert len(fit(Mamba4Rec(**arguments), train, valid, tmp_path, Settings(epochs=2, batch_size=32)).epochs) == 2


def test_weights_that_broke_in_the_last_step_are_not_ranked(tmp_path):
    """Such a model had figures, and was kept as the best."""
    table, (train, valid, _) = data(10)
    settings = Settings(epochs=1, batch_size=10_000, learning_rate=1e20)
    with pytest.raises(ValueError, match="scores are not numbers"):
        fit(network(table.n_items), train, valid, tmp_path, settings)
    assert not (tmp_path / "best.safetensors").exists()


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    table, (train, valid, _) = data(10)
    model = network(table.n_items)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit(model, train, valid, tmp_path, Settings(epochs=1, batch_size=32))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_takes_large_catalogues_in_parts(monkeypatch):
    """4096 rows of scores over a million items are 16 GB; the figures do not depend on how many there are at a time."""
    from zoo_recommendation.protocol import at_once

    assert (at_once(4096, 3417), at_once(4096, 1_000_000), at_once(4096, 1 << 40)) == (4096, 67, 1)
    table, (_, valid, _) = data(30)
    model = network(table.n_items)
    whole = evaluate(model, valid)
    monkeypatch.setattr(training, "at_once", lambda most, n_items: 7)
    assert evaluate(model, valid) == pytest.approx(whole, rel=1e-12)
