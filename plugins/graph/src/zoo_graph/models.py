"""Graph-Mamba as a whole network: encoders, a stack of its layers, a head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.layers import GradCheckpointing

from .graph_mamba import GPSLayers
from .heads import FeatureEncoder, Head, check_graph, check_kind, check_sizes
from .segments import graph_of


class GraphMamba(GradCheckpointing, nn.Module):
    """Graph-Mamba: node and edge encoders, ``layers`` GPS layers of width ``dim_h``, a head.

    Arguments: ``node_dim`` features a node (or ``node_categories``, a vocabulary a column of integers), ``edge_dim`` or
    ``edge_categories`` likewise (0: none), ``pe_dim`` columns of positional or structural encodings, ``out_dim``,
    ``level`` ("node", "graph", "link"), ``kind`` ("classification", "multilabel", "regression": the loss and what
    pipelines print), ``pooling`` of graphs; ``local_gnn_type``, ``global_model_type``, ``dropout``, ``layer_norm``,
    ``batch_norm``, ``num_heads`` as in :class:`zoo_graph.graph_mamba.GPSLayer`.

    forward: x (nodes, features), edge_index (2, edges) int64 (both directions of an undirected edge), edge_attr (edges,
    features), sizes (graphs,) nodes of each graph (None: one graph), pe (nodes, pe_dim), links (2, links) of link
    models, train (one draw of the order; None: as the module's mode), noise and bucket (layers, draws, nodes) instead
    of random numbers. Returns (nodes, out), (graphs, out) or (links, out).
    Source: Wang et al., arXiv 2402.00789. The layers are the original's; encoders and heads are plain ones of ours.
    """

    def __init__(
        self,
        node_dim: int = 0,
        out_dim: int = 2,
        dim_h: int = 96,
        layers: int = 4,
        level: str = "graph",
        kind: str = "classification",
        node_categories: Sequence[int] | None = None,
        edge_dim: int = 0,
        edge_categories: Sequence[int] | None = None,
        pe_dim: int = 0,
        pooling: str = "mean",
        local_gnn_type: str = "CustomGatedGCN",
        global_model_type: str = "Mamba_Hybrid_Degree_Noise",
        dropout: float = 0.0,
        layer_norm: bool = False,
        batch_norm: bool = True,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        check_kind(kind)
        check_sizes(dim_h=dim_h, out_dim=out_dim)
        self.level, self.kind, self.out_dim, self.pe_dim = level, kind, out_dim, pe_dim
        self.node_encoder = FeatureEncoder(node_dim, dim_h, node_categories)
        self.edge_encoder = FeatureEncoder(edge_dim, dim_h, edge_categories) if local_gnn_type != "None" else None
        self.pe_encoder = FeatureEncoder(pe_dim, dim_h) if pe_dim else None
        self.backbone = GPSLayers(
            layers,
            dim_h,
            local_gnn_type=local_gnn_type,
            global_model_type=global_model_type,
            dropout=dropout,
            layer_norm=layer_norm,
            batch_norm=batch_norm,
            num_heads=num_heads,
        )
        self.head = Head(dim_h, out_dim, level, pooling)
        # The last layer's edge features go nowhere, as in the original.
        last = f"backbone.layers.{layers - 1}.local_model.bn_edge_e"
        self.unused_parameters = (last,) if local_gnn_type == "CustomGatedGCN" else ()

    def forward(
        self,
        x: Tensor | None,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        sizes: Tensor | None = None,
        pe: Tensor | None = None,
        links: Tensor | None = None,
        *,
        train: bool | None = None,
        noise: Tensor | None = None,
        bucket: Tensor | None = None,
    ) -> Tensor:
        nodes = node_count(x, sizes)
        check_graph(x, edge_index, nodes, sizes)
        h = self.node_encoder(x, nodes, "node features")
        if self.pe_encoder is not None:
            h = h + self.pe_encoder(pe, nodes, "positional encodings")
        edges = h.new_zeros(edge_index.shape[1], h.shape[1])
        if self.edge_encoder is not None:
            edges = self.edge_encoder(edge_attr, edge_index.shape[1], "edge features")
        h, _ = self.backbone(h, edge_index, edges, sizes, train=train, noise=noise, bucket=bucket)
        graphs = 1 if sizes is None else sizes.shape[0]
        graph = edge_index.new_zeros(nodes) if sizes is None else graph_of(sizes, nodes)
        return self.head(h, graph, graphs, links)


def node_count(x: Tensor | None, sizes: Tensor | None) -> int:
    if x is not None:
        return x.shape[0]
    if sizes is None:
        raise ValueError("x and sizes are both missing; without node features sizes says how many nodes there are")
    return int(sizes.sum())
