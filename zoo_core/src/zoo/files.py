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
import warnings
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
    given = _file(path, "an .npz or .npy file") if isinstance(path, (str, os.PathLike)) else path
    path = given if isinstance(given, Path) else Path("the bytes")
    try:
        content = np.load(given, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": content}
        with content:
            return {name: content[name] for name in content.files}
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # zipfile, zlib and numpy each have their own, and numpy's offers to unpickle
        raise errors.BadFile(
            f"{path} is no .npz or .npy file of plain arrays: it is empty, cut short, of another format, or holds "
            "Python objects",
            path=str(path),
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises BadFile."""
    path = _file(path, "a text file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.BadFile(
            f"{path} is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8",
            path=str(path),
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises BadFile."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise errors.BadFile(f"{path} is no JSON: {error}", path=str(path)) from error


def read_picture(source: Any) -> Any:
    """A ``PIL.Image`` in RGB, upright, from a file, an image, or an array of bytes (height, width[, 3 or 4]).

    Greys of 16 bits keep their shades (Pillow alone would make nearly all of them white). Raises BadFile for a file
    that is no picture, and for one of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` allows; ValueError for other
    objects.
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return _rgb(ImageOps.exif_transpose(source), "the picture")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ValueError(
                f"a picture is an array of {source.dtype} and shape {source.shape}; expected uint8, (height, width) or "
                "(height, width, 3 or 4)"
            )
        return Image.fromarray(source).convert("RGB")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"a picture is given as {type(source).__name__}; expected a file, a PIL image or an array")
    path = _file(source, "a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _rgb(ImageOps.exif_transpose(image), str(path))
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except Image.DecompressionBombError as error:
        raise errors.BadFile(
            f"{path} has too many pixels: {error} PIL.Image.MAX_IMAGE_PIXELS raises the limit", path=str(path)
        ) from error
    except (OSError, SyntaxError) as error:  # Pillow's own error is an OSError; broken PNG is a SyntaxError
        raise errors.BadFile(
            f"{path} is no picture that can be read ({error}); expected png, jpg, webp, bmp, tif ...", path=str(path)
        ) from error


def _rgb(image: Any, name: str) -> Any:
    """RGB of 8 bits. Raises BadFile for greys whose range says nothing about what is white."""
    from PIL import Image

    if image.mode == "F":
        raise errors.BadFile(f"{name} holds floating-point numbers; expected 8 or 16 bits a channel", path=name)
    if image.mode.startswith("I"):  # 16 bits; older releases of Pillow read them as 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise errors.BadFile(f"{name} has values outside 0 to 65535; expected 8 or 16 bits a channel", path=name)
        image = Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))
    return image.convert("RGB")


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
    work = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder", str(path))
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
    return errors.StoreError(f"{path} cannot be written: {error.strerror or error}", path=str(path))


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


def _file(path: str | os.PathLike[str], what: str) -> Path:
    path = Path(path)
    if path.is_dir():
        raise errors.BadFile(f"{path} is a folder; expected {what}", path=str(path))
    if not path.exists():
        raise errors.LocalFileMissing(f"there is no file {str(path)!r} (in {Path.cwd()})", path=str(path))
    return path


def _unreadable(path: Path, error: OSError) -> errors.BadFile:
    return errors.BadFile(f"{path} cannot be read: {error.strerror or error}", path=str(path))
