"""Graph-Mamba's original arguments and keys: bowang-lab/Graph-Mamba."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from .graph_mamba import ORDERS, GPSLayers
from .segments import degree, graph_of, lexsort

_TAKEN = (
    "local_gnn_type", "global_model_type", "dropout", "layer_norm", "batch_norm", "num_heads", "attn_dropout",
    "equivstable_pe",
)  # fmt: skip
#: Arguments of mixers that are not built here.
_INERT = {"pna_degrees", "bigbird_cfg"}
_KNOWN = {"layers", "dim_h", *_TAKEN, *_INERT}


class GraphMambaAdapter(ReferenceAdapter):
    """Reads ``graphgps/layer/gps_layer.py:GPSLayer``, one or a stack. State keys begin with the layer's number, in a
    full model with ``layers.``; encoders and heads (``encoder.*``, ``post_mp.*``) belong to a data set."""

    system = "gmn"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        unknown = sorted(set(config) - _KNOWN)
        if unknown:
            raise ValueError(f"Graph-Mamba has no argument {', '.join(map(repr, unknown))}; known: {sorted(_KNOWN)}")
        if "dim_h" not in config:
            raise ValueError("dim_h is missing; expected the width of the layers")
        arguments = {k: config[k] for k in _TAKEN if k in config}
        return self.load(GPSLayers(int(config.get("layers", 1)), int(config["dim_h"]), **arguments), state)

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """``in/noise`` and ``in/bucket`` hold a row for every draw of every layer, in the order of the calls."""
        assert isinstance(model, GPSLayers)
        call = call if isinstance(call, Mapping) else {}
        train = call.get("split") == "train"  # the original's choice, whatever the module's mode
        was = model.training
        model.train(call.get("mode") == "train")  # of the batch norms
        x, edge_index, edge_attr = inputs["x"], inputs["edge_index"], inputs["edge_attr"]
        batch = inputs.get("batch")
        batch = edge_index.new_zeros(x.shape[0]) if batch is None else batch
        count = int(batch[-1]) + 1
        sizes = torch.bincount(batch, minlength=count)
        graph = graph_of(sizes, x.shape[0])
        layers = len(model.layers)
        noise, bucket = (
            None if key not in inputs else inputs[key].reshape(layers, -1, x.shape[0]) for key in ("noise", "bucket")
        )
        pe = inputs.get("pe_EquivStableLapPE")
        found: dict[str, Tensor] = {}
        key = degree(edge_index, x.shape[0])
        found["mid/degree"] = key
        if noise is not None:
            found["mid/order_degree_noise0"] = lexsort([key + noise[0, 0], graph])
        for i, layer in enumerate(model.layers):
            own = {
                "noise": None if noise is None else noise[i].to(x.dtype),
                "bucket": None if bucket is None else bucket[i].long(),
            }
            x, edge_attr = layer(x, edge_index, edge_attr, graph, count, train=train, pe=pe, **own)
            found[f"mid/layer{i}_x"] = x
        model.train(was)
        return found | {"x": x, "edge_attr": edge_attr, "loss": x.square().mean()}

    def loss(self, golden, named):
        return named["out/loss"]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if any(key.startswith("layers.") for key in state) and model is None:
            return Rules()
        return Rules(Rename("{i:d}.{rest:*}", "layers.{i:d}.{rest:*}"))


__all__ = ["ORDERS", "GraphMambaAdapter"]
