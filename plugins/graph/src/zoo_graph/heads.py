"""What every model of this plugin begins and ends with: features in, an answer for nodes, graphs or links out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.layers import Linear

from .segments import segment_max, segment_mean, segment_sum

LEVELS = ("node", "graph", "link")
KINDS = ("classification", "multilabel", "regression")
POOLING = {"mean": segment_mean, "add": segment_sum, "max": segment_max}


class FeatureEncoder(nn.Module):
    """Features of nodes or edges to width D: a linear map of floats (rows, features), or with ``categories`` the sum of
    an embedding a column of integers (rows, columns); zero features: one learned vector for all rows."""

    def __init__(self, features: int, dim: int, categories: Sequence[int] | None = None) -> None:
        super().__init__()
        self.features = len(categories) if categories else features
        self.linear = Linear(features, dim) if features and not categories else None
        self.embeddings = nn.ModuleList(nn.Embedding(n, dim) for n in categories or ())
        self.empty = nn.Parameter(torch.randn(dim)) if not features and not categories else None

    def forward(self, x: Tensor | None, rows: int, what: str) -> Tensor:
        if self.empty is not None:
            return self.empty.expand(rows, -1)
        if x is None or x.shape != (rows, self.features):
            got = "missing" if x is None else f"of shape {tuple(x.shape)}"
            raise ValueError(f"{what} are {got}; expected ({rows}, {self.features})")
        if self.linear is not None:
            return self.linear(x)
        parts = [table(x[:, i]) for i, table in enumerate(self.embeddings)]
        return torch.stack(parts).sum(0)


class Head(nn.Module):
    """From node vectors (nodes, D) to the answer of ``level``: (nodes, out), (graphs, out) or (links, out).

    A link is scored from the product and the absolute difference of its ends, so its direction does not matter.
    """

    def __init__(self, dim: int, out_dim: int, level: str, pooling: str) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")
        if pooling not in POOLING:
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLING)}")
        self.level, self.pooling = level, pooling
        self.hidden = Linear(2 * dim, dim) if level == "link" else None
        self.out = Linear(dim, out_dim)

    def forward(self, h: Tensor, graph: Tensor, graphs: int, links: Tensor | None) -> Tensor:
        if self.level == "graph":
            return self.out(POOLING[self.pooling](h, graph, graphs))
        if self.hidden is None:
            return self.out(h)
        if links is None or links.dim() != 2 or links.shape[0] != 2:
            got = "missing" if links is None else f"of shape {tuple(links.shape)}"
            raise ValueError(f"links are {got}; expected (2, links), the pairs of nodes to score")
        first, second = h[links[0]], h[links[1]]
        return self.out(self.hidden(torch.cat([first * second, (first - second).abs()], dim=1)).relu())


def check_graph(x: Tensor | None, edge_index: Tensor, nodes: int, sizes: Tensor | None) -> None:
    """Shapes that every model checks; raises ValueError. Values are checked where graphs are read."""
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        raise ValueError(
            f"edge_index is {edge_index.dtype} of shape {tuple(edge_index.shape)}; expected integers (2, edges)"
        )
    if x is not None and x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (nodes, features)")
    if sizes is not None and sizes.dim() != 1:
        raise ValueError(f"sizes has shape {tuple(sizes.shape)}; expected (graphs,), the nodes of each graph")
    if nodes < 1:
        raise ValueError("the graph has no nodes; expected one or more")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError naming a size that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")
