"""The hooks of the language plugin: names only. Nothing here imports torch, transformers or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_language")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "bdh": "zoo_language.bdh:BDHAdapter",
        "birdie": "zoo_language.birdie:BirdieAdapter",
        "bmojo": "zoo_language.bmojo_lm:BMojoAdapter",
        "hax": "zoo_language.hax:HaxAdapter",
        "icll": "zoo_language.icll:ICLLAdapter",
        "mamba": "zoo_language.mamba_formats:MambaAdapter",
        "mamba2": "zoo_language.mamba_formats:Mamba2Adapter",
        "mamba3": "zoo_language.mamba_formats:Mamba3Adapter",
        "phi_mamba": "zoo_language.phi_mamba_formats:PhiMambaAdapter",
        "sambay": "zoo_language.sambay_formats:SambaYAdapter",
        "stree": "zoo_language.stree:STreeAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {"text-generation": "zoo_language.pipelines:TextGeneration"}


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"text-generation": "zoo_language.validation:validate_texts"}


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "generate": "zoo_language.commands:generate",
        "score": "zoo_language.commands:score",
        "chat": "zoo_language.commands:chat",
        "train-language": "zoo_language.commands_training:train_language",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [{"model": "mamba2_micro", "file": "examples/prompt.txt"}]
