"""Molecules: drawn from a SMILES model, alone or after others of their kind; and how likely given ones are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.files import whole
from zoo.pipelines import Result
from zoo_registry import errors, package_path

from ._base import SequencePipeline, at_least_one
from .genomes import Likelihoods
from .outputs import SMILES_LISTS, write_table
from .sampling import Sampling
from .sequences import SMILES, Record, endings, read_smiles
from .tokens import Vocabulary, lost, segment
from .xlstm import XLSTMLM


def well_formed(smiles: str) -> bool:
    """Whether brackets and branches are paired, rings closed, and no letter is foreign to SMILES: its syntax, not its
    chemistry."""
    if not smiles or set(lost(smiles)) - {"\\"}:
        return False
    depth, bracket = 0, False
    rings: set[str] = set()
    for token in segment(smiles):
        if token in "[]":
            if bracket == (token == "["):
                return False
            bracket = token == "["
        elif bracket:
            continue
        elif token in "()":
            depth += 1 if token == "(" else -1
            if depth < 0:
                return False
        elif token.isdigit() or token[0] == "%":
            rings ^= {token.removeprefix("%").lstrip("0") or "0"}
    return depth == 0 and not bracket and not rings


def valid(smiles: str) -> bool:
    """Whether RDKit reads it; :func:`well_formed` where RDKit is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        return well_formed(smiles)
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return bool(smiles) and Chem.MolFromSmiles(smiles) is not None


@dataclass(kw_only=True)
class Molecules(Result):
    """Drawn molecules with the mean -ln p a segment of each, and whether each is valid (see :func:`valid`)."""

    molecules: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    context: list[str] = field(default_factory=list)

    def summary(self) -> str:
        different = len(set(self.molecules))
        return f"{len(self.molecules)} molecules, {sum(self.valid)} valid, {different} different: " + ", ".join(
            self.molecules[:3]
        )

    def save(self, path: str | Path) -> Path:
        """CSV, TSV, parquet or JSON, or .smi: a molecule a line."""
        path = Path(path)
        if path.suffix.lower() in SMILES_LISTS:
            with whole(path) as work:
                work.write_text("".join(m + "\n" for m in self.molecules), encoding="utf-8")
            return path
        return write_table(path, {"smiles": self.molecules, "nats": self.nats, "valid": self.valid})


class _MoleculePipeline(SequencePipeline):
    """Whatever reads SMILES with the vocabulary of the model's weights."""

    extensions = endings(SMILES)

    def __init__(self, model: nn.Module, vocabulary: str | Path | Vocabulary | None = None) -> None:
        super().__init__(model)
        if not isinstance(model, XLSTMLM):
            raise errors.BadArgument(f"{type(model).__name__} is no SMILES model", argument="model", accepted=[])
        self.lm = model
        if isinstance(vocabulary, str | Path):
            vocabulary = Vocabulary.read(vocabulary)
        self.vocabulary = self._own() if vocabulary is None else vocabulary
        if len(self.vocabulary) > model.vocab_size:
            raise errors.BadArgument(
                f"a vocabulary of {len(self.vocabulary)} tokens for a model of {model.vocab_size}",
                argument="vocabulary", accepted=[],
            )  # fmt: skip

    def _own(self) -> Vocabulary:
        if "tokens" in self.preprocess:
            return Vocabulary(self.preprocess["tokens"])
        name = self.preprocess.get("vocabulary")
        if name is None:
            raise errors.BadArgument(
                "these weights name no vocabulary: give vocabulary=, the init_arguments.json beside the original's "
                "model.pt, or a text file with a token a line",
                argument="vocabulary", accepted=[],
            )  # fmt: skip
        return Vocabulary.read(package_path("zoo_biology", name))

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        # A list of strings is one set of molecules.
        if isinstance(inputs, list) and all(isinstance(x, str) for x in inputs):
            return [tuple(inputs)], True
        return super().expand(inputs)

    def read(self, source: Any) -> list[Record]:
        """The molecules of a file, of a list, or of a string of several joined by ".". Raises ValueError for an empty
        one."""
        if source is None:
            return []
        if isinstance(source, Path):
            return read_smiles(source)
        if isinstance(source, str):
            source = [part for part in source.split(".") if part]
        for i, text in enumerate(source, start=1):
            if not text.strip():
                raise ValueError(f"molecule {i} of {len(source)} is empty; expected SMILES")
        return [Record(str(i + 1), text.strip()) for i, text in enumerate(source)]

    def encode(self, records: Sequence[Record]) -> list[list[int]]:
        return [self.vocabulary.encode(record.sequence) for record in records]

    def start(self, context: Sequence[Sequence[int]]) -> list[int]:
        """[BEG], then molecules each followed by "."."""
        if not context:
            return [self.vocabulary.begin]
        if "." not in self.vocabulary.labels:
            raise ValueError("this model's vocabulary has no '.', so it was not trained on several molecules in a row")
        dot = self.vocabulary.labels["."]
        return [self.vocabulary.begin, *(label for molecule in context for label in (*molecule, dot))]


class MoleculeGeneration(_MoleculePipeline):
    """Draw molecules, one segment at a time in constant memory.

    Inputs: None (no context), a file of SMILES (.smi, .csv ...), a list of them, or a string joined by ".": molecules
    of one kind, after which the next one is drawn. Options: ``count``; ``temperature``, ``top_k``, ``top_p``, ``seed``;
    ``max_length`` segments; ``batch`` molecules at a time; ``vocabulary``: the original's init_arguments.json (default:
    what the weights name).
    """

    task = "molecule-generation"

    def __init__(
        self,
        model: nn.Module,
        count: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        max_length: int = 200,
        batch: int = 256,
        vocabulary: str | Path | Vocabulary | None = None,
    ) -> None:
        super().__init__(model, vocabulary)
        at_least_one(count=count, max_length=max_length, batch=batch)
        self.count, self.max_length, self.batch = count, max_length, batch
        self.sampling = Sampling(temperature, top_k, top_p, seed)

    def answer(self, sample: list[Record]) -> Molecules:
        found = self.generate(self.encode(sample))
        found.context = [record.sequence for record in sample]
        found.source = "" if sample else "no context"
        return found

    @torch.no_grad()
    def generate(self, context: Sequence[Sequence[int]]) -> Molecules:
        """``count`` molecules; after a context each is the first that follows it, else a whole text."""
        state = self.lm.init_state(1)
        start = torch.tensor([self.start(context)], device=self.device)
        for piece in start.split(4096, dim=1):
            logits = self.lm(piece, state=state)[:, -1]
        generator = self.sampling.generator()
        ends = {self.vocabulary.end, 0, self.vocabulary.begin} | ({self.vocabulary.labels["."]} if context else set())
        found = Molecules()
        for first in range(0, self.count, self.batch):
            rows = min(self.batch, self.count - first)
            for labels, nats in self._draw(logits.expand(rows, -1), state.fork(rows), ends, generator):
                text = self.vocabulary.decode(labels)
                found.molecules.append(text)
                found.nats.append(nats)
                found.valid.append(valid(text))
        return found

    def _draw(self, logits: Tensor, state: Any, ends: set[int], generator: torch.Generator):
        tokens: list[list[int]] = [[] for _ in range(len(logits))]
        nats = [0.0] * len(logits)
        done = [False] * len(logits)
        known = len(self.vocabulary)
        for _ in range(self.max_length):
            token, cost = self.sampling.draw(logits[:, :known], generator)
            for row, (label, value) in enumerate(zip(token.tolist(), cost.tolist(), strict=True)):
                if done[row]:
                    continue
                nats[row] += value
                tokens[row].append(label)
                done[row] = label in ends
            if all(done):
                break
            logits = self.lm.step(token, state)
        for labels, total in zip(tokens, nats, strict=True):
            end = labels[:-1] if labels and labels[-1] in ends else labels
            yield end, total / max(len(labels), 1)


class MoleculeScoring(_MoleculePipeline):
    """How likely molecules are: the mean -ln p of the segments of each, and of the end behind it.

    Inputs as for :class:`MoleculeGeneration`, without None. Options: ``context``: molecules (a list of SMILES, or a
    file) that stand before each of them, "." being what ends a molecule then; ``vocabulary``; ``batch`` at a time.
    """

    task = "molecule-scoring"

    def __init__(
        self,
        model: nn.Module,
        context: str | Path | Sequence[str] | None = None,
        batch: int = 64,
        vocabulary: str | Path | Vocabulary | None = None,
    ) -> None:
        super().__init__(model, vocabulary)
        at_least_one(batch=batch)
        self.batch = batch
        if isinstance(context, str) and Path(context).is_file():
            context = Path(context)
        self.context = self.encode(self.read(context))

    def answer(self, sample: list[Record]) -> Likelihoods:
        if not sample:
            raise ValueError("no molecules were given; expected SMILES: a list, a string or a file of them")
        found = self.score(self.encode(sample))
        found.names = [record.sequence for record in sample]
        return found

    @torch.no_grad()
    def score(self, molecules: Sequence[Sequence[int]]) -> Likelihoods:
        start = self.start(self.context)
        end = self.vocabulary.labels["."] if self.context else self.vocabulary.end
        found = Likelihoods()
        before = self.lm.init_state(1)
        if len(start) > 1:
            self.lm(torch.tensor([start[:-1]], device=self.device), state=before)
        for first in range(0, len(molecules), self.batch):
            rows = [[start[-1], *molecule, end] for molecule in molecules[first : first + self.batch]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
            # Padding stands behind what is scored, and the model reads forwards alone.
            logits = self.lm(ids[:, :-1], state=before.fork(len(rows)))[..., : len(self.vocabulary)].float()
            cost = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            for row, own in zip(rows, cost.double().cpu(), strict=True):
                found.scored.append(len(row) - 1)
                found.nats.append(float(own[: len(row) - 1].mean()))
        return found
