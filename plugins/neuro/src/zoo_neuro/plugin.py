"""The hooks of the neuro plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_neuro")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "eegdm": "zoo_neuro.eegdm.reference:EEGDMAdapter",
        "tactile_ead": "zoo_neuro.tactile.reference:TactileAdapter",
    }
