"""One engine for every language model of the plugin: prefill in chunks, decode step by step with constant memory.

Rows of a batch never meet: each has its own state, history, random generator and end, so a prompt gives the same tokens
alone as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._base import CausalLM
from .state import State

if TYPE_CHECKING:
    from .decode import Decoder
    from .drafts import Draft


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy.

    temperature: 0 takes the most likely token; top_k: keep the k most likely (0: all); top_p: keep the most likely
    tokens that together reach this probability; min_p: keep tokens at least this share of the most likely one;
    repetition_penalty: above 1 makes tokens seen in the text (prompt included) less likely (Keskar et al., CTRL, arXiv
    1909.05858, section 4.1). Filters apply in this order: penalty, temperature, top_k, top_p, min_p. seed: one for all
    rows (row r uses seed + r), or one a row.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        limits: list[tuple[str, float, bool, str]] = [
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "from 0, below 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
        ]
        for name, value, right, expected in limits:
            if not right:
                raise ValueError(f"{name} is {value}; expected {expected}")

    def row_seed(self, row: int) -> int:
        return self.seed + row if isinstance(self.seed, int) else int(self.seed[row])


def choose(logits: Tensor, seen: Sequence[int], how: Sampling, generator: torch.Generator) -> int:
    """The next token of one text: logits (vocabulary,), ``seen`` its tokens so far."""
    logits = logits.float()
    if how.repetition_penalty != 1.0 and len(seen):
        index = torch.as_tensor(sorted(set(seen)), device=logits.device)
        values = logits[index]
        logits = logits.clone()
        logits[index] = torch.where(values < 0, values * how.repetition_penalty, values / how.repetition_penalty)
    if how.temperature == 0:
        return int(logits.argmax())
    logits = logits / how.temperature
    if 0 < how.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    if how.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(0).cumsum(0)
        drop = mass - ordered.softmax(0) >= how.top_p  # the token that crosses the line stays
        logits = logits.scatter(0, order, ordered.masked_fill(drop, -torch.inf))
    probability = logits.softmax(0)
    if how.min_p > 0:
        probability = probability * (probability >= how.min_p * probability.max())
    return int(torch.multinomial(probability.cpu(), 1, generator=generator))


@dataclass
class Text:
    """One row's result. ``tokens``: generated ids, no stop token; ``reason``: "stop", "length" or "string"."""

    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    text: str | None = None  #: decoded, cut before a stop string; None without a tokenizer
    passes: int = 0  #: with a draft: passes of the model over trees or single tokens
    accepted: int = 0  #: with a draft: drafted tokens that were kept, so tokens = passes + accepted at most


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    state: State | None = None,
    decoder: Decoder | None = None,
    cuda_graphs: bool = False,
    speculative: Draft | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> tuple[list[Text], State]:
    """Continue texts. Returns the texts and the state after the last token that was read.

    prompts: token ids, one list a text; with ``state`` (one text a prompt) they continue what it has read and may be
    empty. stop_strings need ``decode`` (ids to text). decoder: what reads the tokens of a single text
    (:meth:`CausalLM.fast_decoder`); by itself a float32 model on a CPU decodes fused where it can.
    cuda_graphs: on a CUDA device, record a step for each batch size and replay it; elsewhere a message says that it
    does not apply. speculative: drafts trees of tokens that the model checks in one pass
    (:class:`zoo_language.drafts.NGramDraft`, :class:`~zoo_language.drafts.ModelDraft`); the tokens are those of plain
    decoding, row after row. on_token(row, token) is called as tokens come.
    """
    result: dict[str, Any] = {}
    for row, token in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        decode=decode,
        state=state,
        decoder=decoder,
        cuda_graphs=cuda_graphs,
        speculative=speculative,
        result=result,
    ):
        if on_token is not None:
            on_token(row, token)
    return result["texts"], result["state"]


@torch.no_grad()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    state: State | None = None,
    decoder: Decoder | None = None,
    cuda_graphs: bool = False,
    speculative: Draft | None = None,
    result: dict[str, Any] | None = None,
) -> Iterator[tuple[int, int]]:
    """Like :func:`generate`, but yields (row, token) as tokens come; ``result`` receives ``texts`` and ``state``."""
    from .decode import decoder_for
    from .graphs import graph_decoder_for

    _check(model, prompts, max_new_tokens, stop_strings, decode, state)
    rows = len(prompts)
    longest = max((len(p) for p in prompts), default=0)
    device = model.device
    if longest:
        ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.as_tensor(list(prompt), device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        state = model.prefill(ids, state=state, lengths=lengths)
    assert state is not None
    assert state.logits is not None
    texts = [Text() for _ in prompts]
    seen = [list(p) for p in prompts]
    generators = [torch.Generator().manual_seed(sampling.row_seed(i)) for i in range(rows)]
    alive = list(range(rows))  # rows of the batch that still grow; ``current`` holds their states in this order
    current, parked = state, {}
    fast = decoder_for(model) if decoder is None else decoder
    if speculative is not None:
        if cuda_graphs or decoder is not None:
            raise ValueError("speculative goes with neither cuda_graphs nor a decoder of its own: give one of them")
        from .speculation import speculate

        for i in alive:
            parked[i] = state.select(i)
            pieces = speculate(
                model, parked[i], texts[i], seen[i], speculative, max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens, choose=partial(choose, how=sampling, generator=generators[i]),
                ends=partial(_ended, texts[i], stop_strings, decode), step=model.step if fast is None else fast.step,
            )  # fmt: skip
            for token in pieces:
                yield i, token
        alive = []
    graphed = graph_decoder_for(model) if cuda_graphs else None
    for _ in range(max_new_tokens if alive else 0):
        logits = current.logits
        assert logits is not None
        chosen = [
            choose(logits[i, : model.vocab_size], seen[row], sampling, generators[row]) for i, row in enumerate(alive)
        ]
        stay = []
        for i, (row, token) in enumerate(zip(alive, chosen, strict=True)):
            if token in stop_tokens:
                texts[row].reason = "stop"
                parked[row] = current.select(i)
                continue
            texts[row].tokens.append(token)
            seen[row].append(token)
            yield row, token
            if _ended(texts[row], stop_strings, decode):
                parked[row] = current.select(i)
                continue
            stay.append(i)
        if len(stay) < len(alive):
            alive, chosen = [alive[i] for i in stay], [chosen[i] for i in stay]
            if not alive:
                break
            current = current.select(stay)
        if graphed is not None:
            current = graphed.adopt(current)
            graphed.step(torch.tensor(chosen, device=device), current)
        elif fast is not None and len(alive) == 1:
            fast.step(chosen[0], current)
        else:
            model.step(torch.tensor(chosen, device=device), current)
    for i, row in enumerate(alive):
        texts[row].reason = texts[row].reason or "length"
        parked[row] = current.select(i)
    for text in texts:
        if text.text is None and decode is not None:
            text.text = decode(text.tokens)
    if result is not None:
        result["texts"], result["state"] = texts, State.stack([parked[row] for row in range(rows)])


def _cut(text: Text, stop_strings: Sequence[str], decode: Callable[[list[int]], str]) -> bool:
    """End a text at the first stop string, wherever in the decoded text it stands."""
    whole = decode(text.tokens)
    found = [whole.find(s) for s in stop_strings if s in whole]
    if not found:
        return False
    text.text, text.reason = whole[: min(found)], "string"
    return True


def _ended(text: Text, stop_strings: Sequence[str], decode: Callable[[list[int]], str] | None) -> bool:
    return bool(stop_strings) and decode is not None and _cut(text, stop_strings, decode)


def _check(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
    state: State | None,
) -> None:
    if not prompts:
        raise ValueError("no prompts: expected a list with one list of token ids for each text")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need decode=, a function from token ids to text")
    if state is not None:
        state.check(model.state_name)
        if state.batch != len(prompts):
            raise ValueError(f"the state holds {state.batch} texts, prompts {len(prompts)}; fork or stack the state")
    for i, prompt in enumerate(prompts):
        if not len(prompt) and (state is None or state.logits is None):
            raise ValueError(f"prompt {i} is empty and there is no state to continue: give at least one token")
        outside = [t for t in prompt if not 0 <= t < model.vocab_size]
        if outside:
            raise ValueError(f"prompt {i} has the token {outside[0]}; this model's ids are 0 to {model.vocab_size - 1}")
