"""RecBole's data protocol for sequential recommendation, exactly, so that numbers compare.

Filter by k-core, number users and items by first appearance, cut every history into (items before, next item) samples,
leave the last one out for testing and the one before for validation, rank over all items. Samples are index ranges
into one sorted table (:class:`Samples`), not copies: an epoch over a million samples needs the table alone.

Source: RUCAIBox/RecBole @ 7b02be5, ``data/dataset/sequential_dataset.py``, ``evaluator/``.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo_registry import errors


@dataclass(frozen=True)
class Interactions:
    """A filtered table, one row an interaction, sorted by user and then time (ties keep the file's order).

    user, item: ids from 1 (0 is padding); time: float32 as RecBole stores it (raw seconds at 1e9 come in steps of 64).
    ``user_tokens[id]`` and ``item_tokens[id]`` are the names in the file; entry 0 is "[PAD]".
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    user_tokens: list[str]
    item_tokens: list[str]
    time_scale: tuple[float, float] | None = None  #: the (first, last) second that are 0 and 1 in ``time``, if scaled

    @property
    def n_users(self) -> int:
        """Users plus one: id 0 is padding."""
        return len(self.user_tokens)

    @property
    def n_items(self) -> int:
        """Items plus one: id 0 is padding."""
        return len(self.item_tokens)


@dataclass(frozen=True)
class Samples:
    """Next-item samples over one table: history = rows ``start[i]:end[i]``, target = row ``end[i]``."""

    table: Interactions
    start: np.ndarray
    end: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.end)

    @property
    def user(self) -> np.ndarray:
        return self.table.user[self.end]

    @property
    def target(self) -> np.ndarray:
        return self.table.item[self.end]

    @property
    def target_time(self) -> np.ndarray:
        return self.table.time[self.end]

    @property
    def length(self) -> np.ndarray:
        return self.end - self.start

    def checksum(self) -> int:
        """One number for which samples these are, to tell whether a run goes on with the data that it began with."""
        parts = (self.start, self.end, self.table.item, self.table.time)
        return functools.reduce(lambda found, part: zlib.crc32(np.ascontiguousarray(part).tobytes(), found), parts, 0)

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Rows ``index`` as right-padded tensors: item_seq (n, L), times (n, L), item_seq_len, target, user (n)."""
        start, end = self.start[index], self.end[index]
        length = end - start
        rows = start[:, None] + np.arange(self.max_length)
        inside = np.arange(self.max_length) < length[:, None]
        rows = np.where(inside, rows, 0)
        return {
            "item_seq": torch.from_numpy(np.where(inside, self.table.item[rows], 0)),
            "times": torch.from_numpy(np.where(inside, self.table.time[rows], np.float32(0))),
            "item_seq_len": torch.from_numpy(length),
            "target": torch.from_numpy(self.table.item[end]),
            "user": torch.from_numpy(self.table.user[end]),
        }

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """All samples once, in order, or shuffled when a generator is given. Raises ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"the batch size is {size}; expected at least 1")
        order = np.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator).numpy()
        for first in range(0, len(self), size):
            yield self.batch(order[first : first + size])


def prepare(
    users: Sequence[Any] | np.ndarray,
    items: Sequence[Any] | np.ndarray,
    times: Sequence[float] | np.ndarray,
    *,
    core: int = 5,
    scale_time: bool = False,
) -> Interactions:
    """Filter, number and sort. ``scale_time``: min-max to [0, 1], which RecBole does for the data set "ml-100k" alone.

    Raises BadArgument (a ValueError) when nothing is left after the filter, and for times that are not finite.
    """
    users, items, times = np.asarray(users), np.asarray(items), np.asarray(times, dtype=np.float64)
    if not len(users) == len(items) == len(times):
        raise ValueError(f"columns of different lengths: {len(users)} users, {len(items)} items, {len(times)} times")
    if not np.isfinite(times).all():
        raise ValueError(f"time {np.flatnonzero(~np.isfinite(times))[0]} is missing or not finite; expected seconds")
    _, user_code = np.unique(users.astype(str), return_inverse=True)
    _, item_code = np.unique(items.astype(str), return_inverse=True)
    keep = np.ones(len(users), dtype=bool)
    while True:  # users and items leave together, until nobody does
        user_count = np.bincount(user_code[keep], minlength=user_code.max(initial=-1) + 1)
        item_count = np.bincount(item_code[keep], minlength=item_code.max(initial=-1) + 1)
        new = keep & (user_count[user_code] >= core) & (item_count[item_code] >= core)
        if (new == keep).all():
            break
        keep = new
    if not keep.any():
        raise errors.BadArgument(
            f"nothing is left of {len(users)} interactions: no users and items have at least {core} interactions with "
            "each other; use more data or a smaller core (--core)",
            argument="core",
            accepted=[],
        )
    users, items, times = users[keep], items[keep], times[keep]
    user, user_tokens = _number(users)
    item, item_tokens = _number(items)
    scale = (float(times.min()), float(times.max())) if scale_time else None
    stored = scaled(times, scale).astype(np.float32)
    order = np.lexsort((np.arange(len(user)), stored, user))
    return Interactions(user[order], item[order], stored[order], user_tokens, item_tokens, scale)


def scaled(times: np.ndarray | float, scale: tuple[float, float] | None) -> np.ndarray:
    """Seconds as the model reads them: as they are, or on the [0, 1] of the training data (later ones lie above 1)."""
    times = np.asarray(times, dtype=np.float64)
    if scale is None:
        return times
    low, high = scale
    return (times - low) / (high - low) if high > low else np.zeros_like(times)


def seconds(times: np.ndarray, scale: Sequence[float] | None) -> np.ndarray:
    """The inverse of :func:`scaled` (all the same second where the training data held one)."""
    return times if scale is None else scale[0] + times * (scale[1] - scale[0])


def _number(tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Ids from 1 by first appearance, and the names by id."""
    names, first, code = np.unique(tokens.astype(str), return_index=True, return_inverse=True)
    by_appearance = np.argsort(first, kind="stable")
    rank = np.empty(len(names), dtype=np.int64)
    rank[by_appearance] = np.arange(1, len(names) + 1)
    return rank[code], ["[PAD]", *names[by_appearance].tolist()]


def split(table: Interactions, max_length: int) -> tuple[Samples, Samples, Samples]:
    """(train, validation, test) samples, leave-one-out, in RecBole's order.

    Users come in the order of their earliest target, a user's samples in the order of their targets' times. A user with
    two samples has none for validation, a user with one has only a training sample.
    """
    row = np.arange(len(table.user))
    is_first = np.r_[True, table.user[1:] != table.user[:-1]]
    first_row = np.maximum.accumulate(np.where(is_first, row, 0))
    end = row[~is_first]
    start = np.maximum(first_row[end], end - max_length)
    by_time = np.argsort(table.time[end], kind="stable")
    end, start = end[by_time], start[by_time]
    users = table.user[end]
    _, first_seen, code = np.unique(users, return_index=True, return_inverse=True)
    order = np.lexsort((np.arange(len(end)), first_seen[code]))
    end, start, users = end[order], start[order], users[order]

    last = np.r_[users[1:] != users[:-1], True] if len(users) else np.zeros(0, dtype=bool)
    position_from_end = _from_end(last)
    count = np.bincount(users, minlength=table.n_users)[users] if len(users) else users
    test = (position_from_end == 0) & (count > 1)
    valid = (position_from_end == 1) & (count > 2)
    train = ~test & ~valid

    def pick(mask: np.ndarray) -> Samples:
        return Samples(table, start[mask], end[mask], max_length)

    return pick(train), pick(valid), pick(test)


def _from_end(last: np.ndarray) -> np.ndarray:
    """For each row how many rows of its group follow, given which rows end a group."""
    ends = np.flatnonzero(last)
    if not len(ends):
        return np.zeros(0, dtype=np.int64)
    return ends[np.searchsorted(ends, np.arange(len(last)))] - np.arange(len(last))


def at_once(most: int, n_items: int) -> int:
    """How many rows of scores over all items are made at a time: ``most``, fewer where they would fill 256 MB."""
    return max(1, min(most, (1 << 26) // n_items))


#: Every metric and cut-off that is reported, in RecBole's spelling.
METRICS = ("hit", "ndcg", "mrr")


class Ranking:
    """Hit, NDCG and MRR at several cut-offs, accumulated over batches of full scores (RecBole's full ranking)."""

    def __init__(self, topk: Sequence[int] = (10, 20)) -> None:
        self.topk = sorted(topk)
        self.sums = {f"{metric}@{k}": 0.0 for metric in METRICS for k in self.topk}
        self.count = 0

    def add(self, scores: Tensor, target: Tensor) -> None:
        """scores (batch, n_items), target (batch,): item 0 never ranks; items already seen may (as in RecBole).

        Raises ValueError for scores that are not numbers.
        """
        scores = scores.clone()
        scores[:, 0] = -torch.inf
        if bool(scores.isnan().any()):  # a rank among these means nothing, and topk would give one
            raise ValueError(
                "the model's scores are not numbers (NaN), so nothing can be ranked: its weights are broken (by a "
                "learning rate that is too high, say), or timestamps are extreme"
            )
        best = scores.topk(min(max(self.topk), scores.shape[1]), dim=1).indices
        match = best == target[:, None]
        rank = torch.where(match.any(1), match.float().argmax(1) + 1, scores.shape[1] + 1).double()
        for k in self.topk:
            inside = rank <= k
            self.sums[f"hit@{k}"] += float(inside.double().sum())
            self.sums[f"ndcg@{k}"] += float((inside / torch.log2(rank + 1)).sum())
            self.sums[f"mrr@{k}"] += float((inside / rank).sum())
        self.count += len(target)

    def result(self) -> dict[str, float]:
        """Means over all rows added; an error when there were none."""
        if not self.count:
            raise ValueError("no samples to evaluate: the split has no user with enough interactions")
        return {name: value / self.count for name, value in self.sums.items()}


class ProtocolReplay(nn.Module):
    """Replays a golden file of the protocol: an interaction table in, RecBole's samples and metrics out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        table = prepare(
            *(inputs[name].cpu().numpy() for name in ("user", "item", "timestamp")), core=self.config["core"]
        )
        found = {
            "user_tokens_by_id": torch.tensor([int(t) for t in table.user_tokens[1:]]),
            "item_tokens_by_id": torch.tensor([int(t) for t in table.item_tokens[1:]]),
        }
        parts = split(table, self.config["MAX_ITEM_LIST_LENGTH"])
        for name, part in zip(("train", "valid", "test"), parts, strict=True):
            batch = part.batch(np.arange(len(part)))
            found |= {
                f"{name}_items": batch["item_seq"],
                f"{name}_times": batch["times"],
                f"{name}_length": batch["item_seq_len"],
                f"{name}_target": batch["target"],
                f"{name}_user": batch["user"],
                f"{name}_target_time": torch.from_numpy(part.target_time),
            }
        ranking = Ranking(self.config["topk"])
        ranking.add(inputs["test_scores_before_masking"], found["test_target"])
        metrics = ranking.result()
        order = [
            f"{metric}@{k}" for metric in ("hit", "mrr", "ndcg") for k in sorted(self.config["topk"], reverse=True)
        ]
        found["metrics"] = torch.tensor([metrics[name] for name in order], dtype=torch.float64)
        return found
