"""The Point Cloud Library's files (pcd, version 0.7): ascii, binary and binary_compressed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {"F": "f", "I": "i", "U": "u"}


def read_fields(path: Path) -> dict[str, np.ndarray]:
    """Fields by name, one value a point; a packed ``rgb`` or ``rgba`` also as red, green and blue (0 to 255).

    Raises ValueError for a header that does not say what follows, and for a file that ends too early.
    """
    content = path.read_bytes()
    header, start = _header(content, path)
    try:
        names, count = header["FIELDS"], int(header["POINTS"][0])
        formats = [np.dtype(f"<{_KINDS[k]}{s}").str for k, s in zip(header["TYPE"], header["SIZE"], strict=True)]
        repeats = [int(n) for n in header.get("COUNT", ["1"] * len(names))]
        if not len(names) == len(formats) == len(repeats):
            raise ValueError(f"FIELDS, TYPE and COUNT: {len(names)}, {len(formats)} and {len(repeats)} entries")
        if count < 0 or min(repeats, default=1) < 1:
            raise ValueError(f"POINTS and COUNT: {count} and {repeats}, where 0 or more and 1 or more are expected")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no readable pcd file: its header lacks or misstates {error}") from error
    columns = list(zip(names, formats, repeats, strict=True))
    data = " ".join(header["DATA"])
    if data == "ascii":
        fields = _ascii(content[start:], columns, count, path)
    elif data == "binary":
        kind = np.dtype([(f"{n}_{i}", f, (r,)) for i, (n, f, r) in enumerate(columns)])
        _enough(len(content) - start, kind.itemsize, count, path)
        records = np.frombuffer(content, dtype=kind, count=count, offset=start)
        fields = {n: records[f"{n}_{i}"][:, 0] for i, n in enumerate(names)}
    elif data == "binary_compressed":
        fields = _compressed(content[start:], columns, count, path)
    else:
        raise ValueError(f"{path}: DATA {data} is not known; expected ascii, binary or binary_compressed")
    for name in {"rgb", "rgba"} & set(fields):  # bytes in the bits of a float, or of an integer
        if header["TYPE"][names.index(name)] == "F":
            packed = np.ascontiguousarray(fields[name].astype(np.float32)).view(np.uint32)
        else:
            packed = fields[name].astype(np.int64).astype(np.uint32)
        shifts = (("red", 16), ("green", 8), ("blue", 0))
        fields |= {color: (packed >> shift).astype(np.uint8) for color, shift in shifts}
    return fields


def _header(content: bytes, path: Path) -> tuple[dict[str, list[str]], int]:
    """The header's lines by their first word, and where the data begin."""
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = content.find(b"\n", position)
        if end < 0:
            raise ValueError(f"{path}: no readable pcd file: the header has no DATA line")
        words = content[position:end].decode("ascii", "replace").split()
        position = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    return header, position


def _enough(length: int, size: int, count: int, path: Path) -> None:
    if length < size * count:
        raise ValueError(f"{path}: the file ends after {length // size} of {count} points")


def _ascii(content: bytes, columns: list[tuple[str, str, int]], count: int, path: Path) -> dict[str, Any]:
    rows = [line.split() for line in content.decode("ascii", "replace").splitlines() if line.strip()]
    if len(rows) != count:
        raise ValueError(f"{path}: the file has {len(rows)} rows; its header says {count} points")
    starts = np.cumsum([0, *(repeat for *_, repeat in columns)])
    try:
        table = np.array(rows, dtype=np.float64).reshape(len(rows), int(starts[-1]))
    except ValueError as error:
        raise ValueError(f"{path}: not every row holds {int(starts[-1])} numbers: {error}") from error
    return {name: table[:, start] for (name, *_), start in zip(columns, starts, strict=False)}


def _compressed(content: bytes, columns: list[tuple[str, str, int]], count: int, path: Path) -> dict[str, Any]:
    """All values of a field lie together, and the whole is packed with LZF."""
    if len(content) < 8:
        raise ValueError(f"{path}: the file ends before its compressed data")
    packed, size = struct.unpack("<II", content[:8])
    if len(content) - 8 < packed:
        raise ValueError(f"{path}: the file ends after {len(content) - 8} of {packed} compressed bytes")
    try:
        plain = unpack_lzf(content[8 : 8 + packed], size)
    except IndexError as error:
        raise ValueError(f"{path}: the compressed data are damaged") from error
    _enough(len(plain), sum(np.dtype(f).itemsize * r for _, f, r in columns), count, path)
    fields, position = {}, 0
    for name, form, repeat in columns:
        values = np.frombuffer(plain, dtype=form, count=count * repeat, offset=position)
        fields[name] = values.reshape(count, repeat)[:, 0]
        position += values.nbytes
    return fields


def unpack_lzf(packed: bytes, size: int) -> bytes:
    """LZF (Marc Lehmann's liblzf): a control byte below 32 is followed by that many literal bytes and one more; others
    repeat what was written before: 3 bits of length (7: the next byte is added), 13 bits of distance.

    Raises IndexError for data that point outside of themselves.
    """
    out = bytearray()
    i = 0
    while i < len(packed):
        control = packed[i]
        i += 1
        if control < 32:
            out += packed[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += packed[i]
            i += 1
        start = len(out) - ((control & 31) << 8) - packed[i] - 1
        i += 1
        length += 2
        if start < 0:
            raise IndexError("a reference before the first byte")
        if start + length <= len(out):
            out += out[start : start + length]
        else:  # the copy runs into itself: a repeated pattern
            pattern = bytes(out[start:])
            out += (pattern * (length // len(pattern) + 1))[:length]
    if len(out) != size:
        raise IndexError(f"{len(out)} bytes instead of {size}")
    return bytes(out)
