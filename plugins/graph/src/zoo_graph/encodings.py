"""Positional and structural encodings of nodes: Laplacian eigenvectors and return chances of random walks."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_registry import errors

#: Dense matrices of this many nodes squared are made for each graph.
LARGEST = 4096


def adjacency(edge_index: Tensor, nodes: int) -> Tensor:
    """(nodes, nodes) float64, 1 where there is an edge in either direction. Raises ValueError above 4096 nodes."""
    if nodes > LARGEST:
        raise ValueError(f"the graph has {nodes} nodes; encodings need a dense matrix, and at most {LARGEST} are taken")
    found = torch.zeros(nodes, nodes, dtype=torch.float64)
    found[edge_index[0], edge_index[1]] = 1
    return torch.maximum(found, found.T)


def laplacian_encoding(edge_index: Tensor, nodes: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """(nodes, count): eigenvectors of L = D - A to the smallest eigenvalues but the first, of length 1; missing: 0.

    An eigenvector's sign has no meaning: it is drawn with ``generator`` (training), else the entry of the largest size
    is positive.
    """
    a = adjacency(edge_index, nodes)
    _, vectors = torch.linalg.eigh(torch.diag(a.sum(0)) - a)
    found = vectors[:, 1 : count + 1]
    if generator is not None:
        sign = torch.randint(0, 2, (found.shape[1],), generator=generator) * 2.0 - 1
    else:
        sign = torch.gather(found, 0, found.abs().argmax(0, keepdim=True))[0].sign()
    found = found * sign
    return torch.nn.functional.pad(found, (0, count - found.shape[1])).float()


def random_walk_encoding(edge_index: Tensor, nodes: int, count: int) -> Tensor:
    """(nodes, count): the chance that a uniform walk is back after 1, 2, ... ``count`` steps (arXiv 2110.07875)."""
    a = adjacency(edge_index, nodes)
    step = a / a.sum(1, keepdim=True).clamp(min=1)
    power, found = torch.eye(nodes, dtype=torch.float64), []
    for _ in range(count):
        power = power @ step
        found.append(power.diagonal())
    return torch.stack(found, 1).float()


ENCODINGS = {"laplacian": laplacian_encoding, "random-walk": random_walk_encoding}


def checked_encoding(pe_dim: int, given: str | None, trained: str | None = None) -> str | None:
    """The encoding for a model with ``pe_dim`` columns of it: ``given``, else that of its training, else "laplacian";
    None for a model without. Raises BadArgument for a name that there is not, or where the model reads none."""
    if given is not None and not pe_dim:
        raise errors.BadArgument(
            f"encoding is {given!r}, and the model reads none (pe_dim is 0)", argument="encoding", accepted=[]
        )
    found = (given or trained or "laplacian") if pe_dim else None
    if found is not None and found not in ENCODINGS:
        raise errors.BadArgument(
            f"encoding is {found!r}; expected one of {', '.join(ENCODINGS)}", argument="encoding", accepted=[*ENCODINGS]
        )
    return found
