"""The task of in-context language learning: strings of a random automaton, whose next symbols are to be predicted.

Draws are the original's, call by call, from numpy's default generator, so that automata and words are the same.
Source: berlino/seq_icl @ 9b9223d ``src/dataloaders/dfa.py``; paper: arXiv 2401.12973, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SEPARATOR, NOOP = "|", "."


@dataclass
class Automaton:
    """Nodes 0 .. n-1, start 0, all accepting; ``edges[node]`` maps symbols to nodes in the order they were drawn."""

    edges: list[dict[str, int]]
    generator: np.random.Generator

    def accepts(self, word: Sequence[str]) -> bool:
        """False where a transition is missing."""
        node = 0
        for symbol in word:
            if symbol not in self.edges[node]:
                return False
            node = self.edges[node][symbol]
        return True

    def sample(self, length: int) -> list[str]:
        """A random word; the automaton's own generator goes on from word to word."""
        node = 0
        word: list[str] = []
        for _ in range(length):
            symbol = str(self.generator.choice(list(self.edges[node])))
            word.append(symbol)
            node = self.edges[node][symbol]
        return word

    def allowed(self, word: Sequence[str]) -> set[str]:
        """The symbols that may follow ``word``; empty for a word that is not accepted."""
        node = 0
        for symbol in word:
            if symbol not in self.edges[node]:
                return set()
            node = self.edges[node][symbol]
        return set(self.edges[node])

    def minimized(self) -> Automaton:
        """The smallest automaton of the same language: unreachable nodes dropped, equivalent ones joined (Moore)."""
        reachable = [0]
        for node in reachable:
            reachable += [t for t in self.edges[node].values() if t not in reachable]
        block = dict.fromkeys(reachable, 0)
        while True:
            # Nodes are alike when the same symbols lead to like nodes.
            signature = {n: tuple(sorted((s, block[t]) for s, t in self.edges[n].items())) for n in reachable}
            names: dict[tuple, int] = {}
            new = {n: names.setdefault((block[n], signature[n]), len(names)) for n in reachable}
            if len(names) == len(set(block.values())):
                break
            block = new
        first: dict[int, int] = {}
        for node in reachable:
            first.setdefault(block[node], node)
        number = {b: i for i, b in enumerate(first)}
        edges = [{s: number[block[t]] for s, t in self.edges[node].items()} for node in first.values()]
        return Automaton(edges, self.generator)


class AutomatonSampler:
    """Random automata: ``nodes`` nodes, each with 1 to ``max_edges - 1`` outgoing symbols (the bound is exclusive)."""

    def __init__(self, nodes: int, alphabet: Sequence[str], max_edges: int, seed: int) -> None:
        if max_edges - 1 > min(len(alphabet), nodes - 1):
            raise ValueError(
                f"max_edges {max_edges}: a node may need {max_edges - 1} symbols and other nodes, "
                f"there are {len(alphabet)} and {nodes - 1}"
            )
        self.nodes, self.alphabet, self.max_edges = nodes, list(alphabet), max_edges
        self.generator = np.random.default_rng(seed)

    def sample(self) -> Automaton:
        edges = []
        for node in range(self.nodes):
            count = int(self.generator.integers(1, self.max_edges))
            symbols = self.generator.choice(self.alphabet, count, replace=False)
            others = [n for n in range(self.nodes) if n != node]
            targets = self.generator.choice(others, count, replace=False)
            edges.append({str(s): int(t) for s, t in zip(symbols, targets, strict=True)})
        return Automaton(edges, np.random.default_rng(int(self.generator.integers(0, 2**32))))


@dataclass(frozen=True)
class Problem:
    """One in-context problem: words of one automaton joined by the separator, and what may follow at each place."""

    text: list[str]
    automaton: Automaton

    def allowed(self) -> list[set[str]]:
        """For each symbol of the text but the first, which symbols could have stood there (the separator apart)."""
        found: list[set[str]] = []
        word: list[str] = []
        for symbol in self.text[:-1]:
            word = [] if symbol == SEPARATOR else [*word, symbol]
            found.append(self.automaton.allowed(word))
        return found


class InContextTask:
    """Problems for training and testing, each of a new automaton.

    ``vocabulary`` V counts the no-op and the separator, so symbols are the first V - 2 letters. Automata have
    ``min_nodes`` to ``max_nodes`` nodes and are minimised; problems have ``words`` (from, below) words of 1 to below
    ``max_word`` symbols. (The original's data set order follows Python's string hashing; ours follows the seed.)
    Raises ValueError for a vocabulary of fewer letters than edges, or more than there are.
    """

    def __init__(
        self,
        vocabulary: int = 20,
        min_nodes: int = 4,
        max_nodes: int = 12,
        words: tuple[int, int] = (10, 20),
        max_word: int = 50,
        max_edges: int = 4,
        seed: int = 0,
    ) -> None:
        if not max_edges <= vocabulary - 2 <= 26:  # behind "z" comes the separator
            raise ValueError(
                f"vocabulary is {vocabulary}; expected {max_edges + 2} to 28: up to 26 letters, at least max_edges "
                f"({max_edges}) of them, the no-op and the separator"
            )
        letters = [chr(ord("a") + i) for i in range(vocabulary - 2)]
        self.tokens = sorted([NOOP, *letters, SEPARATOR], key=lambda s: (s == SEPARATOR, s != NOOP, s))
        self.ids = {s: i for i, s in enumerate(self.tokens)}
        self.letters, self.min_nodes, self.max_nodes = letters, min_nodes, max_nodes
        self.words, self.max_word, self.max_edges = words, max_word, max_edges
        self.generator = np.random.default_rng(seed)

    def sample(self) -> Problem:
        draw = self.generator
        nodes = int(draw.integers(self.min_nodes, self.max_nodes + 1))
        size = int(draw.integers(self.max_edges, len(self.letters) + 1))
        alphabet = [str(s) for s in draw.choice(self.letters, size, replace=False)]
        sampler = AutomatonSampler(nodes, alphabet, self.max_edges, int(draw.integers(0, 2**32)))
        automaton = sampler.sample().minimized()
        text: list[str] = []
        for i in range(int(draw.integers(*self.words))):
            text += ([SEPARATOR] if i else []) + automaton.sample(int(draw.integers(1, self.max_word)))
        return Problem(text, automaton)

    def batch(self, problems: Sequence[Problem], length: int) -> tuple[Tensor, Tensor]:
        """(inputs, labels), each (batch, length): inputs padded with the no-op, labels -100 there and on separators."""
        inputs = torch.full((len(problems), length), self.ids[NOOP])
        labels = torch.full((len(problems), length), -100)
        for row, problem in enumerate(problems):
            ids = torch.tensor([self.ids[s] for s in problem.text[: length + 1]])
            inputs[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = ids[1:].masked_fill(ids[1:] == self.ids[SEPARATOR], -100)
        return inputs, labels

    def accuracy(self, logits: Tensor, problems: Sequence[Problem]) -> float:
        """Share of places where the most likely symbol is one that the automaton allows (paper, section 3.2)."""
        right = total = 0
        for row, problem in enumerate(problems):
            best = logits[row].argmax(-1).tolist()
            for place, allowed in enumerate(problem.allowed()[: logits.shape[1]]):
                if problem.text[place + 1] != SEPARATOR:
                    right += self.tokens[best[place]] in allowed
                    total += 1
        return right / max(total, 1)
