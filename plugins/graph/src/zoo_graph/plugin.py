"""The hooks of the graph plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_graph")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {"gmn": "zoo_graph.graph_mamba_reference:GraphMambaAdapter"}


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "node-classification": "zoo_graph.pipelines:GraphPredictions",
        "node-regression": "zoo_graph.pipelines:NodeRegression",
        "graph-classification": "zoo_graph.pipelines:GraphClassification",
        "graph-regression": "zoo_graph.pipelines:GraphRegression",
        "link-prediction": "zoo_graph.pipelines:LinkPrediction",
    }


@hookimpl
def zoo_validators() -> Mapping[str, str]:
    tasks = ("node-classification", "node-regression", "graph-classification", "graph-regression")
    links = {"link-prediction": "zoo_graph.validation:validate_links"}
    return dict.fromkeys(tasks, "zoo_graph.validation:validate_graphs") | links


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "predict-graphs": "zoo_graph.commands:predict_graphs",
        "train-graphs": "zoo_graph.commands:train_graphs",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [{"model": "graphmamba_micro.broadcast", "file": "demo/sample"}]
