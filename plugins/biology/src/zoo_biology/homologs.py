"""Proteins as Prot-xLSTM reads them: homologs one after the other, and the middle of one to fill in.

A protein is <cls> and its residues, at positions 0, 1, 2 ..; the next one begins at 0 again. What is cut out of it
leaves <mask-k>; behind the protein follow <eos> (position 0) and, for each k, <mask-k> and what was cut out.

Source: Schmidinger et al., "Bio-xLSTM", arXiv 2411.04165, section 4.2; ml-jku/Prot-xLSTM ``protxlstm/fim.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .tokens import Protein


@dataclass
class Context:
    """Tokens with their positions and the number of the protein that each belongs to."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Context) -> Context:
        return Context(self.ids + other.ids, self.positions + other.positions, self.sequences + other.sequences)

    def tensors(self) -> dict[str, Tensor]:
        """(1, length) each, under the names of ProtXLSTM's arguments."""
        parts = {"ids": self.ids, "position_ids": self.positions, "sequence_ids": self.sequences}
        return {name: torch.tensor([values]) for name, values in parts.items()}


def protein(residues: Sequence[int], number: int = 0, spans: Sequence[tuple[int, int]] = ()) -> Context:
    """One protein, (start, end) ``spans`` of its residues (counted from 0) cut out and put behind it.

    Raises ValueError for spans that are empty, overlap, leave the protein, or are more than five.
    """
    _check(spans, len(residues))
    tokens = [Protein.CLS, *residues]
    if not spans:
        return Context(tokens, list(range(len(tokens))), [number] * len(tokens))
    kept, cut, start = Context(), Context(), 0
    for mask, (first, last) in zip(Protein.MASKS, spans, strict=False):
        begin, end = first + 1, last + 1  # <cls> is at 0
        kept += Context([*tokens[start:begin], mask], [*range(start, begin), begin])
        cut += Context([mask, *tokens[begin:end]], [begin, *range(begin, end)])
        start = end
    kept += Context([*tokens[start:], Protein.EOS], [*range(start, len(tokens)), 0])
    whole = kept + cut
    return Context(whole.ids, whole.positions, [number] * len(whole))


def context(proteins: Sequence[Sequence[int]]) -> Context:
    """Several proteins one after the other."""
    whole = Context()
    for number, residues in enumerate(proteins):
        whole += protein(residues, number)
    return whole


def draw_spans(
    length: int, generator: np.random.Generator, most: int = 5, fraction: float = 0.2
) -> list[tuple[int, int]]:
    """What training cuts out of a protein of ``length`` residues: Poisson(1) patches, at most ``most``, starts without
    replacement, each of 1 to a ``fraction`` of the way to the next."""
    count = most + 1
    while count > min(most, length):
        count = int(generator.poisson(1))
    starts = sorted(int(s) for s in generator.choice(length, count, replace=False))
    spans = []
    for start, following in zip(starts, [*starts[1:], length], strict=False):
        gap = following - start
        spans.append((start, start + min(int(generator.integers(1, max(int(gap * fraction), 2))), gap)))
    return spans


def single_site(residues: Sequence[int], place: int, number: int = 0) -> Context:
    """A protein with the residue at ``place`` (from 0) cut out, up to the mark behind which the model names it."""
    whole = protein(residues, number, [(place, place + 1)])
    return Context(whole.ids[:-1], whole.positions[:-1], whole.sequences[:-1])


def reorder(ids: Sequence[int]) -> list[int]:
    """The residues of one protein in their order, what was filled in put where its mark stands; the text ends at a
    second <cls>. Marks that were not filled in are left out."""
    tokens = list(ids[1:]) if ids and ids[0] == Protein.CLS else list(ids)
    if Protein.CLS in tokens:
        tokens = tokens[: tokens.index(Protein.CLS)]
    if Protein.EOS not in tokens:
        return [t for t in tokens if t not in Protein.MASKS]
    end = tokens.index(Protein.EOS)
    patches: dict[int, list[int]] = {}
    current: list[int] = []
    for token in tokens[end + 1 :]:
        if token in Protein.MASKS:
            current = patches.setdefault(token, [])
        else:
            current.append(token)
    return [residue for t in tokens[:end] for residue in (patches.get(t, []) if t in Protein.MASKS else [t])]


def _check(spans: Sequence[tuple[int, int]], length: int) -> None:
    if len(spans) > len(Protein.MASKS):
        raise ValueError(f"{len(spans)} spans are cut out; there are marks for {len(Protein.MASKS)}")
    before = 0
    for start, end in spans:
        if not before <= start < end <= length:
            raise ValueError(
                f"the span {start} to {end} is empty, overlaps the one before or leaves the protein's {length} residues"
            )
        before = end
