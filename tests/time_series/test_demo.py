"""The demo forecaster answers from a real file, better than the baselines, and its card's figures hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from recipes import recipe

import zoo
import zoo_time_series
from zoo_time_series.baselines import last_value, seasonal_naive
from zoo_time_series.reading import read_table

SAMPLES = Path(zoo_time_series.__file__).parent / "demo" / "samples"


def test_forecasts_a_sample():
    """demand_next.csv is what followed demand.csv; neither was trained on."""
    result = zoo.pipeline("tsm2_micro.series")(SAMPLES / "demand.csv")
    truth = read_table(SAMPLES / "demand_next.csv")
    assert result.columns == truth.columns
    assert result.dates[0] == "2024-01-11 00:00"
    assert result.notes == []
    past = torch.from_numpy(read_table(SAMPLES / "demand.csv").last(192).values)[None]
    scale = past[0].std(0).numpy()

    def error(values):
        return float(np.square((np.asarray(values) - truth.values) / scale).mean())

    found = error(result.values)
    assert found < 0.5 * error(last_value(past, 48)[0])
    assert found < error(seasonal_naive(past, 48)[0])


def test_the_cards_figures_hold():
    """The recipe's series are generated from seeds, so its errors can be taken again: here of a part of them."""
    trained = recipe("time_series", "train_series")
    model = zoo.load("tsm2_micro.series").float()
    train = torch.from_numpy(trained.series.tables(40, trained.LENGTH, trained.COLUMNS, seed=1))
    found = trained.measure(model, train, count=60)
    card = {metric.name: metric.value for metric in zoo.info("tsm2_micro.series").weights.metrics}
    together = found["model, four columns together"]
    assert together["mse"] < found["last season"]["mse"] < found["last value"]["mse"]
    assert together["mse"] < found["linear"]["mse"]
    assert together["mae"] == pytest.approx(card["MAE"], rel=0.25)  # 120 windows of the card's 1000
