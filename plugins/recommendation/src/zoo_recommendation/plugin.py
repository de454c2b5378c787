"""The hooks of the recommendation plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_recommendation")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "tim4rec": "zoo_recommendation.tim4rec:TiM4RecAdapter",
        "ssd4rec": "zoo_recommendation.tim4rec:SSD4RecAdapter",
        "mamba4rec": "zoo_recommendation.mamba4rec:Mamba4RecAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {"next-item": "zoo_recommendation.pipelines:NextItem"}


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"next-item": "zoo_recommendation.validation:validate_interactions"}


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "mamba4rec_micro.serials", "file": "demo/samples/history_u00071.csv"},
        {"model": "mamba4rec_micro.serials", "file": "demo/samples/history_u00762.csv"},
    ]


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "train": "zoo_recommendation.commands:train",
        "recommend": "zoo_recommendation.commands:recommend",
    }
