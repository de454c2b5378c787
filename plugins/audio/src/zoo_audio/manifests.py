"""Which recording says what: lists of recordings with their texts, as people keep them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.files import read_text
from zoo_registry import errors

from .files import EXTENSIONS

#: Names that a column, or a key of a JSON line, may have (those of Common Voice, NeMo and data sets on the Hub).
AUDIO = ("audio", "audio_filepath", "path", "file", "filename", "wav")
TEXT = ("text", "sentence", "transcript", "transcription")


def read_manifest(path: Path) -> list[tuple[Path, str]]:
    """(audio file, text) pairs, from one of

    * a folder of audio files with their texts beside them (a.wav, a.txt);
    * a folder as LibriSpeech's, at any depth: flac files and ``*.trans.txt`` with lines "ID TEXT";
    * a file of lines "AUDIO FILE<tab>WHAT IS SAID";
    * a .tsv or .csv file whose first line names columns, one of ``AUDIO`` and one of ``TEXT``;
    * a file of JSON lines (.jsonl, .json, .ndjson) with such keys.

    Paths are relative to the file that names them. Raises BadArgument for lines that say something else, for files
    without a text, texts without a file, and where there is none at all.
    """
    if path.is_dir():
        lists = sorted(path.rglob("*.trans.txt"))
        pairs = [pair for one in lists for pair in _librispeech(one)] if lists else _beside(path)
    elif path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        pairs = list(_json_lines(path))
    else:
        pairs = list(_table(path))
    if not pairs:
        raise _bad(f"{path} names no audio file; expected one of {', '.join(EXTENSIONS)}")
    return pairs


def _bad(message: str) -> Exception:
    return errors.BadArgument(message, argument="data", accepted=[])


def _there(manifest: Path, number: int, name: str) -> Path:
    if not (found := manifest.parent / name.strip()).is_file():
        raise _bad(f"line {number} of {manifest} names {name.strip()!r}; there is no such file in {manifest.parent}")
    return found


def _beside(folder: Path) -> list[tuple[Path, str]]:
    files = sorted(f for f in folder.iterdir() if f.name.lower().endswith(EXTENSIONS) and f.name[0] != ".")
    lacking = [f.name for f in files if not f.with_suffix(".txt").is_file()]
    if lacking:
        raise _bad(f"{lacking[0]} in {folder} has no text beside it; expected {Path(lacking[0]).stem}.txt")
    spoken = {f.stem for f in files}
    lost = sorted(f.name for f in folder.glob("*.txt") if f.stem not in spoken and f.name[0] != ".")
    if files and lost:
        raise _bad(f"{lost[0]} in {folder} has no recording beside it; expected one of {', '.join(EXTENSIONS)}")
    return [(f, read_text(f.with_suffix(".txt")).strip()) for f in files]


def _librispeech(path: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            name, _, text = line.strip().partition(" ")
            files = [path.parent / f"{name}{ending}" for ending in (".flac", *EXTENSIONS)]
            yield next((f for f in files if f.is_file()), None) or _there(path, number, f"{name}.flac"), text


def _table(path: Path) -> Iterator[tuple[Path, str]]:
    lines = read_text(path).splitlines()
    commas = path.suffix.lower() == ".csv"
    rows = list(csv.reader(lines)) if commas else [line.split("\t") for line in lines]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    audio, text = (next((names.index(n) for n in known if n in names), None) for known in (AUDIO, TEXT))
    if audio is not None and text is not None:
        for number, row in enumerate(rows[1:], 2):
            if any(cell.strip() for cell in row):
                if len(row) <= max(audio, text):
                    raise _bad(f"line {number} of {path} has {len(row)} columns; expected {len(names)}")
                yield _there(path, number, row[audio]), row[text]
        return
    if commas:
        raise _bad(
            f"the first line of {path} names the columns {', '.join(names) or 'none'}; expected one of "
            f"{', '.join(AUDIO)} and one of {', '.join(TEXT)}"
        )
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, tab, said = line.partition("\t")
            if not tab:
                raise _bad(f"line {number} of {path} has no tab; expected an audio file, a tab, and what is said")
            yield _there(path, number, file), said


def _json_lines(path: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                row: Any = json.loads(line)
            except json.JSONDecodeError as error:
                raise _bad(f"line {number} of {path} is no JSON: {error}") from error
            given = row if isinstance(row, Mapping) else {}
            audio, text = (next((given[n] for n in known if n in given), None) for known in (AUDIO, TEXT))
            if not isinstance(audio, str) or not isinstance(text, str):
                raise _bad(
                    f"line {number} of {path} is {line!r:.80}; expected the keys {' or '.join(AUDIO)}, and "
                    f"{' or '.join(TEXT)}, with texts"
                )
            yield _there(path, number, audio), text
