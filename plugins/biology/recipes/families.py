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
ALPHABET = "".join(KINDS)
KIND_OF = {residue: kind for kind in KINDS for residue in kind}


class Family:
    """An ancestor of 24 to 40 residues; 40 % of its places are fixed, the others change within their kind."""

    def __init__(self, generator: np.random.Generator) -> None:
        length = int(generator.integers(24, 41))
        self.ancestor = "".join(generator.choice(list(ALPHABET), length))
        self.fixed = generator.random(length) < 0.4

    def member(self, generator: np.random.Generator) -> str:
        """One homolog: the ancestor with half of the variable places drawn anew from their kind."""
        new = generator.random(len(self.ancestor)) < 0.5
        return "".join(
            residue if fixed or not change else str(generator.choice(list(KIND_OF[residue])))
            for residue, fixed, change in zip(self.ancestor, self.fixed, new, strict=True)
        )

    def members(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        tokens = Protein()
        return [tokens.encode(self.member(generator)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    family = Family(generator)
    write_fasta(options.out, [Record(f"homolog{i + 1}", family.member(generator)) for i in range(options.count)])


if __name__ == "__main__":
    main()
