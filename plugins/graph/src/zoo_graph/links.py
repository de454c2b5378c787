"""Predicting links: edges of a graph are hidden, and to be told from pairs of nodes that have none.

Train and test edges, negative pairs and figures are the usual ones (Kipf and Welling, arXiv 1611.07308, and
torch_geometric's RandomLinkSplit): hidden edges are removed from what the model sees, and as many pairs without an edge
are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run, seeded
from zoo.training import Fitted, Settings, Shuffled
from zoo.training import fit as optimise

from .batching import join
from .files import Graph
from .training import settings_for

#: A graph of fewer edges has none to spare.
LEAST = 6
#: Share of the edges that is hidden in a step of training, and in a measure.
SHOWN, SHARE = 0.2, 0.1


@dataclass
class Case:
    """What a model sees of a graph; ``links`` (2, pairs): the hidden edges, then as many pairs without an edge."""

    graph: Graph
    links: np.ndarray

    @property
    def target(self) -> np.ndarray:
        """(pairs,) float32, 1 for an edge."""
        return np.repeat(np.array([1, 0], np.float32), self.links.shape[1] // 2)


def edges_of(graph: Graph) -> np.ndarray:
    """The pair of nodes of each edge as one number, whatever its direction; -1 for an edge from a node to itself."""
    low, high = np.sort(graph.edge_index, axis=0)
    return np.where(low == high, -1, low * len(graph.nodes) + high)


def usable(graphs: Sequence[Graph]) -> list[Graph]:
    """Those with :data:`LEAST` edges or more. Raises ValueError where there are none."""
    found = [graph for graph in graphs if len(np.setdiff1d(edges_of(graph), [-1])) >= LEAST]
    if not found:
        raise ValueError(f"no graph has {LEAST} edges or more; links are learnt from edges that are hidden")
    return found


def hide(graph: Graph, share: float, draw: np.random.Generator, whole: Graph | None = None) -> Case:
    """A ``share`` of the edges (one at least, not all) out of sight. Pairs without an edge have none in ``whole``
    either, of which ``graph`` is a part. Raises ValueError for a graph where nearly all pairs have an edge."""
    own = edges_of(graph)
    every = np.setdiff1d(own, [-1])
    count = min(max(round(share * len(every)), 1), len(every) - 1)
    gone = draw.permutation(every)[:count]
    kept = ~np.isin(own, gone)
    attributes = None if graph.edge_attr is None else graph.edge_attr[kept]
    rest = replace(graph, edge_index=graph.edge_index[:, kept], edge_attr=attributes)
    known = every if whole is None else edges_of(whole)
    nodes = len(graph.nodes)
    none = np.empty(0, np.int64)
    for _ in range(100):
        pairs = np.sort(draw.integers(0, nodes, (2, 2 * count)), axis=0)
        keys = pairs[0] * nodes + pairs[1]
        none = np.unique(np.r_[none, keys[(pairs[0] != pairs[1]) & ~np.isin(keys, known)]])
        if len(none) >= count:
            keys = np.r_[gone, draw.permutation(none)[:count]]
            return Case(rest, np.stack(np.divmod(keys, nodes)))
    raise ValueError(f"the graph {graph.name!r}: nearly all pairs of its {nodes} nodes have an edge")


def held_out(graphs: Sequence[Graph], seed: int) -> list[Case]:
    """What a model is measured by: of each graph the same edges whenever ``seed`` is the same."""
    return [hide(g, SHARE, np.random.default_rng((seed % 2**63, i))) for i, g in enumerate(usable(graphs))]


def _joined(cases: Sequence[Case], more: dict[str, Any]) -> dict[str, Any]:
    batch = join([case.graph for case in cases], **more)
    starts = np.cumsum([0] + [len(case.graph.nodes) for case in cases[:-1]])
    links = np.concatenate([case.links + start for case, start in zip(cases, starts, strict=True)], axis=1)
    return batch.inputs() | {"links": torch.from_numpy(links)}


def _reading(model: nn.Module, encoding: str | None) -> dict[str, Any]:
    return {**settings_for(model), "encoding": encoding, "encoding_size": int(getattr(model, "pe_dim", 0))}


def fit_links(
    model: nn.Module,
    graphs: Sequence[Graph],
    valid: Sequence[Case],
    settings: Settings,
    *,
    batch_size: int = 32,
    encoding: str | None = None,
    report: Callable[[int, float], None] | None = None,
    score_every: int = 0,
    run: Run | None = None,
) -> Fitted:
    """Train a link model with one output in place: in every step a fifth of the edges of ``batch_size`` graphs is
    hidden and told from other pairs. It ends with the weights that had the best average precision on ``valid``.

    Raises ValueError for another model, and as :func:`usable` and :func:`hide`.
    """
    if getattr(model, "level", "") != "link" or model.out_dim != 1:
        raise ValueError("links are predicted by a model with level 'link' and out_dim 1")
    graphs, more = usable(graphs), _reading(model, encoding)
    order = Shuffled(len(graphs), min(batch_size, len(graphs)), settings.seed)

    def batch(index: int) -> dict[str, Any]:
        draw = order.random(index)
        cases = [hide(graphs[i], SHOWN, draw) for i in order(index)]
        target = torch.from_numpy(np.concatenate([case.target for case in cases]))
        return {"inputs": _joined(cases, more), "target": target}

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(**batch["inputs"])[:, 0].float(), batch["target"])

    def score(model: nn.Module) -> float:
        return measure(model, valid, batch_size=batch_size, encoding=encoding)["average precision"]

    return optimise(model, batch, loss, settings, run=run, report=report, score=score, score_every=score_every)


@torch.no_grad()
def measure(
    model: nn.Module, cases: Sequence[Case], *, batch_size: int = 32, encoding: str | None = None, seed: int = 0
) -> dict[str, float]:
    """AUC and average precision over all pairs, and MRR: the mean of 1 / the place of each hidden edge among the pairs
    of its graph that have none (of equals, the middle). Orders that are drawn at random follow ``seed``."""
    model.eval()
    device, more = next(model.parameters()).device, _reading(model, encoding)
    edges, others, places = [], [], []
    with seeded(seed, device):
        for first in range(0, len(cases), batch_size):
            some = cases[first : first + batch_size]
            inputs = {k: v if v is None else v.to(device) for k, v in _joined(some, more).items()}
            values = model(**inputs)[:, 0].double().cpu().numpy()
            for own in np.split(values, np.cumsum([case.links.shape[1] for case in some])[:-1]):
                edge, other = np.split(own, 2)
                edges.append(edge)
                others.append(other)
                places.append(1 / (1 + _above(edge, other)))
    edge, other = np.concatenate(edges), np.concatenate(others)
    if not np.isfinite(np.r_[edge, other]).all():
        raise ValueError("the model's scores are not finite: its weights are broken, or overflow")
    at_least = np.searchsorted(np.sort(-edge), -edge, side="right")  # edges with this score or a higher one
    wrong = np.searchsorted(np.sort(-other), -edge, side="right")
    return {
        "AUC": 1 - float(_above(edge, other).mean()) / len(other),
        "average precision": float((at_least / (at_least + wrong)).mean()),
        "MRR": float(np.concatenate(places).mean()),
    }


def _above(edge: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many of ``other`` are above each of ``edge``, equals counted as a half."""
    ordered = np.sort(other)
    below, not_above = (np.searchsorted(ordered, edge, side=side) for side in ("left", "right"))
    return len(ordered) - (below + not_above) / 2


def settings_of(
    count: int, *, epochs: int, batch_size: int, rate: float, warmup_epochs: int, seed: int
) -> tuple[Settings, int]:
    """The published settings (see :mod:`.training`) in steps, and how many steps an epoch of ``count`` graphs has."""
    a_pass = math.ceil(count / batch_size)
    kind = {"rate": rate, "weight_decay": 0.01, "warmup": warmup_epochs * a_pass, "seed": seed}
    return Settings(steps=epochs * a_pass, final=0.0, **kind), a_pass  # type: ignore[arg-type]
