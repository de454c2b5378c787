"""What ``zoo cache`` shows and removes: the checkpoints of the registry in the Hub's cache, and what was made of them.

Other files of the same cache, which other programs put there, are never listed and never removed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import _disk as disk
from . import derived as _derived
from .cards import WeightsCard
from .errors import HashMismatch
from .hub import HubFile, cached, check
from .manager import Manager
from .names import Resolved
from .query import query
from .store import shard_names, sibling


@dataclass(frozen=True)
class CachedWeights:
    """One checkpoint in the cache."""

    name: str
    resolved: Resolved = field(repr=False)
    paths: tuple[Path, ...]  #: weights and index, as the Hub's cache names them
    derived: tuple[Path, ...] = ()  #: converted files made from them
    complete: bool = True  #: False when shards are missing

    @property
    def size(self) -> int:
        """Bytes of the originals."""
        return sum(p.stat().st_size for p in self.paths)

    @property
    def derived_size(self) -> int:
        return sum(p.stat().st_size for p in self.derived)


@dataclass(frozen=True)
class LocalDerived:
    """A converted file made from a file outside the Hub's cache (the user's own)."""

    path: Path
    origin: tuple[str, ...]
    size: int


def cached_weights(
    pattern: str = "*", *, cache_dir: str | Path | None = None, plugins: Manager | None = None
) -> list[CachedWeights]:
    """Every checkpoint of the registry that is in the cache, whole or in part, in natural order of names."""
    found = []
    for resolved in query(pattern, on_hub=True, plugins=plugins):
        assert resolved.weights is not None
        paths, complete = _paths(resolved.weights, cache_dir)
        if paths:
            found.append(CachedWeights(resolved.name, resolved, tuple(paths), tuple(_made_from(paths)), complete))
    return found


def _paths(weights: WeightsCard, cache_dir: str | Path | None) -> tuple[list[Path], bool]:
    assert weights.repo_id is not None
    assert weights.filename is not None
    first = cached(HubFile(weights.repo_id, weights.filename, weights.revision), cache_dir)
    if first is None:
        return [], False
    paths, complete = [first], True
    if weights.sharded:
        for name in shard_names(first):
            shard = cached(HubFile(weights.repo_id, sibling(weights.filename, name), weights.revision), cache_dir)
            complete = complete and shard is not None
            paths += [shard] if shard is not None else []
    return paths, complete


def _made_from(paths: Iterable[Path]) -> list[Path]:
    paths = list(paths)
    real = {str(p.resolve()) for p in paths}
    made = []
    for home in {home for path in paths for home in disk.homes(path)}:
        for path, facts in _derived.every(home / "derived"):
            if real & set(_origins(facts)):
                made.append(path)
    return sorted(made)


def _origins(facts: dict[str, object]) -> tuple[str, ...]:
    origin = facts.get("origin")
    if not isinstance(origin, list):
        return ()
    return tuple(str(o["path"]) if isinstance(o, dict) and "path" in o else str(o) for o in origin)


def local_derived() -> list[LocalDerived]:
    """Converted files made from files outside the Hub's cache."""
    folder = disk.assets(create=False) / "derived"
    found = []
    for path, facts in _derived.every(folder):
        origins = _origins(facts)
        if not any(disk.repo_folder(Path(o)) for o in origins):
            found.append(LocalDerived(path, origins, path.stat().st_size))
    return found


def remove(entry: CachedWeights | LocalDerived, *, only_derived: bool = False) -> int:
    """Delete a checkpoint and what was made of it; the number of bytes that became free.

    Bytes that another cached revision of the repository shares stay. ``only_derived`` keeps the originals.
    Raises CacheReadOnly when the cache cannot be written.
    """
    derived = (entry.path,) if isinstance(entry, LocalDerived) else entry.derived
    try:
        freed = sum(_derived.remove(path) for path in derived)
        if isinstance(entry, CachedWeights) and not only_derived:
            freed += sum(_remove_from_hub_cache(path) for path in entry.paths)
    except OSError as error:
        if disk.is_read_only(error):
            raise disk.read_only(Path(error.filename or disk.hub_cache()).parent, error) from error
        raise
    return freed


def _remove_from_hub_cache(path: Path) -> int:
    """Remove a snapshot's entry, its blob when nothing else names it, and the repository's folder when it is empty."""
    if not path.exists():  # two cards can name one file
        return 0
    repo = disk.repo_folder(path)
    blob = path.resolve()
    size = blob.stat().st_size
    disk.forget_digest(path, str(blob))
    path.unlink()
    if blob != path and repo is not None:
        if any(other.is_symlink() and other.resolve() == blob for other in (repo / "snapshots").rglob("*")):
            return 0
        blob.unlink(missing_ok=True)
    if repo is not None:
        _tidy(repo, path)
    return size


def _tidy(repo: Path, removed: Path) -> None:
    """Leave the cache as huggingface_hub expects it: no empty snapshots, no refs to snapshots that are gone."""
    snapshots = repo / "snapshots"
    folder = removed.parent
    while folder != snapshots and folder.is_relative_to(snapshots):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        folder = folder.parent
    left = {p.name for p in snapshots.iterdir()} if snapshots.is_dir() else set()
    if not left:
        shutil.rmtree(repo)
        return
    for ref in (p for p in (repo / "refs").rglob("*") if p.is_file()):
        if ref.read_text().strip() not in left:
            ref.unlink()


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found: ``ok``, ``wrong`` (moved aside), ``no digest`` (nothing to compare with),
    ``incomplete`` (shards are missing), ``gone`` (no longer in the cache)."""

    name: str
    state: str
    message: str = ""


def verify(entry: CachedWeights) -> Verdict:
    """Read a checkpoint of the cache again and compare its digest. A wrong file is moved aside."""
    weights = entry.resolved.weights
    assert weights is not None
    assert weights.repo_id is not None
    if not all(path.exists() for path in entry.paths):
        return Verdict(entry.name, "gone", "the file was removed; loading the checkpoint fetches it again")
    if not entry.complete:
        return Verdict(entry.name, "incomplete", "some shards are missing; loading it fetches them")
    compared = 0
    for path in entry.paths:
        digest = (
            weights.sha256 if path.name == Path(weights.filename or "").name else weights.shard_sha256.get(path.name)
        )
        file = HubFile(weights.repo_id, path.name, weights.revision, digest, entry.name)
        compared += digest is not None or len(path.resolve().name) == 64
        try:
            check(path, file, again=True)
        except HashMismatch as error:
            return Verdict(entry.name, "wrong", str(error))
    if not compared:
        return Verdict(entry.name, "no digest", "neither the card nor the Hub names a sha256")
    return Verdict(entry.name, "ok")


__all__ = ["CachedWeights", "LocalDerived", "Verdict", "cached_weights", "local_derived", "remove", "verify"]
