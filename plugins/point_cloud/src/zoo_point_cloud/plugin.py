"""The hooks of the point-cloud plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_point_cloud")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {
        "pcm": "zoo_point_cloud.pcm_reference:PCMAdapter",
        "pointmamba": "zoo_point_cloud.pointmamba_reference:PointMambaAdapter",
        "occmamba": "zoo_point_cloud.occmamba_reference:OccMambaAdapter",
    }


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "point-cloud-classification": "zoo_point_cloud.pipelines:CloudClassification",
        "point-cloud-pretraining": "zoo_point_cloud.rebuilding:CloudRebuilding",
        "point-cloud-segmentation": "zoo_point_cloud.pipelines:CloudSegmentation",
        "occupancy-prediction": "zoo_point_cloud.occupancy_pipeline:OccupancyPrediction",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    return {
        "point-cloud-classification": "zoo_point_cloud.validation:validate_classes",
        "point-cloud-segmentation": "zoo_point_cloud.validation:validate_points",
    }


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "label-points": "zoo_point_cloud.commands:label_points",
        "pretrain-points": "zoo_point_cloud.commands:pretrain_points",
        "train-points": "zoo_point_cloud.commands_training:train_points",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "pcm_micro.shapes", "file": "demo/samples/chair.ply", "picture": "yes"},
        {"model": "pcm_micro_parts.shapes", "file": "demo/samples/chair.ply", "picture": "yes"},
    ]
