"""Interleaved documents: from JSON files with text, pictures and tokens to one sequence of ids, and back.

A document is a list of segments, ``{"segments": [...]}`` or the list alone, in a ``.json`` file; a ``.jsonl`` file has
one a line. A segment is ``{"text": "a red disc"}``, ``{"image": "disc.png"}`` (a file beside the document), or
``{"tokens": [5, 9], "modality": 1}``, ids within a modality, for tokens made elsewhere.

Ids of modality 0, in models that read characters themselves: 0 begins a document, 1 a picture, 2 ends the document,
then the alphabet. A picture is made grid * patch pixels wide and high; each square gets the code of the nearest
colours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo import files, images

from .mixture_lm import MixtureLM

BEGIN, PICTURE, END = 0, 1, 2
SPECIAL = 3
KINDS = ("text", "image", "tokens")


class Span(NamedTuple):
    """The ids [start, stop) of a segment, and what it is."""

    kind: str
    start: int
    stop: int


@dataclass
class Document:
    """Segments as the file has them; ``folder``: where pictures are looked for; ``name``: for messages."""

    segments: list[dict[str, Any]] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    name: str = "document"


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a ``.json`` (one) or ``.jsonl`` file. Raises ValueError that names file, line and segment."""
    path = Path(path)
    text = files.read_text(path)
    lines = [(f"{path.name}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = []
    for name, one in lines if path.suffix.lower() == ".jsonl" else [(path.name, text)]:
        try:
            value = json.loads(one)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        found.append(make_document(value, path.parent, name))
    if not found:
        raise ValueError(f"{path.name} holds no document; expected one a line")
    return found


def make_document(value: Any, folder: Path | None = None, name: str = "document") -> Document:
    """A document from parsed JSON (or the same objects in memory; pictures may be PIL images or arrays there)."""
    segments = value.get("segments") if isinstance(value, dict) else value
    if not isinstance(segments, list) or not segments:
        raise ValueError(f'{name}: expected a list of segments, or {{"segments": [...]}}, with at least one')
    for i, segment in enumerate(segments):
        if not isinstance(segment, dict) or sum(kind in segment for kind in KINDS) != 1:
            raise ValueError(f"{name}: segment {i} is {segment!r:.80}; expected one of the keys {', '.join(KINDS)}")
    return Document(segments, Path() if folder is None else folder, name)


# -- pictures


def load_picture(source: Any, size: int) -> Tensor:
    """A file, PIL image or (height, width, 3) array of bytes to colours (3, size, size), 0 to 1."""
    from PIL import Image

    image = images.read_picture(source)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def squares(picture: Tensor, patch: int) -> Tensor:
    """(3, H, W) to its squares in raster order, (count, 3, patch, patch)."""
    rows = picture.unfold(1, patch, patch).unfold(2, patch, patch)
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def codes_of(picture: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of every square, (count,)."""
    own = squares(picture, codebook.shape[-1]).flatten(1)
    return torch.cdist(own, codebook.flatten(1).float().cpu()).argmin(1)


def picture_of(codes: Tensor, codebook: Tensor, grid: int) -> Tensor:
    """The picture (3, size, size) that grid * grid codes stand for."""
    own = codebook.float().cpu()[codes.cpu()]
    return own.unflatten(0, (grid, grid)).permute(2, 0, 3, 1, 4).reshape(3, grid * own.shape[-1], -1)


def fit_codebook(pictures: Sequence[Tensor], codes: int, patch: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """The ``codes`` squares that stand best for those of ``pictures`` (3, H, W): k-means, (codes, 3, patch, patch).

    Begins with the different squares there are, each far from those before it, so that rare ones get a code too.
    """
    own = torch.cat([squares(p, patch) for p in pictures]).flatten(1)
    different, count = own.unique(dim=0, return_counts=True)
    first = torch.Generator().manual_seed(seed)
    centres = different[torch.multinomial(count.double(), 1, generator=first)]
    away = torch.cdist(different, centres)[:, 0]
    while len(centres) < min(codes, len(different)):
        centres = torch.cat([centres, different[away.argmax()][None]])
        away = torch.minimum(away, torch.cdist(different, centres[-1:])[:, 0])
    for _ in range(rounds):
        nearest = torch.cdist(different, centres).argmin(1)
        total = torch.zeros_like(centres).index_add_(0, nearest, different * count[:, None])
        weight = torch.zeros(len(centres)).index_add_(0, nearest, count.float())[:, None]
        centres = torch.where(weight > 0, total / weight.clamp(min=1), centres)
    centres = torch.cat([centres, centres[:1].expand(codes - len(centres), -1)])  # fewer different squares than codes
    return centres.unflatten(1, (3, patch, patch))


# -- ids


class Codec:
    """Documents to ids of a model, and back: ``Codec(model)``."""

    def __init__(self, model: MixtureLM) -> None:
        self.starts, self.sizes = model.starts, model.vocab_sizes
        self.alphabet, self.grid, self.patch = model.alphabet, model.grid, model.patch
        self.codebook = model.codebook.detach().float().cpu() if model.patch else None
        self.numbers = {c: SPECIAL + i for i, c in enumerate(self.alphabet)}

    def text(self, text: Any, name: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: text is {text!r:.40}; expected words in quotation marks")
        if not self.alphabet:
            raise ValueError(f'{name} is text, and this model reads tokens; give {{"tokens": [...], "modality": 0}}')
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise ValueError(f"{name} has the character {unknown[0]!r}; this model knows {self.alphabet!r} only")
        return [self.numbers[c] for c in text]

    def picture(self, source: Any, name: str) -> list[int]:
        """Codes of a picture, behind the id that begins one."""
        if self.codebook is None:
            raise ValueError(
                f'{name} is a picture, and this model reads codes; give {{"tokens": [...], "modality": 1}}'
            )
        try:
            picture = load_picture(source, self.grid * self.patch)
        except (ValueError, FileNotFoundError) as error:
            error.add_note(f"in {name}")
            raise
        return [PICTURE, *(codes_of(picture, self.codebook) + self.starts[1]).tolist()]

    def tokens(self, segment: dict[str, Any], name: str) -> list[int]:
        modality, tokens = segment.get("modality", 0), segment["tokens"]
        if not isinstance(modality, int) or not 0 <= modality < len(self.sizes):
            raise ValueError(f"{name} is of modality {modality!r}; this model has 0 to {len(self.sizes) - 1}")
        size = self.sizes[modality]
        if not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < size for t in tokens):
            raise ValueError(f"{name}: tokens of modality {modality} are integers from 0 to {size - 1}")
        return [self.starts[modality] + t for t in tokens]

    def encode(self, document: Document, end: bool = False) -> tuple[list[int], list[Span]]:
        """Ids of a document, the first of them :data:`BEGIN`, and where each segment lies. end: close the document."""
        ids, spans = [BEGIN], []
        for i, segment in enumerate(document.segments):
            name = f"{document.name}: segment {i}"
            if "text" in segment:
                kind, own = "text", self.text(segment["text"], name)
            elif "image" in segment:
                source = segment["image"]
                kind = "image"
                own = self.picture(document.folder / source if isinstance(source, str | Path) else source, name)
            else:
                kind, own = "tokens", self.tokens(segment, name)
            spans.append(Span(kind, len(ids), len(ids) + len(own)))
            ids += own
        return [*ids, END] if end else ids, spans

    def decode_text(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i - SPECIAL] for i in ids if SPECIAL <= i < SPECIAL + len(self.alphabet))

    def decode_picture(self, ids: Sequence[int]) -> Tensor:
        """(3, size, size), 0 to 1, from the ids of grid * grid codes."""
        assert self.codebook is not None
        return picture_of(torch.tensor(list(ids)) - self.starts[1], self.codebook, self.grid)
