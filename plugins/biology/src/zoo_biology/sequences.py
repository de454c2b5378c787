"""Files of sequences: FASTA and A3M, plain or gzipped, and SMILES."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

FASTA = (".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn", ".a3m", ".a2m")
SMILES = (".smi", ".smiles", ".txt", ".csv", ".tsv")


def endings(plain: tuple[str, ...]) -> tuple[str, ...]:
    """The endings of files, and with .gz behind them."""
    return plain + tuple(e + ".gz" for e in plain)


@dataclass(frozen=True)
class Record:
    """One sequence: ``name`` is the first word of its header."""

    name: str
    sequence: str
    description: str = ""


def open_text(path: str | Path) -> IO[str]:
    """A text file, through gzip where its first bytes say so, whatever its ending."""
    with Path(path).open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if zipped else Path(path).open(encoding="utf-8")


def stream_fasta(path: str | Path) -> Iterator[Record]:
    """The records of a FASTA or A3M file one by one; holds one of them in memory.

    Lines that begin with ; or # are comments. Raises ValueError, naming the file and line, for text before the first
    header, a file that is not text, and an empty file.
    """
    header: str | None = None
    lines: list[str] = []
    number = 0
    try:
        with open_text(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.strip()
                if not line or line[0] in ";#":
                    continue
                if line[0] == ">":
                    if header is not None:
                        yield _record(header, lines)
                    header, lines = line[1:].strip(), []
                elif header is None:
                    raise ValueError(
                        f"{path}, line {number}: {line[:30]!r} stands before any header; expected FASTA, where a line "
                        "'>name' comes first"
                    )
                else:
                    lines.append("".join(line.split()))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: not readable as text, plain or gzipped: {error}") from error
    if header is None:
        raise ValueError(f"{path} holds no sequence; expected FASTA: a line '>name', then the sequence")
    yield _record(header, lines)


def read_fasta(path: str | Path) -> list[Record]:
    """All records of a file; see :func:`stream_fasta`."""
    return list(stream_fasta(path))


def _record(header: str, lines: list[str]) -> Record:
    name, _, description = header.partition(" ")
    return Record(name or "unnamed", "".join(lines), description.strip())


def write_fasta(path: str | Path, records: Iterable[Record], width: int = 60) -> Path:
    """Write records, ``width`` letters a line; gzipped if the name ends in .gz."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(f">{record.name}{' ' if record.description else ''}{record.description}\n")
            for start in range(0, len(record.sequence), width):
                file.write(record.sequence[start : start + width] + "\n")
    return path


def read_smiles(path: str | Path) -> list[Record]:
    """Molecules of a file: one a line, SMILES then optionally a name; or CSV or TSV with a column ``smiles``.

    Raises ValueError for a table without that column and for a file without molecules.
    """
    name = Path(path).name.removesuffix(".gz")
    with open_text(path) as file:
        try:
            lines = file.read().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text: {error}") from error
    found: list[Record] = []
    if name.endswith((".csv", ".tsv")):
        rows = list(csv.DictReader(lines, delimiter="\t" if name.endswith(".tsv") else ","))
        columns = {str(c).strip().lower(): c for c in (rows[0] if rows else {})}
        if rows and "smiles" not in columns:
            raise ValueError(f"{path}: no column 'smiles'; found {', '.join(columns)}")
        for i, row in enumerate(rows):
            found.append(Record(str(row.get(columns.get("name", ""), "") or i + 1), row[columns["smiles"]].strip()))
    else:
        for i, line in enumerate(lines):
            words = line.split()
            if words and not line.startswith("#"):
                found.append(Record(words[1] if len(words) > 1 else str(i + 1), words[0]))
    if not found:
        raise ValueError(f"{path} holds no molecule; expected one SMILES a line, or a CSV with a column 'smiles'")
    return found
