"""Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from ._base import CausalLM
from .drafts import Draft, draft_of
from .generation import Sampling, Text, generate, stream
from .state import State
from .tokenizer import HubTokenizer, Tokenizer, tokenizer_of


@dataclass(kw_only=True)
class GeneratedText(Result):
    """A prompt and what the model wrote after it. ``reason``: why it ended ("stop", "length", "string")."""

    prompt: str = ""
    text: str = ""
    tokens: int = 0
    reason: str = ""
    state: State | None = field(default=None, repr=False)

    def summary(self) -> str:
        return self.text


class TextGeneration(Pipeline):
    """Continue texts, alone or in batches of unequal length (each gives what it would give alone).

    Inputs: a string, or a ``Path`` to a text file, or a list of them. Options: those of :class:`Sampling`,
    ``max_new_tokens``, ``stop`` (strings that end a text), ``tokenizer`` (a path to a tokenizer.json, or an object with
    ``encode`` and ``decode``; default: what the weights card names), ``decode_weights`` ("bfloat16" or "int8": smaller
    weights for decoding single texts on a CPU, see :meth:`CausalLM.fast_decoder`), ``cuda_graphs`` (see
    :mod:`zoo_language.graphs`), ``speculative`` (what drafts tokens for the model to check: "ngram", the name of a
    smaller model with the same vocabulary, or a :class:`zoo_language.drafts.Draft`; the text stays the same).
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
    ) -> None:
        super().__init__(model)
        if not isinstance(model, CausalLM):
            raise errors.BadArgument(
                f"{type(model).__name__} is no language model of the zoo", argument="model", accepted=[]
            )
        self.lm = model
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        self.decoder = None if decode_weights is None else model.fast_decoder(decode_weights)
        self.cuda_graphs = cuda_graphs
        self.speculative = draft_of(speculative, model) if isinstance(speculative, str) else speculative
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if isinstance(tokenizer, str | Path):
            self.tokenizer: Tokenizer = HubTokenizer(tokenizer, self.preprocess.get("end_of_text"))
        else:
            self.tokenizer = tokenizer_of(self.preprocess) if tokenizer is None else tokenizer

    # -- the pipeline ----------------------------------------------------------------------------------------------

    def read(self, source: Any) -> str:
        if isinstance(source, Path):
            try:
                return source.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source} is no UTF-8 text: {error}") from error
        return str(source)

    def prepare(self, sample: str) -> Tensor:
        ids = self.tokenizer.encode(sample)
        if not ids and self.tokenizer.end_of_text is not None:
            ids = [self.tokenizer.end_of_text]
        if not ids:
            raise ValueError("the prompt is empty: give at least one character")
        return torch.tensor(ids)

    def collate(self, samples: Sequence[Tensor]) -> Any:
        # Nothing is stacked: prompts of different lengths go through the engine together.
        return {"prompts": [sample.tolist() for sample in samples]}

    def forward(self, batch: Any) -> list[tuple[Text, State]]:
        texts, state = self.continue_from(batch["prompts"])
        return [(text, state.select(i)) for i, text in enumerate(texts)]

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
        return generate(self.lm, prompts, state=state, **self._how())

    def stream_text(self, prompt: str, state: State | None = None) -> Iterator[str]:
        """Pieces of text as they come; whole characters only. ``self.last_state`` is the state after them."""
        result: dict[str, Any] = {}
        tokens: list[int] = []
        shown = ""
        for _, token in stream(self.lm, [self.tokenizer.encode(prompt)], state=state, result=result, **self._how()):
            tokens.append(token)
            whole = self.tokenizer.decode(tokens)
            if whole.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # the rest of the character has not come yet
            if not any(stop.startswith(whole[-n:]) for stop in self.stop for n in range(1, len(stop) + 1)):
                yield whole[len(shown) :]
                shown = whole
        final = result["texts"][0].text
        if len(final) > len(shown):
            yield final[len(shown) :]
        self.last_state: State = result["state"]
