"""Generated molecules with a structure that is known: series of a ring, a linker and a few substituents.

    python plugins/biology/recipes/molecules.py series.smi --count 4

Every string is valid SMILES by construction: rings are written from a random atom in a random direction, substituents
sit on carbons that have a hydrogen to give.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

#: ring -> its atoms in order; upper-case N and O are part of saturated rings, [nH] is left out
RINGS: dict[str, list[str]] = {
    "benzene": ["c"] * 6,
    "pyridine": ["n", *["c"] * 5],
    "pyrimidine": ["n", "c", "n", "c", "c", "c"],
    "thiophene": ["s", *["c"] * 4],
    "furan": ["o", *["c"] * 4],
    "cyclohexane": ["C"] * 6,
    "cyclopentane": ["C"] * 5,
    "morpholine": ["N", "C", "C", "O", "C", "C"],
}
SUBSTITUENTS = [
    "F", "Cl", "Br", "C", "OC", "N", "O", "C#N", "C(F)(F)F", "C(=O)O", "C(=O)N", "N(C)C", "C(=O)OC", "S(=O)(=O)C",
]  # fmt: skip
LINKERS = ["", "C", "CC", "O", "C(=O)N"]


@dataclass(frozen=True)
class Series:
    """What the molecules of a series share."""

    ring: str
    linker: str
    substituents: tuple[str, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Series:
        return cls(rng.choice(list(RINGS)), rng.choice(LINKERS), tuple(rng.sample(SUBSTITUENTS, 2)))

    def molecule(self, rng: random.Random) -> str:
        """A tail of one to three carbons, the linker, the ring with one or two of the substituents."""
        atoms = RINGS[self.ring]
        start = rng.choice([i for i, atom in enumerate(atoms) if atom in "cC"])
        turn = rng.choice((1, -1))
        order = [atoms[(start + turn * i) % len(atoms)] for i in range(len(atoms))]
        free = [i for i, atom in enumerate(order) if i and atom in "cC"]
        chosen = dict(zip(rng.sample(free, rng.choice((1, 2))), rng.choices(self.substituents, k=2), strict=False))
        text = "C" * rng.randint(1, 3) + self.linker
        for i, atom in enumerate(order):
            text += atom + ("1" if i in (0, len(order) - 1) else "")
            group = chosen.get(i)
            if group is not None:
                text += group if i == len(order) - 1 else f"({group})"
        return text


def ring_of(smiles: str) -> str | None:
    """The kind of ring of a molecule of this grammar, from the atoms between the two marks of ring 1."""
    atoms, depth, inside = [], 0, False
    for i, letter in enumerate(smiles):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        elif letter == "1" and not inside:
            inside, atoms, level = True, [smiles[i - 1]], depth
        elif letter == "1":
            return next((name for name, ring in RINGS.items() if _same(ring, atoms)), None)
        elif inside and depth == level and letter.isalpha():
            atoms.append(letter)
    return None


def _same(ring: list[str], atoms: list[str]) -> bool:
    turns = [ring[i:] + ring[:i] for i in range(len(ring))]
    return any(atoms in (turn, turn[::-1]) for turn in turns)


def text(rng: random.Random, most: int = 6) -> str:
    """Molecules of one series joined by "." as the in-context data of Chem-xLSTM are; one to ``most`` of them."""
    series = Series.draw(rng)
    return ".".join(series.molecule(rng) for _ in range(rng.randint(1, most)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=4, help="molecules of one series")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    series = Series.draw(rng)
    with open(options.out, "w", encoding="utf-8") as file:
        for i in range(options.count):
            file.write(f"{series.molecule(rng)} {series.ring}-{i + 1}\n")


if __name__ == "__main__":
    main()
