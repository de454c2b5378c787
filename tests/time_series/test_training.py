"""The Informer protocol by its numbers, training that learns, folders that load, validation that agrees."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
import zoo.testing
from zoo.runs import Run
from zoo_time_series import protocol, training
from zoo_time_series.baselines import last_value, periods, ridge, seasonal_naive
from zoo_time_series.commands import forecast, train_forecaster
from zoo_time_series.spacetime import spacetime
from zoo_time_series.tables import Table
from zoo_time_series.tsm2 import TSM2

TINY = {"seq_len": 24, "pred_len": 6, "patch_len": 8, "stride": 4, "d_model": 16, "d_state": 4, "num_layers": 1}
SMALL = {"lag": 24, "horizon": 6, "model_dim": 16, "n_kernels": 4, "kernel_dim": 6, "max_avg_window": 12}


def seasons(rows=300, columns=2, seed=0):
    random = np.random.default_rng(seed)
    t = np.arange(rows)[:, None]
    return np.sin(2 * np.pi * t / 12 + np.arange(columns)) * 3 + 10 + random.normal(size=(rows, columns)) * 0.1


def written(path, values):
    lines = ["date," + ",".join(f"c{i}" for i in range(values.shape[1]))]
    start = np.datetime64("2024-01-01T00:00:00")
    for i, row in enumerate(values):
        lines.append(f"{start + np.timedelta64(i, 'h')}," + ",".join(f"{v:.5f}" for v in row))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_borders_are_informers():
    assert protocol.borders(1000, 96) == {"train": (0, 700), "val": (604, 800), "test": (704, 1000)}
    assert protocol.borders(17420, 336, "auto", "data/ETTh1.csv") == {
        "train": (0, 8640),
        "val": (8304, 11520),
        "test": (11184, 14400),
    }
    assert protocol.borders(69680, 336, "auto", "ETTm2.csv")["test"] == (46080 - 336, 57600)
    with pytest.raises(ValueError, match="has 500 rows; the split ett-hour needs 14400"):
        protocol.borders(500, 10, "ett-hour")
    with pytest.raises(ValueError, match="split is 'thirds'"):
        protocol.borders(500, 10, "thirds")


def test_windows_and_scaler():
    values = np.stack([np.arange(100.0), np.full(100, 5.0)], axis=1)
    parts, scaler = protocol.prepare(Table(values, ["x", "constant"]), 8, 4)
    assert np.allclose(scaler.mean, [34.5, 5])
    assert np.allclose(scaler.std, [values[:70, 0].std(), 1])  # with n; a constant column is left alone
    assert [len(parts[p]) for p in protocol.PARTS] == [70 - 11, 18 - 11, 28 - 11]
    history, target = parts["test"].take(torch.tensor([0, 16]))
    raw = history[..., 0] * scaler.std[0] + scaler.mean[0]
    assert torch.allclose(raw[0].float(), torch.arange(72.0, 80))
    assert torch.allclose(
        (target[1, :, 0] * scaler.std[0] + scaler.mean[0]).float(), torch.arange(96.0, 100), atol=1e-4
    )
    apart = protocol.Windows(parts["train"].values, 8, 4, apart=True)
    assert len(apart) == 2 * 59
    history, target = apart.take(torch.tensor([1]))
    assert history.shape == (1, 8, 1)
    assert (history == 0).all()  # the second column of the first window
    seen = [h for h, _ in parts["train"].batches(10, torch.Generator().manual_seed(0))]
    assert sum(len(h) for h in seen) == 59
    assert len(torch.cat(seen)[:, 0, 0].unique()) == 59
    with pytest.raises(ValueError, match="need 41 there"):
        protocol.prepare(Table(values, ["x", "y"]), 30, 11)


def test_errors_and_baselines():
    values = torch.from_numpy(seasons(100)).float()
    windows = protocol.Windows(values, 48, 6)
    found = training.baselines(windows)
    assert found["last season"]["mse"] < 0.1 < found["last value"]["mse"]
    x, y = windows.take(torch.arange(len(windows)))
    gap = (last_value(x, 6) - y).double()
    assert found["last value"]["mse"] == pytest.approx(float(gap.square().mean()))
    assert found["last value"]["mae"] == pytest.approx(float(gap.abs().mean()))
    assert (periods(x) == 12).all()
    assert torch.equal(seasonal_naive(x, 30, period=12)[:, 12:24], seasonal_naive(x, 30, period=12)[:, :12])
    with pytest.raises(ValueError, match="period is 99"):
        seasonal_naive(x, 6, period=99)
    assert (periods(torch.ones(1, 20, 1)) == 1).all()
    line = torch.arange(30.0)[None, :, None]  # an exactly linear series is forecast by a linear map
    many = torch.cat([line * s + o for s in (0.5, 1.0, 2.0) for o in (0.0, 5.0, -3.0)])
    assert torch.allclose(ridge(many[:, :24], many[:, 24:], many[:, :24], 1e-6), many[:, 24:], atol=0.05)


@pytest.mark.parametrize("model", ["spacetime", "tsm2"])
def test_training_learns(model):
    torch.manual_seed(0)
    network = spacetime(**SMALL, dropout=0.0) if model == "spacetime" else TSM2(**TINY, dropout=0.0)
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6, apart=network.columns == 1)
    before = training.evaluate(network, parts["val"])
    rows = []
    settings = training.Settings(epochs=5, learning_rate=5e-3, batch_size=20)
    history = training.fit(network, parts["train"], parts["val"], settings, on_epoch=rows.append)
    after = training.evaluate(network, parts["val"])
    assert len(rows) == len(history.epochs) == 5
    assert after["mse"] < 0.3 * before["mse"]
    assert after["mse"] == pytest.approx(min(row["val_mse"] for row in rows))  # the best epoch's weights
    assert not network.training


def test_early_stopping_and_open_loop_epochs(monkeypatch):
    network = spacetime(**SMALL)
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6, apart=True)
    asked, scores = [], iter([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(type(network), "loss", lambda self, s, t, w: asked.append(tuple(w)) or self(s).square().mean())
    monkeypatch.setattr(training, "evaluate", lambda *_: dict.fromkeys(("mse", "mae", "rmse"), next(scores)))
    settings = training.Settings(epochs=9, patience=2, steps=1)
    history = training.fit(network, parts["train"], parts["val"], settings)
    assert len(history.epochs) == 3
    assert history.best_epoch == 1
    assert asked == [(1, 1, 1), (1, 0, 0), (1, 0, 0)]  # as the original: its first validation ends them


def test_settings_that_are_refused():
    for name, value in (("epochs", 0), ("batch_size", 0), ("patience", 0), ("steps", 0), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=name):
            training.Settings(**{name: value})


def test_a_loss_that_is_no_number_is_said():
    network = TSM2(**TINY)
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6)
    network.head.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1"):
        training.fit(network, parts["train"], parts["val"], training.Settings(epochs=1))


@pytest.mark.parametrize(("model", "more"), [
    ("spacetime", ["model_dim=16", "n_kernels=4", "kernel_dim=6", "max_avg_window=12"]),
    ("tsm2", ["patch_len=8", "stride=4", "d_model=8", "num_layers=1"]),
    ("spacetime_ett_m_720", ["model_dim=32", "n_kernels=4", "kernel_dim=6", "max_avg_window=12"]),
])  # fmt: skip
def test_from_table_to_folder_to_figures(tmp_path, monkeypatch, model, more):
    """train-forecaster, then the same figures from zoo validate on its folder, and a forecast on the trained scale."""
    monkeypatch.chdir(tmp_path)
    values = written(tmp_path / "t.csv", seasons())
    options = [x for setting in more for x in ("--set", setting)]
    options += ["--lag", "24", "--horizon", "6", "--epochs", "2", "--steps", "5", "--out", "run", "--json"]
    done = CliRunner().invoke(train_forecaster, [model, "t.csv", *options], catch_exceptions=False)
    assert done.exit_code == 0
    scores = json.loads(done.stdout)["test"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"model", "history.json", "results.json", "curve.png"}
    measured = zoo.validate("./run/model", values)
    assert measured.metrics["mse"] == pytest.approx(scores["model"]["mse"], rel=1e-4)
    assert measured.metrics["mae of the last season"] == pytest.approx(scores["last season"]["mae"], rel=1e-4)
    assert zoo.validate("./run/model", values, limit=7).samples == 7
    pipe = zoo.pipeline("./run/model")
    assert pipe.horizon == 6
    mean = pipe.read(values).mean
    assert np.allclose(mean, seasons()[:210].mean(0), atol=1e-4)  # the training rows', not the history's
    done = CliRunner().invoke(forecast, ["./run/model", "t.csv"], catch_exceptions=False)
    assert "6 steps to 2024-01-13 17:00" in done.output


def test_validation_of_short_tables(tmp_path):
    zoo.save(zoo.create("tsm2_96", **TINY), tmp_path / "model")
    with pytest.raises(ValueError, match="need 30"):
        zoo.validate(str(tmp_path / "model"), written(tmp_path / "t.csv", seasons(20)))
    everything = zoo.validate(str(tmp_path / "model"), written(tmp_path / "t.csv", seasons(40)), split="all")
    assert everything.samples == 40 - 30 + 1


def test_a_place_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", seasons())
    (tmp_path / "spacetime-t").write_text("a file where the default folder would be")
    done = CliRunner().invoke(train_forecaster, ["spacetime", "t.csv", "--lag", "24", "--horizon", "6"])
    assert done.exit_code == 2
    assert "'spacetime-t' is a file" in done.output
    done = CliRunner().invoke(train_forecaster, ["vim_tiny", "t.csv"])
    assert "expected a forecaster" in str(done.exception)


def test_training_leaves_the_callers_random_numbers():
    network = TSM2(**TINY)
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training.fit(network, parts["train"], parts["val"], training.Settings(epochs=1, steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_rows_that_no_patch_reads_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", seasons())
    more = [x for s in ("patch_len=8", "stride=4", "d_model=8", "num_layers=1") for x in ("--set", s)]
    options = ["tsm2", "t.csv", "--horizon", "6", "--epochs", "1", "--steps", "1", *more]
    said = CliRunner().invoke(train_forecaster, [*options, "--lag", "27", "--out", "a"], catch_exceptions=False).output
    assert "the newest 3 of 27 rows" in said
    said = CliRunner().invoke(train_forecaster, [*options, "--lag", "24", "--out", "b"], catch_exceptions=False).output
    assert "in no patch" not in said


@pytest.mark.parametrize("kind", ["spacetime", "tsm2"])
def test_a_run_goes_on(tmp_path, kind):
    """After Ctrl-C as well: the best epoch is there, and the run is kept."""
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6, apart=kind == "spacetime")

    def trained(run, report):
        torch.manual_seed(0)
        model = spacetime(**SMALL, dropout=0.1) if kind == "spacetime" else TSM2(num_variates=2, **TINY)
        settings = training.Settings(epochs=4, batch_size=20, steps=2, learning_rate=1e-2)
        history = training.fit(model, parts["train"], parts["val"], settings, on_epoch=report, run=run)
        assert [row["epoch"] for row in history.epochs] == list(range(1, len(history.epochs) + 1))
        if history.interrupted:
            assert 1 <= history.best_epoch <= 3
            raise KeyboardInterrupt
        return model

    zoo.testing.check_resume(trained, tmp_path)


def test_a_run_that_had_ended_does_not_go_further(tmp_path):
    parts, _ = protocol.prepare(Table(seasons(), ["a", "b"]), 24, 6, apart=True)
    settings = training.Settings(epochs=9, batch_size=20, steps=1, learning_rate=1e-9, patience=1)
    lengths = []
    for _ in range(2):  # the second begins with a run whose patience is at its end
        torch.manual_seed(0)
        run = Run(tmp_path / "training.run", every=0)
        lengths.append(len(training.fit(spacetime(**SMALL), parts["train"], parts["val"], settings, run=run).epochs))
    assert lengths[0] == lengths[1] < 9


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "demand.csv", seasons())
    command = ["spacetime", "demand.csv", "--lag=24", "--horizon=6", "--epochs=4", "--steps=1", "--out=run"]
    command += [f"--set={k}={v}" for k, v in SMALL.items() if k not in ("lag", "horizon")]
    monkeypatch.setattr(Run.__init__, "__kwdefaults__", {"every": 0.0, "on_resume": None})
    evaluate, calls = training.evaluate, []

    def interrupting(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setattr(training, "evaluate", interrupting)
    stopped = CliRunner().invoke(train_forecaster, command)
    assert "run holds the run up to epoch 2: the same command goes on there" in stopped.output
    assert "saved to run" in stopped.output
    again = CliRunner().invoke(train_forecaster, command)
    assert again.exit_code == 0
    assert "going on after epoch 2 of an interrupted run" in again.output
    assert "of 4; on the test rows" in again.output
    assert not (tmp_path / "run" / "training.run").exists()
