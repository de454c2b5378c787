"""The hooks of the rl plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_rl")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "decision_mamba": "zoo_rl.decision_mamba:DecisionMambaAdapter",
        "s5_rl": "zoo_rl.s5_rl:S5RLAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {"policy": "zoo_rl.pipelines:Policy"}


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"policy": "zoo_rl.validation:validate_trajectories"}


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {"act": "zoo_rl.commands:act", "play": "zoo_rl.commands:play"}


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "s5_micro.repeat_previous", "file": "demo/repeat_previous.npz"},
        {"model": "decision_mamba_micro.glide", "file": "demo/glide.npz"},
    ]
