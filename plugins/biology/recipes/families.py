"""Generated protein families with a structure that is known: some places never change, others change in kind.

python plugins/biology/recipes/families.py family.fa --count 8
"""

from __future__ import annotations

import argparse

import numpy as np

from zoo_biology.sequences import Record, write_fasta
from zoo_biology.tokens import Protein

#: residues that stand in for each other
KINDS = ("AVLIM", "FWY", "STNQ", "DE", "KRH", "G", "P", "C")


#: residue -> the number of its kind, and the residues of each kind, repeated to equal lengths
KIND = np.array([next(i for i, kind in enumerate(KINDS) if residue in kind) for residue in Protein.RESIDUES])
MEMBERS = np.array([[Protein.RESIDUES.index((kind * 60)[i]) for i in range(60)] for kind in KINDS])


class Family:
    """An ancestor of 24 to 40 residues (numbers in Protein.RESIDUES); 40 % of its places are fixed, the others change
    within their kind."""

    def __init__(self, generator: np.random.Generator) -> None:
        length = int(generator.integers(24, 41))
        self.ancestor = generator.integers(0, 20, length)
        self.fixed = generator.random(length) < 0.4

    def members(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        """Homologs as token ids: the ancestor with half of the variable places drawn anew from their kind."""
        shape = (count, len(self.ancestor))
        change = ~self.fixed & (generator.random(shape) < 0.5)
        drawn = MEMBERS[KIND[self.ancestor], generator.integers(0, 60, shape)]
        return (np.where(change, drawn, self.ancestor) + Protein.FIRST).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    family = Family(generator)
    members = family.members(options.count, generator)
    write_fasta(options.out, [Record(f"homolog{i + 1}", Protein().decode(ids)) for i, ids in enumerate(members)])


if __name__ == "__main__":
    main()
