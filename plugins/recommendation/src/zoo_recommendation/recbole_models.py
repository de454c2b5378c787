"""RecBole's own SASRec and GRU4Rec behind this plugin's interface: the code that this field's papers compare with.

Used where RecBole can be imported (``pip install "ssm-zoo-recommendation[recbole]"``). Only its model classes are used:
data, training and ranking are this plugin's, whose samples and metrics are RecBole's (tested). RecBole: Zhao et al.,
"RecBole: Towards a Unified, Comprehensive and Efficient Framework for Recommendation Algorithms", arXiv 2011.01731.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._base import SequentialRecommender

#: For each baseline: RecBole's class, its names of our arguments, and its settings that have no argument here.
CLASSES: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]], Mapping[str, Any]]] = {
    "sasrec": (
        "SASRec",
        {
            "hidden_size": ("hidden_size",),
            "num_layers": ("n_layers",),
            "heads": ("n_heads",),
            "inner_size": ("inner_size",),
            "dropout": ("hidden_dropout_prob", "attn_dropout_prob"),
        },
        {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02},
    ),
    "gru4rec": (
        "GRU4Rec",
        {
            "hidden_size": ("embedding_size",),
            "num_layers": ("num_layers",),
            "inner_size": ("hidden_size",),
            "dropout": ("dropout_prob",),
        },
        {},
    ),
}

#: What RecBole's Config holds of every data set: the names of its columns.
FIELDS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "device": "cpu",
}

INSTALL = (
    'pip install "ssm-zoo-recommendation[recbole]" (Python 3.11: RecBole 1.2.1 needs a ray that has nothing newer)'
)


def installed() -> bool:
    """Whether RecBole is there; it is not imported, which takes seconds."""
    return importlib.util.find_spec("recbole") is not None


def _models() -> Any:
    """RecBole's module of sequential models. Importing it turns on torch's anomaly detection for the whole process
    (``sine.py``), which makes a training step up to 1.7 times as long; that is set back to what it was."""
    before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    from recbole.model import sequential_recommender

    torch.autograd.set_detect_anomaly(*before)
    return sequential_recommender


class _Catalogue:
    """The one thing that RecBole's models ask a data set: how many items it has, padding included."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def num(self, field: str) -> int:
        return self.n_items


class RecBoleModel(SequentialRecommender):
    """One of RecBole's models: ``name`` "sasrec" or "gru4rec", and the arguments of the class of that name in
    :mod:`zoo_recommendation.baselines`. RecBole's attention has no state, and its GRU hands none out: users recompute.

    Raises ModuleNotFoundError, saying what to install, where RecBole is not installed, and ImportError where it cannot
    be imported.
    """

    def __init__(self, name: str, n_items: int, max_length: int = 50, loss_type: str = "CE", **arguments: Any) -> None:
        nn.Module.__init__(self)  # the embedding is RecBole's
        if not installed():
            raise ModuleNotFoundError(f"RecBole is not installed: {INSTALL}")
        theirs = _models()
        class_name, names, constants = CLASSES[name]
        unknown = sorted(set(arguments) - set(names))
        if unknown:
            raise TypeError(f"RecBole's {class_name} has no argument {', '.join(unknown)}; it takes {', '.join(names)}")
        config = {**FIELDS, **constants, "MAX_ITEM_LIST_LENGTH": max_length, "loss_type": loss_type}
        config |= {key: value for argument, value in arguments.items() for key in names[argument]}
        self.n_items, self.max_length, self.hidden_size = n_items, max_length, arguments["hidden_size"]
        self.loss_type = loss_type  # type: ignore[assignment]
        self.model = getattr(theirs, class_name)(config, _Catalogue(n_items))

    @property
    def item_embedding(self) -> nn.Embedding:  # type: ignore[override]
        return self.model.item_embedding

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, times: Tensor | None = None) -> Tensor:
        self._check(item_seq, item_seq_len)
        return self.model(item_seq, item_seq_len)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        raise NotImplementedError("RecBole's models give the vector at the last item alone: call the model itself")
