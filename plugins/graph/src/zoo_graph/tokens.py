"""GMN's tokens: subgraphs that random walks from a node visit, as one list of members and one of edges.

Source: Behrouz and Hashemi, "Graph Mamba", arXiv 2402.08678, section 4.1, as this project reads it: uniform walks over
the neighbours, which may turn back; a node without neighbours stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Subgraph tokens of all nodes. Token ``v * T + p`` is node v's at position p of its sequence; there are
    T = m * s + 1 positions, from the largest hop down to the node itself, which is the last."""

    node: Tensor  #: (members,) which node each member is; sorted by token, then by node
    token: Tensor  #: (members,) which token it belongs to
    edges: Tensor  #: (2, pairs) edges of the induced subgraphs, as members
    edge: Tensor  #: (pairs,) which edge of the graph each is


@dataclass(frozen=True)
class Neighbours:
    """Edges sorted by where they begin: those of node v are ``first[v]`` to ``first[v] + count[v]``."""

    target: Tensor
    edge: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, edge_index: Tensor, nodes: int) -> Neighbours:
        order = edge_index[0].argsort(stable=True)
        count = torch.bincount(edge_index[0], minlength=nodes)
        return cls(edge_index[1][order], order, count.cumsum(0) - count, count)

    def step(self, at: Tensor, generator: torch.Generator | None) -> Tensor:
        """One step of each walk to a random neighbour."""
        draw = torch.rand(at.shape, generator=generator, device=at.device, dtype=torch.float64)
        number = (draw * self.count[at]).long()
        if not len(self.target):
            return at
        reached = self.target[(self.first[at] + number).clamp(max=len(self.target) - 1)]
        return torch.where(self.count[at] > 0, reached, at)


def tokenise(
    edge_index: Tensor, nodes: int, m: int, samples: int, walks: int, generator: torch.Generator | None = None
) -> Tokens:
    """Draw ``walks`` walks of k steps from every node for every token, ``samples`` tokens for each k = 1 .. m, and the
    subgraphs induced by what they visit; and the node itself, k = 0.

    Walks never leave a graph, so a batch of graphs is one edge list. Raises ValueError for m below 1 (node tokens need
    no subgraphs) and for counts below 1.
    """
    for name, value in (("m", m), ("samples", samples), ("walks", walks)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")
    around = Neighbours.of(edge_index, nodes)
    start = torch.arange(nodes, device=edge_index.device)
    length = m * samples + 1
    keys = [(start * length + length - 1) * nodes + start]
    for hop in range(1, m + 1):
        at = start[:, None, None].expand(-1, samples, walks)
        seen = [at[:, :, :1]]
        for _ in range(hop):
            at = around.step(at, generator)
            seen.append(at)
        visited = torch.cat(seen, dim=2)
        position = (m - hop) * samples + torch.arange(samples, device=start.device)
        token = start[:, None] * length + position
        keys.append((token[:, :, None] * nodes + visited).flatten())
    members = torch.cat(keys).unique()  # sorted
    token, node = members // nodes, members % nodes
    edges, edge = _induced(members, token, node, around, nodes)
    return Tokens(node, token, edges, edge)


def _induced(members: Tensor, token: Tensor, node: Tensor, around: Neighbours, nodes: int) -> tuple[Tensor, Tensor]:
    """Edges with both ends in one token: every neighbour of every member, looked up among the token's members."""
    count = around.count[node]
    source = torch.repeat_interleave(torch.arange(len(members), device=members.device), count)
    within = torch.arange(len(source), device=members.device) - (count.cumsum(0) - count)[source]
    place = around.first[node[source]] + within
    wanted = token[source] * nodes + around.target[place]
    found = torch.searchsorted(members, wanted).clamp(max=len(members) - 1)
    kept = members[found] == wanted
    return torch.stack([source[kept], found[kept]]), around.edge[place[kept]]
