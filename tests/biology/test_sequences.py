"""Files as people have them: FASTA and A3M, gzipped or not, and SMILES lists."""

import gzip

import pytest

from zoo_biology.sequences import Record, read_fasta, read_smiles, stream_fasta, write_fasta

TEXT = ">chr1 first one\r\nACGT\r\nac gt\n\n; a comment\n>chr2\nNNNN\n>\nA"


@pytest.mark.parametrize("zipped", [True, False])
def test_fasta(tmp_path, zipped):
    path = tmp_path / "a.fa"  # the name does not matter
    path.write_bytes(gzip.compress(TEXT.encode()) if zipped else TEXT.encode())
    assert read_fasta(path) == [Record("chr1", "ACGTacgt", "first one"), Record("chr2", "NNNN"), Record("unnamed", "A")]


def test_records_come_one_by_one(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">good\nACGT\n>bad\nAC\n")
    assert next(stream_fasta(path)).name == "good"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sequence"),
        (b"\n\n# nothing\n", "holds no sequence"),
        (b"ACGT\n", "line 1.*stands before any header"),
        (b">a\nAC\xff\xfe", "not readable as text"),
        (gzip.compress(TEXT.encode() * 50)[:60], "not readable as text"),
    ],
)
def test_files_that_are_no_fasta(tmp_path, content, message):
    (tmp_path / "a.fa").write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        read_fasta(tmp_path / "a.fa")
    assert "a.fa" in str(found.value)


@pytest.mark.parametrize("name", ["out.fa", "deep/out.fa.gz"])
def test_written_fasta_is_read_again(tmp_path, name):
    records = [Record("a", "ACGT" * 40, "what it is"), Record("b", "A")]
    assert read_fasta(write_fasta(tmp_path / name, records)) == records


def test_smiles(tmp_path):
    (tmp_path / "a.smi").write_text("CCO ethanol\n\n# no molecule\nC\n")
    assert read_smiles(tmp_path / "a.smi") == [Record("ethanol", "CCO"), Record("4", "C")]
    (tmp_path / "a.csv").write_text("Name,SMILES\nethanol,CCO\n,C\n")
    assert read_smiles(tmp_path / "a.csv") == [Record("ethanol", "CCO"), Record("2", "C")]
    (tmp_path / "a.smi.gz").write_bytes(gzip.compress(b"CCO\n"))
    assert read_smiles(tmp_path / "a.smi.gz") == [Record("1", "CCO")]
    (tmp_path / "b.csv").write_text("x\n1\n")
    with pytest.raises(ValueError, match="no column 'smiles'; found x"):
        read_smiles(tmp_path / "b.csv")
    (tmp_path / "b.smi").write_text("\n")
    with pytest.raises(ValueError, match="holds no molecule"):
        read_smiles(tmp_path / "b.smi")
