"""Texts of any amount as token ids on disk: read in pieces, tokenised once, mapped into memory from then on.

A folder of :func:`prepare` holds two streams, the texts to train on and those held out. A stream is one row of ids in
which every text follows the token that stands before a text (end-of-text, or a line feed where the tokenizer has none).
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from zoo.files import existing, read_json, unreadable, unwritable, whole
from zoo_registry import errors

from .tokenizer import OwnTokenizer, before_text, settings_of

ENDINGS = (".txt", ".md", ".jsonl")
#: Characters that are read at a time; a longer text is tokenised in pieces.
PIECE = 1 << 22
ABOUT = "about.json"
#: At most so many bytes, and texts, are held out: enough to measure by, and little enough to measure often.
HELD_OUT, HELD_OUT_TEXTS = 1_000_000, 1000

#: The end of the last line whose follower begins with a letter: where no tokenizer's token lies across.
_LINES = re.compile(r".*\n(?=\S)", re.DOTALL)


# -- files to texts ---------------------------------------------------------------------------------------------------


def files_in(sources: Iterable[Path]) -> list[Path]:
    """The files of texts among ``sources``, and in folders at any depth, sorted: .txt, .md, .jsonl, each also with .gz.

    Raises BadArgument for another file and a folder without any, LocalFileMissing for what is not there.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(file for file in source.rglob("*") if file.is_file() and _kind(file) in ENDINGS)
            if not inside:
                raise errors.BadArgument(
                    f"{source} holds no texts; expected {', '.join(ENDINGS)} files, each also with .gz",
                    argument="texts",
                    accepted=[],
                )
            found += inside
        elif _kind(existing(source, "a file or folder of texts")) not in ENDINGS:
            raise errors.BadArgument(
                f"{source} ends in {source.suffix!r}; expected {', '.join(ENDINGS)}, each also with .gz",
                argument="texts",
                accepted=[],
            )
        else:
            found.append(source)
    return found


def documents(files: Iterable[Path]) -> Iterator[Iterator[str]]:
    """The texts of ``files`` that are not empty, each as its pieces: a .txt or .md file is one, and every line of a
    .jsonl file is one, in its "text". Use up one before the next. Raises BadFile."""
    for file in files:
        texts = _records(file) if _kind(file) == ".jsonl" else [_pieces(file)]
        for pieces in texts:
            if (first := next(pieces, "")) != "":
                yield itertools.chain([first], pieces)


def _kind(file: Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _opened(file: Path) -> TextIO:
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def _pieces(file: Path) -> Iterator[str]:
    rest = ""
    try:
        with _opened(file) as stream:
            while read := stream.read(PIECE):
                text = rest + read
                lines = _LINES.match(text)
                cut = len(text) if lines is None else lines.end()
                rest = text[cut:]
                yield text[:cut]
        if rest:
            yield rest
    except UnicodeDecodeError as error:
        raise errors.BadFile(f"{file} is no text in UTF-8; save it as UTF-8", path=str(file)) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise errors.BadFile(f"{file} is no gzip file, or was cut short: {error}", path=str(file)) from error
    except OSError as error:
        raise unreadable(file, error) from error


def _records(file: Path) -> Iterator[Iterator[str]]:
    rest, number = "", 0
    for piece in itertools.chain(_pieces(file), ["\n"]):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield iter([_text(line, file, number)])


def _text(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
        text = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise ValueError('it has no "text"')
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.BadFile(f"{file}, line {number}: half a character (a lone surrogate)", path=str(file)) from error
    except ValueError as error:
        raise errors.BadFile(
            f'{file}, line {number}: {error}; expected an object a line, as {{"text": "..."}}', path=str(file)
        ) from error
    return text


# -- texts to token ids -----------------------------------------------------------------------------------------------


class Stream:
    """Texts one after another. ``tokens`` (count,); ``begins`` (texts,): where each one's first token lies, which is
    the one that stands before a text; ``sizes`` (texts,): their bytes. All are mapped, none is in memory."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.tokens = np.memmap(folder / f"{name}.tokens", dtype=dtype, mode="r")
        self.begins = np.memmap(folder / f"{name}.begins", dtype=np.int64, mode="r")
        self.sizes = np.memmap(folder / f"{name}.sizes", dtype=np.int64, mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def texts(self) -> Iterator[tuple[np.ndarray, int]]:
        """Each text's ids, with the one before it, and its bytes."""
        ends = itertools.chain(self.begins[1:], [len(self)])
        for first, end, size in zip(self.begins, ends, self.sizes, strict=True):
            yield self.tokens[first:end].astype(np.int64), int(size)

    def window(self, first: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (length + 1,) from place ``first`` on, and whether a text begins at each of the first ``length``."""
        begins = np.zeros(length, dtype=bool)
        low, high = np.searchsorted(self.begins, [first, first + length])
        begins[self.begins[low:high] - first] = True
        return self.tokens[first : first + length + 1].astype(np.int64), begins


class Corpus:
    """A folder that :func:`prepare` wrote."""

    def __init__(self, folder: Path) -> None:
        about = read_json(folder / ABOUT)
        self.folder = folder
        self.train = Stream(folder, "train", about["dtype"])
        self.held = Stream(folder, "held", about["dtype"]) if about["held"] else None

    def remove(self) -> None:
        """The folder is no longer needed."""
        shutil.rmtree(self.folder)


def prepare(
    folder: Path, files: Sequence[Path], tokenizer: OwnTokenizer, *,
    held_out: float = 0.0, validation: Sequence[Path] = (), seed: int = 0,
) -> Corpus:  # fmt: skip
    """Tokenise ``files`` into ``folder``, or use what it holds of the same files.

    held_out: a share of the bytes, at most :data:`HELD_OUT` in :data:`HELD_OUT_TEXTS`, that is not trained on: whole
    texts, drawn by ``seed``; the end of one where the first that is drawn is longer than that. validation: files of
    held-out texts instead. Raises BadFile for a file that cannot be read, BadArgument for files without a text, and
    StoreError.
    """
    named = [*files, None, *validation]
    facts = [None if f is None else [str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in named]
    told = json.dumps([facts, settings_of(tokenizer), held_out, seed])
    of = hashlib.sha256(told.encode()).hexdigest()
    said = folder / ABOUT
    if said.exists() and read_json(said)["of"] == of:
        return Corpus(folder)
    held = _drawn(_sizes(files), held_out, seed)
    _sizes(validation)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kind = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
        with _Writer(folder, "train", tokenizer, kind) as train, _Writer(folder, "held", tokenizer, kind) as kept:
            for number, pieces in enumerate(documents(files)):
                _write(pieces, train, kept, held.get(number))
            for pieces in documents(validation):
                _write(pieces, train, kept, 0)
            about = {"of": of, "dtype": kind, "held": kept.count > 0}
        with whole(said) as work:
            work.write_text(json.dumps(about), encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    return Corpus(folder)


def _sizes(files: Sequence[Path]) -> array[int]:
    """Bytes of every text, all of them read: what is wrong with a file is found out here."""
    sizes = array("q", (sum(len(piece.encode()) for piece in pieces) for pieces in documents(files)))
    if files and not sizes:
        raise errors.BadArgument(
            f"{', '.join(map(str, files[:3]))}: there is no text in it", argument="texts", accepted=[]
        )
    return sizes


def _drawn(sizes: Sequence[int], share: float, seed: int) -> dict[int, int]:
    """Numbers of the texts that are held out, and how many bytes of each are trained on all the same."""
    left = min(int(share * sum(sizes)), HELD_OUT)
    found: dict[int, int] = {}
    for number in np.random.default_rng(seed % 2**63).permutation(len(sizes)).tolist() if left else []:
        if sizes[number] > left or len(found) == HELD_OUT_TEXTS:
            return found or {number: sizes[number] - left}
        found[number] = 0
        left -= sizes[number]
    return found


def _write(pieces: Iterator[str], train: _Writer, held: _Writer, before: int | None) -> None:
    """A text to ``train``, or its end, from the line on in which its byte ``before`` lies, to ``held``."""
    here = held if before == 0 else train
    here.begin()
    for piece in pieces:
        if before and here is train:
            data = piece.encode()
            if len(data) > before:
                place = len(data[:before].decode(errors="ignore"))
                place = piece.rfind("\n", 0, place) + 1 or place
                train.add(piece[:place])
                here, piece = held, piece[place:]
                here.begin()
            before = max(before - len(data), 1)
        here.add(piece)


class _Writer:
    """Writes a :class:`Stream`."""

    def __init__(self, folder: Path, name: str, tokenizer: OwnTokenizer, dtype: str) -> None:
        self.tokenizer, self.dtype, self.before = tokenizer, dtype, before_text(tokenizer)[-1:]
        self.count, self.size = 0, 0
        self.files: list[BinaryIO] = [(folder / f"{name}.{part}").open("wb") for part in ("tokens", "begins", "sizes")]

    def __enter__(self) -> _Writer:
        return self

    def begin(self) -> None:
        """Another text follows."""
        self._end()
        self.files[1].write(np.int64(self.count).tobytes())
        self._put(self.before)

    def add(self, text: str) -> None:
        self._put(self.tokenizer.encode(text))
        self.size += len(text.encode())

    def _put(self, ids: Sequence[int]) -> None:
        self.files[0].write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.count += len(ids)

    def _end(self) -> None:
        if self.count:
            self.files[2].write(np.int64(self.size).tobytes())
        self.size = 0

    def __exit__(self, *_: object) -> None:
        self._end()
        for file in self.files:
            file.close()
