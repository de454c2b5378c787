"""Vocabularies of whole words, as word-level language models are trained with.

The rules are those of the original's ``src/dataloaders/utils/vocabulary.py`` (state-spaces/s4, after Transformer-XL):
words are what stands between blanks, and every line ends with ``<eos>``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from zoo_registry import errors

END_OF_LINE, UNKNOWN = "<eos>", "<unk>"


class Vocabulary:
    """Words by id. Text that is encoded has a ``<eos>`` for each line break, where the vocabulary holds that word, and
    ``<unk>`` for words that it does not hold."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            twice = Counter(self.words).most_common(1)[0][0]
            raise errors.BadArgument(
                f"the vocabulary holds {twice!r} more than once; expected each word once",
                argument="vocabulary",
                accepted=[],
            )
        self.end, self.unknown = self.ids.get(END_OF_LINE), self.ids.get(UNKNOWN)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def counted(cls, text: str | Path) -> Vocabulary:
        """The vocabulary that the original builds from a training text (a file): ``<eos>``, then every word, the most
        frequent first, equally frequent ones in the order of their first appearance."""
        counts: Counter[str] = Counter()
        with Path(text).open(encoding="utf-8") as lines:
            for line in lines:
                counts.update(line.split())
        counts.pop(END_OF_LINE, None)
        return cls([END_OF_LINE, *(word for word, _ in counts.most_common())])

    @classmethod
    def read(cls, path: str | Path, size: int) -> Vocabulary:
        """The vocabulary of a model of ``size`` words, from a file of one word a line in the order of the ids, or from
        the training text itself (:meth:`counted`). Raises BadArgument where neither gives ``size`` words."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise errors.LocalFileMissing(f"there is no vocabulary {str(path)!r} (in {Path.cwd()})", path=str(path))
        try:
            with path.open(encoding="utf-8") as lines:
                found = [word for line in lines for word in line.split()[:1]]
            if len(found) == size:
                return cls(found)
            counted = cls.counted(path)
        except UnicodeDecodeError as error:
            raise errors.BadArgument(
                f"{path} is no text in UTF-8 ({error}); expected one word a line, or the training text",
                argument="vocabulary",
                accepted=[],
            ) from error
        if len(counted) != size:
            raise errors.BadArgument(
                f"{path} is no vocabulary of this model: it knows {size} words. Read as one word a line the file has "
                f"{len(found)}, read as the text that the model was trained on {len(counted)}",
                argument="vocabulary",
                accepted=[],
            )
        return counted

    def save(self, path: str | Path) -> Path:
        """One word a line, in the order of the ids: quicker to read than the training text."""
        path = Path(path)
        path.write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8")
        return path

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """(ids, the words that the vocabulary does not hold). Raises ValueError for such a word without ``<unk>``."""
        lines = text.split("\n")
        ends = [END_OF_LINE] if self.end is not None else []
        words: Iterable[str] = chain.from_iterable(
            (*line.split(), *(ends if i < len(lines) - 1 else ())) for i, line in enumerate(lines)
        )
        ids, missing = [], []
        for word in words:
            found = self.ids.get(word, self.unknown)
            if word not in self.ids:
                missing.append(word)
            if found is None:
                raise ValueError(
                    f"the vocabulary has no word {word!r:.60} and no {UNKNOWN} to stand for it; expected words between "
                    "blanks, as in the training text"
                )
            ids.append(found)
        return ids, missing
