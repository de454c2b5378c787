"""DNA files in, embeddings and likelihoods out, for sequences of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.files import refused
from zoo.pipelines import Result
from zoo_registry import errors

from ._base import SequencePipeline, at_least_one
from .dna import DNAXLSTM, CausalDNAXLSTM
from .outputs import write_table, write_vectors
from .sequences import FASTQ, Record, endings, stream_fasta
from .tokens import DNA

#: Masked models are asked for every base once, one in so many hidden at a time (training hides 15 %).
EVERY = 7
#: Bases that are read at a time, where neither the caller nor the weights say so.
WINDOW = 1024


@dataclass(kw_only=True)
class Embeddings(Result):
    """One vector a row: of a whole record, of a window of it, or of each base. ``starts`` and ``ends`` count from 0."""

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)

    def summary(self) -> str:
        bases = sum(e - s for s, e in zip(self.starts, self.ends, strict=True))
        return f"{len(self.names)} embeddings of {self.vectors.shape[-1]} channels, {bases} bases"

    def save(self, path: str | Path) -> Path:
        """CSV, TSV, parquet or JSON (a column a channel), or safetensors."""
        return write_vectors(path, self.vectors, {"name": self.names, "start": self.starts, "end": self.ends})


@dataclass(kw_only=True)
class Likelihoods(Result):
    """For every sequence: how many letters were scored, and the mean of -ln p of them."""

    names: list[str] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> list[float]:
        return torch.tensor(self.nats, dtype=torch.float64).exp().tolist()

    def summary(self) -> str:
        total = sum(self.scored)
        mean = sum(n * c for n, c in zip(self.nats, self.scored, strict=True) if c) / total if total else float("nan")
        return f"{len(self.names)} sequences, {total} letters: {mean:.4f} nats a letter"

    def save(self, path: str | Path) -> Path:
        """CSV, TSV, parquet or JSON."""
        columns: dict[str, Sequence[Any]] = {"name": self.names, "scored": self.scored}
        return write_table(path, columns | {"nats": self.nats, "perplexity": self.perplexity})


class _DNAPipeline(SequencePipeline):
    """A FASTA or FASTQ file, plain or gzipped, is one input; its records are read one by one."""

    extensions = endings((".fa", ".fasta", ".fna", ".ffn", ".frn", *FASTQ))

    def __init__(self, model: nn.Module, window: int | None = None, ambiguous: str = "N", batch: int = 8) -> None:
        super().__init__(model)
        if not isinstance(model, DNAXLSTM):
            raise errors.BadArgument(f"{type(model).__name__} is no DNA model", argument="model", accepted=[])
        window = self.preprocess.get("window", WINDOW) if window is None else window
        at_least_one(window=window, batch=batch)
        self.dna, self.window, self.batch = model, window, batch
        self.tokens = DNA(ambiguous)

    def read(self, source: Any) -> Any:
        return source  # a file may be longer than memory: it is read while it is answered

    def records(self, source: Any) -> Iterator[Record]:
        """The records of a file, of a string, or those given."""
        if isinstance(source, Record):
            return iter([source])
        if isinstance(source, Path):
            return stream_fasta(source)
        return iter([Record("sequence", "".join(str(source).split()))])

    def encode(self, record: Record) -> Tensor:
        """(length,) uint8: a chromosome takes as many bytes as it has bases. Raises BadFile for what is no DNA."""
        with refused(record.name):
            return self._encode(record)

    def _encode(self, record: Record) -> Tensor:
        if not record.sequence:
            raise ValueError(f"the record {record.name!r} has no sequence; expected at least one base")
        return torch.from_numpy(self.tokens.codes(record.sequence, f"the record {record.name!r}"))


class DNAEmbedding(_DNAPipeline):
    """Embeddings: the last norm's output, averaged.

    Inputs: FASTA files, plain or gzipped, or sequences as strings. Options: ``window`` bases are read at a time
    (training's length; default: what the weights say, or 1024), with ``margin`` more on either side that are read but
    not averaged; ``pool``: "record" (one vector for each), "window" or "base"; ``both_strands``: the mean with the
    embedding of the reverse complement, so that a sequence and its reverse complement get one vector (models that are
    equivariant give that by themselves); ``ambiguous``: what IUPAC letters other than N become, "N" or "unk";
    ``batch``: windows at a time.
    """

    task = "dna-embedding"

    def __init__(
        self,
        model: nn.Module,
        window: int | None = None,
        margin: int = 0,
        pool: str = "record",
        both_strands: bool = False,
        ambiguous: str = "N",
        batch: int = 8,
    ) -> None:
        super().__init__(model, window, ambiguous, batch)
        if pool not in ("record", "window", "base"):
            raise errors.BadArgument(
                f"pool is {pool!r}; expected 'record', 'window' or 'base'", argument="pool", accepted=[]
            )
        if margin < 0:
            raise errors.BadArgument(f"margin is {margin}; expected 0 or more", argument="margin", accepted=[])
        self.margin, self.pool, self.both_strands = margin, pool, both_strands

    def answer(self, sample: Any) -> Embeddings:
        found = Embeddings()
        rows: list[Tensor] = []
        for record in self.records(sample):
            ids = self.encode(record)
            whole: Tensor | None = None
            for start, vectors in self._windows(ids):
                end = start + len(vectors)
                if self.pool == "record":
                    share = vectors.double().sum(0) / len(ids)
                    whole = share if whole is None else whole + share
                elif self.pool == "window":
                    _put(found, rows, record.name, [start], [end], vectors.double().mean(0, keepdim=True))
                else:
                    _put(found, rows, record.name, range(start, end), range(start + 1, end + 1), vectors)
            if whole is not None:
                _put(found, rows, record.name, [0], [len(ids)], whole[None])
        found.vectors = torch.cat(rows)
        return found

    def _windows(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(start, vectors of its bases) of window after window; those of one length go through together."""
        starts = list(range(0, len(ids), self.window))
        waiting: list[tuple[int, int, int, Tensor]] = []
        for start in starts:
            end = min(start + self.window, len(ids))
            low, high = max(start - self.margin, 0), min(end + self.margin, len(ids))
            piece = (start, start - low, end - low, ids[low:high])
            if waiting and (len(waiting) == self.batch or len(waiting[0][3]) != len(piece[3])):
                yield from self._embed(waiting)
                waiting = []
            waiting.append(piece)
        if waiting:
            yield from self._embed(waiting)

    def _embed(self, pieces: list[tuple[int, int, int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        rows = torch.stack([piece[3] for piece in pieces]).to(self.device, torch.long)
        x = self._hidden(rows)
        if self.both_strands and not self.dna.rcps:
            complement = torch.tensor([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11], device=self.device)
            x = (x + self._hidden(complement[rows.flip(1)]).flip(1)) / 2
        for (start, first, last, _), own in zip(pieces, x.float().cpu(), strict=True):
            yield start, own[first:last]

    def _hidden(self, rows: Tensor) -> Tensor:
        x = self.dna.hidden(rows)
        if not self.dna.rcps:
            return x
        ahead, back = x.chunk(2, dim=-1)
        return (ahead + back.flip(-1)) / 2


class DNALikelihood(_DNAPipeline):
    """How likely sequences are: -ln p a base, N and other unknown letters not counted.

    Causal models: p(base | all bases before it), the state carried from window to window, so that length costs no
    memory; the first base is not scored. Masked models: p(base | all others of its window), one in seven hidden at a
    time (a pseudo-likelihood: to compare sequences with, not to compare models of the two kinds with). Options as for
    :class:`DNAEmbedding`: ``window``, ``ambiguous``, ``batch``.
    """

    task = "dna-likelihood"

    def answer(self, sample: Any) -> Likelihoods:
        names: list[str] = []

        def named() -> Iterator[Tensor]:
            for record in self.records(sample):
                names.append(record.name)
                yield self.encode(record)

        found = self.score(named())
        found.names = names
        return found

    @torch.no_grad()
    def score(self, sequences: Iterable[Tensor]) -> Likelihoods:
        """Of ids, (length,) each, one sequence after the other."""
        found = Likelihoods()
        causal = isinstance(self.dna, CausalDNAXLSTM)
        for sequence in sequences:
            ids = sequence.to(self.device)
            cost = torch.cat(list(self._next(ids) if causal else self._hidden_ones(ids)))
            known = (ids[1:] if causal else ids) < 11
            known &= (ids[1:] if causal else ids) >= 7
            count = int(known.sum())
            found.scored.append(count)
            found.nats.append(float(cost[known].double().mean()) if count else float("nan"))
        return found

    def _next(self, ids: Tensor) -> Iterator[Tensor]:
        assert isinstance(self.dna, CausalDNAXLSTM)
        state = self.dna.init_state(1)
        yield ids.new_zeros(0, dtype=torch.float32)
        for start in range(0, len(ids) - 1, self.window):
            end = min(start + self.window, len(ids) - 1)
            logits = self.dna(ids[None, start:end].long(), state=state)[0].float()
            yield -logits.log_softmax(-1).gather(1, ids[start + 1 : end + 1, None].long())[:, 0]

    def _hidden_ones(self, ids: Tensor) -> Iterator[Tensor]:
        for start in range(0, len(ids), self.window):
            piece = ids[start : start + self.window].long()
            every = min(EVERY, len(piece))
            asked = torch.arange(len(piece), device=piece.device) % every == torch.arange(
                every, device=piece.device
            ).unsqueeze(1)
            rows = torch.where(asked, DNA.MASK, piece)
            logits = torch.cat([self.dna(part) for part in rows.split(self.batch)]).float()
            cost = -logits.log_softmax(-1).gather(2, piece.expand(every, -1)[..., None])[..., 0]
            yield (cost * asked).sum(0)


def _put(
    found: Embeddings, rows: list[Tensor], name: str, starts: Sequence[int], ends: Sequence[int], vectors: Tensor
) -> None:
    found.names += [name] * len(starts)
    found.starts += starts
    found.ends += ends
    rows.append(vectors.float())
