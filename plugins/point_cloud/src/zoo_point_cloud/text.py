"""Point clouds as text: a row of numbers for each point, below a line that names the columns or below none."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: What other programs call the fields of a point, in lower case.
_ALIASES = {
    **{name: kind for kind in ("red", "green", "blue") for name in (kind[0], f"{kind[0]}f", f"diffuse_{kind}")},
    **{name: f"n{axis}" for axis in "xyz" for name in (f"normal_{axis}", f"normal{axis}")},
}
_NAME = re.compile(r"[a-z_]\w*")
_COMMAS = re.compile(r"\s*,\s*|\s+")


def by_usual_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as x, y, z, red, green, blue, nx, ny, nz, whichever way the file spells them; the others in lower case."""
    found: dict[str, Any] = {}
    for name, values in fields.items():
        usual = name.lower().removeprefix("scalar_")  # CloudCompare's
        found.setdefault(_ALIASES.get(usual, usual), values)
    return found


def read_rows(path: Path) -> tuple[list[str], np.ndarray]:
    """(names of the columns, or none; the numbers (N, columns) in float64) of a text file.

    Numbers are parted by spaces, commas or semicolons. Beside semicolons a comma is a decimal point, and so it is where
    spaces part words with one comma inside. Names come from a heading, or from a comment (#, //) above the numbers that
    has a word for each column, x, y and z among them; a heading with another number of words is a title. A single whole
    number above the rows is their count.

    Raises ValueError, with the line, for anything else, so that no row is lost and no column moves.
    """
    numbers = array("d")
    width, count, first, last = 0, None, 0, 0
    heading, remark = "", ""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for last, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            if line.startswith(("#", "//")):
                remark = remark if width else line
                continue
            if "\0" in line:
                raise ValueError(f"{path}: line {last} holds bytes of zero; expected text in UTF-8")
            row = _numbers(line)
            if not width and not row and not heading and not any(_numbers(word) for word in _words(line)):
                heading = line
            elif not width and count is None and len(row) == 1 and line.isdigit():
                count = int(line)
            elif not row or len(row) != (width or len(row)):
                expected = f"{width} numbers as in line {first}" if width else "numbers"
                raise ValueError(f"{path}: line {last} is {line[:60]!r}; expected {expected}")
            else:
                width, first = len(row), first or last
                numbers.extend(row)
    table = np.array(numbers, dtype=np.float64).reshape(-1, width or 3)
    if count is not None and count != len(table):
        raise ValueError(f"{path} says that it has {count} points and has {len(table)}; it may have been cut short")
    return _names(path, heading, remark, first, width), table


def _numbers(line: str) -> list[float]:
    """The numbers of a line; none where anything else stands there."""
    if '"' in line:
        line = line.replace('"', "")
    if ";" in line:
        words = line.replace(",", ".").rstrip("; ").split(";")
    elif "," in line:
        words = line.split()
        if len(words) > 2 and all(w.count(",") <= 1 and w[0] != "," and w[-1] != "," for w in words):
            words = [word.replace(",", ".") for word in words]
        else:
            words = _COMMAS.split(line.rstrip(", "))
    else:
        words = line.split()
    try:
        return [float(word) for word in words]
    except ValueError:
        return []


def _words(heading: str) -> list[str]:
    """The words of a heading; spaces part them only where nothing else does."""
    words = re.split("[;,\t]", heading) if re.search("[;,\t]", heading) else heading.split()
    return [word for word in (w.strip(' "') for w in words) if word]


def _names(path: Path, heading: str, remark: str, first: int, width: int) -> list[str]:
    """The columns' names out of a heading or a comment above the rows, units in brackets left out."""
    for line, must in ((heading, True), (remark.lstrip("#/ "), False)):
        found = [_NAME.match(word.lower()) for word in _words(line) if word[0] not in "[("]
        names = [m[0] for m in found if m]
        placed = {"x", "y", "z"} <= set(by_usual_names(dict.fromkeys(names)))
        if placed and len(set(names)) == len(found) == width:
            return names
        if must and width and (placed or len(found) == width):
            raise ValueError(
                f"{path}: the heading {line[:60]!r} and the {width} numbers of line {first} do not fit; expected a "
                "name for each column, x, y and z among them, or no heading"
            )
    return []
