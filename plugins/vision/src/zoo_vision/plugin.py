"""The hooks of the vision plugin: names only. Nothing here imports torch, timm or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_vision")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "vim": "zoo_vision.vim_reference:VimAdapter",
        "mambaout": "zoo_vision.mambaout:MambaOutAdapter",
        "efficientvim": "zoo_vision.efficientvim:EfficientViMAdapter",
        "vmamba": "zoo_vision.vmamba:VMambaAdapter",
        "res_vmamba": "zoo_vision.res_vmamba:ResVMambaAdapter",
        "a2mamba": "zoo_vision.a2mamba_reference:A2MambaAdapter",
        "mambavision": "zoo_vision.mambavision:MambaVisionAdapter",
        "upernet": "zoo_vision.segmentation:UPerNetAdapter",
        "detector": "zoo_vision.detection.reference:DetectorAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "image-classification": "zoo_vision.pipelines:ImageClassification",
        "image-embedding": "zoo_vision.pipelines:ImageEmbedding",
        "image-backbone": "zoo_vision.features:ImageFeatures",
        "semantic-segmentation": "zoo_vision.scenes:SemanticSegmentation",
        "object-detection": "zoo_vision.objects:ObjectDetection",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "image-classification": "zoo_vision.validation:validate_folder",
        "object-detection": "zoo_vision.validation:validate_coco",
        "semantic-segmentation": "zoo_vision.labelled_scenes:validate_scenes",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "classify": "zoo_vision.commands:classify",
        "embed-images": "zoo_vision.commands:embed_images",
        "segment-images": "zoo_vision.commands:segment_images",
        "detect": "zoo_vision.commands:detect",
        "train-classifier": "zoo_vision.commands_training:train_classifier",
        "train-segmenter": "zoo_vision.commands_training:train_segmenter",
        "train-detector": "zoo_vision.commands_training:train_detector",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "vim_micro.digits", "file": "demo/samples/digit_3.png", "picture": "yes"},
        {"model": "vim_micro.digits", "file": "demo/samples/digit_5.png"},
        {"model": "vim_micro.digits", "file": "demo/samples/digit_8.png"},
        {"model": "vmamba_micro.digits", "file": "demo/samples/digit_8.png"},
        {"model": "vmamba_micro_upernet.shapes", "file": "demo/samples/scene_0.jpg", "picture": "yes"},
        {"model": "vmamba_micro_mask_rcnn.shapes", "file": "demo/samples/objects_0.jpg", "picture": "yes"},
    ]
