"""A trained forecaster as a folder.

::

    model/         what zoo.save wrote, the scaler in its config.json: zoo.load, zoo forecast and zoo validate read it
    history.json   every epoch, results.json: errors on the test rows, curve.png: the learning curve
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import zoo
from zoo.files import whole
from zoo_registry import WeightsCard

from ._base import Forecaster
from .protocol import Scaler
from .training import History, plot


def save(
    folder: str | Path,
    model: Forecaster,
    scaler: Scaler,
    history: History,
    scores: Mapping[str, Mapping[str, float]],
    data: str,
) -> Path:
    """Write ``folder``; ``scores``: errors on the test rows by name ("model" is the model's), ``data``: the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # What a weights card is to published weights: how the columns were scaled travels with the file.
    model.zoo_info.weights = WeightsCard(tag="own", where=f"trained on {data}", preprocess={"scaler": scaler.to_dict()})
    model.zoo_info.tag = None
    source = "measured by zoo train-forecaster"
    metrics = [
        {"name": key, "value": scores["model"][key], "dataset": data, "split": "test", "source": source}
        for key in ("mse", "mae")
    ]
    zoo.save(model, folder / "model", metrics=metrics)
    for name, content in (("history.json", asdict(history)), ("results.json", dict(scores))):
        with whole(folder / name) as work:
            work.write_text(json.dumps(content, indent=1), encoding="utf-8")
    plot(history, folder / "curve.png")
    return folder
