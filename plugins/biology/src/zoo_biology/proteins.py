"""Homologs in, answers out: how likely a protein or its mutations are after them, and new proteins of the family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.files import refused
from zoo.pipelines import Result
from zoo_registry import errors

from ._base import SequencePipeline, at_least_one
from .genomes import Likelihoods
from .homologs import Context, context, protein, single_site
from .outputs import write_table
from .protein import ProtXLSTM
from .sampling import Sampling
from .sequences import FASTA, Record, endings, read_fasta, write_fasta
from .state import State
from .tokens import Protein

MUTATION = re.compile(r"([A-Z])(\d+)([A-Z])")
#: Tokens that are part of a protein; any other ends it
RESIDUES = range(Protein.FIRST, 29)
#: Tokens of context read at a time: memory does not grow with the number of homologs.
PIECE = 4096


@dataclass(kw_only=True)
class ProteinScores(Result):
    """``nats``: the mean -ln p a residue of the target after its homologs, the end of the protein counted as one.
    ``mutations`` ("A10G", counted from 1) with ``effects``, ln p(mutant) - ln p(wild type) at that place among the
    twenty residues, the rest of the target known: above 0 the model likes the mutant better."""

    target: str = ""
    homologs: int = 0
    residues: int = 0
    nats: float = 0.0
    mutations: list[str] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        text = f"{self.target} after {self.homologs} homologs: {self.nats:.4f} nats a residue"
        if self.mutations:
            order = sorted(range(len(self.effects)), key=self.effects.__getitem__)
            best, worst = order[-1], order[0]
            text += (
                f"; {len(self.mutations)} mutations from {self.mutations[worst]} ({self.effects[worst]:.2f}) to "
                f"{self.mutations[best]} ({self.effects[best]:+.2f})"
            )
        return text + (f" [{'; '.join(self.notes)}]" if self.notes else "")

    def save(self, path: str | Path) -> Path:
        """CSV, TSV, parquet or JSON: a row a mutation, or the target's row where none was asked for."""
        if self.mutations:
            return write_table(path, {"mutation": self.mutations, "effect": self.effects})
        return write_table(path, {"name": [self.target], "residues": [self.residues], "nats": [self.nats]})


@dataclass(kw_only=True)
class Proteins(Result):
    """Drawn proteins, with the mean -ln p a residue of what was drawn; ``complete``: the model ended it itself."""

    sequences: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    homologs: int = 0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        shown = ", ".join(s if len(s) <= 40 else s[:37] + "..." for s in self.sequences[:3])
        notes = f" [{'; '.join(self.notes)}]" if self.notes else ""
        return f"{len(self.sequences)} proteins after {self.homologs} homologs: {shown}{notes}"

    def save(self, path: str | Path) -> Path:
        """FASTA (.fa, .fasta, .faa, also .gz), or CSV, TSV, parquet, JSON."""
        if str(path).lower().endswith(endings(FASTA)):
            about = (
                f"nats={n:.4f}" + ("" if done else " incomplete")
                for n, done in zip(self.nats, self.complete, strict=True)
            )
            rows = zip(self.sequences, about, strict=True)
            return write_fasta(path, (Record(f"generated{i}", s, text) for i, (s, text) in enumerate(rows, start=1)))
        return write_table(path, {"sequence": self.sequences, "nats": self.nats, "complete": self.complete})


@dataclass
class Homologs:
    """What a file gives: the target, and the proteins that are read before it."""

    target: Record
    target_ids: list[int]
    others: list[list[int]]
    notes: list[str]


class _ProteinPipeline(SequencePipeline):
    """A FASTA or A3M file of homologs is one input, or a list of :class:`Record`, or one sequence as a string."""

    extensions = endings(FASTA)

    def __init__(self, model: nn.Module, target: str | int = -1, context_tokens: int = 131072) -> None:
        super().__init__(model)
        if not isinstance(model, ProtXLSTM):
            raise errors.BadArgument(f"{type(model).__name__} is no protein model", argument="model", accepted=[])
        if context_tokens < 0:
            raise errors.BadArgument(
                f"context_tokens is {context_tokens}; expected 0 or more", argument="context_tokens", accepted=[]
            )
        self.lm, self.target, self.context_tokens = model, target, context_tokens
        self.tokens = Protein()

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        if isinstance(inputs, list) and inputs and all(isinstance(x, Record) for x in inputs):
            return [tuple(inputs)], True
        return super().expand(inputs)

    def read(self, source: Any) -> Homologs:
        if isinstance(source, tuple):
            records, where = list(source), "the given records"
        elif isinstance(source, Path):
            # The dots of A2M stand where others have insertions: gaps, as its dashes.
            records = [replace(r, sequence=r.sequence.replace(".", "")) for r in read_fasta(source)]
            where = str(source)
        else:
            records, where = [Record("sequence", "".join(str(source).split()))], "the given sequence"
        with refused(where):
            return self._homologs(records, where)

    def _homologs(self, records: list[Record], where: str) -> Homologs:
        chosen = self._chosen(records, where)
        ids = [self.tokens.encode(record.sequence, f"{where}, {record.name!r}") for record in records]
        target = ids.pop(chosen)
        return Homologs(records[chosen], target, *self._fitting(ids))

    def _chosen(self, records: Sequence[Record], where: str) -> int:
        if isinstance(self.target, str) and not re.fullmatch(r"-?\d+", self.target):
            named = [i for i, record in enumerate(records) if record.name == self.target]
            if len(named) > 1:
                raise ValueError(
                    f"{where} has {len(named)} records named {self.target!r}; give the number of one, from 0: "
                    f"{', '.join(map(str, named[:6]))}"
                )
            if named:
                return named[0]
            raise ValueError(
                f"{where} has no record named {self.target!r}; it has {len(records)}, the first {records[0].name!r}"
            )
        place = int(self.target)
        if not -len(records) <= place < len(records):
            raise ValueError(f"target {place} in {where}, which has {len(records)} records, counted from 0")
        return place % len(records)

    def _fitting(self, ids: list[list[int]]) -> tuple[list[list[int]], list[str]]:
        """The homologs that ``context_tokens`` have room for, the last ones, for they stand nearest to the target."""
        kept, room = [], self.context_tokens
        for residues in reversed(ids):
            room -= len(residues) + 1
            if room < 0:
                break
            kept.append(residues)
        if self.lm.positions == "abs_2d":
            kept = kept[: self.lm.max_sequences - 2]
        left = len(ids) - len(kept)
        note = [f"{left} of {len(ids)} homologs left out: context_tokens is {self.context_tokens}"] if left else []
        return kept[::-1], note

    def after(self, whole: Context, state: State | None = None) -> tuple[Tensor | None, State]:
        """The last logits (1, vocabulary) and the state after a context, read a piece at a time."""
        state = self.lm.init_state(1) if state is None else state
        # Positions that are counted in every call anew do not allow for pieces.
        piece = len(whole) if self.lm.positions == "rot" else PIECE
        logits = None
        parts = {name: values.to(self.device) for name, values in whole.tensors().items()}
        for start in range(0, len(whole), max(piece, 1)):
            own = {name: values[:, start : start + piece] for name, values in parts.items()}
            logits = self.lm(**own, state=state)[:, -1]
        return logits, state


class ProteinScoring(_ProteinPipeline):
    """Score a protein, and single mutations of it, after its homologs.

    Inputs: a FASTA or A3M file (gaps are taken out, insertions become residues), a list of records, or one sequence.
    Options: ``target``: name or number of the record that is scored (default: the last one); ``mutations``: "all", a
    list, or a string like "A10G,L3P" (residues counted from 1 in the target without gaps); ``context_tokens``: at most
    so many of the homologs' residues are read, the last homologs first; ``candidates``: a FASTA file or records, each
    of which is scored after all homologs of the input instead (its answer has a row for each); ``batch``: places at a
    time.

    For mutations the target itself is read once as the last homolog, as the authors do.
    """

    task = "protein-scoring"

    def __init__(
        self,
        model: nn.Module,
        target: str | int = -1,
        mutations: str | Sequence[str] = (),
        context_tokens: int = 131072,
        candidates: str | Path | Sequence[Record] | None = None,
        batch: int = 16,
    ) -> None:
        super().__init__(model, target, context_tokens)
        at_least_one(batch=batch)
        self.candidates: list[Record] = []
        if candidates is not None:
            self.candidates = read_fasta(candidates) if isinstance(candidates, str | Path) else list(candidates)
        if isinstance(mutations, str) and mutations != "all":
            mutations = [text.strip() for text in mutations.split(",") if text.strip()]
        self.mutations, self.batch = mutations, batch

    def answer(self, sample: Homologs) -> Result:
        if self.candidates:
            return self._each(sample)
        wanted = self._asked(sample)
        whole, state = self._read(sample)
        number = len(sample.others)
        found = ProteinScores(
            target=sample.target.name, homologs=number, residues=len(sample.target_ids), nats=self._cost(whole, state),
            notes=sample.notes,
        )  # fmt: skip
        if not wanted:
            return found
        self.after(whole, state)
        places = sorted({place for place, _ in wanted})
        scores: dict[int, Tensor] = {}
        for first in range(0, len(places), self.batch):
            some = places[first : first + self.batch]
            targets = [single_site(sample.target_ids, place, number + 1) for place in some]
            for place, own in zip(some, self._logits(targets, state.fork(len(some))), strict=True):
                scores[place] = own[-1, Protein.FIRST : Protein.LAST].log_softmax(0)
        for place, mutant in wanted:
            wild = sample.target_ids[place] - Protein.FIRST
            found.mutations.append(f"{Protein.LETTERS[wild]}{place + 1}{Protein.RESIDUES[mutant]}")
            found.effects.append(float(scores[place][mutant] - scores[place][wild]))
        return found

    def _each(self, sample: Homologs) -> Likelihoods:
        """The candidates, each by itself after all of the homologs."""
        others = [*sample.others, sample.target_ids]
        state = self.after(context(others))[1]
        found = Likelihoods()
        for record in self.candidates:
            ids = self.tokens.encode(record.sequence, f"the candidate {record.name!r}")
            found.names.append(record.name)
            found.scored.append(len(ids) + 1)
            found.nats.append(self._cost(protein(ids, len(others)), state))
        return found

    def _cost(self, whole: Context, state: State) -> float:
        """Mean -ln p of a protein's residues and its end after what ``state``, which stays, has read."""
        logits = self._logits([whole], state.fork())[0]
        expected = torch.tensor([*whole.ids[1:], Protein.CLS])
        return -float(logits.log_softmax(-1).gather(1, expected[:, None]).mean())

    def _logits(self, rows: Sequence[Context], state: State) -> Tensor:
        """(rows, length, vocabulary) on the CPU, for contexts of one length."""
        parts = [row.tensors() for row in rows]
        joined = {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}
        return self.lm(**joined, state=state).float().cpu()

    @torch.no_grad()
    def nats(self, sample: Homologs) -> float:
        """The mean -ln p a residue of the target after its homologs, the end of the protein counted as one."""
        return self._cost(*self._read(sample))

    def _read(self, sample: Homologs) -> tuple[Context, State]:
        """The target, and the state after its homologs."""
        return protein(sample.target_ids, len(sample.others)), self.after(context(sample.others))[1]

    def _asked(self, sample: Homologs) -> list[tuple[int, int]]:
        """(place from 0, number of the new residue) of every mutation. Raises ValueError for one that does not fit."""
        ids = sample.target_ids
        if self.mutations == "all":
            natural = [i for i, residue in enumerate(ids) if Protein.FIRST <= residue < Protein.LAST]
            return [(i, m) for i in natural for m in range(20) if m != ids[i] - Protein.FIRST]
        found = []
        for text in self.mutations:
            match = MUTATION.fullmatch(text.upper())
            if match is None or match[1] not in Protein.RESIDUES or match[3] not in Protein.RESIDUES:
                raise ValueError(
                    f"the mutation {text!r}; expected one like A10G: a residue, its place from 1, a residue"
                )
            place = int(match[2]) - 1
            if not 0 <= place < len(ids):
                raise ValueError(f"the mutation {text!r}: {sample.target.name!r} has {len(ids)} residues")
            if ids[place] != Protein.FIRST + Protein.RESIDUES.index(match[1]):
                there = Protein().decode([ids[place]])
                raise ValueError(
                    f"the mutation {text!r}: {sample.target.name!r} has {there} at {match[2]}, not {match[1]}"
                )
            found.append((place, Protein.RESIDUES.index(match[3])))
        return found


class ProteinGeneration(_ProteinPipeline):
    """Draw proteins after homologs, residue by residue in constant memory.

    Inputs: as for :class:`ProteinScoring`; every record is context (a single sequence is a context of one). Options:
    ``count``; ``max_length`` residues; ``temperature``, ``top_k``, ``top_p``, ``seed``; ``fill``: instead of new
    proteins, fill these parts of the target anew: "10-20" or "10-20,31-35" (residues from 1, both ends meant); the
    target is then not context. ``context_tokens``: as there.

    Whole proteins are drawn in order, until <cls>. (The original also draws the marks of cut-out parts, which training
    put into every other protein, and puts the parts in their places afterwards.)
    """

    task = "protein-generation"

    def __init__(
        self,
        model: nn.Module,
        count: int = 8,
        max_length: int = 1000,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        fill: str | Sequence[tuple[int, int]] | None = None,
        target: str | int = -1,
        context_tokens: int = 131072,
    ) -> None:
        super().__init__(model, target, context_tokens)
        at_least_one(count=count, max_length=max_length)
        if model.positions.startswith("abs"):  # type: ignore[union-attr]
            max_length = min(max_length, model.max_positions - 1)  # type: ignore[operator, union-attr]
        self.count, self.max_length = count, max_length
        self.sampling = Sampling(temperature, top_k, top_p, seed)
        self.fill = _spans(fill) if isinstance(fill, str) else [(a - 1, b) for a, b in fill or ()]

    def answer(self, sample: Homologs) -> Proteins:
        self._check_fill(sample)
        others = sample.others if self.fill else [*sample.others, sample.target_ids]
        number = len(others)
        found = Proteins(homologs=number, notes=sample.notes)
        state = self.after(context(others))[1]
        draw = self._filled(sample, number, state) if self.fill else self._new(number, state)
        for sequence, nats, done in draw:
            found.sequences.append(sequence)
            found.nats.append(nats)
            found.complete.append(done)
        return found

    def _check_fill(self, sample: Homologs) -> None:
        """Raises ValueError, in residues from 1, for parts that the target does not have."""
        if len(self.fill) > len(Protein.MASKS):
            raise ValueError(f"fill names {len(self.fill)} parts; at most {len(Protein.MASKS)} are filled at a time")
        before = 0
        for start, end in self.fill:
            if not before <= start < end <= len(sample.target_ids):
                raise ValueError(
                    f"fill is {start + 1}-{end}; expected parts one behind the other among the residues 1 to "
                    f"{len(sample.target_ids)} of {sample.target.name!r}"
                )
            before = end

    def _new(self, number: int, state: State) -> Iterator[tuple[str, float, bool]]:
        logits, state = self.after(Context([Protein.CLS], [0], [number]), state)
        assert logits is not None
        drawn, _ = self._draw(
            logits.expand(self.count, -1), state.fork(self.count), 1, number, self.sampling.generator()
        )
        for residues, cost, done in drawn:
            yield self.tokens.decode(residues), cost / max(len(residues) + done, 1), done

    def _filled(self, sample: Homologs, number: int, state: State) -> Iterator[tuple[str, float, bool]]:
        ids = sample.target_ids
        whole = protein(ids, number, self.fill)
        start = whole.ids.index(Protein.EOS) + 1
        _, state = self.after(Context(whole.ids[:start], whole.positions[:start], whole.sequences[:start]), state)
        state = state.fork(self.count)
        generator = self.sampling.generator()
        parts: list[list[list[int]]] = [[] for _ in range(self.count)]
        costs, ended = [0.0] * self.count, [True] * self.count
        letters = [0] * self.count
        for mask, (first, _) in zip(Protein.MASKS, self.fill, strict=False):
            logits = self._step(torch.full((self.count,), mask, device=self.device), state, first + 1, number)
            # A patch ends at the next mark, which is read next: rows that end early wait there for the others.
            drawn, state = self._draw(logits, state, first + 1, number, generator, waits=True)
            for row, (residues, cost, done) in enumerate(drawn):
                parts[row].append(residues)
                costs[row] += cost
                letters[row] += len(residues) + done
                ended[row] &= done
        for row, patches in enumerate(parts):
            text, at = "", 0
            for (first, last), patch in zip(self.fill, patches, strict=True):
                text += self.tokens.decode([*ids[at:first], *patch])
                at = last
            yield text + self.tokens.decode(ids[at:]), costs[row] / max(letters[row], 1), ended[row]

    def _draw(
        self, logits: Tensor, state: State, position: int, number: int, generator: torch.Generator, waits: bool = False
    ) -> tuple[list[tuple[list[int], float, bool]], State]:
        """(residues, -ln p of them and of the end, whether it came) of every row; with ``waits``, for a part of a
        protein, any other token is its end and the state of each row stays before it. Whole proteins are drawn from
        residues and <cls> alone, and so in order."""
        others = [i for i in range(logits.shape[-1]) if i not in RESIDUES and i != Protein.CLS]
        tokens: list[list[int]] = [[] for _ in range(self.count)]
        costs, done = [0.0] * self.count, [False] * self.count
        for _ in range(self.max_length):
            if not waits:
                logits = logits.index_fill(-1, torch.tensor(others, device=logits.device), -torch.inf)
            token, cost = self.sampling.draw(logits, generator)
            for row in (row for row in range(self.count) if not done[row]):
                costs[row] += float(cost[row])
                if int(token[row]) in RESIDUES:
                    tokens[row].append(int(token[row]))
                else:
                    done[row] = True
            if all(done):
                break
            kept = state.fork() if waits and any(done) else None
            logits = self._step(token, state, position, number)
            position += 1
            if kept is not None:
                state = _choose(done, kept, state)
        return list(zip(tokens, costs, done, strict=True)), state

    def _step(self, token: Tensor, state: State, position: int, number: int) -> Tensor:
        places = {"position_ids": torch.full_like(token, position), "sequence_ids": torch.full_like(token, number)}
        return self.lm.step(token, state, **places)


def _choose(done: Sequence[bool], old: State, new: State) -> State:
    """Row by row the old state where a row is done, else the new one."""
    keep = torch.tensor(done, device=new.position.device)

    def either(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    layers = [{key: either(one[key], two[key]) for key in one} for one, two in zip(old.layers, new.layers, strict=True)]
    return State(layers, either(old.position, new.position))


def _spans(text: str) -> list[tuple[int, int]]:
    """ "10-20,31-35" to (start from 0, end) pairs."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        if match is None:
            raise ValueError(f"fill is {text!r}; expected parts like 10-20,31-35 (residues from 1, both ends meant)")
        found.append((int(match[1]) - 1, int(match[2])))
    return found
