"""How well a word-level language model predicts a text, and the words that it expects next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.files import read_text
from zoo.models.s4 import S4LanguageModel
from zoo.pipelines import Pipeline, Result, describe_source
from zoo_registry import errors

from .words import Vocabulary

#: positions whose log-probabilities are held at a time: the head of the WikiText-103 model has 20,000 entries for each
_AT_ONCE = 1024


@dataclass(kw_only=True)
class TextScore(Result):
    """How well a text was predicted. The first word is given and not scored."""

    perplexity: float | None  #: exp of the mean negative log-likelihood of a word; None for a single word
    words: int  #: predicted ones, ends of lines included
    unknown: int  #: words of the text that the vocabulary does not hold, read as ``<unk>``
    next_words: list[str]  #: the likeliest continuations, best first
    next_probabilities: list[float]
    nats: float = field(default=0.0, repr=False)  #: negative log-likelihood of the whole text

    def summary(self) -> str:
        after = ", ".join(f"{w} {p:.1%}" for w, p in zip(self.next_words, self.next_probabilities, strict=True))
        strange = f" ({self.unknown} unknown)" if self.unknown else ""
        if self.perplexity is None:
            return f"next: {after}{strange}"
        return f"perplexity {self.perplexity:.2f} over {self.words} words{strange}; next: {after}"


class _Text(NamedTuple):
    ids: list[int]
    unknown: int


class LanguageModelling(Pipeline):
    """Texts to their perplexity and the likeliest next words.

    Inputs: a string, a ``Path`` to a text file, or word ids (a 1-D integer array or tensor). Texts are split at blanks,
    and every line break is ``<eos>``, as in training: write punctuation apart, as WikiText-103 does.

    ``vocabulary``: a file of one word a line, or the text that the model was trained on, from which it is rebuilt as
    the original does (:class:`zoo.tasks.words.Vocabulary`); the published checkpoints do not hold it. ``top_k`` next
    words are reported. ``window``: words read at a time (default and most: the layers' ``l_max``); ``carry_state``: go
    on from the state of the window before, otherwise every window starts anew, as the original's evaluation does.
    """

    task = "language-modelling"
    extensions = (".txt", ".tokens", ".raw", ".md")
    text_input = True

    def __init__(
        self,
        model: nn.Module,
        vocabulary: str | Path | Vocabulary | None = None,
        top_k: int = 5,
        window: int | None = None,
        carry_state: bool = True,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, S4LanguageModel):
            raise errors.BadArgument(
                f"{type(model).__name__} is no word-level language model; expected S4LanguageModel. For others see the "
                "task text-generation and `zoo score`",
                argument="model",
                accepted=[],
            )
        self.lm, self.size = model, model.loss.ends[-1]
        if top_k < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        limits = [int(limit) for m in model.modules() if (limit := getattr(m, "l_max", None)) is not None]
        most = min(limits, default=None)
        self.window = (most or 8192) if window is None else window
        if self.window < 1 or (most is not None and self.window > most):
            raise errors.BadArgument(
                f"window is {window}; expected 1 or more words" + (f", at most the layers' {most}" if most else ""),
                argument="window",
                accepted=[],
            )
        self.top_k, self.carry_state = top_k, carry_state
        if isinstance(vocabulary, (str, Path)):
            vocabulary = Vocabulary.read(vocabulary, self.size)
        if vocabulary is not None and len(vocabulary) != self.size:
            raise errors.BadArgument(
                f"the vocabulary has {len(vocabulary)} words; {self.name} knows {self.size}",
                argument="vocabulary",
                accepted=[],
            )
        self.vocabulary = vocabulary

    def read(self, source: Any) -> _Text:
        if not isinstance(source, (str, Path)):
            return _Text(self._checked(source), 0)
        if self.vocabulary is None:
            raise errors.BadArgument(
                f"{self.name} reads words by their number in the vocabulary that it was trained with, and its weights "
                f"hold none: give vocabulary=, a file with its {self.size} words, one a line, or the training text "
                "(for WikiText-103 its training split, wiki.train.tokens); or give word ids in place of text",
                argument="vocabulary",
                accepted=[],
            )
        text = read_text(source) if isinstance(source, Path) else source
        ids, missing = self.vocabulary.encode(str(text))
        if not ids:
            raise ValueError(f"{describe_source(source)!r} holds no word; give at least one")
        return _Text(ids, len(missing))

    def _checked(self, source: Any) -> list[int]:
        values = source.cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
        if values.ndim != 1 or not values.size or values.dtype.kind not in "iu":
            raise errors.BadArgument(
                f"{values.dtype} of shape {values.shape} was given; expected a text, a Path, or word ids (length,)",
                argument="inputs",
                accepted=[],
            )
        if values.min() < 0 or values.max() >= self.size:
            raise errors.BadArgument(
                f"word ids from {values.min()} to {values.max()} were given; {self.name} knows 0 to {self.size - 1}",
                argument="inputs",
                accepted=[],
            )
        return values.tolist()

    def prepare(self, sample: _Text) -> Tensor:
        return torch.tensor(sample.ids)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """(batch, length) ids to ``nats`` (batch,) and ``next`` (batch, vocabulary) log-probabilities."""
        lm, length = self.lm, batch.shape[1]
        kind = {"device": self.device, "dtype": self.dtype}
        carried = length > self.window and self.carry_state
        state = lm.init_state(len(batch), **kind) if carried else None
        nats = torch.zeros(len(batch), device=self.device, dtype=torch.float64)
        hidden = None
        for first in range(0, length, self.window):
            given = batch[:, first : first + self.window]
            hidden = lm.model(lm.encoder(given), state=state)
            target = batch[:, first + 1 : first + self.window + 1]  # one shorter at the end of the text
            for part, wanted in zip(hidden.split(_AT_ONCE, dim=1), target.split(_AT_ONCE, dim=1), strict=False):
                nats += lm.loss(part[:, : wanted.shape[1]], wanted).double().sum(dim=1)
        assert hidden is not None
        return {"nats": nats, "next": lm.loss.log_probabilities(hidden[:, -1])}

    def finish(self, output: dict[str, Tensor], sample: _Text) -> TextScore:
        probabilities, ids = output["next"].float().exp().topk(min(self.top_k, self.size))
        count, nats = len(sample.ids) - 1, float(output["nats"])
        names = self.vocabulary.words if self.vocabulary is not None else None
        return TextScore(
            perplexity=math.exp(nats / count) if count else None,
            words=count,
            unknown=sample.unknown,
            next_words=[names[i] if names is not None else f"word {i}" for i in ids.tolist()],
            next_probabilities=probabilities.tolist(),
            nats=nats,
        )
