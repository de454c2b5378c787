"""Mamba4Rec: sequential recommendation with the selective scan.

Paper: Liu et al., "Mamba4Rec", arXiv 2403.03900. Original: chengkai-liu/Mamba4Rec @ 44a0c84, MIT (mamba4rec.py).
Differs from the original: a user can be held as a state of fixed size (:meth:`Mamba4Rec.step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Mamba, Recomputed
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from ._base import FeedForward, SequentialRecommender, UserState, at_least_one, init_normal, outputs, take
from .last import Dropout, rows_at

EPS = 1e-12


class Layer(Recomputed):
    """Mamba, dropout, (residual,) norm, feed-forward. A one-layer model has no residual around its mixer."""

    def __init__(self, hidden_size: int, mamba: Mamba, dropout: float, *, residual: bool) -> None:
        super().__init__()
        self.mamba = mamba
        self.residual = residual
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=EPS)
        self.ffn = FeedForward(hidden_size, dropout, nn.GELU(), eps=EPS)

    def close(self, mixed: Tensor, x: Tensor) -> Tensor:
        hidden = self.dropout(mixed)
        return self.ffn(self.layer_norm(hidden + x if self.residual else hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.close(self.mamba(x), x)

    def at(self, x: Tensor, index: Tensor) -> Tensor:
        """:meth:`forward` at one row of each sequence: all rows are scanned, one goes through what follows."""
        y, z = self.mamba.mix(x, gate=False)
        mixed = self.mamba.out_proj(rows_at(y, index) * F.silu(rows_at(z, index)))
        return self.close(mixed, rows_at(x, index))


class Mamba4Rec(GradCheckpointing, SequentialRecommender):
    """Embedding, ``num_layers`` x (Mamba, feed-forward), scores against the embedding.

    Arguments: ``n_items`` (counting the padding item 0), ``hidden_size`` D, ``num_layers``, ``max_length`` (of the
    training samples; not part of the weights), ``d_state``, ``d_conv``, ``expand``, ``dropout``, ``loss_type``.
    """

    recurrent = True

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        max_length: int = 50,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.2,
        loss_type: str = "CE",
    ) -> None:
        super().__init__(n_items, hidden_size, max_length, loss_type)  # type: ignore[arg-type]
        at_least_one(num_layers=num_layers)
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=EPS)
        self.layers = nn.ModuleList(
            Layer(hidden_size, Mamba(hidden_size, d_state, d_conv, expand), dropout, residual=num_layers > 1)
            for _ in range(num_layers)
        )
        # The original resets every Linear, those inside Mamba too: dt starts at softplus(0), not at Mamba's dt.
        self.apply(init_normal)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        return self.encode_layers(item_seq)[-1]

    def encode_at(self, item_seq: Tensor, index: Tensor, times: Tensor | None = None) -> Tensor:
        x = self._embed(item_seq)
        *first, last = self.layers
        for layer in first:
            x = layer(x)
        return last.at(x, index)  # type: ignore[union-attr, operator]

    def _embed(self, item_seq: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.item_embedding(item_seq)))

    def encode_layers(self, item_seq: Tensor) -> list[Tensor]:
        """Hidden states (batch, length, hidden) after every layer."""
        x = self._embed(item_seq)
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found

    def init_user(self, batch: int) -> UserState:
        return [layer.mamba.init_state(batch) for layer in self.layers]  # type: ignore[union-attr, operator, misc]

    def step(self, item: Tensor, state: UserState) -> Tensor:
        x = self.layer_norm(self.item_embedding(item))
        for layer, layer_state in zip(self.layers, state, strict=True):
            x = layer.close(layer.mamba.step(x, layer_state), x)  # type: ignore[union-attr, operator]
        return x


# -- the original's format --------------------------------------------------------------------------------------------

RULES = Rules(
    Rename("LayerNorm.{p}", "layer_norm.{p}"),
    Rename("mamba_layers.{i:d}.LayerNorm.{p}", "layers.{i:d}.layer_norm.{p}"),
    Rename("mamba_layers.{i:d}.ffn.LayerNorm.{p}", "layers.{i:d}.ffn.layer_norm.{p}"),
    Rename("mamba_layers.{i:d}.ffn.w_1.{p}", "layers.{i:d}.ffn.fc1.{p}"),
    Rename("mamba_layers.{i:d}.ffn.w_2.{p}", "layers.{i:d}.ffn.fc2.{p}"),
    Rename("mamba_layers.{i:d}.{rest:*}", "layers.{i:d}.{rest:*}"),
)

#: The original's configuration keys and ours.
CONFIG = {
    "n_items": "n_items",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "MAX_ITEM_LIST_LENGTH": "max_length",
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "dropout_prob": "dropout",
    "loss_type": "loss_type",
}


class Mamba4RecAdapter(ReferenceAdapter):
    """Reads chengkai-liu/Mamba4Rec."""

    system = "mamba4rec"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(Mamba4Rec(**take(config, CONFIG, self.system)), state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, Mamba4Rec)
        items = inputs["item_seq"]
        found = outputs(model, model(items, inputs["item_seq_len"]), inputs)
        return found | {f"mid/layer{i}_hidden": hidden for i, hidden in enumerate(model.encode_layers(items))}

    def loss(self, golden, named):
        return named["out/full_sort_scores"].pow(2).mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return RULES
