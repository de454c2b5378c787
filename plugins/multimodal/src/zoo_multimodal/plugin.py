"""The hooks of the multimodal plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_multimodal")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "mixture_of_mamba": "zoo_multimodal.mixture_of_mamba:MixtureOfMambaAdapter",
        "mmmamba": "zoo_multimodal.mmmamba_formats:MmMambaAdapter",
    }
