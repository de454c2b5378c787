"""Transcripts: token ids to text and back, and words from tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from zoo.files import existing, read_text
from zoo_registry import errors

#: What stands before the first piece of a word.
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIAL = ("<pad>", "<s>", "</s>")


class Tokenizer:
    """A ``tokenizer.json`` whose pieces mark the beginnings of words, with ids 0 padding, 1 begin, 2 end."""

    def __init__(self, path: str | Path) -> None:
        self._read(read_text(existing(path, "a tokenizer.json")), str(path))

    @classmethod
    def of(cls, text: str) -> Tokenizer:
        """From what a tokenizer.json holds."""
        found = cls.__new__(cls)
        found._read(text, "the weights' own tokenizer")
        return found

    def _read(self, text: str, path: str) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_str(text)
        except Exception as error:  # the library raises bare Exception for a text that it cannot read
            raise errors.BadFile(f"{path} is no tokenizer.json: {error}", path=path) from error
        found = tuple(self._fast.id_to_token(i) for i in range(3))
        if found != SPECIAL:
            raise errors.BadFile(f"the first three tokens of {path} are {found}; expected {SPECIAL}", path=path)

    @property
    def text(self) -> str:
        """What a tokenizer.json of it holds."""
        return self._fast.to_str()

    def __len__(self) -> int:
        return self._fast.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` after :func:`normalise`, without the special ones."""
        return self._fast.encode(normalise(text), add_special_tokens=False).ids

    def piece(self, token: int) -> str:
        """The token as it is written, with its mark; "" for the special ones and ids outside the vocabulary."""
        text = self._fast.id_to_token(int(token)) or ""
        return "" if text in SPECIAL else text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special ones are left out."""
        return "".join(self.piece(i) for i in ids).replace(MARK, " ").strip()


def train_tokenizer(texts: Iterable[str], size: int, path: str | Path | None = None) -> Tokenizer:
    """Byte-pair encoding of ``size`` pieces, learned from ``texts``, and written to ``path`` if there is one. There is
    a piece for every character that occurs, so a small ``size`` gives characters alone."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    fast.train_from_iterator((normalise(text) for text in texts), trainer)
    if path is not None:
        fast.save(str(path), pretty=False)
    return Tokenizer.of(fast.to_str())


def normalise(text: str) -> str:
    """Lower case, punctuation (apostrophes inside words apart) as spaces, single spaces: what is compared and
    learned."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return " ".join(word.strip("'") for word in kept.split() if word.strip("'"))


def words_of(pieces: Sequence[str]) -> list[tuple[str, int, int]]:
    """(word, first piece, piece behind its last) from pieces with marks."""
    words: list[tuple[str, int, int]] = []
    for i, piece in enumerate(pieces):
        if piece.startswith(MARK) or not words:
            words.append((piece.removeprefix(MARK), i, i + 1))
        else:
            text, first, _ = words[-1]
            words[-1] = (text + piece, first, i + 1)
    return [word for word in words if word[0]]
