"""Generated DNA with a structure that is known: a library of motifs on either strand of a random background.

python plugins/biology/recipes/motifs.py sample.fa --count 6
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from zoo_biology.sequences import Record, write_fasta
from zoo_biology.tokens import DNA

FAMILIES, WIDTH, ERROR, LENGTH = 6, 14, 0.05, 256
COMPLEMENT = torch.tensor([3, 2, 1, 0])  # of bases 0..3 = A, C, G, T


def library() -> Tensor:
    """(families, width) bases 0 to 3: the consensus of every motif."""
    return torch.randint(0, 4, (FAMILIES, WIDTH), generator=torch.Generator().manual_seed(2024))


def draw(count: int, generator: torch.Generator, family: int | None = None) -> tuple[Tensor, Tensor]:
    """``count`` sequences: bases (count, LENGTH) 0 to 3, and the motif at every place (-1: background).

    Half of a sequence is motifs, at random places, of one family or of any, each on either strand with equal chance,
    each base another one with probability ERROR: the reverse complement of such a sequence is as likely as itself.
    """
    motifs = library()
    slots = LENGTH // (2 * WIDTH)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    kind = integers(FAMILIES, count, slots) if family is None else torch.full((count, slots), family)
    planted = motifs[kind]
    wrong = torch.rand(planted.shape, generator=generator) < ERROR
    planted = torch.where(wrong, (planted + 1 + integers(3, *planted.shape)) % 4, planted)
    other_strand = integers(2, count, slots, 1).bool()
    planted = torch.where(other_strand, COMPLEMENT[planted.flip(2)], planted)
    start = torch.arange(slots) * 2 * WIDTH + integers(WIDTH, count, slots)
    places = (start[..., None] + torch.arange(WIDTH)).flatten(1)
    bases = integers(4, count, LENGTH).scatter(1, places, planted.flatten(1))
    which = torch.full((count, LENGTH), -1).scatter(1, places, kind[..., None].expand_as(planted).flatten(1))
    return bases, which


def text(bases: Tensor) -> str:
    return "".join(DNA.BASES[int(b)] for b in bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=6, help="sequences, of the families in turn")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    records = []
    for i in range(options.count):
        bases, _ = draw(1, generator, family=i % FAMILIES)
        records.append(Record(f"seq{i + 1}", text(bases[0]), f"motifs of family {i % FAMILIES + 1}"))
    write_fasta(options.out, records)


if __name__ == "__main__":
    main()
