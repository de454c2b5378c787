"""Conversations about pictures as training data: a JSON line each, as InternVL's trainers read them.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "A cat."}]}

``image`` may be a list or missing; paths are relative to the file, or to ``root``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.files import read_text

from .chat_template import IMAGE, Template, with_pictures
from .mmmamba import MmMamba
from .mmmamba_distill import Batch
from .tiles import pixels_of
from .tokenizer import Tokenizer

IGNORED = -100  #: the label of tokens that no loss foretells


@dataclass(frozen=True)
class Conversation:
    """Paths of pictures, and (question, answer) pairs."""

    pictures: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]


def read(path: str | Path, root: str | Path | None = None) -> list[Conversation]:
    """Every conversation of a file. Raises ValueError that names the line and what is wrong in it."""
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(json.loads(line), folder))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}; expected an object with conversations, a list of human and gpt turns "
                "in turn, and image where there are pictures"
            ) from error
    if not found:
        raise ValueError(f"{path} holds no conversation")
    return found


def _conversation(entry: Any, folder: Path) -> Conversation:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ValueError("it has no conversations, a list of turns with from and value (text)")
    turns = [t for t in turns if t.get("from") != "system"]
    said = [t.get("from") for t in turns]
    if not turns or len(turns) % 2 or said != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"its turns are from {said}")
    names = entry.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its image is {names!r:.40}, no file name and no list of them")
    pictures = tuple(folder / name for name in names)
    absent = [p for p in pictures if not p.is_file()]
    if absent:
        raise ValueError(f"there is no picture {str(absent[0])!r}")
    pairs = tuple((turns[i]["value"], turns[i + 1]["value"]) for i in range(0, len(turns), 2))
    places = sum(q.count(IMAGE) for q, _ in pairs)
    if not places and pictures:
        pairs = ((f"{IMAGE}\n" * len(pictures) + pairs[0][0], pairs[0][1]), *pairs[1:])
    elif places != len(pictures):
        raise ValueError(f"it has {places} places {IMAGE!r} and {len(pictures)} pictures")
    return Conversation(pictures, pairs)


class Reader:
    """Conversations to a model's batches of one.

    ``cutting``: the arguments of :func:`zoo_multimodal.tiles.cut`; ``max_length``: longer ones are left out, and
    counted in ``left_out``.
    """

    def __init__(
        self, model: MmMamba, tokenizer: Tokenizer, template: Template, cutting: dict[str, Any], max_length: int = 8192
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.cutting, self.max_length, self.left_out = cutting, max_length, 0

    def batch(self, conversation: Conversation) -> Batch:
        """Ids, tiles and labels: an answer's tokens and its end mark; all else :data:`IGNORED`."""
        tiles = [pixels_of(p, **self.cutting) for p in conversation.pictures]
        counts = [t.shape[0] for t in tiles]
        ids, labels = self._encoded(conversation, counts, self.model.tokens_per_tile)
        hd = None
        if tiles and self.model.shuffle == "post":
            hd, _ = self._encoded(conversation, counts, self.model.patches_per_tile)
        return Batch(ids, torch.cat(tiles) if tiles else None, hd, labels)

    def _encoded(self, conversation: Conversation, counts: list[int], tokens: int) -> tuple[Tensor, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        left = list(counts)
        for turn, (question, answer) in enumerate(conversation.turns):
            here = [left.pop(0) for _ in range(question.count(IMAGE))]
            asked = self.template.text(with_pictures(question, here, tokens), (), None if turn == 0 else "")
            asked_ids = self.tokenizer.encode(asked, begin=turn == 0)
            answer_ids = self.tokenizer.encode(answer + self.template.end, begin=False)
            ids += asked_ids + answer_ids
            labels += [IGNORED] * len(asked_ids) + answer_ids
        return torch.tensor([ids]), torch.tensor([labels])

    def batches(
        self, conversations: list[Conversation], *, epochs: int | None = None, seed: int = 0
    ) -> Iterator[Batch]:
        """Batches in a new order each epoch; ``epochs``: None goes on without end.

        Raises ValueError when every conversation is longer than ``max_length``."""
        rng = random.Random(seed)
        epoch = 0
        while epochs is None or epoch < epochs:
            given = 0
            for conversation in rng.sample(conversations, len(conversations)):
                batch = self.batch(conversation)
                longest = batch.input_ids if batch.hd_input_ids is None else batch.hd_input_ids
                if longest.shape[1] > self.max_length:
                    self.left_out += 1
                    continue
                given += 1
                yield batch
            if not given:
                raise ValueError(f"every conversation is longer than {self.max_length} tokens: nothing to learn from")
            epoch += 1
