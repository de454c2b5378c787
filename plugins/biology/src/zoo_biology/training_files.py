"""Files of sequences as what :mod:`.training` trains on. All are read, and so checked, before training begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zoo.files import refused
from zoo.training import held_out
from zoo_registry import errors

from .dna import DNAXLSTM
from .genomes import DNALikelihood
from .proteins import Homologs, ProteinScoring
from .sequences import FASTA, SMILES, endings, read_smiles, stream_fasta
from .tokens import Vocabulary
from .training import Bases, Families, Molecules, is_known
from .xlstm import SequenceModel

#: At most so many samples are measured by: enough to tell, and little enough to measure often.
HELD_OUT = 1000

Sample = TypeVar("Sample")


def files_in(sources: Iterable[Path], kinds: Sequence[str]) -> list[Path]:
    """``sources``, and of folders the files that end as one of ``kinds``, at any depth, sorted. Raises BadArgument."""
    found: list[Path] = []
    for source in sources:
        if not source.is_dir():
            found.append(source)
            continue
        inside = sorted(file for file in source.rglob("*") if file.name.lower().endswith(tuple(kinds)))
        if not inside:
            raise errors.BadArgument(
                f"{source} holds none of the files that this model is trained on: {', '.join(kinds)}",
                argument="files",
                accepted=[],
            )
        found += inside
    return found


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Those to train on and those that are held out, at most :data:`HELD_OUT`."""
    if not share:
        return list(samples), []
    share = min(share, HELD_OUT / len(samples))
    kept, rest = held_out([0] * len(samples), share, seed)
    return [samples[i] for i in kept], [samples[i] for i in rest]


def read_bases(
    model: DNAXLSTM, files: Iterable[Path], validation: Iterable[Path], share: float, length: int, seed: int
) -> Bases:
    """FASTA and FASTQ records, cut into pieces of ``length``, a byte a base in memory; pieces are held out, or whole
    records of ``validation``. Raises BadFile, BadArgument where no base is known."""
    pipe = DNALikelihood(model)

    def records(of: Iterable[Path]) -> list[np.ndarray]:
        return [pipe.encode(record).numpy() for file in files_in(of, pipe.extensions) for record in stream_fasta(file)]

    whole = records(files)
    length = min(length, max(map(len, whole)))
    pieces = [ids[start : start + length] for ids in whole for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if is_known(piece[1:]).any()]
    if not pieces:
        raise errors.BadArgument("the files hold no base that is known (A, C, G, T)", argument="files", accepted=[])
    train, held = split(pieces, share, seed)
    return Bases.of(model, train, held or records(validation), length)


def read_molecules(
    vocabulary: Vocabulary | None, files: Iterable[Path], validation: Iterable[Path], share: float, length: int,
    seed: int, *, series: bool = False,
) -> Molecules:  # fmt: skip
    """SMILES of files, in the labels of ``vocabulary`` or (None) in those that they give. Raises BadFile for what is no
    SMILES and for segments that the vocabulary does not have."""

    def texts(of: Iterable[Path]) -> list[tuple[Path, str]]:
        return [(f, record.sequence) for f in files_in(of, endings(SMILES)) for record in read_smiles(f)]

    own, others = texts(files), texts(validation)
    if vocabulary is None:
        vocabulary = Vocabulary.learn(text for _, text in own)

    def labels(of: Iterable[tuple[Path, str]]) -> list[list[int]]:
        found = []
        for file, text in of:
            with refused(file):
                found.append(vocabulary.encode(text))
        return found

    train, held = split(labels(own), share, seed)
    return Molecules(train, held or labels(others), vocabulary, length, series=series)


def read_families(
    model: SequenceModel, files: Iterable[Path], validation: Iterable[Path], share: float, length: int, seed: int
) -> Families:
    """FASTA and A3M files, each a family of homologs. Held out are families, the last protein of each to be scored
    after the others; of a single one proteins, each to be scored after those that are trained on. Raises BadFile."""
    pipe = ProteinScoring(model)

    def families(of: Iterable[Path]) -> list[Homologs]:
        return [pipe.read(file) for file in files_in(of, endings(FASTA))]

    def members(family: Homologs) -> list[list[int]]:
        return [*family.others, family.target_ids]

    own, others = families(files), families(validation)
    if len(own) == 1 and share:
        kept, rest = split(members(own[0]), share, seed)
        return Families([kept], [Homologs(own[0].target, ids, kept, []) for ids in rest], length)
    train, held = split(own, share, seed)
    return Families([members(family) for family in train], held or others, length)


def settings_of(data: Bases | Molecules | Families) -> dict[str, Any]:
    """What the saved weights say of how they read."""
    if isinstance(data, Bases):
        return {"window": data.length}
    return {"context": data.length} | ({"tokens": data.vocabulary.tokens} if isinstance(data, Molecules) else {})
