"""Letters to ids: what the sheet of the originals says, and what no original takes."""

import json

import numpy as np
import pytest

from zoo_biology.homologs import context, draw_spans, protein, reorder, single_site
from zoo_biology.tokens import DNA, Protein, Vocabulary, lost, segment


def test_dna():
    assert DNA().encode("ACGTNacgtn") == [7, 8, 9, 10, 11] * 2
    assert DNA().encode("RYSWKMBDHV") == [11] * 10
    assert DNA("unk").encode("RN") == [6, 11]
    assert DNA().decode([7, 8, 9, 10, 11, 3]) == "ACGTN."
    assert DNA.reverse_complement("AACRn") == "nYGTT"
    with pytest.raises(ValueError, match=r"the record holds 'E', 'L'.*is it a protein"):
        DNA().encode("ACGLE", "the record")
    with pytest.raises(ValueError, match="write T for U"):
        DNA().encode("ACGU")
    with pytest.raises(ValueError, match="expected 'N' or 'unk'"):
        DNA("x")


def test_protein():
    assert Protein().encode("LAGVSERTIDPKQNFYMHWCXBUZO") == list(range(4, 29))
    assert Protein().encode("la-g.*") == [4, 5, 6, 29]
    assert Protein().encode("LJ") == [4, 3]
    assert Protein().decode([0, 4, 33, 2]) == "<cls>L<mask-1><eos>"
    for text, message in (("", "is empty"), ("---", "is empty"), ("LA1", "letters of residues"), ("ACGT" * 9, "DNA")):
        with pytest.raises(ValueError, match=message):
            Protein().encode(text)


def test_smiles_segments():
    assert segment("C[C@@H](N)c1ccc(Br)cc1Cl") == [*"C[C@@H](N)c1ccc(", "Br", *")cc1", "Cl"]
    assert segment("[Cs]C%12[Se]") == ["[", "Cs", "]", "C", "%12", "[", "Se", "]"]
    assert segment("Cs") == ["C", "s"]  # outside of a bracket two atoms
    assert segment("F/C=C\\F") == ["F", "/", "C", "=", "C", "F"]
    assert lost("F/C=C\\F") == "\\"
    assert segment("") == []


def test_vocabulary(tmp_path):
    words = Vocabulary.learn(["CCO", "c1ccccc1.N"])
    assert words.tokens == ["[PAD]", "[BEG]", "C", "O", "[END]", "c", "1", ".", "N"]
    assert words.encode("CO") == [2, 3]
    assert words.decode([1, 2, 3, 4, 2, 0]) == "CO"
    (tmp_path / "init_arguments.json").write_text(json.dumps({"n_heads": 1, "token2label": words.labels}))
    (tmp_path / "v.txt").write_text("\n".join(words.tokens))
    assert Vocabulary.read(tmp_path / "init_arguments.json").tokens == words.tokens
    assert Vocabulary.read(tmp_path / "v.txt").tokens == words.tokens
    with pytest.raises(ValueError, match="Br, which this model was not trained on"):
        words.encode("CBr")
    with pytest.raises(ValueError, match=r"holds '!'.*no SMILES"):
        words.encode("C!")
    (tmp_path / "other.json").write_text('{"model_dim": 4}')
    with pytest.raises(ValueError, match="token2label"):
        Vocabulary.read(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"\[BEG\]"):
        Vocabulary(["[PAD]", "C", "[END]"])


def test_context_positions():
    whole = context([[4, 5, 6], [7]])
    assert whole.ids == [0, 4, 5, 6, 0, 7]
    assert whole.positions == [0, 1, 2, 3, 0, 1]
    assert whole.sequences == [0, 0, 0, 0, 1, 1]


def test_fill_in_the_middle():
    whole = protein([4, 5, 6, 7, 8], 2, [(1, 3), (4, 5)])
    assert whole.ids == [0, 4, 33, 7, 34, 2, 33, 5, 6, 34, 8]
    assert whole.positions == [0, 1, 2, 4, 5, 0, 2, 2, 3, 5, 5]
    assert set(whole.sequences) == {2}
    assert reorder(whole.ids) == [4, 5, 6, 7, 8]
    assert reorder([*whole.ids, 0, 9, 9]) == [4, 5, 6, 7, 8]
    assert reorder([0, 4, 33, 5]) == [4, 5]
    assert protein([4, 5]).ids == [0, 4, 5]  # nothing cut out, no <eos>
    target = single_site([4, 5, 6], 1)
    assert target.ids == [0, 4, 33, 6, 2, 33]
    assert target.positions == [0, 1, 2, 3, 0, 2]
    for spans in ([(2, 2)], [(0, 3), (2, 4)], [(3, 9)], [(i, i + 1) for i in range(6)]):
        with pytest.raises(ValueError, match="span"):
            protein([4] * 8, 0, spans)


def test_spans_are_drawn_as_in_training():
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(4000):
        spans = draw_spans(40, generator)
        counts.append(len(spans))
        residues = [4 + i % 20 for i in range(40)]
        assert reorder(protein(residues, 0, spans).ids) == residues
        for (start, end), following in zip(spans, [*(s for s, _ in spans[1:]), 40], strict=False):
            assert 1 <= end - start <= max(int((following - start) * 0.2), 2) - 1
    share = np.bincount(counts, minlength=6) / len(counts)
    assert abs(share[0] - np.exp(-1)) < 0.03  # Poisson with mean 1
    assert abs(share[2] - np.exp(-1) / 2) < 0.03
    assert len(share) == 6
    assert all(len(draw_spans(1, generator)) <= 1 for _ in range(50))
