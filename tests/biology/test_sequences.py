"""Files as people have them: FASTA and A3M, gzipped or not, and SMILES lists."""

import gzip

import pytest

from zoo import errors
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
        (gzip.compress(TEXT.encode() * 50, mtime=0)[:60], "not readable as text"),
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


def test_headers_and_marks(tmp_path):
    """A byte order mark, and a tab behind the name, as editors and tools write them."""
    (tmp_path / "a.fa").write_bytes(b"\xef\xbb\xbf>a\tof a mouse\nACGT\n")
    assert read_fasta(tmp_path / "a.fa") == [Record("a", "ACGT", "of a mouse")]


@pytest.mark.parametrize("zipped", [True, False])
def test_fastq(tmp_path, zipped):
    text = "@r1 first\nACGT\n+\n@+>!\n@r2\nACG\nT\n+r2\n@@\n@@\n\n@r3\nA\n+\n+\n"
    (tmp_path / "a.fq").write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert read_fasta(tmp_path / "a.fq") == [Record("r1", "ACGT", "first"), Record("r2", "ACGT"), Record("r3", "A")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@r1\nACGT\n+\nII\n", "'r1' has 4 bases and 2 qualities"),
        ("@r1\nACGT\n", "'r1' has 4 bases and 0 qualities"),
        ("@r1\nAC\n+\nIIII\n", "'r1' has 2 bases and 4 qualities"),
        ("@r1\nAC\n+\nII\nACGT\n", "line 5: 'ACGT'; expected FASTQ"),
    ],
)
def test_reads_that_are_damaged(tmp_path, text, message):
    (tmp_path / "a.fastq").write_text(text)
    with pytest.raises(errors.BadFile, match=message):
        read_fasta(tmp_path / "a.fastq")


def test_bytes_that_do_not_unpack(tmp_path):
    packed = bytearray(gzip.compress(bytes((7 * i * i + i // 3) % 64 + 63 for i in range(4000))))
    packed[100:140] = b"\xff" * 40
    for name, read in (("a.fa.gz", read_fasta), ("a.smi.gz", read_smiles)):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(errors.BadFile, match="plain or gzipped"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(gzip.compress(b">a\nACGT\n" * 9)[:-9])
        with pytest.raises(errors.BadFile, match="plain or gzipped"):
            read(tmp_path / name)
    with pytest.raises(errors.BadFile, match="is a folder"):
        read_fasta(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_smiles(tmp_path / "none.smi")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\xef\xbb\xbfsmiles,name\nCCO,ethanol\n"),
        ("A.CSV", b"SMILES,name\r\nCCO,ethanol\r\n"),
        ("b.csv", b"name;smiles\nethanol;CCO\n;\n"),
        ("c.tsv", b"name\tsmiles\nethanol\tCCO\n\n"),
    ],
)
def test_tables_of_molecules(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_smiles(tmp_path / name) == [Record("ethanol", "CCO")]


@pytest.mark.parametrize("text", ["name,smiles\na,CCO\nb\n", "name,smiles\na,CCO\nb,\n"])
def test_rows_without_a_molecule(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match="line 3: no SMILES"):
        read_smiles(tmp_path / "a.csv")


def test_files_are_written_whole(tmp_path):
    """What was there stays until all is written."""
    path = write_fasta(tmp_path / "a.fa", [Record("a", "ACGT")])

    def broken():
        yield Record("b", "A")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_fasta(path, broken())
    assert read_fasta(path) == [Record("a", "ACGT")]
    assert [p.name for p in tmp_path.iterdir()] == ["a.fa"]
