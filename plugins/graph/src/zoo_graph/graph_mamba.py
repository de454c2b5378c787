"""Graph-Mamba: GraphGPS layers whose attention is a Mamba over nodes in order of importance.

Paper: Wang et al., "Graph-Mamba: Towards Long-Range Graph Sequence Modeling with Selective State Spaces", arXiv
2402.00789. Original: bowang-lab/Graph-Mamba @ acb4a23 (``graphgps/layer/gps_layer.py``).
Differs from the original: nodes are scanned where they lie, along a path with a reset at every graph, so that no graph
is padded to the largest; the orders of one evaluation go through the scan together and through the projections once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.layers import Linear, Mamba, Recomputed
from zoo_kernels import causal_conv1d, selective_scan

from .local_models import GAT, GINE, GENConv, GraphAttention, distance_gate, squared_distance
from .segments import degree, graph_of, lexsort, segment_mean, segment_sum, starts

BUCKETS, DRAWS = 3, 5
#: Message passing beside the scan, by the original's names.
LOCAL = ("CustomGatedGCN", "GINE", "GENConv", "GAT", "None")


@dataclass(frozen=True)
class Order:
    """How nodes are put in order. ``key``: "input", "random", "degree" or "noise" (uniform [0, 1)), with what breaks
    ties; ``buckets``: each graph's nodes are dealt into three sequences; ``draws``: averaged outside training."""

    key: str
    ties: str = "index"  #: "index", "random", or "noise": added to the degree
    buckets: str = ""  #: "", "random" or "index" (node index mod 3)
    draws: int = 1

    @property
    def draws_noise(self) -> bool:
        return self.key in ("random", "noise") or self.ties != "index"


#: The original's names. Its two Noise forms have each other's names, and are kept as they run.
ORDERS = {
    "Mamba": Order("input"),
    "Mamba_Degree": Order("degree"),
    "Mamba_Permute": Order("random"),
    "Mamba_Hybrid": Order("random", draws=DRAWS),
    "Mamba_Hybrid_Degree": Order("degree", "random", draws=DRAWS),
    "Mamba_Hybrid_Degree_Bucket": Order("degree", "random", "index", DRAWS),
    "Mamba_Hybrid_Degree_Noise": Order("degree", "noise", draws=DRAWS),
    "Mamba_Hybrid_Degree_Noise_Bucket": Order("degree", "noise", "random", DRAWS),
    "Mamba_Hybrid_Noise": Order("noise", "noise", "random", DRAWS),
    "Mamba_Hybrid_Noise_Bucket": Order("noise", "noise", draws=DRAWS),
}
_MORE_DATA = ("Mamba_Eigen", "Mamba_RWSE", "Mamba_Cluster", "Mamba_Augment")


def order_named(name: str) -> Order:
    """The order of a name; raises ValueError for those that the original cannot run either, or that need more data."""
    if name in ORDERS:
        return ORDERS[name]
    reason = ""
    if name.startswith(_MORE_DATA):
        reason = "; it needs data of every node (centralities, clusters) that this library does not make"
    elif name.startswith("Mamba") and name.rpartition("_")[2] in ("2", "4", "Multi", "SmallConv", "SmallState"):
        reason = "; the original's forward raises for every such suffix"
    raise ValueError(
        f"global_model_type is {name!r}; expected one of {', '.join(ORDERS)}, 'Transformer' or 'None'{reason}"
    )


class OrderedMamba(Mamba):
    """Mamba-1 over the nodes of many graphs, in one order or the mean over several.

    forward: x (nodes, D), order (draws, nodes) int64, resets (draws, nodes) bool by node; (nodes, D).
    """

    def forward(self, x: Tensor, order: Tensor, resets: Tensor) -> Tensor:  # type: ignore[override]
        draws = order.shape[0]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        walk = {"path": order, "resets": resets}
        u, _ = causal_conv1d(
            u.expand(draws, -1, -1), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", **walk
        )
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, _ = selective_scan(
            u,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z.expand(draws, -1, -1),
            self.dt_proj.bias.float(),
            dt_proj=self.dt_proj.weight,
            dt_softplus=True,
            **walk,
        )
        return self.out_proj(y.mean(0))


class GatedGCN(Recomputed):
    """Message passing with gates on edges and a residual: new node and edge features (arXiv 1711.07553).

    ``e_ij = D x_i + E x_j + C e``, ``x_i' = x_i + relu(BN(A x_i + sum_j s(e_ij) B x_j / (sum_j s(e_ij) + 1e-6)))``,
    ``e' = e + relu(BN(e_ij))``, i = edge_index[1], j = edge_index[0]. ``stable``: s(e_ij) times
    :func:`zoo_graph.local_models.distance_gate` of the nodes' encodings ``pe``.
    """

    def __init__(self, dim: int, dropout: float = 0.0, stable: bool = False) -> None:
        super().__init__()
        self.mlp_r_ij = distance_gate(dim) if stable else None
        self.A, self.B, self.C, self.D, self.E = (Linear(dim, dim) for _ in range(5))
        self.bn_node_x = nn.BatchNorm1d(dim)
        self.bn_edge_e = nn.BatchNorm1d(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, pe: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (nodes, D), edge_attr (edges, D): new ones of both."""
        source, target = edge_index[0], edge_index[1]
        gate = self.D(x)[target] + self.E(x)[source] + self.C(edge_attr)
        share = gate.sigmoid()
        if self.mlp_r_ij is not None:
            assert pe is not None
            share = share * self.mlp_r_ij(squared_distance(pe, edge_index))
        # Numerator and denominator side by side: one pass over the edges.
        both = segment_sum(torch.cat([share * self.B(x)[source], share], dim=1), target, x.shape[0])
        total, weight = both.chunk(2, dim=1)
        new = self.A(x) + total / (weight + 1e-6)
        x = x + self.dropout(self.bn_node_x(new).relu())
        return x, edge_attr + self.dropout(self.bn_edge_e(gate).relu())


class GraphNorm(nn.Module):
    """Normalised within each graph, the mean taken out by a learned share (Cai et al., arXiv 2009.03294)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.mean_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, graph: Tensor, graphs: int) -> Tensor:
        out = x - segment_mean(x, graph, graphs)[graph] * self.mean_scale
        variance = segment_mean(out * out, graph, graphs)[graph]
        return self.weight * out / (variance + self.eps).sqrt() + self.bias


class GPSLayer(Recomputed):
    """One layer: message passing and a scan side by side, then a feed-forward.

    Arguments (the original's): ``dim_h`` D, ``local_gnn_type`` ("CustomGatedGCN", "GINE", "GENConv", "GAT" or "None"),
    ``global_model_type`` (a name of :data:`ORDERS`, "Transformer" or "None"), ``num_heads`` (of GAT and attention),
    ``dropout``, ``attn_dropout``, ``layer_norm`` (GraphNorm) or ``batch_norm`` (or neither), ``equivstable_pe`` (of the
    first local type: edges are weighted by the distance of their ends' encodings ``pe``).
    forward: x (nodes, D), edge_index (2, edges), edge_attr (edges, D), graph (nodes,) sorted, graphs, train (one draw
    of the order instead of the mean over five; None: as the module's mode). noise, bucket: what replaces the random
    numbers, (draws, nodes) each. pe: (nodes, features). Returns (x, edge_attr).
    """

    def __init__(
        self,
        dim_h: int,
        local_gnn_type: str = "CustomGatedGCN",
        global_model_type: str = "Mamba_Hybrid_Degree_Noise",
        dropout: float = 0.0,
        layer_norm: bool = False,
        batch_norm: bool = True,
        num_heads: int = 4,
        attn_dropout: float = 0.0,
        equivstable_pe: bool = False,
    ) -> None:
        super().__init__()
        if local_gnn_type not in LOCAL:
            raise ValueError(f"local_gnn_type is {local_gnn_type!r}; expected one of {', '.join(LOCAL)}")
        if equivstable_pe and local_gnn_type != "CustomGatedGCN":
            raise ValueError(
                f"equivstable_pe is set; local_gnn_type {local_gnn_type!r} has no such form (the original's GINE fails)"
            )
        if layer_norm and batch_norm:
            raise ValueError("layer_norm and batch_norm are both set; a layer has one kind of norm, or none")
        self.order = None if global_model_type in ("None", "Transformer") else order_named(global_model_type)
        if local_gnn_type == "None" and global_model_type == "None":
            raise ValueError("local_gnn_type and global_model_type are both 'None'; a layer needs one of them")
        self.equivstable_pe = equivstable_pe
        self.local_model: nn.Module | None = None
        if local_gnn_type == "CustomGatedGCN":
            self.local_model = GatedGCN(dim_h, dropout, equivstable_pe)
        elif local_gnn_type == "GINE":
            self.local_model = GINE(dim_h)
        elif local_gnn_type == "GENConv":
            self.local_model = GENConv(dim_h)
        elif local_gnn_type == "GAT":
            self.local_model = GAT(dim_h, num_heads)
        self.self_attn: nn.Module | None = None
        if self.order is not None:
            self.self_attn = OrderedMamba(dim_h, d_state=16, d_conv=4, expand=1)
        elif global_model_type == "Transformer":
            self.self_attn = GraphAttention(dim_h, num_heads, attn_dropout)

        def norm(used: bool) -> nn.Module | None:
            if not used:
                return None
            return GraphNorm(dim_h) if layer_norm else nn.BatchNorm1d(dim_h) if batch_norm else None

        self.norm1_local = norm(self.local_model is not None or layer_norm or batch_norm)
        self.norm1_attn = norm(self.self_attn is not None or layer_norm or batch_norm)
        self.norm2 = norm(True)
        self.ff_linear1 = Linear(dim_h, 2 * dim_h)
        self.ff_linear2 = Linear(2 * dim_h, dim_h)
        self.dropout = nn.Dropout(dropout)

    def draw(self, edge_index: Tensor, graph: Tensor, draws: int, noise: Tensor | None, bucket: Tensor | None):
        """(order, resets), each (draws, nodes)."""
        assert self.order is not None
        nodes, device = graph.shape[0], graph.device
        kind = self.order
        if kind.draws_noise and noise is None:
            noise = torch.rand(draws, nodes, device=device)
        if kind.key == "degree":
            count = degree(edge_index, nodes)
            keys = [(count + noise) if kind.ties == "noise" else count.expand(draws, -1)]
            if kind.ties == "random":
                keys.insert(0, noise)
        else:
            index = torch.arange(nodes, device=device).expand(draws, -1)
            keys = [index if kind.key == "input" else noise]
        labels = [graph]
        if kind.buckets == "index":
            labels.insert(0, torch.arange(nodes, device=device) % BUCKETS)
        elif kind.buckets:
            if bucket is None:
                bucket = torch.randint(0, BUCKETS, (draws, nodes), device=device)
            labels.insert(0, bucket)
        order = lexsort([*keys, *labels])
        return order, starts(order, *labels)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor,
        graph: Tensor,
        graphs: int,
        *,
        train: bool | None = None,
        noise: Tensor | None = None,
        bucket: Tensor | None = None,
        pe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        train = self.training if train is None else train
        if self.equivstable_pe and pe is None:
            raise ValueError("this layer weights edges by positional encodings; give pe, (nodes, features)")
        parts, old = [], edge_attr
        if isinstance(self.local_model, GatedGCN):  # has its own residual and dropout
            local, edge_attr = self.local_model(x, edge_index, old, pe)
            parts.append(_normed(self.norm1_local, local, graph, graphs))
        elif self.local_model is not None:
            local = x + self.dropout(self.local_model(x, edge_index, old))
            parts.append(_normed(self.norm1_local, local, graph, graphs))
        if self.self_attn is not None:
            if self.order is None:
                mixed = self.self_attn(x, graph, graphs)
            else:
                draws = 1 if train else self.order.draws
                mixed = self.self_attn(x, *self.draw(edge_index, graph, draws, noise, bucket))
            mixed = self.dropout(mixed)
            parts.append(_normed(self.norm1_attn, x + mixed, graph, graphs))
        h = sum(parts[1:], parts[0])
        h = h + self.dropout(self.ff_linear2(self.dropout(self.ff_linear1(h).relu())))
        return _normed(self.norm2, h, graph, graphs), edge_attr


def _normed(norm: nn.Module | None, x: Tensor, graph: Tensor, graphs: int) -> Tensor:
    if norm is None:
        return x
    return norm(x, graph, graphs) if isinstance(norm, GraphNorm) else norm(x)


class GPSLayers(nn.Module):
    """A stack of :class:`GPSLayer`: node and edge features of width D in and out.

    forward: x (nodes, D), edge_index (2, edges), edge_attr (edges, D), sizes (graphs,) nodes of each graph (None: one
    graph). noise, bucket: (layers, draws, nodes). Returns (x, edge_attr).
    """

    def __init__(self, layers: int, dim_h: int, **arguments) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}; expected 1 or more")
        self.layers = nn.ModuleList(GPSLayer(dim_h, **arguments) for _ in range(layers))

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor,
        sizes: Tensor | None = None,
        *,
        train: bool | None = None,
        noise: Tensor | None = None,
        bucket: Tensor | None = None,
        pe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        nodes = x.shape[0]
        graphs = 1 if sizes is None else sizes.shape[0]
        graph = edge_index.new_zeros(nodes) if sizes is None else graph_of(sizes, nodes)
        for i, layer in enumerate(self.layers):
            own = {"noise": None if noise is None else noise[i], "bucket": None if bucket is None else bucket[i]}
            x, edge_attr = layer(x, edge_index, edge_attr, graph, graphs, train=train, pe=pe, **own)
        return x, edge_attr
