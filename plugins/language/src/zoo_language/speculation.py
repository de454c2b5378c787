"""Speculative decoding of one text: a draft proposes a tree, the model reads it in one pass, plain choices decide.

Every token is chosen from the model's own logits by the text's own sampler, in the order of plain decoding; a drafted
token only saves a pass where it is the chosen one. So the tokens are those of plain decoding, greedy or sampled, up to
ties within rounding. Source: STree, arXiv 2505.14969, with its "sample and match" verification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._base import CausalLM
from .state import State
from .tree_pass import TreePass
from .tree_verification import Tree

if TYPE_CHECKING:
    from .drafts import Draft
    from .generation import Text


def speculate(
    model: CausalLM,
    state: State,
    text: Text,
    seen: list[int],
    draft: Draft,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    choose: Callable[[Tensor, Sequence[int]], int],
    ends: Callable[[], bool],
    step: Callable[[Tensor, State], Tensor],
) -> Iterator[int]:
    """Yield a text's tokens, fill in ``text`` and move ``state`` (one text) on in place.

    seen: the text so far, extended. choose(logits, seen): the next token. ends(): whether a stop string has come.
    step: how single tokens are read where the draft has nothing to say. The state ends as plain decoding leaves it.
    """
    verify = TreePass(model)
    draft.start(seen)
    assert state.logits is not None
    if max_new_tokens == 0:
        text.reason = text.reason or "length"
        return
    token = choose(state.logits[0, : model.vocab_size], seen)
    while True:
        if token in stop_tokens:
            text.reason = "stop"
            return
        _append(token, text, seen, draft)
        yield token
        if ends():
            return
        text.passes += 1
        left = max_new_tokens - len(text.tokens)
        tree = draft.propose(left) if left else Tree([token], [-1])
        if tree.tokens[0] != token:
            raise ValueError(f"the draft's tree begins with {tree.tokens[0]}; the text's last token is {token}")
        if len(tree.tokens) == 1:
            step(torch.tensor([token], device=state.position.device), state)
            if not left:
                text.reason = "length"
                return
            token = choose(state.logits[0, : model.vocab_size], seen)
            continue
        logits = verify(tree, state)
        path, over = [0], False
        while True:
            token = choose(logits[path[-1], : model.vocab_size], seen)
            following = tree.child(path[-1], token)
            # The last token is read by itself, so that the loop has one end.
            if following is None or token in stop_tokens or len(text.tokens) + 1 >= max_new_tokens:
                break
            _append(token, text, seen, draft)
            yield token
            if ends():
                over = True
                break
            text.accepted += 1
            path.append(following)
        verify.accept(path, state)
        if over:
            return


def _append(token: int, text: Text, seen: list[int], draft: Draft) -> None:
    text.tokens.append(token)
    seen.append(token)
    draft.extend([token])
