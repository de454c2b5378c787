"""Training on sequences that people have: DNA by windows, molecules one by one or in series, proteins after homologs.

Objectives of Schmidinger et al., "Bio-xLSTM", arXiv 2411.04165: masked (15 % of the bases) or next base for DNA, with
reverse complements where the model is not equivariant; next segment for SMILES, cut at the front; next token for
homologs in a row, parts of each cut out and put behind it.

Each class has samples (``len``), ``rows(chosen, draw)``: the batch of these samples as the model's ``inputs`` and the
``target`` of every place (:data:`IGNORED`: none), and ``nats(model)``: the mean -ln p and the number of the letters
that are held out, by the code of the pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.training import Shuffled

from .dna import COMPLEMENT, DNAXLSTM, CausalDNAXLSTM
from .genomes import DNALikelihood, Likelihoods
from .homologs import Context, draw_spans, protein
from .molecules import MoleculeScoring
from .proteins import Homologs, ProteinScoring
from .tokens import DNA, Protein, Vocabulary

#: A place without a target.
IGNORED = -100
#: Share of the bases that a masked model is asked for; of these so many show the mask, and as many of the rest another
#: base as themselves (BERT's shares).
ASKED, MASKED = 0.15, 0.8

Batch = dict[str, Any]


class Sequences(Protocol):
    """What a model is trained on, and measured by."""

    def __len__(self) -> int: ...
    def rows(self, chosen: Sequence[int], draw: np.random.Generator) -> Batch: ...
    def nats(self, model: nn.Module) -> tuple[float, int]: ...


def batches(data: Sequences, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """For :func:`zoo.training.fit`."""
    order = Shuffled(len(data), batch_size, seed)
    return lambda index: data.rows(order(index), order.random(index))


def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy in nats of the places that have a target."""
    logits = model(**batch["inputs"])
    return F.cross_entropy(logits.float().flatten(0, 1), batch["target"].flatten(), ignore_index=IGNORED)


class Bases:
    """DNA. ``pieces``: ids (at most ``length``,) uint8 each, with a base known among them; ``held``: ids of any length.
    ``strands``: half of the pieces are shown as their reverse complements."""

    def __init__(
        self, pieces: Sequence[np.ndarray], held: Sequence[np.ndarray], length: int, *, causal: bool, strands: bool
    ) -> None:
        self.pieces, self.held, self.length = pieces, held, length
        self.causal, self.strands = causal, strands

    @classmethod
    def of(cls, model: DNAXLSTM, pieces: Sequence[np.ndarray], held: Sequence[np.ndarray], length: int) -> Bases:
        """As ``model`` is trained."""
        return cls(pieces, held, length, causal=isinstance(model, CausalDNAXLSTM), strands=not model.rcps)

    def __len__(self) -> int:
        return len(self.pieces)

    def rows(self, chosen: Sequence[int], draw: np.random.Generator) -> Batch:
        ids = np.full((len(chosen), self.length), DNA.PAD, np.int64)
        for row, i in zip(ids, chosen, strict=True):
            piece = self.pieces[i]
            if self.strands and draw.random() < 0.5:
                piece = np.array(COMPLEMENT)[piece[::-1]]
            row[: len(piece)] = piece
        known = is_known(ids)
        if self.causal:
            target = np.where(known, ids, IGNORED)[:, 1:]
            return {"inputs": {"ids": torch.from_numpy(ids[:, :-1])}, "target": torch.from_numpy(target)}
        asked = known & (draw.random(ids.shape) < ASKED)
        if not asked.any():
            asked[tuple(np.argwhere(known)[0])] = True
        kind = draw.random(ids.shape)
        shown = np.where(asked & (kind < MASKED), DNA.MASK, ids)
        other = asked & (kind >= MASKED) & (kind < (1 + MASKED) / 2)
        shown[other] = 7 + draw.integers(0, 4, int(other.sum()))
        target = np.where(asked, ids, IGNORED)
        return {"inputs": {"ids": torch.from_numpy(shown)}, "target": torch.from_numpy(target)}

    def nats(self, model: nn.Module) -> tuple[float, int]:
        pipe = DNALikelihood(model, window=self.length)
        return mean(pipe.score([torch.from_numpy(ids) for ids in self.held]))


def is_known(ids: np.ndarray) -> np.ndarray:
    """Where A, C, G or T stands."""
    return (ids >= 7) & (ids < 11)


class Molecules:
    """SMILES as labels without marks. ``length``: segments that are read at most, the last ones. ``series``: a text
    holds molecules joined by ".", whose order is drawn anew each time (the original's conditional mode)."""

    def __init__(
        self, texts: Sequence[Sequence[int]], held: Sequence[Sequence[int]], vocabulary: Vocabulary, length: int,
        *, series: bool = False,
    ) -> None:  # fmt: skip
        self.texts, self.held, self.vocabulary, self.length, self.series = texts, held, vocabulary, length, series

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, chosen: Sequence[int], draw: np.random.Generator) -> Batch:
        texts = [self._text(self.texts[i], draw) for i in chosen]
        rows = [[self.vocabulary.begin, *text, self.vocabulary.end][-self.length - 1 :] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"inputs": {"ids": ids[:, :-1]}, "target": ids[:, 1:].masked_fill(ids[:, 1:] == 0, IGNORED)}

    def _text(self, labels: Sequence[int], draw: np.random.Generator) -> list[int]:
        dot = self.vocabulary.labels.get(".")
        if not self.series or dot not in labels:
            return list(labels)
        molecules: list[list[int]] = [[]]
        for label in labels:
            if label == dot:
                molecules.append([])
            else:
                molecules[-1].append(label)
        mixed = [label for i in draw.permutation(len(molecules)) for label in (*molecules[i], dot)]
        return mixed[:-1]

    def nats(self, model: nn.Module) -> tuple[float, int]:
        return mean(MoleculeScoring(model, vocabulary=self.vocabulary).score(self.held))


class Families:
    """Proteins as ids, by families. A sample is a family: its members in an order that is drawn, parts of each cut out
    and put behind it, up to ``length`` tokens. ``held``: targets with what stands before them."""

    def __init__(self, families: Sequence[Sequence[list[int]]], held: Sequence[Homologs], length: int) -> None:
        self.families, self.held, self.length = families, held, length

    def __len__(self) -> int:
        return len(self.families)

    def rows(self, chosen: Sequence[int], draw: np.random.Generator) -> Batch:
        texts = [self._text(self.families[i], draw) for i in chosen]
        width = max(map(len, texts))

        def padded(part: str, fill: int) -> Tensor:
            return torch.tensor([(row := getattr(text, part)) + [fill] * (width - len(row)) for text in texts])

        ids = padded("ids", Protein.PAD)
        inputs = {
            "ids": ids[:, :-1],
            "position_ids": padded("positions", 0)[:, :-1],
            "sequence_ids": padded("sequences", 0)[:, :-1],
        }
        return {"inputs": inputs, "target": ids[:, 1:].masked_fill(ids[:, 1:] == Protein.PAD, IGNORED)}

    def _text(self, members: Sequence[list[int]], draw: np.random.Generator) -> Context:
        whole = Context()
        for number, i in enumerate(draw.permutation(len(members)).tolist()):
            whole += protein(members[i], number, draw_spans(len(members[i]), draw))
            if len(whole) > self.length:
                break
        end = Context([Protein.CLS], [0], [0])  # what ends the last one
        whole = whole + end
        cut = self.length + 1
        return Context(whole.ids[:cut], whole.positions[:cut], whole.sequences[:cut])

    def nats(self, model: nn.Module) -> tuple[float, int]:
        pipe = ProteinScoring(model)
        found = [(pipe.nats(sample), len(sample.target_ids) + 1) for sample in self.held]
        count = sum(n for _, n in found)
        return sum(nats * n for nats, n in found) / count, count


def mean(found: Likelihoods) -> tuple[float, int]:
    """The mean -ln p of all letters, and how many were scored."""
    count = sum(found.scored)
    return sum(n * c for n, c in zip(found.nats, found.scored, strict=True) if c) / max(count, 1), count
