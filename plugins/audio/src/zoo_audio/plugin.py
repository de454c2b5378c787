"""The hooks of the audio plugin: names only. Nothing here imports torch, soundfile or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_audio")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {"sashimi": "zoo_audio.sashimi_reference:SashimiAdapter"}


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "speech-recognition": "zoo_audio.pipelines:SpeechRecognition",
        "audio-generation": "zoo_audio.generation:AudioGeneration",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "speech-recognition": "zoo_audio.validation:validate_speech",
        "audio-generation": "zoo_audio.validation:validate_sound",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "transcribe": "zoo_audio.commands:transcribe",
        "generate-audio": "zoo_audio.commands:generate_audio",
        "train-audio": "zoo_audio.commands_sounds:train_audio",
        "train-speech": "zoo_audio.commands_training:train_speech",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "samba_asr_micro.commands", "file": "examples/sample_1.wav", "picture": "yes"},
        {"model": "samba_asr_micro.commands", "file": "examples/sample_2.flac"},
        {"model": "samba_asr_micro.commands", "file": "examples/sample_3.ogg"},
        {"model": "sashimi_micro.plucks", "file": "examples/pluck.wav", "picture": "yes"},
    ]
