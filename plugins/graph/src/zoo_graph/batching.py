"""Graphs of any sizes as one batch: their nodes one after another, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .encodings import ENCODINGS
from .files import Graph


@dataclass
class Batch:
    """What the models take, and targets where they are known."""

    x: Tensor | None  #: (nodes, features)
    edge_index: Tensor  #: (2, edges)
    edge_attr: Tensor | None
    sizes: Tensor  #: (graphs,)
    pe: Tensor | None = None
    y: Tensor | None = None

    def inputs(self) -> dict[str, Tensor | None]:
        """Arguments of a model's forward."""
        named = {"edge_attr": self.edge_attr, "sizes": self.sizes, "pe": self.pe}
        # x may be None, and the models say what that means.
        return {"x": self.x, "edge_index": self.edge_index} | {k: v for k, v in named.items() if v is not None}

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in vars(self).values()))  # type: ignore[arg-type]


def join(
    graphs: Sequence[Graph],
    *,
    integers: bool = False,
    integer_edges: bool = False,
    encoding: str | None = None,
    encoding_size: int = 0,
) -> Batch:
    """Graphs side by side. integers, integer_edges: features are categories. encoding: "laplacian" or "random-walk".

    Targets are joined by their kind: one entry a node or one a graph. Raises ValueError where graphs have features of
    different widths, or only some have them.
    """
    if not graphs:
        raise ValueError("no graphs were given")
    counts = [len(g.nodes) for g in graphs]
    offsets = np.r_[0, np.cumsum(counts)[:-1]]
    edge_index = np.concatenate([g.edge_index + o for g, o in zip(graphs, offsets, strict=True)], axis=1)
    pe = None
    if encoding is not None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}; expected one of {', '.join(ENCODINGS)}")
        make = ENCODINGS[encoding]
        pe = torch.cat([make(torch.from_numpy(g.edge_index), len(g.nodes), encoding_size) for g in graphs])
    return Batch(
        _joined([g.x for g in graphs], [g.name for g in graphs], "node", integers),
        torch.from_numpy(np.ascontiguousarray(edge_index)),
        _joined([g.edge_attr for g in graphs], [g.name for g in graphs], "edge", integer_edges),
        torch.tensor(counts),
        pe,
        _targets([g.y for g in graphs]),
    )


def _joined(parts: list[np.ndarray | None], names: list[str], what: str, integers: bool) -> Tensor | None:
    given = [p for p in parts if p is not None]
    if not given:
        return None
    widths = {p.shape[1] for p in given}
    if len(given) != len(parts) or len(widths) > 1:
        without = next((n for n, p in zip(names, parts, strict=True) if p is None), "")
        reason = f"graph {without!r} has none" if len(given) != len(parts) else f"widths {sorted(widths)}"
        raise ValueError(f"{what} features differ between graphs ({reason}); expected the same columns in all")
    whole = np.concatenate(given)
    if integers and (whole != np.round(whole)).any():
        raise ValueError(f"{what} features are categories, and not all of them are whole numbers")
    return torch.from_numpy(whole.astype(np.int64 if integers else np.float32))


def _targets(parts: list) -> Tensor | None:
    if any(p is None for p in parts):
        return None
    try:
        whole = np.concatenate([np.atleast_1d(np.asarray(p)) for p in parts])
        return torch.from_numpy(whole.astype(np.int64 if np.issubdtype(whole.dtype, np.integer) else np.float32))
    except (TypeError, ValueError):
        return None  # names of classes: whoever trains says what they stand for


def from_pyg(data) -> Batch:
    """A ``torch_geometric`` Data or Batch object (anything with x, edge_index and perhaps edge_attr, ptr, y) as a
    batch. torch_geometric itself is never imported.
    """
    if getattr(data, "edge_index", None) is None:
        raise ValueError(f"{type(data).__name__} has no edge_index; expected a torch_geometric Data or Batch object")
    x = getattr(data, "x", None)
    pointer = getattr(data, "ptr", None)
    nodes = data.num_nodes if x is None else x.shape[0]
    sizes = torch.tensor([nodes]) if pointer is None else pointer.diff()
    return Batch(x, data.edge_index, getattr(data, "edge_attr", None), sizes, None, getattr(data, "y", None))
