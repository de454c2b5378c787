"""The little language of path names: ``raster + reverse(hilbert) + local(w=7) + zigma[3]``.

::

    paths := order ("+" order)*
    order := name [ "(" argument ("," argument)* ")" ] [ "[" number "]" ]
    argument := paths | key "=" value        value := number | true | false | word
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z0-9_][A-Za-z0-9_.-]*)|(?P<mark>[()+,=\[\]])|(?P<minus>-\d+))")

Value = bool | int | float | str


@dataclass(frozen=True)
class Node:
    """One order: its name, the orders it is applied to, its parameters, and which direction is picked."""

    name: str
    orders: tuple[Paths, ...] = ()
    params: tuple[tuple[str, Value], ...] = ()
    pick: int | None = None


Paths = tuple[Node, ...]


def parse(text: str) -> Paths:
    """Read a path expression. Raises ValueError that shows where it stops making sense."""
    tokens: list[tuple[str, int]] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise _error(text, at, "a name, '+', '(', ')', ',', '=' or '['")
        tokens.append((match.group().strip(), match.start(match.lastgroup or 0)))
        at = match.end()
    reader = _Reader(text, tokens)
    found = reader.paths()
    if reader.peek() is not None:
        raise reader.error("'+' or the end")
    return found


def _error(text: str, at: int, expected: str) -> ValueError:
    return ValueError(f"path {text!r}: expected {expected} at position {at} ({text[at : at + 12]!r})")


class _Reader:
    def __init__(self, text: str, tokens: list[tuple[str, int]]) -> None:
        self.text, self.tokens, self.at = text, tokens, 0

    def peek(self, ahead: int = 0) -> str | None:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else None

    def error(self, expected: str) -> ValueError:
        where = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        return _error(self.text, where, expected)

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.error(repr(mark))
        self.at += 1

    def word(self, expected: str) -> str:
        token = self.peek()
        if token is None or token in "()+,=[]":
            raise self.error(expected)
        self.at += 1
        return token

    def paths(self) -> Paths:
        nodes = [self.order()]
        while self.peek() == "+":
            self.at += 1
            nodes.append(self.order())
        return tuple(nodes)

    def order(self) -> Node:
        name = self.word("the name of an order").lower().replace("-", "_")
        orders: list[Paths] = []
        params: list[tuple[str, Value]] = []
        if self.peek() == "(":
            self.at += 1
            while self.peek() != ")":
                if self.peek(1) == "=":
                    key = self.word("a parameter")
                    self.at += 1
                    params.append((key, _value(self.word("a value"))))
                else:
                    orders.append(self.paths())
                if self.peek() != ")":
                    self.take(",")
            self.at += 1
        pick = None
        if self.peek() == "[":
            self.at += 1
            number = self.word("the number of a direction")
            if not re.fullmatch(r"-?\d+", number):
                raise _error(self.text, self.tokens[self.at - 1][1], "the number of a direction")
            pick = int(number)
            self.take("]")
        return Node(name, tuple(orders), tuple(sorted(params)), pick)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
