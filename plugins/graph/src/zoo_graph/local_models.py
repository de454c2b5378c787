"""GraphGPS's other message passing beside the gated one, and its attention: GINE, GENConv, GAT, multi-head attention.

Parameter names are those of PyTorch Geometric's classes, which bowang-lab/Graph-Mamba builds its layers of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear

from .segments import segment_max, segment_mean, segment_sum


def distance_gate(dim: int) -> nn.Sequential:
    """Weights of edges from the squared distance of their ends' positional encodings (Wang et al., "Equivariant and
    Stable Positional Encoding", ICLR 2022): (edges, 1) to (edges, 1)."""
    return nn.Sequential(nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, 1), nn.Sigmoid())


def squared_distance(pe: Tensor, edge_index: Tensor) -> Tensor:
    """pe (nodes, features) to (edges, 1)."""
    return (pe[edge_index[1]] - pe[edge_index[0]]).square().sum(-1, keepdim=True)


def segment_softmax(scores: Tensor, segment: Tensor, count: int) -> Tensor:
    """(items, ...) scores, each segment's to a distribution."""
    weight = (scores - segment_max(scores, segment, count)[segment]).exp()
    return weight / segment_sum(weight, segment, count)[segment]


class GINE(nn.Module):
    """``nn((1 + eps) x_i + sum_j relu(x_j + e_ij))``, eps 0 (Hu et al., arXiv 1905.12265)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.nn = nn.Sequential(Linear(dim, dim), nn.ReLU(), Linear(dim, dim))
        self.register_buffer("eps", torch.zeros(1))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        message = (x[edge_index[0]] + edge_attr).relu()
        return self.nn(segment_sum(message, edge_index[1], x.shape[0]) + (1 + self.eps) * x)


class GENConv(nn.Module):
    """``mlp(x_i + sum_j softmax_j(m_j) m_j)``, ``m_j = relu(x_j + e_ij) + 1e-7``, by channel (arXiv 2006.07739)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(dim, 2 * dim, bias=False), nn.BatchNorm1d(2 * dim), nn.ReLU(), nn.Identity(),
            Linear(2 * dim, dim, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        message, target = (x[edge_index[0]] + edge_attr).relu() + 1e-7, edge_index[1]
        share = segment_softmax(message, target, x.shape[0])
        return self.mlp(x + segment_sum(share * message, target, x.shape[0]))


class GAT(nn.Module):
    """Graph attention with edge features (arXiv 1710.10903): ``heads`` heads of width D / heads, side by side.

    Every node also attends to itself; that edge's features are the mean of those that come in, and loops of the input
    are left out.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"num_heads is {heads}; it must divide dim_h {dim}")
        self.heads = heads
        self.lin, self.lin_edge = Linear(dim, dim, bias=False), Linear(dim, dim, bias=False)
        self.att_src, self.att_dst, self.att_edge = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, heads, dim // heads))) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        nodes = x.shape[0]
        apart = edge_index[0] != edge_index[1]
        edge_index, edge_attr = edge_index[:, apart], edge_attr[apart]
        every = torch.arange(nodes, device=x.device)
        edge_attr = torch.cat([edge_attr, segment_mean(edge_attr, edge_index[1], nodes)])
        source, target = torch.cat([edge_index, every.expand(2, -1)], 1)
        h, e = (t.unflatten(-1, (self.heads, -1)) for t in (self.lin(x), self.lin_edge(edge_attr)))
        score = (h * self.att_src).sum(-1)[source] + (h * self.att_dst).sum(-1)[target] + (e * self.att_edge).sum(-1)
        share = segment_softmax(F.leaky_relu(score, 0.2), target, nodes)
        return segment_sum(share[..., None] * h[source], target, nodes).flatten(1) + self.bias


class GraphAttention(nn.MultiheadAttention):
    """Multi-head attention among the nodes of each graph: x (nodes, D), graph (nodes,) sorted, to (nodes, D)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        if dim % heads:
            raise ValueError(f"num_heads is {heads}; it must divide dim_h {dim}")
        super().__init__(dim, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor, graph: Tensor, graphs: int) -> Tensor:  # type: ignore[override]
        sizes = torch.bincount(graph, minlength=graphs)
        place = torch.arange(x.shape[0], device=x.device) - (sizes.cumsum(0) - sizes)[graph]
        padded = x.new_zeros(graphs, int(sizes.max()), x.shape[1])
        padded[graph, place] = x
        absent = torch.arange(padded.shape[1], device=x.device) >= sizes[:, None]
        return super().forward(padded, padded, padded, key_padding_mask=absent, need_weights=False)[0][graph, place]
