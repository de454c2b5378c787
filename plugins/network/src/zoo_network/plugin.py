"""The hooks of the network plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_network")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {"netmamba": "zoo_network.netmamba_reference:NetMambaAdapter"}


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "traffic-classification": "zoo_network.pipelines:TrafficClassification",
        "traffic-pretraining": "zoo_network.rebuilding:TrafficRebuilding",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"traffic-classification": "zoo_network.validation:validate_folder"}


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "classify-flows": "zoo_network.commands:classify_flows",
        "train-flows": "zoo_network.commands:train_flows",
        "pretrain-flows": "zoo_network.commands:pretrain_flows",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [{"model": "netmamba_micro.generated", "file": "demo/sample.pcap"}]
