"""Measuring models on labelled graphs, and on links: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zoo.files import refused
from zoo.validation import Measured
from zoo_registry import errors

from .files import Graph, read_graphs
from .links import LEAST, held_out, measure
from .pipelines import GraphPredictions, LinkPrediction
from .training import answers, check_targets


def numbered(graphs: Sequence[Graph], names: Sequence[str] | None) -> list[str]:
    """Turn labels of the graphs into class numbers, in place; returns the names, by default sorted.

    Raises ValueError for graphs without labels and for a label that ``names`` does not hold.
    """
    if any(g.y is None for g in graphs):
        raise ValueError(
            f"the graph {next(g.name for g in graphs if g.y is None)!r} has no labels, or not for all of its nodes"
        )
    every = {str(v) for g in graphs for v in np.atleast_1d(np.asarray(g.y))}
    known = list(names) if names is not None else sorted(every, key=lambda v: (not v.lstrip("-").isdigit(), len(v), v))
    if unknown := sorted(every - set(known)):
        raise ValueError(f"there is a label {unknown[0]!r}; expected one of {', '.join(known[:20])}")
    for graph in graphs:
        graph.y = np.array([known.index(str(v)) for v in np.atleast_1d(np.asarray(graph.y))])
    return known


def validate_graphs(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 32,
    directed: bool | None = None,
    encoding: str | None = None,
) -> Measured:
    """Accuracy of the classes (and of each class), or the mean absolute error of regression.

    DATA is what `zoo predict` reads, with labels: a column label of nodes.csv, y in npz or JSON, one for each node or
    one for each graph. Labels are matched to the classes by name, to numbers where the model names none.
    """
    pipe = GraphPredictions(model, directed=directed, encoding=encoding)
    if pipe.level == "link":
        raise errors.BadArgument(
            "this measures models of nodes and graphs; zoo.validate(..., task='link-prediction') those of links",
            argument="model",
            accepted=[],
        )
    began = time.perf_counter()
    with refused(data):
        graphs = read_graphs(data, directed=pipe.directed)
        if pipe.kind == "classification":
            plain = [str(i) for i in range(len(pipe.names))]
            numbered(graphs, pipe.names if pipe.labels() is not None else plain)
        output, target = answers(model, graphs, batch_size=batch_size, encoding=pipe.encoding)
        if target is None:
            raise ValueError(f"{data}: not all graphs have numbers as targets")
        check_targets(pipe.kind, output, target)
    per_class: dict[str, dict[str, float]] = {}
    if pipe.kind == "classification":
        right = output.argmax(1) == target
        metrics = {"accuracy": float(right.float().mean())}
        for i, name in enumerate(pipe.names):
            own = target == i
            if own.any():
                per_class[name] = {"count": float(own.sum()), "accuracy": float(right[own].float().mean())}
    else:
        target = target.reshape(output.shape).float()
        if pipe.kind == "multilabel":
            known = ~torch.isnan(target)
            metrics = {"accuracy": float(((output > 0) == (target > 0.5))[known].float().mean())}
        else:
            metrics = {"mae": float((output - target).abs().mean())}
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(output),
        metrics=metrics,
        seconds=time.perf_counter() - began,
        per_class=per_class,
    )


def validate_links(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 32,
    seed: int = 0,
    directed: bool | None = None,
    encoding: str | None = None,
) -> Measured:
    """AUC, average precision and MRR of edges that are hidden from the model, among as many pairs that have no edge.

    DATA is what `zoo predict` reads; of each graph of 6 edges or more a tenth is hidden, drawn by ``seed``: with that
    of `zoo train-graphs`, the edges that were not trained on. Samples are pairs.
    """
    # How graphs are read is the pipeline's; its pairs are not, so that no table of links is read here.
    pipe = LinkPrediction(model, links=data, directed=directed, encoding=encoding)
    began = time.perf_counter()
    with refused(data):
        graphs = read_graphs(data, directed=pipe.directed)
        cases = held_out(graphs, seed)
        metrics = measure(model, cases, batch_size=batch_size, encoding=pipe.encoding)
    left = len(graphs) - len(cases)
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=sum(case.links.shape[1] for case in cases),
        metrics=metrics,
        seconds=time.perf_counter() - began,
        notes=f"{left} graphs of fewer than {LEAST} edges left out" if left else "",
    )
