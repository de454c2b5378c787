"""Graph Mamba Networks: every node's neighbourhood as a sequence of subgraphs, read by a bidirectional Mamba.

Paper: Behrouz and Hashemi, "Graph Mamba: Towards Learning on Graphs with State Space Models", arXiv 2402.08678 (KDD
2024). The authors' repository holds no code and no weights: this is a reading of the paper, and nothing can be compared
with an original. What is ours where the paper leaves room: uniform walks that may turn back, the mean of a subgraph's
nodes as readout, Mamba-1's usual sizes, a residual around each block, ties in degree by the nodes' order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, Mamba, Recomputed

from .graph_mamba import GatedGCN
from .heads import FeatureEncoder, Head, check_graph, check_kind, check_sizes
from .models import node_count
from .segments import degree, graph_of, lexsort, segment_mean, starts
from .tokens import tokenise


class BidirectionalMamba(Recomputed):
    """``x + W_out (forwards(LN x) + backwards(LN x))``: two Mamba mixers with parameters of their own.

    forward: (batch, length, D); path and the two resets as in :func:`zoo_kernels.selective_scan`.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.forwards = Mamba(dim, d_state, d_conv, expand)
        self.backwards = Mamba(dim, d_state, d_conv, expand)
        self.out = Linear(dim, dim)

    def forward(
        self, x: Tensor, path: Tensor | None = None, resets: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> Tensor:
        p = self.norm(x)
        there = self.forwards(p, path=path, resets=resets[0])
        back = self.backwards(p, path=path, resets=resets[1], reverse=True)
        return x + self.out(there + back)

    def last(self, x: Tensor) -> Tensor:
        """:meth:`forward` at the last position, (batch, D): where backwards begins, so that it has seen one token."""
        p = self.norm(x)
        y, z = self.forwards.mix(p, gate=False)
        there = self.forwards.out_proj(y[:, -1] * F.silu(z[:, -1]))
        back = self.backwards(p[:, -1:])[:, 0]
        return x[:, -1] + self.out(there + back)


class GMN(GradCheckpointing, nn.Module):
    """Graph Mamba Network.

    Arguments: features, ``out_dim``, ``level``, ``kind`` and ``pooling`` as :class:`zoo_graph.models.GraphMamba`;
    ``dim_h``; ``layers`` bidirectional blocks; ``m`` the largest hop (0: every node is a token, and a graph is one
    sequence in order of degree, ascending), ``samples`` s tokens a hop, ``walks`` M a token; ``local_layers`` of
    message passing inside each token (0: the mean of its nodes' features); ``mpnn`` also runs ``layers`` of message
    passing over the graph beside the sequences; ``d_state``, ``d_conv``, ``expand`` of the mixers; ``seed`` of the
    walks in evaluation.

    forward: as GraphMamba's, and with m > 0 node, token, edges (and edge where there are edge features) of
    :func:`zoo_graph.tokens.tokenise`; without them they are drawn: anew in training, from ``seed`` in evaluation.
    The sequence of a node has m * s + 1 tokens, so that nothing is padded; with m = 0 the graphs of a batch lie one
    after another, and states are reset between them.
    """

    def __init__(
        self,
        node_dim: int = 0,
        out_dim: int = 2,
        dim_h: int = 64,
        layers: int = 2,
        level: str = "graph",
        kind: str = "classification",
        node_categories: Sequence[int] | None = None,
        edge_dim: int = 0,
        edge_categories: Sequence[int] | None = None,
        pe_dim: int = 0,
        pooling: str = "mean",
        m: int = 3,
        samples: int = 2,
        walks: int = 4,
        local_layers: int = 1,
        mpnn: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_kind(kind)
        check_sizes(dim_h=dim_h, out_dim=out_dim, samples=samples, walks=walks)
        if m < 0 or local_layers < 0 or layers < 1:
            raise ValueError(f"m is {m}, local_layers {local_layers}, layers {layers}; expected 0, 0 and 1 or more")
        if m == 0 and local_layers:
            raise ValueError("local_layers encode subgraph tokens, and m=0 has none; give local_layers=0 (mpnn=True)")
        self.level, self.kind, self.out_dim, self.pe_dim = level, kind, out_dim, pe_dim
        self.m, self.samples, self.walks, self.seed = m, samples, walks, seed
        self.node_encoder = FeatureEncoder(node_dim, dim_h, node_categories)
        self.pe_encoder = FeatureEncoder(pe_dim, dim_h) if pe_dim else None
        passing = local_layers > 0 or mpnn
        self.edge_encoder = FeatureEncoder(edge_dim, dim_h, edge_categories) if passing else None
        self.local = nn.ModuleList(GatedGCN(dim_h, dropout) for _ in range(local_layers))
        self.blocks = nn.ModuleList(BidirectionalMamba(dim_h, d_state, d_conv, expand) for _ in range(layers))
        self.mpnn = nn.ModuleList(GatedGCN(dim_h, dropout) for _ in range(layers if mpnn else 0))
        self.dropout = nn.Dropout(dropout)
        self.head = Head(dim_h, out_dim, level, pooling)
        # A stack's last edge features go nowhere, and the last block is read where its backward scan begins.
        stacks = {"local": self.local, "mpnn": self.mpnn}
        unused = [f"{k}.{len(s) - 1}.bn_edge_e" for k, s in stacks.items() if len(s)]
        self.unused_parameters = (*unused, *([f"blocks.{layers - 1}.backwards.A_log"] if m else []))

    @property
    def positions(self) -> int:
        """Tokens of a node's sequence."""
        return self.m * self.samples + 1

    def forward(
        self,
        x: Tensor | None,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        sizes: Tensor | None = None,
        pe: Tensor | None = None,
        links: Tensor | None = None,
        *,
        node: Tensor | None = None,
        token: Tensor | None = None,
        edges: Tensor | None = None,
        edge: Tensor | None = None,
    ) -> Tensor:
        nodes = node_count(x, sizes)
        check_graph(x, edge_index, nodes, sizes)
        graphs = 1 if sizes is None else sizes.shape[0]
        graph = edge_index.new_zeros(nodes) if sizes is None else graph_of(sizes, nodes)
        h = self.node_encoder(x, nodes, "node features")
        if self.pe_encoder is not None:
            h = h + self.pe_encoder(pe, nodes, "positional encodings")
        e = None
        if self.edge_encoder is not None:
            e = self.edge_encoder(edge_attr, edge_index.shape[1], "edge features")
        if self.m == 0:
            found = self.node_sequence(h, edge_index, graph)
        else:
            if node is None or token is None or edges is None:
                node, token, edges, edge = tokenise(
                    edge_index, nodes, self.m, self.samples, self.walks, self.generator(edge_index.device)
                )
            elif edge is None and self.edge_encoder is not None and self.edge_encoder.empty is None:
                raise ValueError("node, token and edges are given without edge, which says whose features edges have")
            found = self.token_sequences(h, node, token, edges, e if edge is None or e is None else e[edge])
        for layer in self.mpnn:
            h, e = layer(h, edge_index, e)
        return self.head(self.dropout(found + h if len(self.mpnn) else found), graph, graphs, links)

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Fixed walks in evaluation, new ones at every step of training."""
        return None if self.training else torch.Generator(device=device).manual_seed(self.seed)

    def token_sequences(self, h: Tensor, node: Tensor, token: Tensor, edges: Tensor, e: Tensor | None) -> Tensor:
        """Node vectors (nodes, D) to those at the end of every node's sequence of tokens."""
        nodes, width = h.shape
        members = h[node]
        if len(self.local):
            assert e is not None
            if e.shape[0] != edges.shape[1]:  # without edge features all edges are alike
                e = e[:1].expand(edges.shape[1], -1)
        for layer in self.local:
            members, e = layer(members, edges, e)
        sequence = segment_mean(members, token, nodes * self.positions).view(nodes, self.positions, width)
        *first, last = self.blocks
        for block in first:
            sequence = block(sequence)
        return last.last(sequence)  # type: ignore[union-attr, operator]

    def node_sequence(self, h: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
        """Node vectors (nodes, D) through one sequence a graph, nodes in order of degree, ascending."""
        order = lexsort([degree(edge_index, h.shape[0]), graph])
        resets = starts(order, graph)[None], starts(order, graph, reverse=True)[None]
        sequence = h[None]
        for block in self.blocks:
            sequence = block(sequence, order, resets)
        return sequence[0]
