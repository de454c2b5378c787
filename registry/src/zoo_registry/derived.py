"""Files made from other files (a checkpoint converted to safetensors), made once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import _disk as disk
from .errors import LocalFileMissing

Origin = str | Path | Sequence[Path]


def derived(source: Origin, key: str, produce: Callable[[Path], None], *, suffix: str = ".safetensors") -> Path:
    """The file that ``produce`` makes from ``source``: from the cache when it was made before, else made now.

    ``source`` is the file it is made from (several for shards; a change of path, size or time makes it anew), or a
    text that identifies the content, such as a digest. ``key`` says what is made and by which version of the code
    ("vim-2"); letters, digits, dots, dashes, underscores. ``produce`` gets a path to write to. While it runs, other
    processes that want the same file wait.

    The file appears under its name only when it is whole and on the disk, so a kill at any moment leaves at most a
    temporary file, which the next call removes. An exception of ``produce`` passes through, a full disk becomes
    DiskFull; both leave nothing behind. The file lies beside the original in the Hub's cache, or in the folder for
    assets when that cannot be written (a message says so); CacheReadOnly when neither can.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,80}", key):
        raise ValueError(f"key is {key!r}; expected up to 80 letters, digits, dots, dashes, underscores")
    origin, beside = _origin(source)
    identity = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:24]
    name = f"{key}-{identity}{suffix}"
    for home in disk.homes(beside):
        if _whole(home / "derived" / name):
            return home / "derived" / name
    folder = disk.writable_home(beside) / "derived"
    final = folder / name
    with disk.lock(folder / ".locks" / f"{name}.lock") as held:
        if _whole(final):  # another process made it while this one waited
            return final
        if held:
            _sweep(folder, name)
        temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp{suffix}"
        try:
            produce(temporary)
            if not temporary.is_file():
                raise RuntimeError(f"produce wrote nothing to the path it was given ({temporary})")
            size = temporary.stat().st_size
            disk.commit(temporary, final)
            # Written last: the file counts as whole only with its facts beside it.
            disk.write_json(_facts(final), {"key": key, "size": size, "origin": origin})
        except Exception as error:
            if disk.is_full(error):
                temporary.unlink(missing_ok=True)
                raise disk.disk_full(folder, what=name) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        _drop_older(folder, final, key, origin)
    return final


def _origin(source: Origin) -> tuple[list[Any], Path]:
    """What identifies the source, and the path that decides where the derived file lies."""
    if isinstance(source, str):
        return [source], Path(source)
    paths = [source] if isinstance(source, Path) else list(source)
    if not paths:
        raise ValueError("source holds no paths; expected at least one")
    try:
        return [disk.stamp(path) for path in paths], paths[0]
    except FileNotFoundError as error:
        raise LocalFileMissing(f"the file to convert is not there: {error.filename}", path=str(paths[0])) from error


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _whole(path: Path) -> bool:
    facts = disk.read_json(_facts(path))
    try:
        return facts is not None and path.stat().st_size == facts.get("size")
    except OSError:
        return False


def _sweep(folder: Path, name: str) -> None:
    """Remove what killed processes left of this file. Only the holder of its lock comes here, so nobody writes it."""
    for stale in folder.glob(f".{name}.*.tmp*"):
        with contextlib.suppress(OSError):
            stale.unlink()


def _drop_older(folder: Path, final: Path, key: str, origin: list[Any]) -> None:
    """Remove what was made with the same key from an earlier state of the same files, which nobody asks for again."""

    def places(facts: list[Any]) -> list[str] | None:
        return [f["path"] for f in facts] if all(isinstance(f, dict) and "path" in f for f in facts) else None

    own = places(origin)
    if own is None:
        return
    for path, facts in every(folder):
        if path != final and facts.get("key") == key and places(facts.get("origin", [])) == own:
            with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
                remove(path)


def every(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The derived files of a folder with their facts."""
    for file in sorted(folder.glob("*.json")):
        path = file.with_name(file.name.removesuffix(".json"))
        facts = disk.read_json(file)
        if facts is not None and path.is_file():
            yield path, facts


def remove(path: Path) -> int:
    """Delete a derived file; the number of bytes that became free."""
    size = path.stat().st_size if path.exists() else 0
    _facts(path).unlink(missing_ok=True)  # first: without its facts the file counts as absent
    path.unlink(missing_ok=True)
    return size
