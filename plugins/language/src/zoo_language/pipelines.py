"""Text in, text out."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo import errors
from zoo.files import read_text
from zoo.pipelines import Pipeline, Result

from ._base import CausalLM
from .drafts import Draft, draft_of
from .generation import Sampling, Text, generate, stream
from .incremental import Growing, held
from .state import State
from .tokenizer import Tokenizer, before_text, tokenizer_of


@dataclass(kw_only=True)
class GeneratedText(Result):
    """A prompt and what the model wrote after it.

    ``reason``: why it ended ("stop", "length", "string"). ``state``: what the model has read, to go on from.
    """

    prompt: str = ""
    text: str = ""
    tokens: int = 0
    reason: str = ""
    state: State | None = field(default=None, repr=False)

    def summary(self) -> str:
        return self.text


class TextGeneration(Pipeline):
    """Continue texts, alone or in batches of unequal length (each gives what it would give alone: every text is sampled
    with the same ``seed``).

    Inputs: a string, or a ``Path`` to a text file in UTF-8, or a list of them. Options: those of :class:`Sampling`,
    ``max_new_tokens``, ``stop`` (strings that end a text), ``tokenizer`` (a path to a tokenizer.json, or an object with
    ``encode`` and ``decode``; default: what the weights card names), ``decode_weights`` ("bfloat16" or "int8": smaller
    weights for decoding single texts on a CPU, see :meth:`CausalLM.fast_decoder`), ``cuda_graphs`` (see
    :mod:`zoo_language.graphs`), ``speculative`` (what drafts tokens for the model to check: "ngram", the name of a
    smaller model with the same vocabulary, or a :class:`zoo_language.drafts.Draft`; the text stays the same),
    ``keep_state`` (False: answers are without their states, which for thousands of texts fill the memory).
    """

    task = "text-generation"
    extensions = (".txt", ".md")
    text_input = True

    def __init__(
        self,
        model: nn.Module,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        tokenizer: str | Path | Tokenizer | None = None,
        decode_weights: str | None = None,
        cuda_graphs: bool = False,
        speculative: str | Draft | None = None,
        keep_state: bool = True,
    ) -> None:
        if not isinstance(model, CausalLM):
            raise errors.BadArgument(
                f"{type(model).__name__} is no language model of the zoo", argument="model", accepted=[]
            )
        if max_new_tokens < 0:
            raise errors.BadArgument(
                f"max_new_tokens is {max_new_tokens}; expected 0 or more", argument="max_new_tokens", accepted=[]
            )
        if speculative is not None and (decode_weights is not None or cuda_graphs):
            raise errors.BadArgument(
                "speculative goes with neither cuda_graphs nor decode_weights: give one of them",
                argument="speculative",
                accepted=[],
            )
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stop:
            raise errors.BadArgument(
                "a stop string is empty, which ends every text at once; leave it out", argument="stop", accepted=[]
            )
        super().__init__(model)
        self.lm = model
        self.max_new_tokens, self.keep_state = max_new_tokens, keep_state
        self.sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        self.decoder = None if decode_weights is None else model.fast_decoder(decode_weights)
        self.cuda_graphs = cuda_graphs
        self.speculative = draft_of(speculative, model) if isinstance(speculative, str) else speculative
        if tokenizer is None or isinstance(tokenizer, str | Path):
            tokenizer = tokenizer_of(self.preprocess, tokenizer, fetch=self.companion)
        self.tokenizer: Tokenizer = tokenizer

    @property
    def start(self) -> list[int]:
        """What stands before a text without a context: the end-of-text token, or a line feed."""
        return before_text(self.tokenizer)

    # -- the pipeline ----------------------------------------------------------------------------------------------

    def read(self, source: Any) -> str:
        if isinstance(source, Path):
            return read_text(source)
        if not isinstance(source, str):
            raise errors.BadArgument(
                f"a prompt is a {type(source).__name__}; expected a string, or a Path to a text file",
                argument="inputs",
                accepted=[],
            )
        return source

    def prepare(self, sample: str) -> list[int]:
        # No tensor: prompts of different lengths go through the engine together.
        ids = self.tokenizer.encode(sample)
        if not ids and self.tokenizer.end_of_text is not None:
            ids = [self.tokenizer.end_of_text]
        if not ids:
            raise errors.BadArgument("the prompt is empty: give at least one character", argument="inputs", accepted=[])
        return ids

    def collate(self, samples: Sequence[list[int]]) -> Any:
        return {"prompts": list(samples)}

    def forward(self, batch: Any) -> list[tuple[Text, State | None]]:
        # The states are handed out: tensors of inference mode could not be moved on.
        with torch.inference_mode(False):
            texts, state = self.continue_from(batch["prompts"])
            return [(text, state.select(i) if self.keep_state else None) for i, text in enumerate(texts)]

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: Any, sample: str) -> GeneratedText:
        text, state = output
        return GeneratedText(
            prompt=sample, text=text.text or "", tokens=len(text.tokens), reason=text.reason, state=state
        )

    # -- what a chat needs -----------------------------------------------------------------------------------------

    def _how(self) -> dict[str, Any]:
        end = self.tokenizer.end_of_text
        return {
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling,
            "stop_tokens": () if end is None else (end,),
            "stop_strings": self.stop,
            "decode": self.tokenizer.decode,
            "decoder": self.decoder,
            "cuda_graphs": self.cuda_graphs,
            "speculative": self.speculative,
        }

    def continue_from(self, prompts: list[list[int]], state: State | None = None) -> tuple[list[Text], State]:
        """Token ids in, texts and the state after them out; ``state`` goes on where it stands."""
        how = self._how()
        if isinstance(self.sampling.seed, numbers.Integral):  # as each alone
            how["sampling"] = replace(self.sampling, seed=[int(self.sampling.seed)] * len(prompts))
        return generate(self.lm, prompts, state=state, **how)

    def stream_text(self, prompt: str, state: State | None = None) -> Iterator[str]:
        """Pieces of text as they come; whole characters only. ``self.last_state`` is the state after them,
        ``self.last_text`` all of it.

        Together the pieces are what calling the pipeline gives. Raises BadArgument as that does, and for a ``state`` of
        another model.
        """
        result: dict[str, Any] = {}
        growing, pending, shown = Growing(self.tokenizer.decode), "", 0
        ids = self.tokenizer.encode(prompt) if state is not None else self.prepare(prompt)
        for _, token in stream(self.lm, [ids], state=state, result=result, **self._how()):
            pending += growing.add(token)
            if safe := len(pending) - held(pending, self.stop):
                yield pending[:safe]
                pending, shown = pending[safe:], shown + safe
        self.last_text: Text = result["texts"][0]
        self.last_state: State = result["state"]
        final = self.last_text.text or ""
        if len(final) > shown:
            yield final[shown:]
