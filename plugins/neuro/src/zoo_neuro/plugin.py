"""The hooks of the neuro plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

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


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "eeg-classification": "zoo_neuro.eegdm.pipelines:EEGClassification",
        "eeg-generation": "zoo_neuro.eegdm.pipelines:EEGGeneration",
        "touch-classification": "zoo_neuro.tactile.pipelines:TouchClassification",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "eeg-classification": "zoo_neuro.eegdm.validation:validate_folder",
        "touch-classification": "zoo_neuro.tactile.validation:validate_folder",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "classify-eeg": "zoo_neuro.eegdm.commands:classify_eeg",
        "generate-eeg": "zoo_neuro.eegdm.commands:generate_eeg",
        "pretrain-eeg": "zoo_neuro.eegdm.commands:pretrain_eeg",
        "train-eeg": "zoo_neuro.eegdm.commands:train_eeg",
        "touch-activity": "zoo_neuro.tactile.commands:touch_activity",
        "train-touch": "zoo_neuro.tactile.commands:train_touch",
        "pretrain-touch": "zoo_neuro.tactile.commands:pretrain_touch",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    touch = {"model": "tactile_micro.solids", "file": "demo/whisker_sweep.npz"}
    if find_spec("mne") is None:  # reads and filters EEG; an extra
        return [touch]
    return [{"model": "eegdm_micro.generated", "file": "demo/sample.edf"}, touch]
