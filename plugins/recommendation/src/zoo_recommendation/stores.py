"""Where users are kept between events: in memory with one safetensors file, or in SQLite.

A recurrent model's user is a state of fixed size, a vector and the list of what was taken (4 bytes an item, so that it
can be left out of answers). Keys are the users' names in the interaction file.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from zoo.files import existing, whole
from zoo_registry import errors


@dataclass
class UserRecord:
    """What is kept of one user. ``state`` is None for models without one; their last items and times serve instead."""

    items: np.ndarray  #: int32 ids in the order of events (all of them: seen items are excluded from answers)
    times: np.ndarray  #: float64, as the model reads them: seconds, or scaled as the training data were
    state: np.ndarray | None = None  #: float32, every tensor of the state end to end
    vector: np.ndarray | None = None  #: float32, the user vector after the last item


#: What events do to users: their records before (None for a new user) to their records after, in the same order.
Change = Callable[[list[UserRecord | None]], list[UserRecord]]


class Store(Protocol):
    """What :class:`zoo_recommendation.serving.Recommender` needs of a place for users."""

    def get(self, user: str) -> UserRecord | None:
        """The user's record, None for one who is not in the store."""

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """Write records, in place of earlier ones of the same users."""

    def change(self, users: Sequence[str], change: Change) -> None:
        """Read these users' records, change them and write them back; nobody else writes them in between."""

    def users(self) -> Iterator[str]:
        """The ids of all users."""
        ...

    def __len__(self) -> int: ...


class MemoryStore:
    """Users in memory, saved to and read from one safetensors file. Threads may share it: one changes it at a time."""

    def __init__(self) -> None:
        self._records: dict[str, UserRecord] = {}
        self._lock = threading.Lock()

    def get(self, user: str) -> UserRecord | None:
        return self._records.get(user)

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        self._records.update(records)

    def change(self, users: Sequence[str], change: Change) -> None:
        with self._lock:
            self.put_many(zip(users, change([self.get(user) for user in users]), strict=True))

    def users(self) -> Iterator[str]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def save(self, path: str | Path) -> Path:
        """Everything in one file: ragged parts end to end with their offsets. Written beside and moved into place.

        Raises StoreError where nothing can be written, ValueError when some users have a state and some have none.
        """
        from safetensors.numpy import save_file

        records = list(self._records.values())
        lengths = np.array([len(r.items) for r in records], dtype=np.int64)
        tensors: dict[str, np.ndarray] = {
            "lengths": lengths,
            "items": np.concatenate([r.items for r in records] or [np.zeros(0, np.int32)]).astype(np.int32),
            "times": np.concatenate([r.times for r in records] or [np.zeros(0)]).astype(np.float64),
        }
        if any(r.state is not None for r in records):
            tensors["states"] = np.stack([_present(r.state) for r in records])
            tensors["vectors"] = np.stack([_present(r.vector) for r in records])
        path = Path(path)
        with whole(path) as work:
            save_file(tensors, work, metadata={"users": json.dumps(list(self._records))})
        return path

    @classmethod
    def open(cls, path: str | Path) -> MemoryStore:
        """Read what :meth:`save` wrote. Raises BadFile (a ValueError) for other files."""
        from safetensors import SafetensorError, safe_open

        store = cls()
        path = existing(path, "a file that MemoryStore.save wrote")
        try:
            with safe_open(str(path), framework="np") as file:
                users = json.loads((file.metadata() or {})["users"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, KeyError) as error:
            raise errors.BadFile(f"{path} is no file of MemoryStore.save: {error}", path=str(path)) from error
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
    """Users in one SQLite file: millions of them need no memory.

    An update reads, steps and writes inside one transaction, so several processes may serve one file. A crash of the
    process loses nothing; a loss of power may lose the last updates, but never half of one. A connection belongs to
    its thread: give each thread its own store. A file that cannot be written (a read-only disk) answers and takes no
    updates. Raises BadFile for a file that is no SQLite database, StoreError where none can be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        try:
            if path.is_file() and not (os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK)):
                self._connection = _read_only(path)
                return
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS users "
                "(user TEXT PRIMARY KEY, items BLOB NOT NULL, times BLOB NOT NULL, state BLOB, vector BLOB)"
            )
        except sqlite3.OperationalError as error:
            raise errors.StoreError(f"{path} cannot be opened as a file of users: {error}", path=str(path)) from error
        except sqlite3.DatabaseError as error:
            raise errors.BadFile(f"{path} is no file of users (SQLite): {error}", path=str(path)) from error

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

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """All of them or none."""
        with self._transaction():
            self._write(records)

    def change(self, users: Sequence[str], change: Change) -> None:
        """Read, change, write; no other process writes in between. What ``change`` raises leaves the file as it was."""
        with self._transaction():
            self._write(zip(users, change([self.get(user) for user in users]), strict=True))

    def _write(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?, ?)", (_row(user, record) for user, record in records)
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a read-only file, a full disk, one that another holds for too long
            raise errors.StoreError(f"{self.path} cannot be changed: {error}", path=str(self.path)) from error

    def users(self) -> Iterator[str]:
        for (user,) in self._connection.execute("SELECT user FROM users"):
            yield user

    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM users").fetchone()[0]

    def close(self) -> None:
        """Write out what lies beside the file, and let go of it."""
        self._connection.close()


def _read_only(path: Path) -> sqlite3.Connection:
    """A file that nobody here can write. Raises StoreError when updates still lie beside it, which it would not see."""
    behind = path.with_name(path.name + "-wal")
    if behind.exists() and behind.stat().st_size:
        raise errors.StoreError(
            f"{path} cannot be written, and {behind.name} beside it holds updates that must first be written into it; "
            "open it once where it can be written, or copy both files there",
            path=str(path),
        )
    return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)


def _row(user: str, record: UserRecord) -> tuple[str, bytes, bytes, bytes | None, bytes | None]:
    return (
        user,
        record.items.astype(np.int32).tobytes(),
        record.times.astype(np.float64).tobytes(),
        None if record.state is None else record.state.astype(np.float32).tobytes(),
        None if record.vector is None else record.vector.astype(np.float32).tobytes(),
    )


def _present(value: np.ndarray | None) -> np.ndarray:
    if value is None:
        raise ValueError("some users have a state and some have none: they were written by different models")
    return value
