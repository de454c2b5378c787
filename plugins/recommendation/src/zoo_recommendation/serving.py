"""A recommender that is told what happens and answers at once: the user is a state, an update is one step.

A transformer reads a user's whole history again for every answer. A recurrent model needs the state after the last
item alone: :meth:`Recommender.update` costs the same for the tenth item and for the ten thousandth, and gives the
scores that the whole history would give (up to rounding).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.files import whole

from ._base import SequentialRecommender, UserState
from .protocol import Interactions, at_once, scaled
from .stores import MemoryStore, SQLiteStore, Store, UserRecord

__all__ = ["Answer", "MemoryStore", "Recommendation", "Recommender", "SQLiteStore", "UnknownItem", "UserRecord",
           "write_parquet"]  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """One answer: the item's name in the interaction file and its score (higher is better, no unit)."""

    item: str
    score: float


@dataclass(frozen=True)
class Answer:
    """The items for one user, best first. ``cold``: the user has no history here, and popularity answered."""

    user: str
    items: tuple[Recommendation, ...]
    cold: bool = False


class UnknownItem(ValueError):
    """An item that was not in the training data: the model has no vector for it."""


class Recommender:
    """Answers for users who keep acting.

    Arguments: ``model`` (put into eval mode), ``item_tokens`` (names by id, entry 0 is padding), ``store`` (memory by
    default), ``popularity`` (counts by item id, what cold users get; None: zero for all), ``time_scale`` (the (first,
    last) second that were 0 and 1 in training, for models trained on scaled times). Users' names are strings; others
    are taken by their text, 17 as "17". Raises ValueError for names or counts of another number than the model's items
    and for a model that is not on the CPU.
    """

    def __init__(
        self,
        model: SequentialRecommender,
        item_tokens: Sequence[str],
        store: Store | None = None,
        popularity: np.ndarray | None = None,
        time_scale: tuple[float, float] | None = None,
    ) -> None:
        if len(item_tokens) != model.n_items:
            raise ValueError(f"{len(item_tokens)} item names for a model of {model.n_items} items (padding included)")
        if (device := next(model.parameters()).device).type != "cpu":
            raise ValueError(f"the model is on {device}; a recommender answers on the CPU: give it model.cpu()")
        self.model = model.eval()
        self.item_tokens = list(item_tokens)
        self.item_ids = {token: i for i, token in enumerate(self.item_tokens) if i}
        self.store: Store = MemoryStore() if store is None else store
        self.time_scale = time_scale
        self.popularity = np.zeros(model.n_items) if popularity is None else np.asarray(popularity, dtype=np.float64)
        if self.popularity.shape != (model.n_items,):
            raise ValueError(
                f"popularity has shape {self.popularity.shape}; expected ({model.n_items},), item 0 included"
            )
        self._layout = [{k: v.shape[1:] for k, v in layer.items()} for layer in model.init_user(1)] if (
            model.recurrent
        ) else []  # fmt: skip

    # -- what happens ----------------------------------------------------------------------------------------------

    def update(self, user: str, item: str, time: float | None = None) -> None:
        """``user`` took ``item`` at ``time`` (seconds; models that do not read times need none). Constant cost for
        recurrent models.

        Raises UnknownItem, naming it, for an item that the model was not trained on, and ValueError for a time that is
        missing or not finite; nothing is changed then.
        """
        self.update_many([(user, item, time)])

    def update_many(self, events: Iterable[tuple[str, str, float | None]], batch_size: int = 1024) -> int:
        """(user, item, time) events in their order, ``batch_size`` users stepping together; returns how many.

        The result is that of :meth:`update` after :meth:`update`, many times as fast. Raises as :meth:`update`, before
        anything is changed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        rounds: list[list[tuple[str, int, float]]] = []  # the n-th holds each user's n-th event of these
        seen: dict[str, int] = {}
        for user, item, time in events:
            index = self.item_ids.get(str(item))
            if index is None:
                raise UnknownItem(
                    f"item {item!r} was not in the training data, so the model has no vector for it; "
                    "skip it, or train again with it"
                )
            if time is None and self.model.reads_times:
                raise ValueError(f"user {user!r}, item {item!r}: the model reads times; give time= in seconds")
            when = 0.0 if time is None else float(time)
            if not math.isfinite(when):
                raise ValueError(f"user {user!r}, item {item!r}: the time is {time}; expected seconds")
            user = str(user)
            turn = seen[user] = seen.get(user, -1) + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append((user, index, float(scaled(when, self.time_scale))))
        for events_of_round in rounds:
            for first in range(0, len(events_of_round), batch_size):
                users, items, times = zip(*events_of_round[first : first + batch_size], strict=True)
                self.store.change(users, functools.partial(self._step, items, times))
        return sum(len(r) for r in rounds)

    @torch.no_grad()
    def _step(self, items: Sequence[int], times: Sequence[float], records: list[UserRecord | None]) -> list[UserRecord]:
        """One event for each of several users."""
        before = [UserRecord(np.zeros(0, np.int32), np.zeros(0)) if r is None else r for r in records]
        states: Sequence[np.ndarray | None] = [None] * len(before)
        vectors: Sequence[np.ndarray | None] = states
        if self.model.recurrent:
            tensors = self._open([record.state for record in before])
            vectors = list(self.model.step(torch.tensor(items), tensors).float().numpy())
            states = list(self._close(tensors))
        return [
            UserRecord(
                np.append(record.items, np.int32(item)).astype(np.int32), np.append(record.times, time), state, vector
            )
            for record, item, time, state, vector in zip(before, items, times, states, vectors, strict=True)
        ]

    @torch.no_grad()
    def load_histories(self, table: Interactions, batch_size: int = 256) -> None:
        """Every user of a table with its whole history, in batches. Replaces what the store had of them."""
        first = np.flatnonzero(np.r_[True, table.user[1:] != table.user[:-1]])
        spans = zip(first, np.r_[first[1:], len(table.user)], strict=True)
        self.put_histories(
            [(table.user_tokens[table.user[a]], table.item[a:b], table.time[a:b]) for a, b in spans], batch_size
        )

    @torch.no_grad()
    def put_histories(self, histories: Sequence[tuple[str, np.ndarray, np.ndarray]], batch_size: int = 256) -> None:
        """Users with whole histories, (name, item ids, times as the model reads them). Replaces what the store had."""
        ordered = sorted(histories, key=lambda history: len(history[1]))  # batches of like lengths
        for start in range(0, len(ordered), batch_size):
            group = ordered[start : start + batch_size]
            states: list[np.ndarray | None] = [None] * len(group)
            vectors: list[np.ndarray | None] = [None] * len(group)
            if self.model.recurrent:
                states, vectors = self._walk([items for _, items, _ in group])
            self.store.put_many(
                (user, UserRecord(items.astype(np.int32), times.astype(np.float64), state, vector))
                for (user, items, times), state, vector in zip(group, states, vectors, strict=True)
            )

    def _walk(self, histories: list[np.ndarray]) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
        """States and vectors after whole histories: all users step together, those that have ended wait."""
        longest = max(len(h) for h in histories)
        state = self.model.init_user(len(histories))
        vectors = torch.zeros(len(histories), self.model.hidden_size)
        lengths = torch.tensor([len(h) for h in histories])
        items = torch.zeros(len(histories), longest, dtype=torch.long)
        for i, history in enumerate(histories):
            items[i, : len(history)] = torch.from_numpy(history.astype(np.int64))
        for t in range(longest):
            active = (lengths > t).nonzero().squeeze(1)
            piece = [{k: v[active] for k, v in layer.items()} for layer in state]
            vectors[active] = self.model.step(items[active, t], piece).float()
            for layer, part in zip(state, piece, strict=True):
                for key, value in part.items():
                    layer[key][active] = value
        return list(self._close(state)), list(vectors.numpy())

    # -- answers ---------------------------------------------------------------------------------------------------

    def scores(self, user: str) -> np.ndarray | None:
        """Scores by item id (padding at -inf), or None for a user without history."""
        record = self.store.get(str(user))
        if record is None or not len(record.items):
            return None
        return self._scores([record])[0].numpy()

    @torch.no_grad()
    def _scores(self, records: Sequence[UserRecord]) -> Tensor:
        """(users, n_items) of users with a history."""
        vectors = torch.empty(len(records), self.model.hidden_size, dtype=self.model.item_embedding.weight.dtype)
        unknown = [i for i, record in enumerate(records) if record.vector is None]
        if unknown:
            vectors[unknown] = self._recompute([records[i] for i in unknown])
        for i, record in enumerate(records):
            if record.vector is not None:
                if len(record.vector) != self.model.hidden_size:
                    raise ValueError(
                        f"a stored vector has {len(record.vector)} numbers, this model's has {self.model.hidden_size}: "
                        "the store belongs to another model"
                    )
                vectors[i] = torch.from_numpy(np.array(record.vector))
        scores = self.model.scores(vectors).float()
        scores[:, 0] = -torch.inf
        return scores

    def _recompute(self, records: Sequence[UserRecord]) -> Tensor:
        """The user vectors from the last ``max_length`` items, for models without a state."""
        window = self.model.max_length
        lengths = [min(len(record.items), window) for record in records]
        items = torch.zeros(len(records), window, dtype=torch.long)
        times = torch.zeros(len(records), window)
        for i, (record, length) in enumerate(zip(records, lengths, strict=True)):
            items[i, :length] = torch.from_numpy(record.items[-length:].astype(np.int64))
            times[i, :length] = torch.from_numpy(record.times[-length:].astype(np.float32))
        return self.model(items, torch.tensor(lengths), times)

    def recommend(self, user: str, k: int = 10, *, exclude_seen: bool = True) -> Answer:
        """The ``k`` best items, fewer when the catalogue is smaller. A user without history gets the most popular."""
        return self.recommend_many([user], k, exclude_seen=exclude_seen)[0]

    def recommend_many(self, users: Sequence[str], k: int = 10, *, exclude_seen: bool = True) -> list[Answer]:
        """:meth:`recommend` for several users at once, in their order."""
        if not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"k is {k!r}; expected a whole number, at least 1")
        if isinstance(users, str):
            raise ValueError(f"users is {users!r}; expected a list of names (`recommend` answers for one user)")
        users = [str(user) for user in users]
        records = [self.store.get(user) for user in users]
        known = [record for record in records if record is not None and len(record.items)]
        best: Iterator[tuple[Recommendation, ...]] = iter(())
        if known:
            scores = self._scores(known)
            if exclude_seen:
                for row, record in zip(scores, known, strict=True):
                    row[torch.from_numpy(record.items.astype(np.int64))] = -torch.inf
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            best = (self._named(*pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return [
            Answer(user, next(best))
            if record is not None and len(record.items)
            else Answer(user, self._popular(k), True)
            for user, record in zip(users, records, strict=True)
        ]

    def recommend_all(self, k: int = 10, *, exclude_seen: bool = True, batch_size: int = 512) -> Iterator[Answer]:
        """Answers for every user of the store, ``batch_size`` of them at once (fewer over large catalogues)."""
        users = iter(self.store.users())
        batch_size = at_once(batch_size, self.model.n_items)
        while batch := list(islice(users, batch_size)):
            yield from self.recommend_many(batch, k, exclude_seen=exclude_seen)

    def _named(self, items: Sequence[int], scores: Sequence[float]) -> tuple[Recommendation, ...]:
        return tuple(
            Recommendation(self.item_tokens[i], score)
            for i, score in zip(items, scores, strict=True)
            if score != -np.inf
        )

    def _popular(self, k: int) -> tuple[Recommendation, ...]:
        best = np.argsort(-self.popularity[1:], kind="stable")[:k] + 1
        return self._named(best.tolist(), self.popularity[best].tolist())

    # -- states as rows of numbers ---------------------------------------------------------------------------------

    def _open(self, rows: Sequence[np.ndarray | None]) -> UserState:
        """States of several users from their rows; None is a user without history."""
        state = self.model.init_user(len(rows))
        known = [i for i, row in enumerate(rows) if row is not None]
        if not known:
            return state
        size = sum(int(np.prod(shape)) for layer in self._layout for shape in layer.values())
        wrong = next((row for row in rows if row is not None and len(row) != size), None)
        if wrong is not None:
            raise ValueError(
                f"a stored state has {len(wrong)} numbers, this model's has {size}: the store belongs to another model"
            )
        stored = torch.from_numpy(np.stack([row for row in rows if row is not None]))
        position = 0
        for layer, shapes in zip(state, self._layout, strict=True):
            for key, shape in shapes.items():
                count = int(np.prod(shape))
                layer[key][known] = stored[:, position : position + count].view(-1, *shape).to(layer[key].dtype)
                position += count
        return state

    def _close(self, state: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
        """(users, numbers of a state) float32."""
        parts = [v.float().reshape(v.shape[0], -1) for layer in state for v in layer.values()]
        return torch.cat(parts, dim=1).numpy()


def write_parquet(answers: Iterable[Answer], path: str | Path, *, rows: int = 65536) -> int:
    """One row a recommendation: user, rank (from 1), item, score, cold. Returns the number of rows.

    ``rows`` are held in memory at a time, so the answers may be a generator over millions of users. Written beside and
    moved into place: ``path`` is whole or it is not there. Folders above it are made; raises StoreError where nothing
    can be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = pa.schema(
        [
            ("user", pa.string()),
            ("rank", pa.int32()),
            ("item", pa.string()),
            ("score", pa.float32()),
            ("cold", pa.bool_()),
        ]
    )
    table = (
        (answer.user, rank, found.item, found.score, answer.cold)
        for answer in answers
        for rank, found in enumerate(answer.items, start=1)
    )
    written = 0
    with whole(path) as work, parquet.ParquetWriter(work, schema) as writer:
        while piece := list(islice(table, rows)):
            columns = [pa.array(column, type=field.type) for column, field in zip(zip(*piece), schema)]  # noqa: B905
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            written += len(piece)
    return written
