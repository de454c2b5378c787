"""Joint recall, the task of HAX: a table of values by context and key, read once and then asked for in another order.

Tokens: 1 begins, 2 ends, 3 pads, 4 separates; 10 + v are values, then keys, then contexts. Draws are the original's,
call by call, from numpy's legacy generator. Source: DeepGraphLearning/HAX @ 73d3c18 ``scripts/create_dataset.py``;
paper: arXiv 2507.00449, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BEGIN, END, PAD, SEPARATOR, SPECIAL = 1, 2, 3, 4, 10


@dataclass(frozen=True)
class JointRecall:
    """The task's sizes: at most ``max_n_context`` contexts of ``max_n_key`` keys, ``n_value`` different values."""

    max_n_context: int = 16
    max_n_key: int = 16
    n_value: int = 16

    @property
    def length(self) -> int:
        """Tokens of an item, padding included."""
        return 2 * self.max_n_context * (2 * self.max_n_key + 1) + 2

    @property
    def vocab_size(self) -> int:
        """Ids that occur (the published configurations have 100)."""
        return SPECIAL + self.n_value + self.max_n_key + self.max_n_context

    def item(self, n_context: int, n_key: int, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
        """(ids, mask), (length,) int64 each; mask is 1 on the keys of the second half, behind which a value is due.

        Raises ValueError for more contexts or keys than the task has.
        """
        for name, value, most in (("n_context", n_context, self.max_n_context), ("n_key", n_key, self.max_n_key)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; expected 1 to {most}")
        values = random.randint(0, self.n_value, (n_context, n_key))
        first_key, first_context = SPECIAL + self.n_value, SPECIAL + self.n_value + self.max_n_key
        ids, mask = [BEGIN], [0]
        for half in range(2):
            if half:
                ids.append(SEPARATOR)
                mask.append(0)
            for context in random.permutation(n_context):
                ids.append(first_context + int(context))
                mask.append(0)
                for key in random.permutation(n_key):
                    ids += [first_key + int(key), SPECIAL + int(values[context, key])]
                    mask += [half, 0]
        missing = self.length - len(ids)
        return torch.tensor(ids + [PAD] * missing), torch.tensor(mask + [0] * missing)

    def items(
        self, each: int, *, seed: int = 1, smallest: int = 5, seen: set[bytes] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``each`` items of every size from ``smallest`` up, none twice.

        Items in ``seen`` are drawn again, and new ones added to it: share it between the splits (those published have
        10 000, 100 and 100 of each size). Raises ValueError where a thousand draws in a row give nothing new.
        """
        random = np.random.RandomState(seed)
        seen = set() if seen is None else seen
        for n_context in range(smallest, self.max_n_context + 1):
            for n_key in range(smallest, self.max_n_key + 1):
                for _ in range(each):
                    for _ in range(1000):
                        ids, mask = self.item(n_context, n_key, random)
                        name = ids.numpy().tobytes()
                        if name not in seen:
                            break
                    else:
                        raise ValueError(
                            f"there are too few different items of {n_context} contexts and {n_key} keys for {each} of "
                            "each size: ask for fewer, or begin with larger ones (smallest=)"
                        )
                    seen.add(name)
                    yield ids, mask


def recall_accuracy(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Mean over items of the share of asked values that the logits put first.

    logits (batch, length, vocabulary), ids and mask (batch, length) as :meth:`JointRecall.item` gives them.
    """
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).double()
    asked = mask[:, :-1].double()
    return float(((right * asked).sum(1) / asked.sum(1).clamp(min=1)).mean())


class JointRecallReplay(nn.Module):
    """The generator alone: the items of a golden file, one after another from one stream."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.task = JointRecall(config["max_n_context"], config["max_n_key"], config["n_value"])
        self.seed = config["seed"]

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        random = np.random.RandomState(self.seed)
        found = {}
        for i in range(sum(name.endswith(".sizes") for name in inputs)):
            n_context, n_key = (int(n) for n in inputs[f"{i}.sizes"])
            found[f"{i}.inputs"], found[f"{i}.mask"] = self.task.item(n_context, n_key, random)
        return found
