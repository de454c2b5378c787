"""One engine for every language model of the plugin: prefill in chunks, decode step by step with constant memory.

Rows of a batch never meet: each has its own state, history, random generator and end, so a prompt gives the same tokens
alone as among others.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo_registry import errors

from ._base import CausalLM
from .incremental import Ends
from .state import State

if TYPE_CHECKING:
    from .decode import Decoder
    from .drafts import Draft


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy. Raises BadArgument (a ValueError) for values out of range.

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
        seeds = [self.seed] if isinstance(self.seed, numbers.Integral) else self.seed
        whole = isinstance(self.top_k, numbers.Integral)
        limits: list[tuple[str, Any, bool, str]] = [
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, whole and self.top_k >= 0, "a whole number, 0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "from 0, below 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed, _are_seeds(seeds), "a whole number of 64 bits, or one a row"),
        ]
        for name, value, right, expected in limits:
            if not right:
                raise errors.BadArgument(f"{name} is {value}; expected {expected}", argument=name, accepted=[])

    def row_seeds(self, rows: int) -> list[int]:
        """The seeds of so many rows. Raises ValueError where as many were given, and others are asked for."""
        given: Any = self.seed  # numpy's integers and arrays too
        if isinstance(given, numbers.Integral):
            return [_seed(int(given) + row) for row in range(rows)]
        if len(given) != rows:
            raise ValueError(f"{len(given)} seeds for {rows} texts; expected one for all, or one a text")
        return [_seed(int(seed)) for seed in given]


def _are_seeds(seeds: Any) -> bool:
    try:
        return all(isinstance(seed, numbers.Integral) and -(2**63) <= int(seed) < 2**64 for seed in seeds)
    except TypeError:  # neither a number nor several
        return False


def _seed(value: int) -> int:
    """As torch takes it, behind whose largest the smallest follows."""
    return value if value < 2**64 else value - 2**64


def choose(logits: Tensor, seen: Sequence[int], how: Sampling, generator: torch.Generator) -> int:
    """The next token of one text: logits (vocabulary,), ``seen`` its tokens so far.

    Raises ValueError for logits that are not numbers: any choice among them would be made up.
    """
    logits = logits.float()
    if how.repetition_penalty != 1.0 and len(seen):
        index = torch.as_tensor(sorted(set(seen)), device=logits.device)
        values = logits[index]
        logits = logits.clone()
        logits[index] = torch.where(values < 0, values * how.repetition_penalty, values / how.repetition_penalty)
    token = int(logits.argmax())  # NaN is the largest
    best = float(logits[token])
    if not math.isfinite(best):
        raise ValueError(f"the model's largest logit is {best}: its weights are broken, or overflow in this dtype")
    if how.temperature == 0:
        return token
    # From the largest down, so that no temperature makes infinities that cancel.
    logits = (logits - best) / max(how.temperature, 1e-30)
    if 0 < how.top_k < logits.numel():
        kept = logits.topk(how.top_k)  # k of them, also where several are equal
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
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
    empty; the given state stays as it is. stop_strings need ``decode`` (ids to text); the state after a text that one
    ended is that after the tokens before it, so that what is read next follows on what the text says. decoder: what
    reads the tokens of a single text (:meth:`CausalLM.fast_decoder`); by itself a float32 model on a CPU decodes fused
    where it can.
    cuda_graphs: on a CUDA device, record a step for each batch size and replay it; elsewhere a message says that it
    does not apply. speculative: drafts trees of tokens that the model checks in one pass
    (:class:`zoo_language.drafts.NGramDraft`, :class:`~zoo_language.drafts.ModelDraft`); the tokens are those of plain
    decoding, row after row. on_token(row, token) is called as tokens come. Raises ValueError for ids that the model
    does not have, a state of another model, and logits that are not numbers.
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

    prompts = _ids(prompts)
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    stop_tokens = (int(stop_tokens),) if isinstance(stop_tokens, numbers.Integral) else tuple(stop_tokens)
    _check(model, prompts, max_new_tokens, stop_strings, decode, state)
    state = None if state is None else state.fork()
    rows = len(prompts)
    seeds = sampling.row_seeds(rows)
    longest = max((len(p) for p in prompts), default=0)
    device = model.device
    if longest:
        ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt, device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        state = model.prefill(ids, state=state, lengths=lengths)
    assert state is not None
    assert state.logits is not None
    before = state.fork() if stop_strings else None
    texts = [Text() for _ in prompts]
    ends = [Ends(text, stop_strings, decode or str) for text in texts]
    seen = [list(p) for p in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
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
                ends=ends[i], step=model.step if fast is None else fast.step,
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
            if ends[row]():
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
    for i, text in enumerate(texts):
        if text.text is None and decode is not None:
            text.text = decode(text.tokens)
        if text.reason == "string":
            assert before is not None
            assert decode is not None
            parked[i] = _after_cut(model, before.select(i), text, decode)
    if result is not None:
        result["texts"], result["state"] = texts, State.stack([parked[row] for row in range(rows)])


def _after_cut(model: CausalLM, state: State, text: Text, decode: Callable[[list[int]], str]) -> State:
    """``state``, which is that before ``text``, moved on over the tokens that the cut text holds whole."""
    assert text.text is not None
    count = len(text.tokens)
    while count and not text.text.startswith(decode(text.tokens[:count])):
        count -= 1
    return model.prefill(torch.tensor([text.tokens[:count]], device=model.device), state=state) if count else state


def _ids(prompts: Any) -> list[list[int]]:
    """Prompts as lists of plain integers, from lists, arrays or tensors of them. Raises ValueError."""
    texts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(
            f"prompts is a {type(prompts).__name__}; expected a list with one list of token ids for each text"
        )
    found = []
    for i, text in enumerate(texts):
        ids = text.tolist() if hasattr(text, "tolist") else text
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise ValueError(
                f"prompt {i} is {text!r:.60}; expected a list of token ids (a tokenizer makes them of text)"
            )
        ids = [t.item() if isinstance(t, Tensor) and t.numel() == 1 else t for t in ids]
        wrong = next((t for t in ids if not isinstance(t, numbers.Integral)), None)
        if wrong is not None:
            raise ValueError(f"prompt {i} has the token {wrong!r:.60}; expected whole numbers")
        found.append([int(t) for t in ids])
    return found


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
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number, 0 or more")
    if "" in stop_strings:
        raise ValueError("a stop string is empty, which ends every text at once; leave it out")
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
