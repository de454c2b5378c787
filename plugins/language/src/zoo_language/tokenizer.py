"""Text to token ids: bytes as they are, or the tokenizer of the Hub repository that the weights card names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What the pipelines need of a tokenizer."""

    end_of_text: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 as ids 0 to 255; text that is cut inside a character shows the replacement mark."""

    end_of_text: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class HubTokenizer:
    """A ``tokenizer.json`` (the ``tokenizers`` library)."""

    def __init__(self, path: str | Path, end_of_text: int | None = None) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error
        self.end_of_text = end_of_text

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)


def tokenizer_of(settings: Mapping[str, Any], *, local: str | Path | None = None, **download: Any) -> Tokenizer:
    """The tokenizer that a weights card's ``preprocess`` names: ``tokenizer = "bytes"`` or a Hub repository.

    ``local``: a tokenizer.json to use instead; ``download``: passed to the store (``local_files_only``, ``token`` ...).
    """
    end = settings.get("end_of_text")
    if local is not None:
        return HubTokenizer(local, end)
    name = settings.get("tokenizer")
    if name is None:
        raise ValueError("these weights name no tokenizer: pass tokenizer=, a path to a tokenizer.json")
    if name == "bytes":
        return ByteTokenizer()
    from zoo_registry import store

    path = store.hub_file(name, "tokenizer.json", revision=settings.get("tokenizer_revision"), **download)
    return HubTokenizer(path, end)
