"""The hooks of the generation plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_generation")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "dimsum": "zoo_generation.dimsum.reference:DiMSUMAdapter",
        "unianimate": "zoo_generation.unianimate.reference:UniAnimateAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "image-generation": "zoo_generation.dimsum.pipeline:ImageGeneration",
        "human-animation": "zoo_generation.unianimate.pipeline:HumanAnimation",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "image-generation": "zoo_generation.dimsum.validation:validate_images",
        "human-animation": "zoo_generation.unianimate.validation:validate_folder",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "generate-images": "zoo_generation.dimsum.commands:generate_images",
        "train-images": "zoo_generation.dimsum.commands:train_images",
        "animate": "zoo_generation.unianimate.commands:animate",
        "train-animation": "zoo_generation.unianimate.commands:train_animation",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "dimsum_micro.shapes", "file": "demo/shapes.txt", "picture": "yes"},
        {"model": "unianimate_micro.figures", "file": "demo/figure.png; demo/figure.npz", "picture": "yes"},
    ]
