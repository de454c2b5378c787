"""The recommenders that everyone compares with, on torch's own layers: SASRec and GRU4Rec.

Papers: Kang and McAuley, "Self-Attentive Sequential Recommendation", arXiv 1808.09781; Tan et al., "Improved Recurrent
Neural Networks for Session-based Recommendations", arXiv 1606.08621. Structure and initialisation as in RecBole, so
that they stand for what the papers of this domain compare with; with the same weights they give RecBole's values
(tested). They are yardsticks, not systems of the zoo: no adapter, no published weights. Differs from RecBole: torch's
encoder layer also drops the feed-forward's hidden units. Where RecBole is installed, :func:`build` takes RecBole's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ._base import SequentialRecommender, UserState, at_least_one, init_normal


class SASRec(SequentialRecommender):
    """Causal self-attention over the last ``max_length`` items, learned positions, post-norm blocks."""

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        max_length: int = 50,
        heads: int = 2,
        inner_size: int = 256,
        dropout: float = 0.2,
        loss_type: str = "CE",
    ) -> None:
        super().__init__(n_items, hidden_size, max_length, loss_type)  # type: ignore[arg-type]
        at_least_one(num_layers=num_layers)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            hidden_size, heads, inner_size, dropout, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.apply(init_normal)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):  # its joint projection is a bare parameter
                nn.init.normal_(module.in_proj_weight, std=0.02)
                nn.init.zeros_(module.in_proj_bias)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        length = item_seq.shape[1]
        if length > self.max_length:
            raise ValueError(f"item_seq has length {length}; this model has {self.max_length} positions")
        x = self.item_embedding(item_seq) + self.position_embedding.weight[:length]
        x = self.dropout(self.layer_norm(x))
        # Padding stands behind the last item, so the causal mask alone hides it.
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
        return self.encoder(x, mask=mask, is_causal=True)


class GRU4Rec(SequentialRecommender):
    """A GRU over the items, and a projection back to the embedding's width. Its user is a state of fixed size too."""

    recurrent = True

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        max_length: int = 50,
        inner_size: int = 128,
        dropout: float = 0.3,
        loss_type: str = "CE",
    ) -> None:
        super().__init__(n_items, hidden_size, max_length, loss_type)  # type: ignore[arg-type]
        at_least_one(num_layers=num_layers)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(hidden_size, inner_size, num_layers, bias=False, batch_first=True)
        self.dense = nn.Linear(inner_size, hidden_size)
        nn.init.xavier_normal_(self.item_embedding.weight)
        for name, weight in self.gru.named_parameters():
            if "weight" in name:
                nn.init.xavier_uniform_(weight)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        hidden, _ = self.gru(self.dropout(self.item_embedding(item_seq)))
        return self.dense(hidden)

    def init_user(self, batch: int) -> UserState:
        weight = self.dense.weight
        return [
            {"hidden": torch.zeros(batch, self.gru.hidden_size, device=weight.device, dtype=weight.dtype)}
            for _ in range(self.gru.num_layers)
        ]

    def step(self, item: Tensor, state: UserState) -> Tensor:
        before = torch.stack([layer["hidden"] for layer in state])
        out, after = self.gru(self.item_embedding(item)[:, None], before)
        for layer, hidden in zip(state, after, strict=True):
            layer["hidden"].copy_(hidden)
        return self.dense(out[:, 0])


BASELINES: dict[str, type[SequentialRecommender]] = {"sasrec": SASRec, "gru4rec": GRU4Rec}


def build(name: str, *, implementation: str | None = None, **arguments: Any) -> SequentialRecommender:
    """A baseline by name, ``n_items=`` and the other arguments of its class.

    ``implementation``: "recbole" (its own code), "torch" (the classes above) or None, which is RecBole where it is
    installed. The model's ``built_from`` says what was taken, so that it can be saved and built again.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline is {name!r}; expected one of {', '.join(BASELINES)}")
    if implementation not in (None, "recbole", "torch"):
        raise ValueError(f"implementation is {implementation!r}; expected 'recbole', 'torch' or nothing")
    from .recbole_models import RecBoleModel, installed

    own = BASELINES[name]
    if implementation is None:
        implementation = "recbole" if installed() else "torch"
    signature = inspect.signature(own)
    unknown = sorted(set(arguments) - set(signature.parameters))
    if unknown:
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it takes {', '.join(signature.parameters)}")
    bound = signature.bind(**arguments)
    bound.apply_defaults()
    chosen = dict(bound.arguments)
    model = own(**chosen) if implementation == "torch" else RecBoleModel(name, **chosen)
    model.built_from = {"baseline": name, "implementation": implementation, **chosen}
    return model
