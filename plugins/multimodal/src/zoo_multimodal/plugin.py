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


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "interleaved-generation": "zoo_multimodal.interleaved:Interleaved",
        "image-text-to-text": "zoo_multimodal.image_text:ImageTextToText",
        "emotion-recognition-in-conversation": "zoo_multimodal.emotion:EmotionRecognition",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "interleaved-generation": "zoo_multimodal.interleaved:validate_documents",
        "image-text-to-text": "zoo_multimodal.mmmamba_validation:validate_conversations",
        "emotion-recognition-in-conversation": "zoo_multimodal.emotion:validate_dialogues",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "ask": "zoo_multimodal.commands_mmmamba:ask",
        "distill": "zoo_multimodal.commands_mmmamba:distill",
        "train-interleaved": "zoo_multimodal.commands_mixture:train_interleaved",
        "predict-emotions": "zoo_multimodal.commands_emotion:predict_emotions",
        "train-emotions": "zoo_multimodal.commands_emotion:train_emotions",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "mmmamba_micro.scenes", "file": "demo/scene.png"},
        {"model": "mixture_of_mamba_micro.shapes", "file": "demo/shapes/document.json"},
        {"model": "broad_mamba_micro.moods", "file": "demo/moods.npz"},
    ]
