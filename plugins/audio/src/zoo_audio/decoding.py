"""From the encoder's positions to tokens: CTC (greedy, prefix beam), the autoregressive decoder (greedy, beam), and
where in the audio each token is.

CTC: Graves et al., ICML 2006; prefix beam search: Hannun et al., arXiv 1408.2873, without a language model.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .samba_asr import SambaASR, TextState

#: Tokens of the longest transcript of one piece of audio, as in the speech models of this kind.
MAX_TOKENS = 448


@dataclass
class Hypothesis:
    """Tokens, the encoder position at which each begins (None where that is not known), and its score: the
    log-probability of the tokens (for beams of the decoder normalised by length, see :func:`decode_beam`)."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] | None = None
    score: float = 0.0


class CTCGreedy:
    """The most likely symbol of every position, repetitions merged, blanks dropped; position by position."""

    def __init__(self, blank: int = 0) -> None:
        self.blank, self.last, self.position = blank, blank, 0
        self.found = Hypothesis([], [])

    def push(self, logits: Tensor) -> list[tuple[int, int]]:
        """(positions, V) logits that follow those before; returns the new (token, position) pairs."""
        best = logits.float().log_softmax(-1).max(-1)
        new = []
        for value, symbol in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            self.found.score += value
            if symbol not in (self.blank, self.last):
                new.append((symbol, self.position))
            self.last, self.position = symbol, self.position + 1
        assert self.found.positions is not None
        self.found.tokens += [token for token, _ in new]
        self.found.positions += [position for _, position in new]
        return new


def ctc_greedy(logits: Tensor, blank: int = 0) -> Hypothesis:
    """(positions, V) logits to the greedy path's tokens; its score is the path's log-probability."""
    greedy = CTCGreedy(blank)
    greedy.push(logits)
    return greedy.found


def ctc_beam(logits: Tensor, width: int = 8, *, blank: int = 0, symbols: int = 16) -> list[Hypothesis]:
    """The ``width`` most likely token sequences, each summed over all of its alignments, best first.

    ``symbols``: how many of a position's symbols are tried.
    """
    if width < 1:
        raise ValueError(f"the beam width is {width}; expected 1 or more")
    log_probs = logits.float().log_softmax(-1)
    never = -math.inf
    # prefix -> (log p of it with a blank last, with its own last token last)
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, never)}
    for row in log_probs:
        top = row.topk(min(symbols, len(row)))
        nearby = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        silent = float(row[blank])
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], with_blank: float, with_token: float, into: dict = grown) -> None:
            old = into.get(prefix, (never, never))
            into[prefix] = (_add(old[0], with_blank), _add(old[1], with_token))

        for prefix, (p_blank, p_token) in beams.items():
            both = _add(p_blank, p_token)
            add(prefix, both + silent, p_token + float(row[prefix[-1]]) if prefix else never)
            for symbol, value in nearby:
                if symbol != blank:
                    # The same token again needs a blank between.
                    before = p_blank if prefix and symbol == prefix[-1] else both
                    add((*prefix, symbol), never, before + value)
        possible = [item for item in grown.items() if _add(*item[1]) > never]
        ranked = sorted(possible, key=lambda item: -_add(*item[1]))
        beams = dict(ranked[:width])
    return [Hypothesis(list(prefix), align(log_probs, prefix, blank), _add(*p)) for prefix, p in beams.items()]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))"""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def align(log_probs: Tensor, tokens: list[int] | tuple[int, ...], blank: int = 0) -> list[int] | None:
    """The position at which each token begins on the best CTC path that writes exactly ``tokens``; None if they do not
    fit into the positions."""
    if not tokens:
        return []
    states = [blank]
    for token in tokens:
        states += [token, blank]
    repeated = sum(a == b for a, b in itertools.pairwise(tokens))
    if len(log_probs) < len(tokens) + repeated:
        return None
    index = torch.tensor(states, device=log_probs.device)
    emitted = log_probs[:, index].double().cpu()
    # A state is reached from itself, the one before, or over a blank between two different tokens.
    jump = torch.tensor(
        [i >= 2 and states[i] != blank and states[i] != states[i - 2] for i in range(len(states))], dtype=torch.bool
    )
    score = torch.full((len(states),), -math.inf, dtype=torch.float64)
    score[:2] = emitted[0, :2]
    came = torch.zeros(len(log_probs), len(states), dtype=torch.long)
    for t in range(1, len(log_probs)):
        ways = torch.stack([score, _shifted(score, 1), _shifted(score, 2).masked_fill(~jump, -math.inf)])
        best = ways.max(0)
        came[t], score = best.indices, best.values + emitted[t]
    at = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    first = [0] * len(tokens)
    for t in range(len(log_probs) - 1, -1, -1):
        if at % 2:
            first[at // 2] = t
        at -= int(came[t, at])
    return first


def _shifted(score: Tensor, by: int) -> Tensor:
    return torch.cat([score.new_full((by,), -math.inf), score[:-by]])


# -- the autoregressive decoder ----------------------------------------------------------------------------------------


def heard(model: SambaASR, hidden: Tensor) -> TextState:
    """The decoder's state after audio (1, positions, dim) and no text. Raises ValueError for a model without
    decoder."""
    if model.dec is None:
        raise ValueError("this model has no decoder; decode it by its CTC head")
    state = model.dec.init_state(hidden.shape[0])
    model.dec.listen(hidden, state)
    return state


def next_log_probs(model: SambaASR, tokens: Tensor, state: TextState) -> Tensor:
    """Log-probabilities of what follows ``tokens`` (batch,); padding never does. ``state`` moves on in place."""
    assert model.dec is not None
    assert model.head is not None
    logits = model.head(model.dec.step(tokens, state)).float()
    logits[:, model.pad_id] = -math.inf
    logits[:, model.bos_id] = -math.inf
    return logits.log_softmax(-1)


def decode_greedy(
    model: SambaASR, hidden: Tensor, *, prefix: list[int] | None = None, state: TextState | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Hypothesis:  # fmt: skip
    """The most likely token at every step until the end token. hidden: (1, positions, dim), or ``state``, that of
    :func:`heard` (it is used up). prefix: tokens that the text begins with."""
    state = heard(model, hidden) if state is None else state
    found = Hypothesis(list(prefix or []))
    for token in [model.bos_id, *found.tokens]:
        log_probs = next_log_probs(model, torch.tensor([token], device=hidden.device), state)
    while len(found.tokens) < max_tokens:
        value, index = log_probs[0].max(-1)
        found.score += float(value)
        if int(index) == model.eos_id:
            break
        found.tokens.append(int(index))
        log_probs = next_log_probs(model, index[None], state)
    return found


def decode_beam(
    model: SambaASR, hidden: Tensor, width: int = 5, *, max_tokens: int = MAX_TOKENS, alpha: float = 0.6
) -> list[Hypothesis]:
    """Beam search, best first; scores are the log-probability over ((5 + length) / 6) ^ ``alpha`` (Wu et al., arXiv
    1609.08144, equation 14). Every hypothesis carries its own states."""
    if width < 1:
        raise ValueError(f"the beam width is {width}; expected 1 or more")
    state = heard(model, hidden)
    texts: list[list[int]] = [[]]
    scores = torch.zeros(1, device=hidden.device)
    tokens = torch.tensor([model.bos_id], device=hidden.device)
    done: list[Hypothesis] = []

    def normal(score: float, length: int) -> float:
        return score / ((5 + length) / 6) ** alpha

    for _ in range(max_tokens + 1):
        log_probs = next_log_probs(model, tokens, state) + scores[:, None]
        best = log_probs.flatten().topk(min(2 * width, log_probs.numel()))
        rows: list[int] = []
        ids: list[int] = []
        kept: list[float] = []
        grown: list[list[int]] = []
        for value, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value == -math.inf or len(rows) == width:
                break
            row, token = divmod(flat, log_probs.shape[1])
            if token == model.eos_id:
                done.append(Hypothesis(texts[row], score=normal(value, len(texts[row]) + 1)))
            else:
                rows.append(row)
                ids.append(token)
                kept.append(value)
                grown.append([*texts[row], token])
        done = sorted(done, key=lambda h: -h.score)[:width]
        # No open hypothesis can still overtake: scores only fall, and length helps at most as the longest would.
        if not rows or (len(done) == width and normal(kept[0], max_tokens) < done[-1].score):
            break
        texts, scores = grown, torch.tensor(kept, device=hidden.device)
        tokens = torch.tensor(ids, device=hidden.device)
        state = state.select(torch.tensor(rows, device=hidden.device))
    if not done:
        done = [Hypothesis(t, score=normal(float(s), len(t))) for t, s in zip(texts, scores, strict=True)]
    return sorted(done, key=lambda h: -h.score)
