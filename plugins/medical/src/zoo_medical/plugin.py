"""The hooks of the medical plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_medical")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "mambamim": "zoo_medical.mambamim_reference:MambaMIMAdapter",
        "segmamba": "zoo_medical.segmamba:SegMambaAdapter",
        "swin_umamba": "zoo_medical.swin_umamba:SwinUMambaAdapter",
        "umamba": "zoo_medical.umamba_reference:UMambaAdapter",
        "vm_unet": "zoo_medical.vm_unet:VMUNetAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "masked-pretraining": "zoo_medical.rebuilding:VolumeRebuilding",
        "medical-segmentation": "zoo_medical.pipelines:MedicalSegmentation",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {"medical-segmentation": "zoo_medical.validation:validate_cases"}


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "segment-volume": "zoo_medical.commands:segment_volume",
        "pretrain-volumes": "zoo_medical.commands_pretraining:pretrain_volumes",
        "train-volumes": "zoo_medical.commands_training:train_volumes",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [{"model": "umamba_micro.phantoms", "file": "demo/samples/phantom_0.nii.gz", "picture": "yes"}]
