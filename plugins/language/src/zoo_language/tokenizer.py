"""Text to token ids: bytes as they are, or the tokenizer of the Hub repository that the weights card names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zoo.files import existing
from zoo_registry import errors, store


class Tokenizer(Protocol):
    """What the pipelines need of a tokenizer."""

    end_of_text: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 as ids 0 to 255; text that is cut inside a character shows the replacement mark."""

    end_of_text: int | None = None
    size = 256  #: one more than the largest id

    def encode(self, text: str) -> list[int]:
        # A command line's bytes that are no UTF-8 come as lone surrogates: these are the bytes again.
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class HubTokenizer:
    """A ``tokenizer.json`` (the ``tokenizers`` library).

    ``end_of_text``: the token that ends a text, or its id; None: "<|endoftext|>", where there is such a token. Raises
    BadFile, a ValueError, for a file that is none, and BadArgument for a token that it does not have.
    """

    def __init__(self, path: str | Path, end_of_text: int | str | None = None) -> None:
        from tokenizers import Tokenizer as Fast

        path = existing(path, "a tokenizer.json")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise errors.BadFile(f"{path} is no tokenizer.json: {error}", path=str(path)) from error
        end = "<|endoftext|>" if end_of_text is None else end_of_text
        self.end_of_text: int | None = self._fast.token_to_id(end) if isinstance(end, str) else end
        if end_of_text is not None and self.end_of_text is None:
            raise errors.BadArgument(f"{path} has no token {end!r}", argument="end_of_text", accepted=[])

    @classmethod
    def of(cls, text: str, end_of_text: int | None = None) -> HubTokenizer:
        """From what a tokenizer.json says, as :attr:`text` gives it."""
        from tokenizers import Tokenizer as Fast

        made = cls.__new__(cls)
        made._fast, made.end_of_text = Fast.from_str(text), end_of_text
        return made

    @property
    def text(self) -> str:
        """What its tokenizer.json says."""
        return self._fast.to_str()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)


OwnTokenizer = ByteTokenizer | HubTokenizer


def before_text(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text without a context: the end-of-text token, or a line feed."""
    end = tokenizer.end_of_text
    return tokenizer.encode("\n") if end is None else [end]


def settings_of(tokenizer: OwnTokenizer) -> dict[str, Any]:
    """``preprocess`` of weights that go with ``tokenizer``, from which :func:`tokenizer_of` makes it again: the
    tokenizer is inside."""
    if isinstance(tokenizer, ByteTokenizer):
        return {"tokenizer": "bytes"}
    return {"tokenizer_json": tokenizer.text, "end_of_text": tokenizer.end_of_text}


def tokenizer_of(
    settings: Mapping[str, Any], local: str | Path | None = None, *, fetch: Callable[..., Path] = store.hub_file
) -> OwnTokenizer:
    """The tokenizer that a weights card's ``preprocess`` names: ``tokenizer = "bytes"`` or a Hub repository, or
    ``tokenizer_json``, the text of one.

    ``local``: a tokenizer.json to use instead. ``fetch(repository, file name, revision=)``: how one on the Hub is had.
    Raises BadArgument where none is named.
    """
    end = settings.get("end_of_text")
    if local is not None:
        return HubTokenizer(local, end)
    if "tokenizer_json" in settings:
        return HubTokenizer.of(settings["tokenizer_json"], end)
    name = settings.get("tokenizer")
    if name is None:
        raise errors.BadArgument(
            "these weights name no tokenizer: pass tokenizer=, a path to a tokenizer.json",
            argument="tokenizer",
            accepted=[],
        )
    if name == "bytes":
        return ByteTokenizer()
    return HubTokenizer(fetch(name, "tokenizer.json", revision=settings.get("tokenizer_revision")), end)
