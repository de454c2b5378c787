"""Files on disk: where the zoo keeps its own, how it writes them so that a kill at any moment leaves nothing wrong,
and how it remembers that a file was checked.

Nothing of the zoo lies outside the Hub's cache. What belongs to a file of a cached repository lies in the folder
``.zoo`` of that repository (``models--org--name/.zoo``, beside ``blobs`` and ``snapshots``), so that ``hf cache rm``
takes it along. What belongs to other files (the user's own, a plugin's) lies in the Hub's folder for assets
(``HF_ASSETS_CACHE``), which also serves when the cache cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CacheReadOnly, DiskFull, StoreError

log = logging.getLogger("zoo.store")

#: No space, over the user's quota, over the process's limit on file sizes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def is_full(error: BaseException) -> bool:
    """Whether an error means that no more can be written; safetensors reports it as text only."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error)
    return "No space left on device" in text or any(f"(os error {code})" in text for code in _FULL)


def is_read_only(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _READ_ONLY


def disk_full(path: Path, *, needed: int | None = None, what: str = "the file", advice: str | None = None) -> DiskFull:
    """``advice``: what to do, where ``path`` is not the Hub's cache."""
    advice = advice or "Free some space (`zoo cache` lists what is cached) or set HF_HOME to a larger disk"
    free = free_bytes(path)
    sizes = ", ".join(
        part
        for part in (f"{_mb(needed)} needed" if needed else "", f"{_mb(free)} free" if free is not None else "")
        if part
    )
    return DiskFull(
        f"no space left to write {what} in {path}{f' ({sizes})' if sizes else ''}; nothing half-written was kept. "
        f"{advice}",
        path=str(path),
        needed=needed,
        free=free,
    )


def read_only(path: Path, error: BaseException | None = None) -> CacheReadOnly:
    return CacheReadOnly(
        f"the cache {path} cannot be written{f' ({error})' if error else ''}. Set HF_HOME to a folder of yours, "
        "or pass cache_dir=",
        path=str(path),
    )


def unwritable(path: Path, error: OSError) -> StoreError:
    """A folder of the user's, not the cache."""
    return StoreError(f"{path} cannot be written: {error.strerror or error}; choose another folder", path=str(path))


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def free_bytes(path: Path) -> int | None:
    """Free space where ``path`` lies or would lie; None where the system does not say."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


# -- places ------------------------------------------------------------------------------------------------------


def hub_cache(cache_dir: str | Path | None = None) -> Path:
    """The Hub's cache folder: ``cache_dir``, else what HF_HUB_CACHE and HF_HOME say."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def assets(*, create: bool = True) -> Path:
    """The zoo's folder under HF_ASSETS_CACHE."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    path = Path(HF_ASSETS_CACHE).expanduser() / "ssm-zoo"
    if create:
        path.mkdir(parents=True, exist_ok=True)
    return path


def repo_folder(path: Path) -> Path | None:
    """The folder of the cached repository that ``path`` lies in ("models--org--name"), None for other files."""
    for parent in path.absolute().parents:
        if parent.name in ("snapshots", "blobs") and parent.parent.name.startswith("models--"):
            return parent.parent
    return None


def homes(path: Path) -> list[Path]:
    """Where what belongs to ``path`` may lie, the preferred place first. Creates nothing."""
    repo = repo_folder(path)
    return [*([repo / ".zoo"] if repo else []), assets(create=False)]


def writable_home(path: Path) -> Path:
    """The first of :func:`homes` that can be written, created. Raises CacheReadOnly or DiskFull."""
    tried: list[tuple[Path, OSError]] = []
    for home in homes(path):
        try:
            home.mkdir(parents=True, exist_ok=True)
            probe = home / f".probe-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if is_full(error):
                raise disk_full(home) from error
            tried.append((home, error))
            continue
        if tried:
            log.warning("%s cannot be written (%s); using %s instead", tried[0][0], tried[0][1], home)
        return home
    raise read_only(*tried[0]) from tried[0][1]


# -- writing -----------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk itself."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot say when it has written
            raise
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Make ``temporary`` become ``final``, whole or not at all, even when the power fails."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A small file of facts; None when it is not there or is no such file (then it is written anew)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Held by one process (and thread) at a time; the system releases it when its holder is killed.

    Yields False where the file system has no locks. What is written stays right (it appears by renaming), only work
    may be done twice.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    own = FileLock(path)
    try:
        own.acquire()
        held = True
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s has no file locks (%s); going on without", path.parent, error)
        held = False
    try:
        yield held
    finally:
        if held:
            own.release()


# -- digests -----------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> dict[str, Any]:
    """What changes when a file changes: its real path, its size in bytes, its time of change in nanoseconds."""
    real = path.resolve(strict=True)
    facts = real.stat()
    return {"path": str(real), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


#: For caches that cannot be written: real path -> verdict.
_remembered: dict[str, dict[str, Any]] = {}


def _verdict_name(real: str) -> str:
    return hashlib.sha256(real.encode()).hexdigest()[:32] + ".json"


def known_digest(path: Path) -> str | None:
    """The digest that this very file (path, size, time) was found to have earlier; None when it must be computed."""
    now = stamp(path)
    for verdict in (_remembered.get(now["path"]), *_verdicts(path, now["path"])):
        if verdict and all(verdict.get(key) == value for key, value in now.items()):
            _remembered[now["path"]] = verdict
            return verdict.get("sha256")
    return None


def _verdicts(path: Path, real: str) -> Iterator[dict[str, Any] | None]:
    for home in homes(path):
        yield read_json(home / "verified" / _verdict_name(real))


def recorded_digest(path: Path) -> str | None:
    """The digest that a file of this path was once found to have, whatever has happened to the file since."""
    real = str(path.resolve(strict=True))
    for verdict in _verdicts(path, real):
        if verdict and verdict.get("path") == real and isinstance(verdict.get("sha256"), str):
            return str(verdict["sha256"])
    return None


def remember_digest(path: Path, sha256: str, before: dict[str, Any]) -> None:
    """Keep a verdict. ``before`` is the stamp from before the file was read: a file that changed since is not it."""
    verdict = before | {"sha256": sha256}
    _remembered[before["path"]] = verdict
    try:
        folder = writable_home(path) / "verified"
        folder.mkdir(exist_ok=True)
        write_json(folder / _verdict_name(before["path"]), verdict)
    except OSError as error:  # the verdict saves time only; without it the file is hashed again
        log.debug("the digest of %s cannot be remembered: %s", path, error)


def forget_digest(path: Path, real: str) -> None:
    _remembered.pop(real, None)
    for home in homes(path):
        with contextlib.suppress(OSError):
            (home / "verified" / _verdict_name(real)).unlink(missing_ok=True)


def digest(path: Path, *, again: bool = False) -> str:
    """The sha256 of a file, computed once for as long as its path, size and time stay the same."""
    known = None if again else known_digest(path)
    if known is not None:
        return known
    before = stamp(path)
    value = sha256_of(path)
    remember_digest(path, value, before)
    return value
