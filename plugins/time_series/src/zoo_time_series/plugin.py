"""The hooks of the time series plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_time_series")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "spacetime": "zoo_time_series.spacetime_reference:SpaceTimeAdapter",
        "mambamixer": "zoo_time_series.tsm2:MambaMixerAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {"forecasting": "zoo_time_series.pipelines:Forecasting"}


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"forecasting": "zoo_time_series.validation:validate_table"}


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "forecast": "zoo_time_series.commands:forecast",
        "train-forecaster": "zoo_time_series.commands:train_forecaster",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [{"model": "tsm2_micro.series", "file": "demo/samples/demand.csv", "picture": "yes"}]
