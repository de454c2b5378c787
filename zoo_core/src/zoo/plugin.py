"""The hooks of the core distribution: systems that belong to no one domain. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "dsf": "zoo.systems.dsf:DSFAdapter",
        "s4": "zoo.systems.s4:S4Adapter",
        "survey_visual": "zoo.systems.survey_visual:ScanOrdersAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "language-modelling": "zoo.tasks.language_modelling:LanguageModelling",
        "sequence-classification": "zoo.tasks.sequence_classification:SequenceClassification",
    }
