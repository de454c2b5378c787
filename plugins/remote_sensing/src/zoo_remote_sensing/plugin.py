"""The hooks of the remote sensing plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_remote_sensing")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "changemamba": "zoo_remote_sensing.changemamba_reference:ChangeMambaAdapter",
        "mamba_fcs": "zoo_remote_sensing.mamba_fcs_reference:MambaFCSAdapter",
        "rsmamba": "zoo_remote_sensing.rsmamba_reference:RSMambaAdapter",
        "morpmamba": "zoo_remote_sensing.morpmamba_reference:MorpMambaAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "binary-change-detection": "zoo_remote_sensing.pipelines:ChangeDetection",
        "semantic-change-detection": "zoo_remote_sensing.pipelines:SemanticChangeDetection",
        "damage-assessment": "zoo_remote_sensing.pipelines:DamageAssessment",
        "pixel-classification": "zoo_remote_sensing.hyperspectral:PixelClassification",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "binary-change-detection": "zoo_remote_sensing.validation:validate_binary",
        "semantic-change-detection": "zoo_remote_sensing.validation:validate_semantic",
        "damage-assessment": "zoo_remote_sensing.validation:validate_damage",
        "pixel-classification": "zoo_remote_sensing.validation:validate_pixels",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "change": "zoo_remote_sensing.commands:change",
        "map-pixels": "zoo_remote_sensing.commands:map_pixels",
        "train-change": "zoo_remote_sensing.commands_training:train_change",
        "train-pixels": "zoo_remote_sensing.commands_training:train_pixels",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {
            "model": "changemamba_micro.scenes",
            "file": "demo/samples/scene_0_before.jpg; demo/samples/scene_0_after.jpg",
            "picture": "yes",
        },
        {
            "model": "changemamba_micro.scenes",
            "file": "demo/samples/scene_1_before.jpg; demo/samples/scene_1_after.jpg",
        },
    ]
