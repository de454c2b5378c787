"""Files of sequences: FASTA, A3M and FASTQ, plain or gzipped, and SMILES."""

from __future__ import annotations

import csv
import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zoo.files import existing, refused, whole

FASTA = (".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn", ".a3m", ".a2m")
FASTQ = (".fq", ".fastq")
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


#: What reading text from a file raises where it is damaged, or no text.
_DAMAGE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)


def open_text(path: str | Path) -> IO[str]:
    """A text file in UTF-8 (with or without byte order mark), through gzip where its first bytes say so, whatever its
    ending. Raises BadFile for a folder, LocalFileMissing for nothing."""
    path = existing(path, "a file of sequences")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig")


def stream_fasta(path: str | Path) -> Iterator[Record]:
    """The records of a FASTA, A3M or FASTQ file one by one; holds one of them in memory. Qualities are passed over.

    Lines that begin with ; or # are comments in FASTA. Raises BadFile (a ValueError), naming the file and line, for
    text before the first header, a file that is not text, a read without its qualities, and an empty file.
    """
    number = 0
    with refused(path):
        try:
            with open_text(path) as file:
                lines = ((number := i, raw.strip()) for i, raw in enumerate(file, start=1))
                first = next((line for line in lines if line[1] and line[1][0] not in ";#"), None)
                if first is None:
                    raise ValueError(f"{path} holds no sequence; expected FASTA: a line '>name', then the sequence")
                if first[1][0] not in ">@":
                    raise ValueError(
                        f"{path}, line {first[0]}: {first[1][:30]!r} stands before any header; expected FASTA, where "
                        "a line '>name' comes first"
                    )
                yield from (_fasta if first[1][0] == ">" else _fastq)(first[1][1:].strip(), lines, path)
        except _DAMAGE as error:
            raise ValueError(f"{path}, after line {number}: not readable as text, plain or gzipped: {error}") from error


def _fasta(header: str, lines: Iterator[tuple[int, str]], path: str | Path) -> Iterator[Record]:
    parts: list[str] = []
    for _, line in lines:
        if line.startswith(">"):
            yield _record(header, parts)
            header, parts = line[1:].strip(), []
        elif line and line[0] not in ";#":
            parts.append("".join(line.split()))
    yield _record(header, parts)


def _fastq(header: str, lines: Iterator[tuple[int, str]], path: str | Path) -> Iterator[Record]:
    """A quality may begin with @ or +, so that its length alone says where it ends."""
    found: str | None = header
    while found is not None:
        record = _record(found, [text for _, text in itertools.takewhile(lambda line: line[1][:1] != "+", lines)])
        qualities = 0
        while qualities < len(record.sequence):
            quality = next(lines, (0, ""))[1]
            if not quality:
                break
            qualities += len(quality)
        if qualities != len(record.sequence):
            raise ValueError(
                f"{path}: the read {record.name!r} has {len(record.sequence)} bases and {qualities} qualities; "
                "expected FASTQ: '@name', the bases, '+', a quality for each base"
            )
        yield record
        number, line = next((one for one in lines if one[1]), (0, ""))
        if line and not line.startswith("@"):
            raise ValueError(f"{path}, line {number}: {line[:30]!r}; expected FASTQ, where a read begins with '@name'")
        found = line[1:].strip() if line else None


def read_fasta(path: str | Path) -> list[Record]:
    """All records of a file; see :func:`stream_fasta`."""
    return list(stream_fasta(path))


def _record(header: str, lines: list[str]) -> Record:
    name, *description = header.split(None, 1) or [""]
    return Record(name or "unnamed", "".join(lines), "".join(description))


def write_fasta(path: str | Path, records: Iterable[Record], width: int = 60) -> Path:
    """Write records, ``width`` letters a line; gzipped if the name ends in .gz."""
    path = Path(path)
    with whole(path) as work:
        packed = path.suffix.lower() == ".gz"
        with gzip.open(work, "wt", encoding="utf-8") if packed else work.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(f">{record.name}{' ' if record.description else ''}{record.description}\n")
                for start in range(0, len(record.sequence), width):
                    file.write(record.sequence[start : start + width] + "\n")
    return path


def read_smiles(path: str | Path) -> list[Record]:
    """Molecules of a file: one a line, SMILES then optionally a name; or CSV or TSV with a column ``smiles``.

    Raises BadFile (a ValueError) for a table without that column or with an empty cell in it, and for a file without
    molecules.
    """
    name = Path(path).name.lower().removesuffix(".gz")
    with refused(path), open_text(path) as file:
        try:
            lines = file.read().splitlines()
        except _DAMAGE as error:
            raise ValueError(f"{path} is no text, plain or gzipped: {error}") from error
        if name.endswith((".csv", ".tsv")):
            found = _from_table(lines, path)
        else:
            parts = ((i, line.split()) for i, line in enumerate(lines, start=1) if not line.startswith("#"))
            found = [Record(words[1] if len(words) > 1 else str(i), words[0]) for i, words in parts if words]
        if not found:
            raise ValueError(f"{path} holds no molecule; expected one SMILES a line, or a CSV with a column 'smiles'")
    return found


def _from_table(lines: list[str], path: str | Path) -> list[Record]:
    header = lines[0] if lines else ""
    reader = csv.reader(lines, delimiter=max(",;\t", key=header.count))
    columns = [name.strip().lower() for name in next(reader, [])]
    if columns.count("smiles") != 1:
        many = "several columns" if "smiles" in columns else "no column"
        raise ValueError(f"{path}: {many} 'smiles'; found {', '.join(columns)}")
    found = []
    for i, cells in enumerate((cells for cells in reader if any(cells)), start=1):
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        if not row.get("smiles"):
            raise ValueError(f"{path}, line {reader.line_num}: no SMILES; expected one in every row")
        found.append(Record(row.get("name") or str(i), row["smiles"]))
    return found
