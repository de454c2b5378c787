"""A recommender that is told what happens and answers at once: the user is a state, an update is one step.

A transformer reads a user's whole history again for every answer. A recurrent model needs the state after the last
item alone: :meth:`Recommender.update` costs the same for the tenth item and for the ten thousandth, and gives the
scores that the whole history would give (up to rounding).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ._base import SequentialRecommender, UserState
from .protocol import Interactions


@dataclass
class UserRecord:
    """What is kept of one user. ``state`` is None for models without one; their last items and times serve instead."""

    items: np.ndarray  #: int32 ids in the order of events (all of them: seen items are excluded from answers)
    times: np.ndarray  #: float64 seconds
    state: np.ndarray | None = None  #: float32, every tensor of the state end to end
    vector: np.ndarray | None = None  #: float32, the user vector after the last item


class Store(Protocol):
    """Where users are kept. Keys are the users' names in the interaction file."""

    def get(self, user: str) -> UserRecord | None: ...
    def put(self, user: str, record: UserRecord) -> None: ...
    def users(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


class MemoryStore:
    """Users in memory, saved to and read from one safetensors file."""

    def __init__(self) -> None:
        self._records: dict[str, UserRecord] = {}

    def get(self, user: str) -> UserRecord | None:
        return self._records.get(user)

    def put(self, user: str, record: UserRecord) -> None:
        self._records[user] = record

    def users(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def save(self, path: str | Path) -> Path:
        """Everything in one file: ragged parts end to end with their offsets. Written beside and moved into place."""
        from safetensors.numpy import save_file

        records = list(self._records.values())
        lengths = np.array([len(r.items) for r in records], dtype=np.int64)
        tensors: dict[str, np.ndarray] = {
            "lengths": lengths,
            "items": np.concatenate([r.items for r in records] or [np.zeros(0, np.int32)]).astype(np.int32),
            "times": np.concatenate([r.times for r in records] or [np.zeros(0)]).astype(np.float64),
        }
        if records and records[0].state is not None:
            tensors["states"] = np.stack([_present(r.state) for r in records])
            tensors["vectors"] = np.stack([_present(r.vector) for r in records])
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata={"users": json.dumps(list(self._records))})
        temporary.replace(path)
        return path

    @classmethod
    def open(cls, path: str | Path) -> MemoryStore:
        """Read what :meth:`save` wrote."""
        from safetensors import safe_open

        store = cls()
        with safe_open(str(path), framework="np") as file:
            users = json.loads((file.metadata() or {}).get("users", "[]"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if len(tensors["lengths"]) != len(users):
            raise ValueError(f"{path}: {len(users)} user names for {len(tensors['lengths'])} records; not a state file")
        ends = np.cumsum(tensors["lengths"])
        for i, user in enumerate(users):
            rows = slice(ends[i] - tensors["lengths"][i], ends[i])
            store._records[user] = UserRecord(
                tensors["items"][rows],
                tensors["times"][rows],
                tensors["states"][i] if "states" in tensors else None,
                tensors["vectors"][i] if "vectors" in tensors else None,
            )
        return store


class SQLiteStore:
    """Users in one SQLite file: updates are transactions, millions of users need no memory."""

    def __init__(self, path: str | Path) -> None:
        self._connection = sqlite3.connect(path)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS users "
            "(user TEXT PRIMARY KEY, items BLOB NOT NULL, times BLOB NOT NULL, state BLOB, vector BLOB) WITHOUT ROWID"
        )

    def get(self, user: str) -> UserRecord | None:
        row = self._connection.execute(
            "SELECT items, times, state, vector FROM users WHERE user = ?", (user,)
        ).fetchone()
        if row is None:
            return None
        items, times, state, vector = row
        return UserRecord(
            np.frombuffer(items, np.int32),
            np.frombuffer(times, np.float64),
            None if state is None else np.frombuffer(state, np.float32),
            None if vector is None else np.frombuffer(vector, np.float32),
        )

    def put(self, user: str, record: UserRecord) -> None:
        self.put_many([(user, record)])

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """All of them or none."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?, ?)",
                (
                    (
                        user,
                        record.items.astype(np.int32).tobytes(),
                        record.times.astype(np.float64).tobytes(),
                        None if record.state is None else record.state.astype(np.float32).tobytes(),
                        None if record.vector is None else record.vector.astype(np.float32).tobytes(),
                    )
                    for user, record in records
                ),
            )

    def users(self) -> Iterator[str]:
        for (user,) in self._connection.execute("SELECT user FROM users"):
            yield user

    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM users").fetchone()[0]

    def close(self) -> None:
        self._connection.close()


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

    Arguments: ``model`` (eval mode), ``item_tokens`` (names by id, entry 0 is padding), ``store`` (memory by default),
    ``popularity`` (counts by item id, what cold users get; None: zero for all).
    """

    def __init__(
        self,
        model: SequentialRecommender,
        item_tokens: Sequence[str],
        store: Store | None = None,
        popularity: np.ndarray | None = None,
    ) -> None:
        if len(item_tokens) != model.n_items:
            raise ValueError(f"{len(item_tokens)} item names for a model of {model.n_items} items (padding included)")
        self.model = model.eval()
        self.item_tokens = list(item_tokens)
        self.item_ids = {token: i for i, token in enumerate(self.item_tokens) if i}
        self.store: Store = MemoryStore() if store is None else store
        self.popularity = np.zeros(model.n_items) if popularity is None else np.asarray(popularity, dtype=np.float64)
        self._layout = [{k: v.shape[1:] for k, v in layer.items()} for layer in model.init_user(1)] if (
            model.recurrent
        ) else []  # fmt: skip

    # -- what happens ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, user: str, item: str, time: float = 0.0) -> None:
        """``user`` took ``item`` at ``time`` (seconds). Constant cost for recurrent models.

        Raises UnknownItem, naming it, for an item that the model was not trained on; nothing is changed then.
        """
        index = self.item_ids.get(str(item))
        if index is None:
            raise UnknownItem(
                f"item {item!r} was not in the training data, so the model has no vector for it; "
                "skip it, or train again with it"
            )
        record = self.store.get(user)
        if record is None:
            record = UserRecord(np.zeros(0, np.int32), np.zeros(0))
        state, vector = record.state, record.vector
        if self.model.recurrent:
            tensors = self._open(state)
            out = self.model.step(torch.tensor([index]), tensors)
            state, vector = self._close(tensors), out[0].float().numpy()
        items = np.append(record.items, np.int32(index)).astype(np.int32)
        self.store.put(user, UserRecord(items, np.append(record.times, float(time)), state, vector))

    @torch.no_grad()
    def load_histories(self, table: Interactions, batch_size: int = 256) -> None:
        """Every user of a table with its whole history, in batches. Replaces what the store had of them."""
        first = np.flatnonzero(np.r_[True, table.user[1:] != table.user[:-1]])
        spans = list(zip(first, np.r_[first[1:], len(table.user)], strict=True))
        spans.sort(key=lambda span: span[1] - span[0])  # batches of like lengths
        for start in range(0, len(spans), batch_size):
            group = spans[start : start + batch_size]
            states: list[np.ndarray | None] = [None] * len(group)
            vectors: list[np.ndarray | None] = [None] * len(group)
            if self.model.recurrent:
                states, vectors = self._walk([table.item[a:b] for a, b in group])
            records = [
                (
                    table.user_tokens[table.user[a]],
                    UserRecord(table.item[a:b].astype(np.int32), table.time[a:b].astype(np.float64), state, vector),
                )
                for (a, b), state, vector in zip(group, states, vectors, strict=True)
            ]
            if isinstance(self.store, SQLiteStore):
                self.store.put_many(records)
            else:
                for user, record in records:
                    self.store.put(user, record)

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
        rows: list[np.ndarray | None] = []
        for i in range(len(histories)):
            rows.append(self._close([{k: v[i : i + 1] for k, v in layer.items()} for layer in state]))
        return rows, list(vectors.numpy())

    # -- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, user: str) -> np.ndarray | None:
        """Scores by item id (padding at -inf), or None for a user without history."""
        record = self.store.get(user)
        if record is None or not len(record.items):
            return None
        if record.vector is not None:
            vector = torch.from_numpy(np.array(record.vector))[None]
        else:
            vector = self._recompute(record)
        scores = self.model.scores(vector.to(self.model.item_embedding.weight.dtype))[0].float().numpy()
        scores[0] = -np.inf
        return scores

    def _recompute(self, record: UserRecord) -> Tensor:
        """The user vector from the last ``max_length`` items, for models without a state."""
        length = min(len(record.items), self.model.max_length)
        items = torch.zeros(1, self.model.max_length, dtype=torch.long)
        times = torch.zeros(1, self.model.max_length)
        items[0, :length] = torch.from_numpy(record.items[-length:].astype(np.int64))
        times[0, :length] = torch.from_numpy(record.times[-length:].astype(np.float32))
        return self.model(items, torch.tensor([length]), times)

    def recommend(self, user: str, k: int = 10, *, exclude_seen: bool = True) -> Answer:
        """The ``k`` best items, fewer when the catalogue is smaller. A user without history gets the most popular."""
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        scores = self.scores(user)
        cold = scores is None
        if scores is None:
            scores = self.popularity.astype(np.float32).copy()
            scores[0] = -np.inf
        elif exclude_seen:
            record = self.store.get(user)
            assert record is not None
            scores[np.unique(record.items)] = -np.inf
        k = min(k, int(np.isfinite(scores).sum()))
        best = np.argpartition(-scores, max(k - 1, 0))[:k]
        best = best[np.argsort(-scores[best], kind="stable")]
        return Answer(user, tuple(Recommendation(self.item_tokens[i], float(scores[i])) for i in best), cold)

    def recommend_all(self, k: int = 10, *, exclude_seen: bool = True) -> Iterator[Answer]:
        """Answers for every user of the store."""
        for user in self.store.users():
            yield self.recommend(user, k, exclude_seen=exclude_seen)

    # -- the state as a row of numbers -----------------------------------------------------------------------------

    def _open(self, row: np.ndarray | None) -> UserState:
        if row is None:
            return self.model.init_user(1)
        state, position = [], 0
        for layer in self._layout:
            tensors = {}
            for key, shape in layer.items():
                count = int(np.prod(shape))
                tensors[key] = torch.from_numpy(np.array(row[position : position + count])).view(1, *shape)
                position += count
            state.append(tensors)
        if position != len(row):
            raise ValueError(
                f"a stored state has {len(row)} numbers, this model's has {position}: "
                "the store belongs to another model"
            )
        return state

    def _close(self, state: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
        return np.concatenate([v.float().reshape(-1).numpy() for layer in state for v in layer.values()])


def _present(value: np.ndarray | None) -> np.ndarray:
    if value is None:
        raise ValueError("some users have a state and some have none: they were written by different models")
    return value


def write_parquet(answers: Iterable[Answer], path: str | Path) -> int:
    """One row a recommendation: user, rank (from 1), item, score, cold. Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns: dict[str, list[Any]] = {"user": [], "rank": [], "item": [], "score": [], "cold": []}
    for answer in answers:
        for rank, found in enumerate(answer.items, start=1):
            for name, value in zip(columns, (answer.user, rank, found.item, found.score, answer.cold), strict=True):
                columns[name].append(value)
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    parquet.write_table(pa.table(columns), temporary)
    temporary.replace(path)
    return len(columns["user"])
