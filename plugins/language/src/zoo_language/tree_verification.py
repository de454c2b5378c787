"""Trees of drafted tokens: what they are, and which of their tokens a target model accepts.

Paper: Wu et al., "STree: Speculative Tree Decoding for Hybrid State-Space Models", arXiv 2505.14969; its original:
wyc1997/stree @ 021b0ec (no licence stated; written from facts). Multi-step speculative sampling: Miao et al.,
"SpecInfer", arXiv 2305.09781, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Tree:
    """Drafted continuations as a tree: ``tokens[0]`` is the root, the last token chosen, which is not yet read.

    ``parents[i]`` is the node before node i, an earlier one; -1 for the root. Raises ValueError where that is not so.
    """

    tokens: list[int]
    parents: list[int]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or not self.tokens:
            raise ValueError(f"a tree of {len(self.tokens)} tokens has {len(self.parents)} parents; one each is needed")
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise ValueError(f"parents are {self.parents}; expected -1 for the root and an earlier node for the others")

    @classmethod
    def from_mask(cls, tokens: Sequence[int], mask: Tensor) -> Tree:
        """From an ancestor-or-self mask (nodes, nodes)."""
        rows = mask.bool().tolist()
        parents = [max((j for j in range(i) if row[j]), default=-1) for i, row in enumerate(rows)]
        return cls([int(t) for t in tokens], parents)

    def mask(self) -> Tensor:
        """Ancestor-or-self, (nodes, nodes) bool. As :func:`zoo_kernels.ops.ssd.tree_mask`, without its tensor loop."""
        rows = np.eye(len(self.parents), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                rows[i] |= rows[parent]
        return torch.from_numpy(rows)

    def depths(self) -> list[int]:
        """Tokens between the root and each node."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found

    def children(self, node: int) -> list[int]:
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def child(self, node: int, token: int) -> int | None:
        """The first child of ``node`` that holds ``token``."""
        return next((i for i in self.children(node) if self.tokens[i] == token), None)


@dataclass
class Accepted:
    """``path``: accepted nodes from the root on; ``tokens``: what comes behind the root, the last one chosen freely."""

    path: list[int]
    tokens: list[int]

    def mask(self, nodes: int) -> Tensor:
        """(nodes,) bool, True on the path."""
        found = torch.zeros(nodes, dtype=torch.bool)
        found[self.path] = True
        return found


def match(tree: Tree, choose: Callable[[int], int]) -> Accepted:
    """Choose a token at a node as plain decoding would; while a child holds it, go there ("sample and match").

    choose(node) gives the token that follows a node; with the target's own sampler the text has the distribution of
    plain decoding, with the most likely token it is that of greedy decoding.
    """
    path, tokens = [0], []
    while True:
        tokens.append(choose(path[-1]))
        following = tree.child(path[-1], tokens[-1])
        if following is None:
            return Accepted(path, tokens)
        path.append(following)


def match_greedy(tree: Tree, logits: Tensor) -> Accepted:
    """:func:`match` with the most likely token; logits (nodes, vocabulary) of what follows each node."""
    best = logits.argmax(-1).tolist()
    return match(tree, lambda node: best[node])


def speculative_sampling(
    tree: Tree,
    target: Tensor,
    draft: Tensor,
    uniforms: Iterator[float],
    sample: Callable[[Tensor], int],
    max_depth: int | None = None,
) -> tuple[Accepted, Tensor]:
    """SpecInfer's multi-step speculative sampling: accepts more than matching where siblings were drawn from ``draft``.

    target, draft: logits (nodes, vocabulary); draft row i is what node i and its siblings were drawn from, read at
    their first. uniforms: numbers in [0, 1), one a child that is tried. sample: draws from probabilities (vocabulary,).
    Returns what is accepted, and the probabilities from which the last token was drawn. The tokens have the target's
    distribution.
    """
    path, tokens = [0], []
    while True:
        p = target[path[-1]].float().softmax(-1)
        tried = tree.children(path[-1]) if max_depth is None or len(path) <= max_depth else []
        following = None
        if tried:
            q = draft[tried[0]].float().softmax(-1)
        for child in tried:
            token = tree.tokens[child]
            if q[token] == 0:
                continue
            if next(uniforms) <= min(1.0, float(p[token] / q[token])):
                following = child
                break
            p = _normalised((p - q).clamp(min=0), p)
            q = q.clone()
            q[token] = 0
            q = _normalised(q, q)
        if following is None:
            tokens.append(sample(p))
            return Accepted(path, tokens), p
        path.append(following)
        tokens.append(tree.tokens[following])


def _normalised(x: Tensor, otherwise: Tensor) -> Tensor:
    total = x.sum()
    return x / total if total > 0 else otherwise
