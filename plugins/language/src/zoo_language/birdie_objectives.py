"""Birdie's training objectives: from a text to (input, label), draw by draw as the original makes them.

Paper: Blouir et al., "Birdie: Advancing State Space Models with Reward-Driven Objectives and Curricula", arXiv
2411.01030, section 3.2 and appendix A. Original: samblouir/birdie @ b81f78e (``birdie_rl/objectives``). Every call
reseeds numpy's default generator, so a text and a seed give the same sample.

``remaining_space`` counts input and label together. A paradigm string in front of the input tells the model which
objective it is. All lengths are in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ATTEMPTS = 100


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class CharacterTokenizer:
    """One token a character, its code point; what the golden files use."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True)
class Sample:
    """``unused_input_ids`` is what is left of the text for the next sample."""

    input_ids: list[int]
    label_ids: list[int]
    unused_input_ids: list[int]


class _Draws:
    """What the objectives need of a text: its tokens, the paradigm's tokens, a fresh generator, the space."""

    def __init__(self, text: str, tokenizer: Tokenizer, paradigm: str, space: int, seed: int) -> None:
        self.tokenizer, self.space = tokenizer, space
        self.tokens = tokenizer.encode(text)
        self.paradigm = tokenizer.encode(paradigm)
        self.random = np.random.default_rng(seed)

    def rate(self, corruption: float) -> float:
        return float(self.random.uniform(0.5 * corruption, min(0.95, 2 * corruption)))


def next_token_prediction(
    text: str, tokenizer: Tokenizer, remaining_space: int, rng_seed: int = 0, paradigm: str = "<|NTP|>"
) -> Sample:
    """The text itself, once as input and once as label."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    used = max(0, (remaining_space - len(d.paradigm)) // 2)
    return Sample(d.paradigm + d.tokens[:used], d.tokens[:used], d.tokens[used:])


def copying(
    text: str, tokenizer: Tokenizer, remaining_space: int, rng_seed: int = 0, paradigm: str = "<|COPY|>"
) -> Sample:
    """Say the text again."""
    return next_token_prediction(text, tokenizer, remaining_space, rng_seed, paradigm)


def prefix_language_modeling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int,
    rng_seed: int = 0,
    prefix_fraction: float = 0.75,
    paradigm_str: str = "<|PREFIX LM|>",
) -> Sample:
    """Continue the text after a prefix of it."""
    d = _Draws(text, tokenizer, paradigm_str, remaining_space, rng_seed)
    used = d.tokens[: max(0, remaining_space - len(d.paradigm))]
    cut = min(max(1, math.floor(prefix_fraction * len(used))), max(1, len(used) - 1))
    return Sample(d.paradigm + used[:cut], used[cut:], d.tokens[len(used) :])


def infilling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int,
    rng_seed: int = 0,
    corruption_rate: float = 0.15,
    mean_tokens_per_span: float = 3.0,
    max_mask_spans: int = 20,
    paradigm: str = "<|INFILL|>",
) -> Sample:
    """Spans of the text are replaced by numbered marks; the label says what stood at each mark."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    limit = min(len(d.tokens), remaining_space - len(d.paradigm) - 16)
    mean = mean_tokens_per_span
    for _ in range(ATTEMPTS):
        source = list(d.paradigm)
        label: list[int] = []
        i = spans = 0
        while i < limit and spans < max_mask_spans:
            used = len(source) + len(label)
            if used >= remaining_space:
                break
            rate = d.rate(corruption_rate)
            length = np.clip(d.random.poisson(mean), max(1, mean / 3), max(1, 3 * mean))
            length = int(max(1, min(length, limit - i)))
            mark = tokenizer.encode(f" [[mask_{spans}]]")
            if (
                d.random.uniform() < rate / length
                and i + length <= limit
                and used + 2 * len(mark) + length <= remaining_space
            ):
                source += mark
                label += mark + d.tokens[i : i + length]
                i += length
                spans += 1
            elif used + 1 <= remaining_space:
                source.append(d.tokens[i])
                i += 1
            else:
                break
        if spans:
            return Sample(source, label, d.tokens[i:])
    raise ValueError(f"no span was masked in {ATTEMPTS} attempts: the text or remaining_space is too small")


def autoencoding(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int,
    rng_seed: int = 0,
    corruption_rate: float = 0.5,
    tokens_per_mask: int = 3,
    paradigm_prompt: str = "<|AUTOENCODE|>",
) -> Sample:
    """Spans of the text are replaced by numbered marks; the label is the whole text."""
    d = _Draws(text, tokenizer, paradigm_prompt, remaining_space, rng_seed)
    limit = min(len(d.tokens), remaining_space - len(d.paradigm) - 16)
    low, high = max(1, tokens_per_mask // 3), max(1, 3 * tokens_per_mask)
    for _ in range(ATTEMPTS):
        source = list(d.paradigm)
        i = spans = 0
        while i < limit:
            if len(source) + i >= remaining_space:
                break
            rate = d.rate(corruption_rate)
            length = int(max(1, min(np.clip(d.random.poisson(tokens_per_mask), low, high), limit - i)))
            mark = tokenizer.encode(f" [[mask_{spans}]]")
            if d.random.uniform() < rate / length and len(source) + len(mark) + i + length <= remaining_space:
                source += mark
                i += length
                spans += 1
            elif len(source) + 1 + i + 1 <= remaining_space:
                source.append(d.tokens[i])
                i += 1
            else:
                break
        if spans:
            return Sample(source, d.tokens[:i], d.tokens[i:])
    raise ValueError(f"no span was masked in {ATTEMPTS} attempts: the text or remaining_space is too small")


def autoencoding_with_deshuffling(
    text: str, tokenizer: Tokenizer, remaining_space: int, rng_seed: int = 0, **settings: Any
) -> Sample:
    """Autoencoding under its own paradigm. The original's shuffle settings do nothing, and neither do they here."""
    settings = {k: v for k, v in settings.items() if "shuffle" not in k}
    settings.setdefault("paradigm_prompt", "<|AUTOENCODE + DESHUFFLE|>")
    return autoencoding(text, tokenizer, remaining_space, rng_seed, **settings)


def deshuffling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int,
    rng_seed: int = 0,
    percentage_to_shuffle: float = 0.75,
    paradigm: str = "<|DESHUFFLE|>",
) -> Sample:
    """A share of the text's characters change places; the label is the text."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    used = d.tokens[: max(0, int(0.9 * (remaining_space // 2) - len(d.paradigm)))]
    letters = np.array(list(tokenizer.decode(used)))
    index = d.random.choice(len(letters), int(len(letters) * percentage_to_shuffle), replace=False)
    letters[index] = d.random.permutation(letters[index])
    return Sample(d.paradigm + tokenizer.encode("".join(letters)), used, d.tokens[len(used) :])


def selective_copying(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int,
    rng_seed: int = 0,
    corruption_rate: float = 0.5,
    tokens_per_mask: int = 8,
    min_delimiter_prefix_length: int = 8,
    max_delimiter_prefix_length: int = 64,
    min_delimiter_suffix_length: int = 8,
    max_delimiter_suffix_length: int = 64,
    min_context_content_length: int = 10,
    shuffle: bool = True,
    format_style: str = "query_context",
    paradigm_prompt: str = "<|Selective Copying|>",
) -> Sample:
    """Find what stands between given delimiters in the text, for several pairs of delimiters at once."""
    d = _Draws(text, tokenizer, paradigm_prompt, remaining_space, rng_seed)
    encode = tokenizer.encode
    opened, closed, end = encode("\n\n[ctx]\n"), encode("\n[/ctx]"), encode("\n\n[done]")
    fixed = len(d.paradigm) + len(opened) + len(closed) + len(end)
    limit = min(len(d.tokens), remaining_space - fixed - 38)
    low, high = max(1, tokens_per_mask // 3), max(1, 3 * tokens_per_mask)
    least_prefix, least_suffix = min_delimiter_prefix_length, min_delimiter_suffix_length

    def query(j: int, span: tuple[list[int], list[int], list[int]]) -> list[int]:
        prefix, _, suffix = span
        return encode(f"\n\n[find {j}]\n") + prefix + encode("\n[sep]\n") + suffix + encode(f"\n[/find {j}]")

    def answer(j: int, span: tuple[list[int], list[int], list[int]]) -> list[int]:
        return encode(("\n\n" if j else "") + f"[res {j}]\n") + span[1]

    for _ in range(ATTEMPTS):
        spans: list[tuple[list[int], list[int], list[int]]] = []
        taken = 0
        i = least_prefix
        while i <= limit - least_suffix - low:
            length = int(min(np.clip(d.random.poisson(tokens_per_mask), low, high), limit - least_suffix - i))
            rate = d.rate(corruption_rate)
            if d.random.uniform() >= rate:
                i += int(d.random.integers(1, low + 1))
                continue
            before = int(d.random.integers(least_prefix, min(i, max_delimiter_prefix_length) + 1))
            after = int(d.random.integers(least_suffix, min(limit - i - length, max_delimiter_suffix_length) + 1))
            span = (
                d.tokens[i - before : i],
                d.tokens[i : i + length],
                d.tokens[i + length : i + length + after],
            )
            cost = len(query(len(spans), span)) + len(answer(len(spans), span))
            if fixed + 10 + taken + cost > remaining_space:
                break
            spans.append(span)
            taken += cost
            i += length + after + int(d.random.integers(1, max(1, least_prefix // 2) + 1))
        if not spans:
            continue
        order = d.random.permutation(len(spans)) if shuffle else np.arange(len(spans))
        queries, answers = [], []
        for j, index in enumerate(order):
            queries += query(j, spans[index])
            answers += answer(j, spans[index])
        room = min(limit, remaining_space - fixed - len(queries) - len(answers))
        if room < min_context_content_length:
            continue
        context = opened + d.tokens[:room] + closed
        body = queries + context if format_style == "query_context" else context + queries
        return Sample(d.paradigm + body, answers + end, d.tokens[room:])
    raise ValueError(f"no span was chosen in {ATTEMPTS} attempts: the text or remaining_space is too small")


OBJECTIVES: dict[str, Callable[..., Sample]] = {
    "next_token_prediction": next_token_prediction,
    "copying": copying,
    "prefix_language_modeling": prefix_language_modeling,
    "infilling": infilling,
    "deshuffling": deshuffling,
    "autoencoding": autoencoding,
    "autoencoding_with_deshuffling": autoencoding_with_deshuffling,
    "selective_copying": selective_copying,
}


def objective(name: str, config: Mapping[str, Any], tokenizer: Tokenizer) -> Callable[[str], Sample]:
    """An objective with its settings: a function of the text. Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; Birdie has {', '.join(OBJECTIVES)}")
    return lambda text: OBJECTIVES[name](text, tokenizer, **config)


class Packer:
    """Several samples a row, rows filled best-fit: what the trainer reads.

    A row holds ``input, start, label[:-1]`` of each sample; labels stand from the start token on, -100 elsewhere;
    ``segment_ids`` count samples from 1; ``attention_mask`` is 1 on inputs (read in both directions), 3 on what is
    generated, 0 on padding. Original: ``pipeline/packer_batcher2.py``.
    """

    def __init__(
        self,
        batch_size: int,
        sequence_length: int,
        minimum_sequence_length: int,
        start_generating_id: int = 2,
        max_samples_per_packer: int | None = None,
    ) -> None:
        self.length, self.minimum, self.start = sequence_length, minimum_sequence_length, start_generating_id
        self.most = max_samples_per_packer
        shape = (batch_size, sequence_length)
        self.rows = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "attention_mask")}
        self.rows["label_ids"] = np.full(shape, -100, np.int32)
        self.used, self.samples = [0] * batch_size, [0] * batch_size

    def _row(self, needed: int) -> int | None:
        """The row with the least space left that still fits; the first on ties."""
        fits = [
            (self.length - used, row)
            for row, used in enumerate(self.used)
            if needed <= self.length - used and (self.most is None or self.samples[row] < self.most)
        ]
        return min(fits)[1] if fits else None

    def can_accept(self, input_ids: Sequence[int], label_ids: Sequence[int]) -> bool:
        if not len(input_ids) or not len(label_ids):
            return False
        return self._row(len(input_ids) + len(label_ids)) is not None

    def add(self, input_ids: Sequence[int], label_ids: Sequence[int]) -> bool:
        """Place a sample; returns whether the batch is ready. Raises ValueError for one that does not fit."""
        if not self.can_accept(input_ids, label_ids):
            raise ValueError(f"a sample of {len(input_ids)} + {len(label_ids)} tokens fits in no row")
        row = self._row(len(input_ids) + len(label_ids))
        assert row is not None
        start, middle = self.used[row], self.used[row] + len(input_ids)
        end = middle + len(label_ids)
        self.samples[row] += 1
        self.rows["input_ids"][row, start:end] = [*input_ids, self.start, *label_ids[:-1]]
        self.rows["label_ids"][row, middle:end] = label_ids
        self.rows["segment_ids"][row, start:end] = self.samples[row]
        self.rows["attention_mask"][row, start:middle] = 1
        self.rows["attention_mask"][row, middle:end] = 3
        self.used[row] = end
        return self.ready

    @property
    def ready(self) -> bool:
        return all(self.length - used <= self.minimum for used in self.used)

    def pop(self) -> dict[str, np.ndarray]:
        """The batch, (rows, length) int32 each; the packer starts anew."""
        rows = self.rows
        self.__init__(len(self.used), self.length, self.minimum, self.start, self.most)  # type: ignore[misc]
        return rows
