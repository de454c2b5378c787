"""Choosing tokens and going on from a state, one text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mmmamba import MmMamba, State


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    temperature: 0 takes the most likely token; top_k: keep the k most likely (0: all); top_p: keep the most likely
    tokens that together reach this probability; repetition_penalty: above 1 makes tokens of the answer so far less
    likely (Keskar et al., arXiv 1909.05858, section 4.1). Filters apply in this order: penalty, temperature, top_k,
    top_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")


def choose(logits: Tensor, seen: Sequence[int], how: Sampling, generator: torch.Generator) -> int:
    """The next token: logits (vocabulary,), ``seen`` the answer's tokens so far."""
    logits = logits.float()
    if how.repetition_penalty != 1.0 and seen:
        index = torch.as_tensor(sorted(set(seen)), device=logits.device)
        values = logits[index]
        weaker = torch.where(values < 0, values * how.repetition_penalty, values / how.repetition_penalty)
        logits = logits.index_put((index,), weaker)
    if how.temperature == 0:
        return int(logits.argmax())
    logits = logits / how.temperature
    if 0 < how.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    if how.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(0)
        drop = probability.cumsum(0) - probability >= how.top_p  # the token that crosses the line stays
        logits = logits.scatter(0, order, ordered.masked_fill(drop, -torch.inf))
    return int(torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator))


@torch.no_grad()
def stream(
    model: MmMamba,
    state: State,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """Yield the tokens that follow what ``state`` (of one text, prefilled) has read; the state moves on with them.

    Ends before a stop token, or after ``max_new_tokens``. The last token that was yielded is read, too, so that the
    state can go on from there.
    """
    if state.logits is None:
        raise ValueError("the state has read nothing: prefill it first")
    if state.logits.shape[0] != 1:
        raise ValueError(f"the state holds {state.logits.shape[0]} texts; expected 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    generator = torch.Generator().manual_seed(sampling.seed)
    seen: list[int] = []
    for _ in range(max_new_tokens):
        assert state.logits is not None
        token = choose(state.logits[0], seen, sampling, generator)
        if token in stop_tokens:
            return
        seen.append(token)
        model.step(torch.tensor([token], device=model.device), state)
        yield token
