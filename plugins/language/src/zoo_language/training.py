"""Training a causal language model on the next token: windows of packed texts, the loss, and the score on others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.training import Shuffled
from zoo_registry import errors

from ._base import CausalLM, Rereading
from .corpus import Stream
from .scoring import Score, score, together


class Windows:
    """Batches of windows of ``length`` tokens, for :func:`zoo.training.fit`.

    The stream is cut into windows; an epoch has each once, and every batch moves its windows by a number of tokens of
    its own, so that texts are not cut at the same places again. Raises BadArgument for a stream shorter than a window.
    """

    def __init__(self, stream: Stream, length: int, batch_size: int, seed: int = 0) -> None:
        if len(stream) <= length:
            raise errors.BadArgument(
                f"the texts have {len(stream)} tokens; a window of {length} needs {length + 1}: give more texts, or a "
                "smaller length",
                argument="length",
                accepted=[],
            )
        self.stream, self.length = stream, length
        self.order = Shuffled((len(stream) - 1) // length, batch_size, seed)

    def __call__(self, index: int) -> dict[str, Tensor]:
        """``ids`` (batch, length + 1) int64; ``begins`` (batch, length) bool, True where another text begins."""
        shift = int(self.order.random(index).integers(self.length))
        last = len(self.stream) - self.length - 1
        rows = [self.stream.window(min(i * self.length + shift, last), self.length) for i in self.order(index)]
        ids, begins = ([torch.from_numpy(row[part]) for row in rows] for part in range(2))
        return {"ids": torch.stack(ids), "begins": torch.stack(begins)}


def next_token_loss(model: CausalLM, batch: Mapping[str, Tensor], *, recompute: bool = False) -> Tensor:
    """Mean cross-entropy in nats of each next token of ``ids`` (batch, length + 1), plus what the model adds to it in
    training (its ``learn``: balanced experts, scores of keys, early exits).

    ``begins`` (batch, length): texts of one row do not see each other where the model takes resets; elsewhere rows are
    read as one text, as the originals train. recompute: each row's logits are computed again in the backward pass.
    """
    ids, target = batch["ids"][:, :-1], batch["ids"][:, 1:]
    if learn := getattr(model, "learn", None):
        hidden, more = learn(ids)
    else:
        how = {"resets": batch["begins"]} if takes_resets(model) else {}
        hidden, more = model.backbone(ids, **how), None

    def nats(hidden: Tensor, target: Tensor) -> Tensor:
        logits = model.head(hidden)[..., : model.vocab_size]
        return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="sum")

    if recompute:
        rows = zip(hidden, target, strict=True)
        total = torch.stack([checkpoint(nats, *row, use_reentrant=False) for row in rows]).sum()
    else:
        total = nats(hidden, target)
    loss = total / target.numel()
    return loss if more is None else loss + more


def takes_resets(model: CausalLM) -> bool:
    """Whether texts that are packed into one row are kept apart."""
    return bool(getattr(model, "takes_resets", False))


def streams(model: CausalLM) -> bool:
    """Whether the model goes on from a state; others read their text again for each piece of it."""
    return bool(getattr(model, "streams", not isinstance(model, Rereading)))


@torch.no_grad()
def check_causal(model: CausalLM, length: int, name: str) -> None:
    """Raise BadArgument for a model that sees later tokens: that would make their prediction no task. ValueError, the
    model's own, where it cannot read ``length`` tokens."""
    ids = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    early = length - max(length // 10, 1)
    changed = ids.clone()
    changed[:, early:] = (changed[:, early:] + 1) % model.vocab_size
    training = model.training
    model.eval()
    before, after = (model.backbone(row)[:, :early].float() for row in (ids, changed))
    model.train(training)
    if early and float((before - after).abs().amax()) > 1e-4 * float(before.abs().amax()):
        raise errors.BadArgument(
            f"{name} is not causal as it is built: a later token changes what it says of those before, so it would be "
            "trained on what it sees. Look for an argument that keeps it from that (--set causal=true for HAX)",
            argument="name",
            accepted=[],
        )


def held_out_score(model: CausalLM, held: Stream, *, window: int, carry: bool) -> Score:
    """What ``zoo validate`` measures, on the texts of a stream."""
    return together(score(model, ids, text_bytes=size, window=window, carry_state=carry) for ids, size in held.texts())
