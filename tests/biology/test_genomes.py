"""Embeddings and likelihoods of DNA: real files, any length, both strands, and what is no DNA."""

import gzip

import pytest
import torch
from safetensors import safe_open

import zoo
import zoo.testing
from zoo_biology.dna import dna_xlstm
from zoo_biology.genomes import DNAEmbedding, DNALikelihood
from zoo_biology.sequences import Record, write_fasta
from zoo_biology.tokens import DNA
from zoo_registry import errors

SLSTM = {"slstm_at": "all", "slstm": {"num_heads": 1}, "ffn": {}}


def letters(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return "".join("ACGT"[int(i)] for i in torch.randint(0, 4, (count,), generator=generator))


def model(seed=0, **config):
    torch.manual_seed(seed)
    made = dna_xlstm(d_model=32, num_blocks=2, **config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


BOTH_WAYS = {"bidirectional": True}


def test_a_file_of_records(tmp_path):
    sequences = [letters(300, 1), letters(40, 2).lower() + "NNNNRYSW", "A"]
    records = [Record(f"r{i}", s) for i, s in enumerate(sequences)]
    plain = write_fasta(tmp_path / "a.fa", records)
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pipe = DNAEmbedding(model(**BOTH_WAYS), window=64)
    answer = pipe(plain)
    assert answer.names == ["r0", "r1", "r2"]
    assert answer.starts == [0, 0, 0]
    assert answer.ends == [300, 48, 1]
    assert answer.vectors.shape == (3, 32)
    assert torch.equal(pipe(tmp_path / "b.fa.gz").vectors, answer.vectors)
    assert torch.equal(pipe(str(plain)).vectors, answer.vectors)
    assert "388" in str(answer) or "349 bases" in answer.summary()


def test_windows_are_the_models_own():
    """What is put together from windows is what the model gives for each of them."""
    net, text = model(**BOTH_WAYS), letters(150)
    tokens = torch.tensor(DNA().encode(text))
    pipe = DNAEmbedding(net, window=64, pool="window", batch=2)
    answer = pipe(text)
    assert list(zip(answer.starts, answer.ends, strict=True)) == [(0, 64), (64, 128), (128, 150)]
    with torch.no_grad():
        for (start, end), found in zip([(0, 64), (64, 128), (128, 150)], answer.vectors, strict=True):
            zoo.testing.assert_close(found, net.hidden(tokens[None, start:end])[0].mean(0), tolerance=1e-5)
        margin = DNAEmbedding(net, window=64, margin=10, pool="base")(text)
        whole = net.hidden(tokens[None, 54:138])[0]
    assert len(margin.names) == 150
    zoo.testing.assert_close(margin.vectors[64:128], whole[10:74], tolerance=1e-5)


@pytest.mark.parametrize("equivariant", [True, False])
def test_a_sequence_and_its_reverse_complement_have_one_embedding(equivariant):
    net = model(**SLSTM, rcps=True, **BOTH_WAYS) if equivariant else model(**BOTH_WAYS)
    text = letters(90)
    back = DNA.reverse_complement(text)
    pipe = DNAEmbedding(net, window=128, both_strands=not equivariant)
    zoo.testing.assert_close(pipe(back).vectors, pipe(text).vectors, tolerance=1e-5)
    if not equivariant:
        one_strand = DNAEmbedding(net, window=128)
        assert (one_strand(back).vectors - one_strand(text).vectors).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 17, 1000])
def test_next_base_likelihood_carries_its_state(window):
    net, text = model(**SLSTM), letters(60) + "N" + letters(9, 3)
    tokens = torch.tensor(DNA().encode(text))
    with torch.no_grad():
        cost = -net(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    known = tokens[1:] < 11
    answer = DNALikelihood(net, window=window)(text)
    assert answer.scored == [68]
    assert abs(answer.nats[0] - float(cost[known].mean())) < 1e-5


def test_masked_likelihood_asks_for_every_base_once():
    net, text = model(**BOTH_WAYS), letters(50)
    tokens = torch.tensor(DNA().encode(text))
    expected = []
    with torch.no_grad():
        for k in range(7):
            shown = tokens.clone()
            shown[k::7] = DNA.MASK
            logits = net(shown[None])[0].log_softmax(-1)
            expected += [-float(logits[t, tokens[t]]) for t in range(k, 50, 7)]
    answer = DNALikelihood(net)(text)
    assert answer.scored == [50]
    assert abs(answer.nats[0] - sum(expected) / 50) < 1e-5
    assert abs(answer.perplexity[0] - torch.tensor(answer.nats[0]).exp().item()) < 1e-4


def test_nothing_to_score():
    causal = DNALikelihood(model(**SLSTM))
    assert causal("A").scored == [0]
    assert causal("NNN").nats[0] != causal("NNN").nats[0]  # not a number: there is no mean of nothing


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.safetensors"])
def test_saving(tmp_path, name):
    answer = DNAEmbedding(model(**BOTH_WAYS))(letters(30))
    path = answer.save(tmp_path / "new" / name)
    if name.endswith("safetensors"):
        with safe_open(path, "pt") as file:
            assert torch.equal(file.get_tensor("embeddings"), answer.vectors)
            assert file.metadata()["name"] == '["sequence"]'
    else:
        text = path.read_text()
        assert "e31" in text
        assert "sequence" in text
    with pytest.raises(ValueError, match=r"no table is written as \.xls"):
        answer.save(tmp_path / "a.xls")


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = DNALikelihood(model(**BOTH_WAYS))(letters(30)).save(tmp_path / "a.parquet")
    assert parquet.read_table(path).column_names == ["name", "scored", "nats", "perplexity"]


def test_what_is_no_dna(tmp_path):
    pipe = DNAEmbedding(model(**BOTH_WAYS))
    path = write_fasta(tmp_path / "p.fa", [Record("good", "ACGT"), Record("albumin", "MKWVTFISLLFLFSSAYS")])
    with pytest.raises(ValueError, match=r"'albumin' holds 'F', 'I'.*is it a protein"):
        pipe(path)
    (tmp_path / "e.fa").write_text(">a\n>b\nACGT\n")
    with pytest.raises(ValueError, match="'a' has no sequence"):
        pipe(tmp_path / "e.fa")
    with pytest.raises(errors.LocalFileMissing, match=r"there is no file .not_here\.fa."):
        pipe("not_here.fa")
    for bad in ({"window": 0}, {"margin": -1}, {"pool": "mean"}, {"batch": 0}):
        with pytest.raises(errors.BadArgument):
            DNAEmbedding(model(**BOTH_WAYS), **bad)
    with pytest.raises(errors.BadArgument, match="no DNA model"):
        DNAEmbedding(torch.nn.Linear(2, 2))


def test_several_files_and_one_that_fails(tmp_path):
    for name, text in (("a.fa", ">a\nACGT\n"), ("b.fa", "ACGT\n"), ("c.fa", ">c\nAC\n")):
        (tmp_path / name).write_text(text)
    found = DNAEmbedding(model(**BOTH_WAYS))(tmp_path, keep_going=True)
    assert [type(f).__name__ for f in found] == ["Embeddings", "Failure", "Embeddings"]
    assert zoo.pipeline("dna_xlstm_micro", "dna-likelihood")("ACGTAC").scored == [6]


def test_folders_named_in_a_string(tmp_path):
    """A string with a slash that names a folder is not a sequence."""
    for name in ("b.fa", "a.fastq"):
        (tmp_path / name).write_text(">r\nACGT\n" if name == "b.fa" else "@r\nACGT\n+\nIIII\n")
    pipe = DNAEmbedding(model(**BOTH_WAYS))
    found = pipe(str(tmp_path))
    assert [answer.source for answer in found] == [str(tmp_path / "a.fastq"), str(tmp_path / "b.fa")]
    assert torch.equal(found[0].vectors, found[1].vectors)


def test_a_vector_a_base_names_every_base():
    answer = DNAEmbedding(model(**BOTH_WAYS), window=3, pool="base")(Record("r", "ACGTACGT"))
    assert answer.names == ["r"] * 8
    assert answer.starts == list(range(8))
    assert answer.ends == list(range(1, 9))
    assert answer.vectors.shape == (8, 32)
