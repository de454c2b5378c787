"""Birdie's training objectives: from a text to (input, label), draw by draw as the original makes them.

Paper: Blouir et al., "Birdie: Advancing State Space Models with Reward-Driven Objectives and Curricula", arXiv
2411.01030, section 3.2 and appendix A. Original: samblouir/birdie @ b81f78e (``birdie_rl/objectives``). Every call
reseeds numpy's default generator, so a text and a seed give the same sample.

``remaining_space`` counts input and label together. A paradigm string in front of the input tells the model which
objective it is. All lengths are in tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ATTEMPTS = 100
SEED = 42  # the original's default


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


class NoSample(ValueError):
    """No sample can be made of a text; ``sample`` is what the original hands back then (None: nothing)."""

    def __init__(self, message: str, sample: Sample | None = None) -> None:
        super().__init__(message)
        self.sample = sample


class _Draws:
    """What the objectives need of a text: its tokens, the paradigm's tokens, a fresh generator, the space."""

    def __init__(self, text: str, tokenizer: Tokenizer, paradigm: str, space: int, seed: int) -> None:
        self.tokenizer, self.space = tokenizer, space
        self.tokens = tokenizer.encode(text)
        self.paradigm = tokenizer.encode(paradigm)
        self.random = np.random.default_rng(seed)

    def limit(self) -> int:
        """How many tokens of text are looked at. Raises NoSample where there is no room for any."""
        limit = min(len(self.tokens), self.space - len(self.paradigm) - 16)
        if limit <= 0:
            raise NoSample("the text or remaining_space is too small", Sample([], [], self.tokens))
        return limit

    def failed(self, what: str, attempts: int, given: Sequence[int] = ()) -> NoSample:
        """The error after the last attempt; ``given``: the input that the original hands back nevertheless."""
        message = f"{what} in {attempts} attempts: the text or remaining_space is too small"
        return NoSample(message, Sample(list(given), [], self.tokens))

    def rate(self, corruption: float) -> float:
        return float(self.random.uniform(0.5 * corruption, min(0.95, 2 * corruption)))


def next_token_prediction(
    text: str, tokenizer: Tokenizer, remaining_space: int = -1, rng_seed: int = SEED, paradigm: str = "<|NTP|>"
) -> Sample:
    """The text itself, once as input and once as label."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    used = max(0, (remaining_space - len(d.paradigm)) // 2)
    return Sample(d.paradigm + d.tokens[:used], d.tokens[:used], d.tokens[used:])


def copying(
    text: str, tokenizer: Tokenizer, remaining_space: int = -1, rng_seed: int = SEED, paradigm: str = "<|COPY|>"
) -> Sample:
    """Say the text again."""
    sample = next_token_prediction(text, tokenizer, remaining_space, rng_seed, paradigm)
    return _fitting(sample, remaining_space)


def _fitting(sample: Sample, space: int) -> Sample:
    needed = len(sample.input_ids) + len(sample.label_ids)
    if needed > space:
        raise NoSample(f"the sample needs {needed} tokens, remaining_space is {space}")
    return sample


def prefix_language_modeling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int = -1,
    rng_seed: int = SEED,
    prefix_fraction: float = 0.75,
    paradigm_str: str = "<|PREFIX LM|>",
) -> Sample:
    """Continue the text after a prefix of it."""
    d = _Draws(text, tokenizer, paradigm_str, remaining_space, rng_seed)
    space = remaining_space - len(d.paradigm)
    used = d.tokens[: max(0, space)]
    if space < 2 or len(used) < 2:
        given = d.paradigm if space < 2 else []
        raise NoSample("a prefix and what follows it need two tokens of text", Sample(given, [], d.tokens))
    cut = min(max(1, math.floor(prefix_fraction * len(used))), len(used) - 1)
    return Sample(d.paradigm + used[:cut], used[cut:], d.tokens[len(used) :])


def infilling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int = -1,
    rng_seed: int = SEED,
    corruption_rate: float = 0.15,
    mean_tokens_per_span: float = 3.0,
    max_mask_spans: int = 20,
    mask_prefix: str = " [[mask_",
    mask_suffix: str = "]]",
    paradigm: str = "<|INFILL|>",
    paradigm_end: str = "",
    max_attempts: int = ATTEMPTS,
) -> Sample:
    """Spans of the text are replaced by numbered marks; the label says what stood at each mark."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    end = tokenizer.encode(paradigm_end)
    limit = d.limit()
    mean = mean_tokens_per_span
    for _ in range(max_attempts):
        source = list(d.paradigm)
        label: list[int] = []
        i = spans = 0
        while i < limit and spans < max_mask_spans:
            used = len(source) + len(label) + len(end)
            if used >= remaining_space:
                break
            rate = d.rate(corruption_rate)
            length = np.clip(d.random.poisson(mean), max(1, mean / 3), max(1, 3 * mean))
            length = int(max(1, min(length, limit - i)))
            mark = tokenizer.encode(f"{mask_prefix}{spans}{mask_suffix}")
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
            return Sample(source, label + end, d.tokens[i:])
    raise d.failed("no span was masked", max_attempts)


def autoencoding(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int = -1,
    rng_seed: int = SEED,
    corruption_rate: float = 0.5,
    tokens_per_mask: int = 3,
    mask_prefix: str = " [[mask_",
    mask_suffix: str = "]]",
    paradigm_prompt: str = "<|AUTOENCODE|>",
    paradigm_end: str = "",
    max_attempts: int = ATTEMPTS,
) -> Sample:
    """Spans of the text are replaced by numbered marks; the label is the whole text."""
    d = _Draws(text, tokenizer, paradigm_prompt, remaining_space, rng_seed)
    end = tokenizer.encode(paradigm_end)
    space = remaining_space - len(end)
    limit = d.limit()
    low, high = max(1, tokens_per_mask // 3), max(1, 3 * tokens_per_mask)
    for _ in range(max_attempts):
        source = list(d.paradigm)
        i = spans = 0
        while i < limit:
            if len(source) + i >= space:
                break
            rate = d.rate(corruption_rate)
            length = int(max(1, min(np.clip(d.random.poisson(tokens_per_mask), low, high), limit - i)))
            mark = tokenizer.encode(f"{mask_prefix}{spans}{mask_suffix}")
            if d.random.uniform() < rate / length and len(source) + len(mark) + i + length <= space:
                source += mark
                i += length
                spans += 1
            elif len(source) + 1 + i + 1 <= space:
                source.append(d.tokens[i])
                i += 1
            else:
                break
        if spans:
            return Sample(source, d.tokens[:i] + end, d.tokens[i:])
    raise d.failed("no span was masked", max_attempts)


def autoencoding_with_deshuffling(
    text: str, tokenizer: Tokenizer, remaining_space: int = -1, rng_seed: int = SEED, **settings: Any
) -> Sample:
    """Autoencoding under its own paradigm. The original's shuffle settings do nothing, and neither do they here."""
    settings.setdefault("paradigm_prompt", "<|AUTOENCODE + DESHUFFLE|>")
    return autoencoding(text, tokenizer, remaining_space, rng_seed, **settings)


def deshuffling(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int = -1,
    rng_seed: int = SEED,
    percentage_to_shuffle: float = 0.75,
    paradigm: str = "<|DESHUFFLE|>",
) -> Sample:
    """A share of the text's characters change places; the label is the text."""
    d = _Draws(text, tokenizer, paradigm, remaining_space, rng_seed)
    used = d.tokens[: max(0, int(0.9 * (remaining_space // 2) - len(d.paradigm)))]
    letters = np.array(list(tokenizer.decode(used)))
    moved = int(len(letters) * percentage_to_shuffle)
    if moved:
        index = d.random.choice(len(letters), moved, replace=False)
        letters[index] = d.random.permutation(letters[index])
    shuffled = tokenizer.encode("".join(letters.tolist()))
    return _fitting(Sample(d.paradigm + shuffled, used, d.tokens[len(used) :]), remaining_space)


def selective_copying(
    text: str,
    tokenizer: Tokenizer,
    remaining_space: int = -1,
    rng_seed: int = SEED,
    corruption_rate: float = 0.5,
    tokens_per_mask: int = 8,
    min_delimiter_prefix_length: int = 8,
    max_delimiter_prefix_length: int = 64,
    min_delimiter_suffix_length: int = 8,
    max_delimiter_suffix_length: int = 64,
    min_context_content_length: int = 10,
    shuffle: bool = True,
    format_style: str = "query_context",
    start_token_template: str = "find",
    result_token_template: str = "res",
    sep_token_template: str = "sep",
    context_token: str = "\n\n[ctx]\n",
    close_context_token: str = "\n[/ctx]",
    done_token: str = "\n\n[done]",
    paradigm_prompt: str = "<|Selective Copying|>",
    paradigm_end: str = "",
    max_attempts: int = ATTEMPTS,
) -> Sample:
    """Find what stands between given delimiters in the text, for several pairs of delimiters at once."""
    d = _Draws(text, tokenizer, paradigm_prompt, remaining_space, rng_seed)
    encode = tokenizer.encode
    opened, closed, done = encode(context_token), encode(close_context_token), encode(done_token)
    outside = len(d.paradigm) + len(opened) + len(closed) + len(done)
    limit = min(len(d.tokens), remaining_space - outside - 38)
    end = done + encode(paradigm_end)
    fixed = outside - len(done) + len(end)
    low, high = max(1, tokens_per_mask // 3), max(1, 3 * tokens_per_mask)
    least_prefix, least_suffix = min_delimiter_prefix_length, min_delimiter_suffix_length
    if limit < least_prefix + low + least_suffix:
        raise NoSample("the text or remaining_space is too small for one query", Sample([], [], d.tokens))

    def query(j: int, span: tuple[list[int], list[int], list[int]]) -> list[int]:
        prefix, _, suffix = span
        start, stop = f"\n\n[{start_token_template} {j}]\n", f"\n[/{start_token_template} {j}]"
        return encode(start) + prefix + encode(f"\n[{sep_token_template}]\n") + suffix + encode(stop)

    def answer(j: int, span: tuple[list[int], list[int], list[int]]) -> list[int]:
        return encode(("\n\n" if j else "") + f"[{result_token_template} {j}]\n") + span[1]

    for _ in range(max_attempts):
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
            if fixed + min_context_content_length + taken + cost > remaining_space:
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
    raise d.failed("no span was chosen", max_attempts, d.paradigm)


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
#: Fields of the original's configurations that change no sample.
UNUSED = {
    "objective", "maximum_remaining_space", "special_token_ids", "use_begin_generating_paradigm", "paradigm_suffix",
    "separator", "gap_between_spans", "deshuffling_percentage", "objective_verbosity",
}  # fmt: skip
#: Of every objective: the text's length in tokens and the space, outside which none is tried. -1: no bound.
BOUNDS = {"minimum_sequence_length": 0, "maximum_sequence_length": -1, "minimum_remaining_space": 1}


def objective(name: str, config: Mapping[str, Any], tokenizer: Tokenizer) -> Callable[[str], Sample]:
    """An objective with its settings: a function of the text.

    Settings of other objectives are passed over, as in the original, whose mixtures share one set of them. Raises
    ValueError for an unknown objective or setting; the function raises :class:`NoSample` where a text gives none.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; Birdie has {', '.join(OBJECTIVES)}")
    own, every = _settings(name), set().union(*map(_settings, OBJECTIVES)) | UNUSED | set(BOUNDS)
    unknown = sorted(set(config) - every)
    if unknown:
        raise ValueError(f"the objective {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(own))}")
    bounds = BOUNDS | {k: v for k, v in config.items() if k in BOUNDS}
    space = config.get("remaining_space", -1)

    def run(text: str) -> Sample:
        if 0 <= space < bounds["minimum_remaining_space"]:
            raise NoSample(f"remaining_space is {space}, minimum_remaining_space {bounds['minimum_remaining_space']}")
        length = len(tokenizer.encode(text))
        least, most = bounds["minimum_sequence_length"], bounds["maximum_sequence_length"]
        if length < least:
            raise NoSample(f"the text has {length} tokens, minimum_sequence_length is {least}")
        if 0 <= most < length:
            raise NoSample(f"the text has {length} tokens, maximum_sequence_length is {most}")
        return OBJECTIVES[name](text, tokenizer, **{k: v for k, v in config.items() if k in own})

    return run


def _settings(name: str) -> set[str]:
    """The names of an objective's settings."""
    function = autoencoding if name == "autoencoding_with_deshuffling" else OBJECTIVES[name]
    return set(inspect.signature(function).parameters) - {"text", "tokenizer"}
