"""Letters to ids, as the three originals have them.

DNA: models/caduceus/tokenization_caduceus.py of ml-jku/DNA-xLSTM; proteins: protxlstm/utils.py of ml-jku/Prot-xLSTM;
molecules: chemxlstm/smiles_utils.py of ml-jku/Chem-xLSTM (after S4DD), whose labels are learnt from data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import read_json, read_text, refused

# -- DNA --------------------------------------------------------------------------------------------------------------


class DNA:
    """[CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11."""

    MASK, PAD, UNK = 3, 4, 6
    _STRANGE = 255
    BASES = "ACGTN"
    #: IUPAC's codes for what is not known exactly, U (RNA) aside
    AMBIGUOUS = "RYSWKMBDHV"
    COMPLEMENT = str.maketrans("ACGTNRYSWKMBDHVUacgtnryswkmbdhvu", "TGCANYRSWMKVHDBAtgcanyrswmkvhdba")

    def __init__(self, ambiguous: str = "N") -> None:
        """``ambiguous``: what IUPAC codes other than N become: "N", or "unk", the original's [UNK], which no model saw
        in training."""
        if ambiguous not in ("N", "unk"):
            raise ValueError(f"ambiguous is {ambiguous!r}; expected 'N' or 'unk'")
        self._table = np.full(256, self._STRANGE, np.uint8)
        other = 7 + self.BASES.index("N") if ambiguous == "N" else self.UNK
        for letters, ids in ((self.BASES, range(7, 12)), (self.AMBIGUOUS, [other] * len(self.AMBIGUOUS))):
            for letter, i in zip(letters, ids, strict=True):
                self._table[[ord(letter), ord(letter.lower())]] = i

    def codes(self, sequence: str, name: str = "the sequence") -> np.ndarray:
        """Ids of a sequence, (length,) uint8; lower case (soft-masked) letters are as good as upper ones.

        Raises ValueError naming letters that are no DNA.
        """
        found = self._table[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]
        if not (found == self._STRANGE).any():
            return found
        strange = sorted(c for c in set(sequence.upper()) if self._table[min(ord(c), 255)] == self._STRANGE)
        hint = "RNA: write T for U" if strange == ["U"] else "is it a protein? Those go to Prot-xLSTM models"
        raise ValueError(
            f"{name} holds {', '.join(map(repr, strange[:6]))}, which is no DNA (A, C, G, T, N, IUPAC); {hint}"
        )

    def encode(self, sequence: str, name: str = "the sequence") -> list[int]:
        """The same as a list."""
        return self.codes(sequence, name).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Letters of ids; "." for those that stand for no base."""
        return "".join(self.BASES[i - 7] if 7 <= i < 12 else "." for i in ids)

    @classmethod
    def reverse_complement(cls, sequence: str) -> str:
        return sequence.translate(cls.COMPLEMENT)[::-1]


# -- proteins ---------------------------------------------------------------------------------------------------------


class Protein:
    """<cls> 0, <pad> 1, <eos> 2, <unk> 3, the twenty residues 4 to 23, X B U Z O . - 24 to 30, <null_1> 31, <mask> 32,
    <mask-1> to <mask-5> 33 to 37."""

    CLS, PAD, EOS, UNK = 0, 1, 2, 3
    RESIDUES = "LAGVSERTIDPKQNFYMHWC"
    LETTERS = RESIDUES + "XBUZO.-"
    FIRST, LAST = 4, 24  #: the twenty residues are range(FIRST, LAST)
    MASKS = (33, 34, 35, 36, 37)
    _IDS: Mapping[str, int] = {letter: 4 + i for i, letter in enumerate(LETTERS)}

    @staticmethod
    def clean(sequence: str) -> str:
        """Without gaps, insertions (lower case in A3M) as residues, and without a stop at the end."""
        return sequence.replace("-", "").upper().rstrip("*")

    def encode(self, sequence: str, name: str = "the sequence") -> list[int]:
        """Ids of a cleaned sequence, without <cls>. Letters that are no residue become <unk>, as in the original.

        Raises ValueError for an empty sequence, for what can be no protein (digits, blanks, marks), and for long
        sequences of nothing but A, C, G, T, U, N.
        """
        letters = self.clean(sequence)
        if not letters:
            raise ValueError(f"{name} is empty; expected at least one residue")
        strange = sorted({c for c in letters if not (c.isascii() and c.isalpha()) and c not in ".*"})
        if strange:
            raise ValueError(f"{name} holds {', '.join(map(repr, strange[:6]))}; expected letters of residues")
        if len(letters) >= 30 and set(letters) <= set("ACGTUN"):
            raise ValueError(
                f"{name} has no letters but {''.join(sorted(set(letters)))}: it is DNA; those go to DNA-xLSTM models"
            )
        return [self._IDS.get(letter, self.UNK) for letter in letters]

    def decode(self, ids: Iterable[int]) -> str:
        """Letters of ids; marks as the original writes them ("<mask-1>")."""
        marks = {0: "<cls>", 1: "<pad>", 2: "<eos>", 3: "<unk>", 31: "<null_1>", 32: "<mask>"}
        marks |= {i: f"<mask-{k}>" for k, i in enumerate(self.MASKS, start=1)}
        return "".join(marks[i] if i in marks else self.LETTERS[i - 4] for i in ids)


# -- molecules --------------------------------------------------------------------------------------------------------

_TWO = (
    "Si Xe Ba Rb Ra Sr Dy Li Kr Bi Mn He Am Pu Cm Pm Ne Th Ni Pr Fe Lu Pa Fm Tm Tb Er Be Al Gd Eu te As Pt Lr Sm Ca La "
    "Ti Te Ac Cf Rf Na Cu Au Nd Ag Se se Zn Mg Br Cl Pb Sb"
)
_SEGMENT = re.compile(
    r"[\[\]]|(?<=\[)Cs(?=\])|" + "|".join(_TWO.split()) + r"|[UVKCBHNOSPFIbcnosp]|[().=#+/:~@?>*$-]|\\\\|%\d{2}|\d"
)


def segment(smiles: str) -> list[str]:
    """The segments of a SMILES string: brackets, elements, bonds, ring numbers, each a token.

    What the original's pattern does not know is left out, as there; of what occurs in SMILES that is the backslash of
    a double bond's geometry (:func:`lost` tells).
    """
    return _SEGMENT.findall(smiles)


def lost(smiles: str) -> str:
    """The characters that :func:`segment` leaves out."""
    return _SEGMENT.sub("", smiles)


class Vocabulary:
    """Labels of SMILES segments: [PAD] is 0; [BEG] and [END] stand around every text; the rest as the data had it."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """``tokens`` in the order of their labels. Raises ValueError if a mark is missing or a token is there twice."""
        self.tokens = list(tokens)
        self.labels = {token: i for i, token in enumerate(self.tokens)}
        missing = [mark for mark in ("[PAD]", "[BEG]", "[END]") if mark not in self.labels]
        if missing or len(self.labels) != len(self.tokens) or self.tokens[0] != "[PAD]":
            raise ValueError(
                f"a vocabulary of {len(self.tokens)} tokens, {len(self.labels)} of them different, without "
                f"{missing or 'nothing missing'}; expected different tokens, [PAD] first, [BEG] and [END] among them"
            )

    @classmethod
    def learn(cls, molecules: Iterable[str]) -> Vocabulary:
        """From data, in the order in which tokens come up."""
        found = {"[PAD]": None}
        for smiles in molecules:
            found |= dict.fromkeys(["[BEG]", *segment(smiles), "[END]"])
        return cls(list(found))

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """From the original's ``init_arguments.json``, or from a text file with a token a line, [PAD] first. Raises
        BadFile."""
        with refused(path):
            return cls._read(path)

    @classmethod
    def _read(cls, path: str | Path) -> Vocabulary:
        if Path(path).suffix.lower() != ".json":
            return cls([line for line in read_text(path).splitlines() if line])
        found: Any = read_json(path)
        labels = found.get("token2label", found) if isinstance(found, dict) else None
        if not isinstance(labels, dict) or sorted(labels.values()) != list(range(len(labels))):
            raise ValueError(f"{path} has no token2label with the labels 0, 1, 2 ..; is it an init_arguments.json?")
        return cls(sorted(labels, key=labels.__getitem__))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def begin(self) -> int:
        return self.labels["[BEG]"]

    @property
    def end(self) -> int:
        return self.labels["[END]"]

    def encode(self, smiles: str) -> list[int]:
        """Labels of the segments, without marks. Raises ValueError naming what is no SMILES or was not in the data."""
        strange = sorted(set(lost(smiles)) - {"\\"})
        if strange:
            raise ValueError(f"{smiles!r} holds {', '.join(map(repr, strange[:6]))}, which is no SMILES")
        tokens = segment(smiles)
        unknown = sorted({token for token in tokens if token not in self.labels})
        if unknown:
            raise ValueError(
                f"{smiles!r} holds {', '.join(unknown[:6])}, which this model was not trained on; it knows "
                f"{' '.join(self.tokens[1:])}"
            )
        return [self.labels[token] for token in tokens]

    def decode(self, labels: Iterable[int]) -> str:
        """SMILES of labels up to [END], without padding and marks."""
        text = []
        for label in labels:
            token = self.tokens[label]
            if token == "[END]":
                break
            if token not in ("[PAD]", "[BEG]"):
                text.append(token)
        return "".join(text)
