"""Files of the user's: read with one sentence for whatever is wrong with them, written whole or not at all.

numpy, zipfile, json and Pillow each have errors of their own for an empty file, a folder, text in place of bytes or a
transfer that was cut short, and some of them give advice that nobody should follow ("load it unsafely"). Here all of
them become :class:`zoo.errors.BadFile`, a ValueError that names the file and says what was expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zoo_registry import errors


def read_arrays(path: str | os.PathLike[str] | BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by their names, or that of a ``.npy`` file under the name "".

    ``path``: or an open file of bytes, as ``io.BytesIO``. Raises BadFile for anything else, Python objects included:
    these are never unpickled.
    """
    given = existing(path, "an .npz or .npy file") if isinstance(path, (str, os.PathLike)) else path
    path = given if isinstance(given, Path) else Path("the bytes")
    try:
        content = np.load(given, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": content}
        with content:
            return {name: content[name] for name in content.files}
    except PermissionError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # zipfile, zlib and numpy each have their own, and numpy's offers to unpickle
        raise errors.BadFile(
            f"{path} is no .npz or .npy file of plain arrays: it is empty, cut short, of another format, or holds "
            "Python objects",
            path=str(path),
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises BadFile."""
    path = existing(path, "a text file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.BadFile(
            f"{path} is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8",
            path=str(path),
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises BadFile."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise errors.BadFile(f"{path} is no JSON: {error}", path=str(path)) from error


def check_ending(path: str | os.PathLike[str], endings: Collection[str] | None = None) -> None:
    """Raise BadArgument for a name whose ending says no format: none of ``endings``, or (None) of pictures'."""
    said = endings
    if endings is None:
        from PIL import Image

        endings, said = Image.registered_extensions(), (".png", ".jpg", ".webp", ".tif", "...")
    assert said is not None
    ending = Path(path).suffix.lower()
    if ending not in endings:
        raise errors.BadArgument(
            f"{path} ends in {ending!r}; expected {', '.join(said)}", argument="path", accepted=sorted(endings)
        )


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a place beside ``path`` to write to, which takes the place of ``path`` when all went well.

    So a file appears whole or not at all, and one that was there stays until then. Folders above it are made. Raises
    StoreError where nothing can be written, DiskFull where the disk is full.
    """
    path = Path(path)
    if path.is_dir():  # before its name is asked for: "." has none
        raise unwritable(path, IsADirectoryError(None, "it is a folder", str(path)))
    work = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # all endings stay: .nii.gz
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield work
        os.replace(work, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def unwritable(path: str | os.PathLike[str], error: OSError) -> errors.ZooError:
    """An error of the system's while writing ``path``, as one that says what happened; ZooErrors stay as they are."""
    import errno

    if isinstance(error, errors.ZooError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.DiskFull(f"no space left to write {path}; nothing half-written was kept", path=str(path))
    why = error.strerror or str(error)
    if isinstance(error, FileExistsError) and error.filename is not None:  # what mkdir says of a file in its way
        why = f"{error.filename} is a file"
    return errors.StoreError(f"{path} cannot be written: {why}", path=str(path))


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise StoreError where a folder or file ``path`` could not be made, before hours of work are spent on it."""
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    probe = (place if place.is_dir() else place.parent) / f".zoo.{secrets.token_hex(4)}"
    try:
        if not place.is_dir() and place != Path(path).expanduser().absolute():
            raise NotADirectoryError(None, f"{place} is a file")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def refused(path: object) -> Iterator[None]:
    """ValueErrors raised within, whose sentences name the file themselves, become BadFile: the file is at fault."""
    try:
        yield
    except errors.ZooError:
        raise
    except ValueError as error:
        raise errors.BadFile(str(error), path=str(path)) from error


def existing(path: str | os.PathLike[str], what: str) -> Path:
    """``path``, which is a file. Raises BadFile for a folder, LocalFileMissing for nothing."""
    path = Path(path)
    if path.is_dir():
        raise errors.BadFile(f"{path} is a folder; expected {what}", path=str(path))
    if not path.exists():
        raise errors.LocalFileMissing(f"there is no file {str(path)!r} (in {Path.cwd()})", path=str(path))
    return path


def unreadable(path: Path, error: OSError) -> errors.BadFile:
    """An error of the system's while reading ``path``, as one that says what happened."""
    return errors.BadFile(f"{path} cannot be read: {error.strerror or error}", path=str(path))
