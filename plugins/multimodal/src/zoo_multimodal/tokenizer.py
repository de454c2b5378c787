"""Text to token ids: the words of a small model, or InternLM2's sentencepiece model with the chat's marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from zoo_registry import errors, optional, store


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer. Marks ("<img>", "<|im_end|>") are single tokens."""

    def encode(self, text: str, begin: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def id_of(self, mark: str) -> int: ...


class WordTokenizer:
    """A token a word, and a mark of punctuation; text is read in lower case. ``words``: in the order of their ids."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("the list of words holds a word twice")
        marks = sorted((w for w in self.words if not w.isalnum()), key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, marks), r"\w+", r"[^\w\s]"]))
        self._exact = {w.lower(): w for w in marks}  # marks keep their letters

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """``begin`` says that nothing stands before the text, which changes nothing here."""
        found = self._pattern.findall(text)
        words = [w if w in self.ids else self._exact.get(w.lower(), w.lower()) for w in found]
        unknown = next((w for w in words if w not in self.ids), None)
        if unknown is not None:
            plain = [w for w in self.words if w.isalnum()]
            near = get_close_matches(unknown, plain, n=3) or plain
            raise ValueError(f"{unknown!r} is no word of this small model; it knows {', '.join(near)}")
        return [self.ids[w] for w in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def id_of(self, mark: str) -> int:
        return self.encode(mark)[0]


class SentencePieceTokenizer:
    """InternLM2's tokenizer: ``tokenizer.model`` and the marks that ``added_tokens.json`` or ``tokenizer_config.json``
    beside it names. A text begins with the model's begin-of-text token.

    ``folder``: where these files are. Needs sentencepiece (``ssm-zoo-multimodal[tokenizer]``). No code of the folder
    is run. Source: ``tokenization_internlm2.py`` in hustvl/mmMamba.
    """

    def __init__(self, folder: str | Path) -> None:
        sentencepiece = optional(
            "sentencepiece", "reading tokenizer.model", "ssm-zoo-multimodal[tokenizer]",
            otherwise="or give tokenizer=, an object with encode, decode and id_of",
        )  # fmt: skip
        folder = Path(folder)
        model = folder if folder.is_file() else folder / "tokenizer.model"
        if not model.is_file():
            raise FileNotFoundError(f"there is no {model}; expected the tokenizer's folder, with tokenizer.model in it")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except RuntimeError as error:
            raise ValueError(f"{model} is no sentencepiece model: {error}") from error
        self.marks = _marks(model.parent)
        self._names = {i: mark for mark, i in self.marks.items()}
        longest_first = sorted(self.marks, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.marks else None

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """``begin``: put the begin-of-text token in front."""
        ids = [self._pieces.bos_id()] if begin and self._pieces.bos_id() >= 0 else []
        for part in self._cut.split(text) if self._cut is not None else [text]:
            if part in self.marks:
                ids.append(self.marks[part])
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        run: list[int] = []
        for i in ids:
            if i in self._names:
                text, run = text + self._pieces.decode(run) + self._names[i], []
            elif i < self._pieces.get_piece_size():  # a model may have rows for ids that mean nothing
                run.append(int(i))
        return text + self._pieces.decode(run)

    def id_of(self, mark: str) -> int:
        if mark in self.marks:
            return self.marks[mark]
        found = self._pieces.piece_to_id(mark)
        if found == self._pieces.unk_id():
            raise ValueError(f"the tokenizer has no token {mark!r}; its marks are {', '.join(self.marks) or 'none'}")
        return int(found)


def _marks(folder: Path) -> dict[str, int]:
    """The added tokens, from whichever file names them."""
    found: dict[str, int] = {}
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    try:
        if config.is_file():
            table = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
            found |= {entry["content"]: int(i) for i, entry in table.items()}
        if added.is_file():
            found |= {mark: int(i) for mark, i in json.loads(added.read_text(encoding="utf-8")).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the added tokens in {folder} cannot be read: {error}") from error
    return found


def tokenizer_of(
    settings: Mapping[str, Any], local: str | Path | None = None, *, fetch: Callable[..., Path] = store.hub_file
) -> Tokenizer:
    """The tokenizer that a weights card's ``preprocess`` names: ``words`` (a list), or ``tokenizer``, a Hub repository.

    ``local``: a folder with tokenizer.model to use instead. ``fetch(repository, file name)``: how
    one on the Hub is had.
    """
    if local is not None:
        return SentencePieceTokenizer(local)
    if "words" in settings:
        return WordTokenizer(settings["words"])
    name = settings.get("tokenizer")
    if name is None:
        raise ValueError("these weights name no tokenizer: give tokenizer=, the folder that holds its tokenizer.model")
    optional("sentencepiece", "reading tokenizer.model", "ssm-zoo-multimodal[tokenizer]")  # before anything is fetched
    found = fetch(name, "tokenizer.model")
    for beside in ("added_tokens.json", "tokenizer_config.json"):
        try:
            fetch(name, beside)
        except errors.FileNotInRepo:
            continue
    return SentencePieceTokenizer(found.parent)
