"""The commands, as a user types them, on the package's own samples."""

import json
from pathlib import Path

import pytest

import zoo_biology
from zoo.cli import run
from zoo_biology.sequences import read_fasta

EXAMPLES = Path(zoo_biology.__file__).parent / "examples"
FAMILY, MOTIFS, SERIES = (str(EXAMPLES / name) for name in ("family.fa", "motifs.fa", "series.smi"))


def answer(capsys, *words):
    assert run([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_embed_dna(capsys, tmp_path):
    out = tmp_path / "e.csv"
    found = answer(capsys, "embed-dna", "dna_xlstm_micro", MOTIFS, "--out", str(out), "--window", "100")
    assert found["names"] == [f"seq{i}" for i in range(1, 7)]
    assert found["file"] == str(out)
    assert len(out.read_text().splitlines()) == 7


def test_score_dna(capsys):
    found = answer(capsys, "score-dna", "dna_xlstm_micro", MOTIFS)
    assert found["scored"] == [256] * 6


def test_score_protein(capsys, tmp_path):
    out = tmp_path / "m.csv"
    found = answer(
        capsys,
        "score-protein",
        "prot_xlstm_micro",
        FAMILY,
        "--target",
        "homolog3",
        "--mutations",
        "G1A",
        "--out",
        str(out),
    )
    assert found["target"] == "homolog3"
    assert found["mutations"] == ["G1A"]
    assert out.read_text().startswith("mutation,effect\nG1A,")


def test_generate_protein(capsys, tmp_path):
    out = tmp_path / "new.fa"
    found = answer(
        capsys, "generate-protein", "prot_xlstm_micro", FAMILY, "--count", "3", "--max-length", "40", "--out", str(out)
    )
    assert [r.sequence for r in read_fasta(out)] == found["sequences"]
    filled = answer(
        capsys, "generate-protein", "prot_xlstm_micro", FAMILY, "--count", "2", "--fill", "10-14", "--max-length", "9"
    )
    wild = read_fasta(FAMILY)[-1].sequence
    assert all(s.startswith(wild[:9]) and s.endswith(wild[14:]) for s in filled["sequences"])


def test_molecules(capsys, tmp_path):
    out = tmp_path / "new.smi"
    found = answer(capsys, "generate-molecules", "chem_xlstm_micro", SERIES, "--count", "4", "--out", str(out))
    assert out.read_text().splitlines() == found["molecules"]
    assert found["context"] == [line.split()[0] for line in Path(SERIES).read_text().splitlines()]
    scored = answer(capsys, "score-molecules", "chem_xlstm_micro", SERIES, "--context", SERIES)
    assert len(scored["nats"]) == 4
    assert answer(capsys, "generate-molecules", "chem_xlstm_micro", "--count", "2")["context"] == []


def test_predict_takes_the_cards_task(capsys):
    (found,) = answer(capsys, "predict", "dna_xlstm_micro", MOTIFS)
    assert found["names"][0] == "seq1"


def test_what_is_not_known_is_null(capsys, tmp_path):
    """N is not scored; JSON has no word for not a number."""
    (tmp_path / "n.fa").write_text(">a\nNNNN\n")
    found = answer(capsys, "score-dna", "dna_xlstm_micro", str(tmp_path / "n.fa"), "--out", str(tmp_path / "n.json"))
    assert found["nats"] == [None]
    assert json.loads((tmp_path / "n.json").read_text())[0]["nats"] is None


def test_where_answers_go_is_checked_first(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for words, message in (
        (("embed-dna", "dna_xlstm_micro", MOTIFS, "--out", "e.fa"), "e.fa ends in '.fa'; expected .csv"),
        (
            ("generate-protein", "prot_xlstm_micro", FAMILY, "--out", "p.smi"),
            "expected .csv, .tsv, .parquet, .json, .fa",
        ),
        (("score-dna", "dna_xlstm_micro", MOTIFS, "--out", str(tmp_path / "file" / "s.csv")), "cannot be written"),
    ):
        assert run(list(words)) in (2, 3)
        assert message in " ".join(capsys.readouterr().err.split())
    assert answer(capsys, "score-dna", "dna_xlstm_micro", MOTIFS, "--out", str(tmp_path / "new" / "S.CSV"))["file"]
    assert (tmp_path / "new" / "S.CSV").read_text().startswith("name,scored,nats")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embed-dna", "dna_xlstm_micro", FAMILY), "is no DNA"),
        (("score-protein", "prot_xlstm_micro", MOTIFS), "it is DNA"),
        (("score-protein", "prot_xlstm_micro", FAMILY, "--mutations", "W1A"), "has G at 1, not W"),
        (("embed-dna", "chem_xlstm_micro", MOTIFS), "is no DNA model"),
        (("generate-molecules", "chem_xlstm_micro", "--temperature", "-1"), "expected temperature"),
        (("embed-dna", "dna_xlstm_1k_slstm", MOTIFS), "ml.jku.at"),
    ],
)
def test_errors_are_sentences(capsys, words, message):
    assert run(list(words)) != 0
    text = " ".join(capsys.readouterr().err.split())
    assert message in text
    assert "Traceback" not in text
