"""The hooks of the restoration plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_restoration")


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "image-restoration": "zoo_restoration.pipelines:ImageRestoration",
        "super-resolution": "zoo_restoration.pipelines:SuperResolution",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "image-restoration": "zoo_restoration.validation:validate_images",
        "super-resolution": "zoo_restoration.validation:validate_images",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "restore": "zoo_restoration.commands:restore",
        "train-restorer": "zoo_restoration.commands:train_restorer",
        "upscale": "zoo_restoration.commands:upscale",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "serpent_micro.drawings", "file": "demo/noisy.png", "picture": "yes"},
        {"model": "contrast_micro.drawings", "file": "demo/small.png", "picture": "yes"},
    ]
