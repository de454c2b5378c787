"""What every sequential recommender of this plugin is: items in, scores over all items out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import Linear, linear
from zoo_registry import errors

from .last import Dropout, rows_at

LossType = Literal["CE", "BPR"]
#: What a user is to a recurrent recommender: one dictionary of tensors a layer, each (batch, ...), of fixed size.
UserState = list[dict[str, Tensor]]


class SequentialRecommender(nn.Module):
    """Next-item prediction: encode a history, score every item by the product with its embedding.

    Item 0 is padding. Histories are right-padded with 0 to ``max_length``. Subclasses implement :meth:`encode` and,
    where a user can be held as a state, :meth:`init_user` and :meth:`step`.
    """

    item_embedding: nn.Embedding
    #: True where :meth:`step` gives what :meth:`encode` of the whole history gives, at constant cost.
    recurrent = False
    #: Whether :meth:`encode` needs ``times``.
    reads_times = False
    #: The (first, last) second that were 0 and 1 in training, None for a model of raw seconds.
    time_scale: Sequence[float] | None = None
    #: What a baseline was built from (see :mod:`zoo_recommendation.baselines`); the zoo's models have a card instead.
    built_from: Mapping[str, Any] | None = None

    def __init__(self, n_items: int, hidden_size: int, max_length: int, loss_type: LossType = "CE") -> None:
        super().__init__()
        if loss_type not in ("CE", "BPR"):
            raise errors.BadArgument(
                f"loss_type is {loss_type!r}; expected 'CE' (cross entropy) or 'BPR'",
                argument="loss_type",
                accepted=["CE", "BPR"],
            )
        at_least_one(hidden_size=hidden_size, max_length=max_length)
        if n_items < 2:
            raise ValueError(f"n_items is {n_items}; it counts the padding item 0 and needs at least one real item")
        self.n_items, self.hidden_size, self.max_length, self.loss_type = n_items, hidden_size, max_length, loss_type
        self.item_embedding = nn.Embedding(n_items, hidden_size, padding_idx=0)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        """item_seq (batch, length) int64, times (batch, length) seconds or scaled; hidden (batch, length, hidden)."""
        raise NotImplementedError

    def encode_at(self, item_seq: Tensor, index: Tensor, times: Tensor | None = None) -> Tensor:
        """:meth:`encode` at the row ``index`` (batch,) of each history: (batch, hidden). Models with a way to leave
        out what that row does not read override this."""
        return rows_at(self.encode(item_seq, times), index)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, times: Tensor | None = None) -> Tensor:
        """The user's vector (batch, hidden): the encoding at the last item, ``item_seq_len - 1``.

        Raises ValueError for empty histories and unknown ids (on a CPU, uncompiled; elsewhere indexing fails).
        """
        self._check(item_seq, item_seq_len)
        return self.encode_at(item_seq, item_seq_len - 1, times)

    def _check(self, item_seq: Tensor, item_seq_len: Tensor) -> None:
        if item_seq.dim() != 2:
            raise ValueError(f"item_seq has shape {tuple(item_seq.shape)}; expected (batch, length)")
        if item_seq_len.shape != item_seq.shape[:1]:
            raise ValueError(
                f"item_seq_len has shape {tuple(item_seq_len.shape)}; expected ({item_seq.shape[0]},), one length a row"
            )
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(item_seq) is not Tensor
        if item_seq.device.type != "cpu" or traced or not item_seq_len.numel():
            return  # looking at values costs a transfer, or is not allowed
        if item_seq.is_floating_point() or item_seq_len.is_floating_point():
            raise ValueError(f"item_seq is {item_seq.dtype}, item_seq_len {item_seq_len.dtype}; expected integers")
        length = item_seq.shape[1]
        if not 1 <= int(item_seq_len.min()) <= int(item_seq_len.max()) <= length:
            row = int(((item_seq_len < 1) | (item_seq_len > length)).nonzero()[0])
            raise ValueError(
                f"item_seq_len is {int(item_seq_len[row])} in row {row}; expected 1 to {length}: a user without "
                "history has no vector"
            )
        if not 0 <= int(item_seq.min()) <= int(item_seq.max()) < self.n_items:
            wrong = item_seq[(item_seq < 0) | (item_seq >= self.n_items)]
            raise ValueError(
                f"item_seq holds the id {int(wrong[0])}; this model has the items 1 to {self.n_items - 1}, 0 is padding"
            )

    def scores(self, user: Tensor) -> Tensor:
        """(batch, hidden) to (batch, n_items): column 0 is the padding item, masked by whoever ranks."""
        return linear(user, self.item_embedding.weight)

    def loss(self, user: Tensor, target: Tensor, negative: Tensor | None = None) -> Tensor:
        """Cross entropy over all items (padding included, as the originals do), or BPR against ``negative``."""
        if self.loss_type == "CE":
            return F.cross_entropy(self.scores(user), target)
        if negative is None:
            raise ValueError("the BPR loss needs negative items: pass negative=(batch,) int64")
        positive_score = (user * self.item_embedding(target)).sum(-1)
        negative_score = (user * self.item_embedding(negative)).sum(-1)
        return -torch.log(1e-10 + torch.sigmoid(positive_score - negative_score)).mean()

    def init_user(self, batch: int) -> UserState:
        """Users without history."""
        raise NotImplementedError(f"{type(self).__name__} has no state of fixed size: recompute from the history")

    def step(self, item: Tensor, state: UserState) -> Tensor:
        """One more item for each user: item (batch,) int64; returns the user vectors, ``state`` moves in place."""
        raise NotImplementedError(f"{type(self).__name__} has no state of fixed size: recompute from the history")


class FeedForward(nn.Module):
    """``LN(drop(W2 drop(act(W1 x))) + x)``, hidden size 4D: the post-norm block of RecBole's transformers."""

    def __init__(self, hidden_size: int, dropout: float, activation: nn.Module, eps: float) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, 4 * hidden_size)
        self.fc2 = Linear(4 * hidden_size, hidden_size)
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.fc1(x)))
        return self.layer_norm(self.dropout(self.fc2(hidden)) + x)


def at_least_one(**sizes: int) -> None:
    """Raise BadArgument (a ValueError), naming it, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise errors.BadArgument(f"{name} is {size}; expected at least 1", argument=name, accepted=[])


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """RecBole's initialiser: normal weights of Linear and Embedding, zero biases, unit norms."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


#: What the originals' configuration files hold beside the model: RecBole's data, training and evaluation.
RUN_KEYS = frozenset(
    {
        "gpu_id", "log_wandb", "reproducibility", "seed", "state", "show_progress", "dataset", "USER_ID_FIELD",
        "ITEM_ID_FIELD", "TIME_FIELD", "load_col", "user_inter_num_interval", "item_inter_num_interval", "epochs",
        "train_batch_size", "learner", "learning_rate", "weight_decay", "eval_step", "stopping_step",
        "train_neg_sample_args", "train_from_scratch", "checkpoint_path", "eval_args", "metrics", "valid_metric",
        "eval_batch_size", "topk",
    }
)  # fmt: skip


def take(config: Mapping[str, Any], names: Mapping[str, str], system: str) -> dict[str, Any]:
    """The original's configuration under our argument names, without what is not of the model (:data:`RUN_KEYS`) and
    what is None (RecBole's value of a key that is not set); an unknown key is an error that names it."""
    config = {key: value for key, value in config.items() if key not in RUN_KEYS and value is not None}
    unknown = sorted(set(config) - set(names))
    if unknown:
        raise ValueError(f"{system} has no configuration key {', '.join(map(repr, unknown))}; known: {sorted(names)}")
    return {names[key]: value for key, value in config.items() if key in names}


def outputs(model: SequentialRecommender, user: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The originals' outputs that follow from the user vector: full scores, scores of candidates, the loss."""
    found = {"seq_output": user, "full_sort_scores": model.scores(user)}
    if "cand_items" in inputs:
        found["predict"] = (user * model.item_embedding(inputs["cand_items"])).sum(-1)
    if "pos_items" in inputs:
        found["loss"] = model.loss(user, inputs["pos_items"], inputs.get("cand_items")).reshape(1)
    return found
