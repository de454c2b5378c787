"""Texts whose tokens come one by one: decoded and searched for stop strings at a cost that does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generation import Text

Decode = Callable[[list[int]], str]
#: What stands for the bytes of a character that is not whole.
MARK = "\N{REPLACEMENT CHARACTER}"


class Growing:
    """Decodes tokens as they come: :meth:`add` gives what each adds to the text, whole characters only.

    A tokenizer may write a token otherwise at the beginning of a text than behind another (the blank of a word), so
    what was decoded last is decoded again in front of what is new.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.rest = ""  #: text of the tokens whose last character is not whole yet
        self._last: list[int] = []  # tokens of the piece that was given last
        self._new: list[int] = []  # tokens behind it

    def add(self, token: int) -> str:
        self._new.append(token)
        before = self.decode(self._last) if self._last else ""
        piece = self.decode(self._last + self._new)[len(before) :]
        if piece.endswith(MARK):
            self.rest = piece
            return ""
        self._last, self._new, self.rest = self._new, [], ""
        return piece


class Ends:
    """Whether ``text`` has come to one of the ``stops``; called after each token, it ends the text there."""

    def __init__(self, text: Text, stops: Sequence[str], decode: Decode) -> None:
        self.text, self.stops, self.decode = text, stops, decode
        self._growing, self._seen, self._tail = Growing(decode), 0, ""
        self._longest = max((len(stop) for stop in stops), default=0)

    def __call__(self) -> bool:
        if not self.stops:
            return False
        for token in self.text.tokens[self._seen :]:
            self._tail += self._growing.add(token)
        self._seen = len(self.text.tokens)
        recent = self._tail + self._growing.rest
        self._tail = self._tail[-self._longest :]
        if not any(stop in recent for stop in self.stops):
            return False
        whole = self.decode(self.text.tokens)
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if not found:  # a character that was cut short looked like one
            return False
        self.text.text, self.text.reason = whole[: min(found)], "string"
        return True


def held(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of ``text`` must not be shown yet: those of a stop string that may be beginning,
    or one that came, with all behind it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return len(text) - min(found)
    begun = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return max(begun, default=0)
