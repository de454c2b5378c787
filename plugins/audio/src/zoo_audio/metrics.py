"""Word and character error rates, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoo_registry import errors, optional

from .text import normalise


@dataclass(frozen=True)
class ErrorRates:
    """Errors over all texts together: ``wer`` and ``cer`` as fractions of the words and characters that were said."""

    wer: float
    cer: float
    words: int
    substitutions: int
    deletions: int
    insertions: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def error_rates(said: Sequence[str], written: Sequence[str]) -> ErrorRates:
    """Compare what was ``said`` with what was ``written``, both normalised (:func:`zoo_audio.text.normalise`).

    Silence may be among them: words written where none were said count as insertions. Raises BadArgument for lists of
    unequal length, or when nothing was said in any of them, and ``zoo.errors.MissingExtra`` without jiwer.
    """
    jiwer: Any = optional("jiwer", "counting errors of transcripts", "ssm-zoo-audio[metrics]")
    if len(said) != len(written):
        raise errors.BadArgument(
            f"{len(said)} texts were said and {len(written)} written; expected as many", argument="written", accepted=[]
        )
    pairs = [(normalise(a), normalise(b)) for a, b in zip(said, written, strict=True)]
    if not any(a for a, _ in pairs):
        raise errors.BadArgument(
            "no words were said in any of the texts, so there is no error rate", argument="said", accepted=[]
        )
    # jiwer refuses empty references; all that was written there are insertions.
    silent = [b for a, b in pairs if not a]
    spoken = [(a, b) for a, b in pairs if a]
    found = jiwer.process_words([a for a, _ in spoken], [b for _, b in spoken])
    letters = jiwer.process_characters([a for a, _ in spoken], [b for _, b in spoken])
    words = found.hits + found.substitutions + found.deletions
    characters = letters.hits + letters.substitutions + letters.deletions
    insertions = found.insertions + sum(len(b.split()) for b in silent)
    more = letters.substitutions + letters.deletions + letters.insertions + sum(len(b) for b in silent)
    return ErrorRates(
        wer=(found.substitutions + found.deletions + insertions) / words, cer=more / characters, words=words,
        substitutions=found.substitutions, deletions=found.deletions, insertions=insertions,
    )  # fmt: skip
