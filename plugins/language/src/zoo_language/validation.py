"""Measuring a language model on texts: ``zoo validate`` for text generation, and one text for ``zoo score``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from zoo.files import read_text
from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from .pipelines import TextGeneration
from .scoring import Score, score, together


def score_text(
    pipe: TextGeneration,
    text: str,
    *,
    window: int = 2048,
    carry_state: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """:func:`zoo_language.scoring.score` of every token of a text, the first after :attr:`TextGeneration.start`."""
    return score(
        pipe.lm,
        pipe.tokenizer.encode(text),
        text_bytes=len(text.encode(errors="surrogateescape")),
        window=window,
        carry_state=carry_state,
        start=pipe.start[-1],
        progress=progress,
    )


def figures(found: Score) -> dict[str, float]:
    """What is said of a score."""
    return {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}


def validate_texts(
    model: nn.Module,
    data: str | Path,
    *,
    window: int = 2048,
    carry: bool = True,
    tokenizer: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Bits a byte and perplexity a token of texts: how well the model predicts each token from those before it.

    DATA is a text in UTF-8, or a folder that is searched for .txt and .md files; each text begins anew, after the
    end-of-text token or (bytes have none) a line feed. ``window``: tokens read at a time; ``carry``: the state goes on
    from window to window (false: each begins anew); ``tokenizer``: a tokenizer.json instead of the card's; ``limit``:
    at most so many texts. Samples are tokens.
    """
    if window < 1:
        raise errors.BadArgument(f"window is {window}; expected at least 1", argument="window", accepted=[])
    pipe = TextGeneration(model, tokenizer=tokenizer)
    files = pipe.expand(Path(data))[0][:limit]
    began = time.perf_counter()
    scores: list[Score] = []
    with progress_bar(progress and sys.stderr.isatty(), len(files), pipe.name) as advance:
        for file in files:
            if text := read_text(file):
                scores.append(score_text(pipe, text, window=window, carry_state=carry))
            advance()
    found, empty = together(scores), len(files) - len(scores)
    if not found.tokens:
        raise errors.BadArgument(f"{data} is empty; there is nothing to score", argument="data", accepted=[])
    notes = f"{len(scores)} texts, {found.bytes} bytes" + (f"; {empty} empty files left out" if empty else "")
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=found.tokens,
        metrics=figures(found),
        seconds=time.perf_counter() - began,
        notes=notes,
    )
