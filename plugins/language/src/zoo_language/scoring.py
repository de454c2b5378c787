"""How well a model predicts a text: log-likelihood in windows, the state carried from one to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import CausalLM

if TYPE_CHECKING:
    from .decode import Decoder


@dataclass(frozen=True)
class Score:
    """``nats``: negative log-likelihood of ``tokens`` predicted tokens; ``bytes``: of the text they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nats / self.tokens) if self.tokens else float("nan")

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, and with compressors."""
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")


def together(scores: Iterable[Score]) -> Score:
    """The score of several texts."""
    parts = [(one.nats, one.tokens, one.bytes) for one in scores]
    return Score(*(sum(part) for part in zip(*parts, strict=True))) if parts else Score(0.0, 0, 0)


@torch.no_grad()
def score(
    model: CausalLM,
    ids: Sequence[int] | Tensor | np.ndarray,
    *,
    text_bytes: int,
    window: int = 2048,
    carry_state: bool = True,
    start: int | None = None,
    decoder: Decoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score a text, ``window`` tokens at a time.

    carry_state: go on from the state of the window before (a recurrent model's context has no end); without it every
    window starts anew, as transformers are scored. start: a token to condition the first window on, such as the
    end-of-text token; without one the first token is given and not scored. decoder: read token by token with it (what
    quantised weights cost). Raises ValueError for texts of fewer than two tokens, ids that the model does not have, a
    window below 1, and logits that are not numbers.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1")
    ids = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
    if start is not None:
        ids = torch.cat([torch.tensor([start]), ids])
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; scoring needs at least 2")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"the text has the token {wrong}; this model's ids are 0 to {model.vocab_size - 1}")
    state = model.init_state(1) if carry_state or decoder is not None else None
    nats, count = 0.0, 0
    for first in range(0, len(ids) - 1, window):
        piece = ids[first : first + window + 1].to(model.device)
        given, target = piece[:-1], piece[1:]
        if decoder is not None:
            state = state if carry_state or not first else model.init_state(1)
            assert state is not None
            logits = torch.cat([decoder.step(int(token), state) for token in given])[:, : model.vocab_size]
        else:
            logits = model(given[None], state=state)[0, :, : model.vocab_size].float()
        nats += float(F.cross_entropy(logits, target, reduction="sum"))
        if not math.isfinite(nats):
            raise ValueError(f"the text's likelihood is {nats} nats: the model's weights are broken, or overflow")
        count += len(target)
        if progress is not None:
            progress(count, len(ids) - 1)
    return Score(nats, count, text_bytes)


@torch.no_grad()
def continuation_loglikelihood(
    model: CausalLM, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """(log-probability in nats, whether greedy decoding would give it) of ``continuation`` after ``context``."""
    if not context or not continuation:
        raise ValueError("context and continuation each need at least one token")
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    logits = model(ids[:, :-1])[0, len(context) - 1 :, : model.vocab_size].float()
    target = ids[0, len(context) :]
    logprob = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(logprob), bool((logits.argmax(-1) == target).all())
