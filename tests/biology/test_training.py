"""``zoo train-sequences``: what models are asked for and measured by, runs that go on, folders that work."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
import zoo.testing
from zoo.training import Settings, fit
from zoo_biology.commands_training import train_sequences
from zoo_biology.dna import COMPLEMENT, dna_xlstm
from zoo_biology.homologs import context, reorder
from zoo_biology.protein import ProtXLSTM
from zoo_biology.proteins import Homologs
from zoo_biology.sequences import Record, write_fasta
from zoo_biology.tokens import DNA, Protein, Vocabulary
from zoo_biology.training import IGNORED, Bases, Families, Molecules, batches, loss
from zoo_biology.training_files import read_bases, read_families, split
from zoo_biology.xlstm import XLSTMLM

MLSTM = {"num_heads": 2}


def run(*arguments):
    return CliRunner().invoke(train_sequences, [*map(str, arguments)])


def repeats(path, records: int = 12, length: int = 120, seed: int = 0):
    """DNA that repeats a word of its own kind: half of its bases follow from the others."""
    draw = np.random.default_rng(seed)
    words = ["ACGT", "TTGACA"]
    found = ["".join(words[i] for i in draw.integers(0, 2, length))[:length] for _ in range(records)]
    return write_fasta(path, [Record(f"r{i}", sequence) for i, sequence in enumerate(found)])


def drawn(rows: int = 40, length: int = 200) -> list[np.ndarray]:
    return [row.astype(np.uint8) for row in np.random.default_rng(0).integers(7, 12, (rows, length))]


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_masked_bases():
    """15 % of the known bases; 80 % of them masked, 10 % another base; every row a piece or its reverse complement."""
    pieces = drawn()
    data = Bases(pieces, [], 210, causal=False, strands=True)
    batch = data.rows(range(40), np.random.default_rng(1))
    ids, target = batch["inputs"]["ids"].numpy(), batch["target"].numpy()
    asked = target != IGNORED
    turned = 0
    for row, (shown, own, piece) in enumerate(zip(ids, asked, pieces, strict=True)):
        whole = np.where(own, target[row], shown)
        assert (whole[200:] == DNA.PAD).all()
        back = np.array(COMPLEMENT)[piece[::-1]]
        assert np.array_equal(whole[:200], piece) or np.array_equal(whole[:200], back)
        turned += np.array_equal(whole[:200], back)
    assert 10 <= turned <= 30
    known = sum((piece < 11).sum() for piece in pieces)
    assert abs(asked.sum() / known - 0.15) < 0.01
    assert (target[asked] < 11).all()  # N is not asked for
    assert abs((ids[asked] == DNA.MASK).mean() - 0.8) < 0.04
    assert abs((ids[asked] == target[asked]).mean() - 0.1 - 0.025) < 0.03  # as it is, or by chance
    still = Bases(pieces, [], 200, causal=False, strands=False).rows([0], np.random.default_rng(1))
    assert np.array_equal(np.where(still["target"] == IGNORED, still["inputs"]["ids"], still["target"])[0], pieces[0])


def test_next_bases():
    piece = np.array([7, 8, 11, 9, 10], np.uint8)
    batch = Bases([piece], [], 7, causal=True, strands=False).rows([0], np.random.default_rng(0))
    assert batch["inputs"]["ids"].tolist() == [[7, 8, 11, 9, 10, DNA.PAD]]
    assert batch["target"].tolist() == [[8, IGNORED, 9, 10, IGNORED, IGNORED]]


def test_molecules_are_cut_at_the_front_and_padded():
    words = Vocabulary.learn(["CCO.N", "CC(F)Cl"])
    texts = [words.encode("CCO.N"), words.encode("CC")]
    batch = Molecules(texts, [], words, 4).rows([0, 1], np.random.default_rng(0))
    assert words.decode(batch["inputs"]["ids"][0].tolist()) == "CO.N"
    assert batch["target"][0].tolist() == [words.labels[t] for t in "O.N"] + [words.end]
    assert batch["target"][1].tolist() == [*words.encode("CC"), words.end, IGNORED]
    series = Molecules([words.encode("CCO.N.F")], [], words, 9, series=True)
    draw = np.random.default_rng(0)
    seen = {words.decode(series.rows([0], draw)["inputs"]["ids"][0].tolist()) for _ in range(30)}
    assert len(seen) == 6
    assert all(sorted(text.split(".")) == ["CCO", "F", "N"] for text in seen)


def test_homologs_follow_one_another_with_parts_cut_out():
    family = [[4 + i] * (9 + i) for i in range(4)]
    data = Families([family], [], 400)
    draw = np.random.default_rng(0)
    batch = data.rows([0, 0], draw)
    ids = [*batch["inputs"]["ids"][0].tolist(), int(batch["target"][0][-1])]
    ids = [i for i in ids if i != IGNORED and i != Protein.PAD]
    borders = [i for i, token in enumerate(ids) if token == Protein.CLS]
    found = [reorder(ids[a:b]) for a, b in itertools.pairwise(borders)]
    assert sorted(found) == sorted(family)
    assert batch["inputs"]["sequence_ids"][0].unique().tolist() == [0, 1, 2, 3]
    assert (batch["inputs"]["position_ids"][0][borders[:-1]] == 0).all()
    short = Families([family], [], 15).rows([0], draw)
    assert short["target"].shape == (1, 15)


# -- what they are measured by ----------------------------------------------------------------------------------------


def test_held_out_proteins_are_scored_after_their_homologs():
    torch.manual_seed(0)
    model = ProtXLSTM(d_model=16, num_blocks=1, mlstm=MLSTM, positions="rot_1d").eval()
    family = [[5, 6, 7, 8], [5, 6, 9, 8], [4, 6, 7, 8, 8]]
    data = Families([family[:2]], [Homologs(Record("t", ""), family[2], family[:2], [])], 64)
    whole = context([*family, []]).tensors()  # ends with <cls>
    with torch.no_grad():
        logits = model(whole["ids"], position_ids=whole["position_ids"])[0, :-1]
    cost = -logits.log_softmax(-1).gather(1, whole["ids"][0, 1:, None])[:, 0]
    nats, count = data.nats(model)
    assert count == 6
    assert nats == pytest.approx(float(cost[-6:].mean()), rel=1e-4)


def test_a_family_alone_gives_members(tmp_path):
    file = write_fasta(tmp_path / "f.fa", [Record(f"p{i}", "MKLV" * (i + 2)) for i in range(10)])
    model = ProtXLSTM(d_model=16, num_blocks=1, mlstm=MLSTM)
    data = read_families(model, [file], [], 0.2, 64, seed=0)
    assert [len(data.families), len(data.families[0]), len(data.held)] == [1, 8, 2]
    assert all(sample.others == data.families[0] for sample in data.held)
    two = read_families(model, [file, file], [], 0.5, 64, seed=0)
    assert [len(two.families), len(two.families[0]), len(two.held)] == [1, 10, 1]


def test_windows_without_a_known_base_are_left_out(tmp_path):
    file = write_fasta(tmp_path / "f.fa", [Record("a", "ACGTACGT" + "N" * 20 + "acg"), Record("b", "T")])
    data = read_bases(dna_xlstm(d_model=16, num_blocks=1, mlstm=MLSTM), [file], [], 0.0, 8, seed=0)
    assert [len(piece) for piece in data.pieces] == [8, 7]
    assert data.causal
    write_fasta(file, [Record("a", "NNNN")])
    with pytest.raises(ValueError, match="hold no base that is known"):
        read_bases(dna_xlstm(d_model=16, num_blocks=1, mlstm=MLSTM), [file], [], 0.0, 8, seed=0)


def test_the_held_out_share():
    train, held = split(list(range(100)), 0.1, seed=1)
    assert sorted(train + held) == list(range(100))
    assert len(held) == 10
    assert (train, held) == split(list(range(100)), 0.1, seed=1) != split(list(range(100)), 0.1, seed=2)
    assert split([1, 2], 0.0, seed=0) == ([1, 2], [])
    assert len(split(list(range(50_000)), 0.5, seed=0)[1]) == 1000


def kinds():
    torch.manual_seed(0)
    words = Vocabulary.learn(["CCO", "CN(C)F"])
    held = [words.encode("CCF")]
    yield (
        dna_xlstm(d_model=16, num_blocks=1, mlstm=MLSTM, bidirectional=True),
        Bases(drawn(6, 32), drawn(1, 32), 32, causal=False, strands=True),
    )
    yield XLSTMLM(len(words), 16, 1, mlstm=MLSTM), Molecules([words.encode("CCO"), *held], held, words, 9, series=True)
    yield ProtXLSTM(d_model=16, num_blocks=1, mlstm=MLSTM), Families([[[5, 6, 7, 8]] * 3] * 2, [], 32)


@pytest.mark.parametrize("kind", range(3))
def test_a_run_goes_on(tmp_path, kind):
    def train(run, report):
        model, data = list(kinds())[kind]
        score = (lambda m: -data.nats(m)[0]) if data.held else None
        fit(
            model, batches(data, 2, 0), loss, Settings(steps=4, rate=1e-2), run=run, report=report, score=score,
            score_every=2,
        )  # fmt: skip
        return model

    zoo.testing.check_resume(train, tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


def test_dna_is_learnt_and_measured_as_it_is_scored(tmp_path):
    file, others = repeats(tmp_path / "dna.fa"), repeats(tmp_path / "others.fa", 3, seed=9)
    out = tmp_path / "out"
    found = run(
        "dna_xlstm_1k_causal", file, "--out", out, "--steps", 60, "--batch-size", 6, "--length", 50, "--rate", 1e-2,
        "--validation", others, "--json", "--set", "d_model=16", "--set", "num_blocks=1", "--set", "slstm_at=[0]",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["metrics"]["perplexity"] < 2.2  # 4 by chance
    answer = zoo.pipeline(out, "dna-likelihood")(others)
    total = sum(n * c for n, c in zip(answer.nats, answer.scored, strict=True))
    assert sum(answer.scored) == said["letters"]
    assert total / said["letters"] == pytest.approx(said["metrics"]["nats"], rel=1e-5)
    assert zoo.pipeline(out, "dna-likelihood").window == 50
    assert zoo.pipeline(out).window == 50


def test_molecules_bring_their_vocabulary(tmp_path):
    file = tmp_path / "m.smi"
    file.write_text("".join(f"{'C' * n}O{'N' * (n % 3)} name\n" for n in range(1, 21)))
    out = tmp_path / "out"
    small = ["--steps", 3, "--batch-size", 4, "--held-out", 0.2]
    found = run("chem_xlstm_1_6m", file, "--out", out, *small, "--set", "d_model=16", "--set", "num_blocks=1", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["measured"] == 4
    assert zoo.load(out).vocab_size == len(Vocabulary.learn(["CON"])) == 6
    moved = zoo.save(zoo.load(out), tmp_path / "moved")
    assert len(zoo.pipeline(moved, count=2, max_length=4)(None).molecules) == 2
    again = run("chem_xlstm_1_6m", file, "--out", tmp_path / "more", "--start", moved, *small)
    assert again.exit_code == 0, again.output
    assert "zoo generate-molecules" in again.output
    file.write_text("CCBr\n")
    strange = run("chem_xlstm_1_6m", file, "--out", tmp_path / "no", "--start", moved)
    assert "'CCBr' holds Br, which this model was not trained on" in str(strange.exception)


def test_families_are_measured_as_they_are_scored(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(4):
        word = "".join(draw.choice(list(Protein.RESIDUES), 7))
        write_fasta(tmp_path / "families" / f"{i}.fa", [Record(f"p{k}", word * (k + 1)) for k in range(3)])
    (tmp_path / "other.fa").write_text((tmp_path / "families" / "0.fa").read_text())
    out = tmp_path / "out"
    found = run(
        "prot_xlstm_micro", tmp_path / "families", "--out", out, "--start", "prot_xlstm_micro.families", "--steps", 2,
        "--batch-size", 2, "--validation", tmp_path / "other.fa", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["samples"] == 4
    answer = zoo.pipeline(out)(tmp_path / "other.fa")
    assert answer.nats == pytest.approx(said["metrics"]["nats"], rel=1e-5)
    assert said["metrics"]["perplexity"] == pytest.approx(math.exp(answer.nats), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dna_xlstm_micro", "--series"], "--series and --vocabulary are for molecules; dna_xlstm_micro reads DNA"),
        (["dna_xlstm_micro", "--held-out", 0.1, "--validation", "."], "give one, a share of the data or other data"),
        (["chem_xlstm_1_6m"], "holds none of the files that this model is trained on: .smi"),
        (["vim_tiny_patch16_224"], "no Bio-xLSTM"),
    ],
)
def test_what_is_refused(tmp_path, arguments, message):
    repeats(tmp_path / "dna.fa")
    arguments = [tmp_path if a == "." else a for a in arguments]
    found = run(*arguments, tmp_path, "--out", tmp_path / "out", "--steps", 1)
    assert found.exit_code != 0
    assert message in " ".join((found.output + str(found.exception)).split())
