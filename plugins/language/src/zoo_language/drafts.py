"""What drafts trees of tokens for :func:`zoo_language.generation.generate`: counts of n-grams, or a smaller model."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from zoo_registry import errors

from ._base import CausalLM
from .state import State
from .tree_verification import Tree

#: STree's static tree: at each level, how many children the parents have by their rank in their own level (18 nodes).
STATIC_TREE = ((5,), (2, 1, 1), (2, 1, 1), (2, 2))


class Draft(Protocol):
    """Reads a text as it grows and proposes how it goes on."""

    def start(self, tokens: Sequence[int]) -> None:
        """A new text that begins with ``tokens``."""

    def extend(self, tokens: Sequence[int]) -> None:
        """These tokens were accepted."""

    def propose(self, depth: int) -> Tree:
        """A tree whose root is the text's last token, at most ``depth`` tokens deep behind it."""


class NGramDraft:
    """Continuations by what followed the last tokens before: in texts that were counted, and in the text itself.

    order: tokens of context at most; shorter contexts stand in for unseen ones. nodes: size of the trees, the root
    included; the likeliest continuations are drafted. depth: tokens behind the root at most. least: continuations whose
    share, multiplied along the way, is below are not drafted; a tree may then be the root alone.

    >>> draft = NGramDraft(order=2).count([1, 2, 3, 1, 2, 3, 1])
    >>> draft.start([1, 2]); draft.propose(2).tokens
    [2, 3, 1]
    """

    def __init__(self, order: int = 6, nodes: int = 16, depth: int = 8, least: float = 0.0) -> None:
        for name, value in (("order", order), ("nodes", nodes), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= least < 1:
            raise ValueError(f"least is {least}; expected from 0, below 1")
        self.order, self.nodes, self.depth = order, nodes, depth
        self._least = math.log(least) if least else -math.inf
        self._followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self._text: list[int] = []
        self._own: list[tuple[tuple[int, ...], int]] = []  # what this text added, taken back when the next one begins
        self._best: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def count(self, tokens: Iterable[int]) -> NGramDraft:
        """Count a text for good; returns itself."""
        text: list[int] = []
        for token in tokens:
            self._add(text, token)
            text.append(token)
            del text[: -self.order]
        return self

    def _add(self, before: Sequence[int], token: int) -> list[tuple[int, ...]]:
        contexts = [tuple(before[len(before) - n :]) for n in range(1, min(self.order, len(before)) + 1)]
        for context in contexts:
            self._followers[context][token] += 1
            self._best.pop(context, None)
        return contexts

    def start(self, tokens: Sequence[int]) -> None:
        for context, token in self._own:
            followers = self._followers[context]
            followers[token] -= 1
            if not followers[token]:
                del followers[token]
            self._best.pop(context, None)
        self._own, self._text = [], []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._own += [(context, token) for context in self._add(self._text[-self.order :], token)]
            self._text.append(token)

    def _after(self, context: list[int]) -> list[tuple[int, float]]:
        """(token, log share), likeliest first, by the longest context that was seen."""
        for n in range(min(self.order, len(context)), 0, -1):
            key = tuple(context[-n:])
            found = self._best.get(key)
            if found is None:
                followers = self._followers.get(key)
                if not followers:
                    continue
                total = sum(followers.values())
                # One is added for what was never seen: a follower seen once is a guess.
                found = [(token, math.log(c / (total + 1))) for token, c in followers.most_common(self.nodes)]
                self._best[key] = found
            return found
        return []

    def propose(self, depth: int) -> Tree:
        if not self._text:
            raise ValueError("there is no text to go on from: call start with at least one token")
        tokens, parents, paths = [self._text[-1]], [-1], [self._text[-self.order :]]
        depths = [0]
        most = min(self.depth, depth)
        waiting: list[tuple[float, int, int, int]] = []  # (-log share, when, parent, token): the likeliest first
        when = 0

        def look(node: int, score: float) -> None:
            nonlocal when
            if depths[node] < most:
                for token, share in self._after(paths[node]):
                    if share - score < self._least:
                        break
                    when += 1
                    heapq.heappush(waiting, (score - share, when, node, token))

        look(0, 0.0)
        while waiting and len(tokens) < self.nodes:
            score, _, parent, token = heapq.heappop(waiting)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            paths.append([*paths[parent][1 - self.order :], token] if self.order > 1 else [token])
            look(len(tokens) - 1, score)
        return Tree(tokens, parents)


class ModelDraft:
    """A smaller language model drafts STree's static tree: the most likely tokens of each of its nodes.

    branching: the children of each level's nodes, by rank (see :data:`STATIC_TREE`; a chain of four is
    ``((1,), (1,), (1,), (1,))``). It must share the target's vocabulary. All nodes of a level are read in one step.
    """

    def __init__(self, model: CausalLM, branching: Sequence[Sequence[int]] = STATIC_TREE) -> None:
        if not branching or any(not level or min(level) < 0 for level in branching):
            raise ValueError(f"branching is {branching}; expected for each level the children of its parents by rank")
        self.model, self.branching = model, branching
        self._state: State | None = None
        self._unread: list[int] = []

    def start(self, tokens: Sequence[int]) -> None:
        self._state, self._unread = None, list(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self._unread += tokens

    @torch.no_grad()
    def propose(self, depth: int) -> Tree:
        root = self._read()
        assert self._state is not None
        tokens, parents = [root], [-1]
        level, states = [0], self._state
        for i, children in enumerate(self.branching[:depth]):
            assert states.logits is not None
            logits = states.logits[:, : self.model.vocab_size]
            best = logits.topk(min(max(children), logits.shape[1]), dim=-1).indices.tolist()
            rows, chosen = [], []
            for rank, (node, likely) in enumerate(zip(level, best, strict=True)):
                for token in likely[: children[rank] if rank < len(children) else 0]:
                    rows.append(rank)
                    chosen.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
            level = chosen
            if not level:
                break
            if i + 1 < min(depth, len(self.branching)):
                states = states.select(rows)
                self.model.step(torch.tensor([tokens[n] for n in level], device=states.position.device), states)
        return Tree(tokens, parents)

    def _read(self) -> int:
        """Read what was accepted; returns the text's last token."""
        if self._unread:
            ids = torch.tensor([self._unread], device=self.model.device)
            self._state = self.model.prefill(ids, state=self._state)
            self._last, self._unread = self._unread[-1], []
        if self._state is None:
            raise ValueError("there is no text to go on from: call start with at least one token")
        return self._last


def draft_of(name: str, target: CausalLM) -> Draft:
    """The draft of a name: "ngram", or a model of the zoo, loaded beside ``target``.

    Raises BadArgument (a ValueError) for a model of another task or with another vocabulary.
    """
    if name == "ngram":
        return NGramDraft()
    import zoo
    from zoo.loading import card_of

    if (task := card_of(name).task) != "text-generation":  # told before its weights are fetched
        raise errors.BadArgument(f"{name} cannot draft: it is for {task}", argument="speculative", accepted=["ngram"])
    model = zoo.load(name, device=str(target.device))
    if not isinstance(model, CausalLM) or model.vocab_size != target.vocab_size:
        has = getattr(model, "vocab_size", "no")
        raise errors.BadArgument(
            f"{name} cannot draft: it has {has} token ids, the target {target.vocab_size}",
            argument="speculative",
            accepted=["ngram"],
        )
    return ModelDraft(model)
