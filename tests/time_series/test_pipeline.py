"""From a file to a forecast: dates, scales, horizons, files written; and the sentences for what cannot be."""

import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo_time_series._base import Forecaster
from zoo_time_series.commands import forecast
from zoo_time_series.pipelines import Forecasting, roll_forward
from zoo_time_series.spacetime import spacetime
from zoo_time_series.tsm2 import TSM2

TINY = {"seq_len": 24, "pred_len": 6, "patch_len": 8, "stride": 4, "d_model": 16, "d_state": 4, "num_layers": 1}
SMALL = {"lag": 24, "horizon": 6, "model_dim": 16, "n_kernels": 4, "kernel_dim": 6, "max_avg_window": 12}


class LastValues(Forecaster):
    """Repeats the newest value: what a pipeline does around a model can be told from its answer."""

    lag, horizon = 8, 3

    def forward(self, series):
        return series[:, -1:].expand(-1, self.horizon, -1)


def table(path, rows=40, columns=("a", "b")):
    with open(path, "w") as file:
        file.write("date," + ",".join(columns) + "\n")
        for i in range(rows):
            file.write(
                f"2024-03-{1 + i // 24:02d} {i % 24:02d}:00:00,"
                + ",".join(str(10 * j + i) for j in range(len(columns)))
                + "\n"
            )
    return path


def test_values_come_back_in_the_tables_units(tmp_path):
    result = Forecasting(LastValues())(table(tmp_path / "t.csv"))
    assert result.columns == ["a", "b"]
    assert np.allclose(result.values, [[39, 49]] * 3)
    assert result.dates == ["2024-03-02 16:00", "2024-03-02 17:00", "2024-03-02 18:00"]
    assert "3 steps to 2024-03-02 18:00: a 39, b 49" in str(result)


def test_a_horizon_beyond_the_models(tmp_path):
    result = Forecasting(LastValues(), horizon=7)(table(tmp_path / "t.csv"))
    assert result.values.shape == (7, 2)
    assert any("reads its own forecast" in note for note in result.notes)
    assert Forecasting(LastValues(), horizon=2)(table(tmp_path / "t.csv")).values.shape == (2, 2)


def test_rolling_forward_reads_its_own_forecast():
    torch.manual_seed(0)
    model = TSM2(**TINY).eval()
    x = torch.randn(2, 24, 3)
    with torch.no_grad():
        first = model(x)
        second = model(torch.cat([x, first], 1)[:, -24:])
        assert torch.equal(roll_forward(model, x, 10), torch.cat([first, second], 1)[:, :10])
        univariate = spacetime(**SMALL).eval()
        assert torch.equal(roll_forward(univariate, x[..., :1], 10), univariate(x[..., :1], horizon=10))


@pytest.mark.parametrize("make", [lambda: TSM2(**TINY), lambda: spacetime(**SMALL, input_dim=1)], ids=["tsm2", "st"])
def test_columns_of_any_scale(tmp_path, make):
    """A column in other units has its forecast in those units."""
    torch.manual_seed(1)
    pipe = Forecasting(make())
    x = np.cumsum(np.random.default_rng(0).normal(size=(30, 2)), axis=0)
    plain, scaled = pipe(x), pipe(x * [1000.0, 1.0] + [0.0, 5e4])
    assert np.allclose(scaled.values, plain.values * [1000.0, 1.0] + [0.0, 5e4], rtol=1e-3)


def test_a_model_of_one_column_takes_each_by_itself():
    torch.manual_seed(2)
    pipe = Forecasting(spacetime(**SMALL))
    x = np.random.default_rng(1).normal(size=(30, 3))
    together = pipe(x)
    for i in range(3):
        assert np.allclose(pipe(x[:, i]).values[:, 0], together.values[:, i], atol=1e-4)


def test_constant_columns_and_short_histories():
    pipe = Forecasting(spacetime(**SMALL))
    assert np.allclose(pipe(np.full((30, 1), 7.0)).values, 7.0, atol=10)  # finite, near
    short = pipe(np.arange(10.0))
    assert "10 rows of history; SpaceTime was made for 24" in short.notes
    with pytest.raises(ValueError, match="has 1 rows; SpaceTime needs at least 2"):
        pipe(np.zeros(1))
    with pytest.raises(ValueError, match="has 20 rows; TSM2 needs at least 24"):
        Forecasting(TSM2(**TINY))(np.zeros(20))
    with pytest.raises(ValueError, match="TSM2 reads 24 rows"):
        Forecasting(TSM2(**TINY), history=30)
    assert Forecasting(spacetime(**SMALL), history=30).history == 30


def test_old_gaps_do_not_matter(tmp_path):
    """Only the rows that are read must be whole."""
    x = np.arange(40.0)
    x[3] = np.nan
    assert Forecasting(LastValues(), missing="error")(x).notes == []
    x[-2] = np.nan
    with pytest.raises(ValueError, match="1 values are missing"):
        Forecasting(LastValues(), missing="error")(x)
    assert "filled" in Forecasting(LastValues())(x).notes[0]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="horizon is 0"):
        Forecasting(LastValues(), horizon=0)
    with pytest.raises(zoo.errors.BadArgument, match="no forecaster"):
        Forecasting(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="missing is 'drop'"):
        Forecasting(LastValues(), missing="drop")
    three = Forecasting(spacetime(**{**SMALL, "model_dim": 48}, input_dim=3))
    with pytest.raises(ValueError, match=r"2 columns of numbers \(a, b\); SpaceTime forecasts 3 together"):
        three(table(tmp_path / "t.csv"))
    with pytest.raises(ValueError, match="no column 'c'"):
        Forecasting(LastValues(), columns=["c"])(table(tmp_path / "t.csv"))
    unstable = spacetime(**SMALL)
    unstable.decoder.blocks.ssm.a.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        Forecasting(unstable)(np.arange(30.0))


def test_many_files_and_pictures(tmp_path):
    table(tmp_path / "a.csv")
    table(tmp_path / "b.csv", rows=50)
    results = Forecasting(LastValues())(str(tmp_path), batch_size=2)
    assert [r.values.shape for r in results] == [(3, 2), (3, 2)]
    picture = results[0].picture()
    assert picture.size[0] > 500
    assert len(picture.getcolors(1 << 20)) > 10
    results[0].save_picture(tmp_path / "p.png")
    assert json.dumps(results[0].to_dict())
    no_dates = Forecasting(LastValues())(np.arange(20.0))
    assert no_dates.dates == ["1", "2", "3"]
    assert no_dates.picture() is not None
    assert no_dates.to_csv(tmp_path / "n.csv").read_text().splitlines()[:2] == ["step,column_1", "1,19"]


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "t.csv")
    zoo.save(zoo.create("tsm2_96", **TINY), tmp_path / "model")
    done = CliRunner().invoke(forecast, ["./model", "t.csv", "--horizon", "9", "--column", "b"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "-> t_forecast.csv, t_forecast.png" in done.output
    with open("t_forecast.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["date", "b"]
    assert len(rows) == 10
    assert rows[1][0] == "2024-03-02 16:00"
    done = CliRunner().invoke(forecast, ["./model", "t.csv", "--json", "--out", "x/y.csv"], catch_exceptions=False)
    assert json.loads(done.output)["file"] == "x/y.csv"
    assert (tmp_path / "x" / "y.png").exists()


def test_dates_follow_all_of_the_table(tmp_path):
    """The rows that are read may be even in another way than the table is: Monday to Friday, and then not Saturday."""
    days = np.busday_offset("2024-01-01", np.arange(20)).astype("datetime64[ns]")
    model = LastValues()
    model.any_length = True
    result = Forecasting(model, history=5)({"date": days, "a": np.arange(20.0)})
    assert result.dates == ["2024-01-29", "2024-01-30", "2024-01-31"]


def test_digits_of_a_small_change_on_a_large_level(tmp_path):
    result = Forecasting(LastValues())(np.arange(40.0) / 100 + 1e9)
    rows = list(csv.reader(result.to_csv(tmp_path / "f.csv").open()))
    assert float(rows[1][1]) == pytest.approx(1e9 + 0.39, abs=1e-4)


def test_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = table(tmp_path / "t.csv", rows=200).read_text()
    for options in (["--out", "t.csv"], ["--out", "x.png"], ["--picture", "t.csv"]):
        done = CliRunner().invoke(forecast, ["tsm2_micro.series", "t.csv", *options])
        assert done.exit_code == 2
        assert "would take the place of" in done.output
    assert CliRunner().invoke(forecast, ["tsm2_micro.series", str(tmp_path)]).exit_code == 2
    assert (tmp_path / "t.csv").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_no_columns_are_refused():
    with pytest.raises(ValueError, match="columns is empty"):
        Forecasting(LastValues(), columns=[])
