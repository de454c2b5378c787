"""Proteins after their homologs: scores, mutations, new sequences, parts filled anew."""

import pytest
import torch

from zoo_biology.homologs import context, protein, single_site
from zoo_biology.protein import ProtXLSTM
from zoo_biology.proteins import ProteinGeneration, ProteinScoring
from zoo_biology.sequences import Record, read_fasta
from zoo_biology.tokens import Protein
from zoo_registry import errors

A3M = ">first a protein\nMKVLAAGIVTQ\n>second\nMK-LAaaGIVT-\n>third\nMRVLSAGLVTQ\n"


def model(positions="rot_1d", seed=0):
    torch.manual_seed(seed)
    made = ProtXLSTM(38, 32, 2, {"num_heads": 2}, positions, 64, 16, rope_base=1000).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "family.a3m"
    path.write_text(A3M)
    return path


@pytest.mark.parametrize("positions", ["rot_1d", "rot_2d", "abs_2d", "rot", "none"])
def test_the_score_is_that_of_the_whole_sequence(family, positions, monkeypatch):
    """Read in pieces from a state, it is what the model gives for everything at once."""
    net = model(positions)
    monkeypatch.setattr("zoo_biology.proteins.PIECE", 5)
    answer = ProteinScoring(net, target="third")(family)
    assert (answer.target, answer.homologs, answer.residues) == ("third", 2, 11)
    if positions == "rot":
        return  # its positions start anew with the target, by the model's definition
    encode = Protein().encode
    whole = context([encode("MKVLAAGIVTQ"), encode("MKLAAAGIVT"), encode("MRVLSAGLVTQ")]).tensors()
    with torch.no_grad():
        logits = net(**whole)[0, -12:].log_softmax(-1)
    expected = torch.tensor([*encode("MRVLSAGLVTQ"), Protein.CLS])
    assert abs(answer.nats + float(logits.gather(1, expected[:, None]).mean())) < 1e-4


def test_mutations(family):
    net = model()
    answer = ProteinScoring(net, target="third", mutations="M1L, G7W", batch=1)(family)
    assert answer.mutations == ["M1L", "G7W"]
    encode = Protein().encode
    target = encode("MRVLSAGLVTQ")
    before = context([encode("MKVLAAGIVTQ"), encode("MKLAAAGIVT"), target])
    whole = (before + single_site(target, 6, 3)).tensors()
    with torch.no_grad():
        scores = net(**whole)[0, -1, 4:24].log_softmax(0)
    order = Protein.RESIDUES
    assert abs(answer.effects[1] - float(scores[order.index("W")] - scores[order.index("G")])) < 1e-4
    every = ProteinScoring(net, target="third", mutations="all")(family)
    assert len(every.mutations) == 11 * 19
    assert abs(every.effects[every.mutations.index("G7W")] - answer.effects[1]) < 1e-5


@pytest.mark.parametrize(
    ("mutations", "message"),
    [
        ("K1L", "has M at 1, not K"),
        ("M99L", "has 11 residues"),
        ("M1", "expected one like A10G"),
        ("M1J", "expected one like A10G"),
    ],
)
def test_mutations_that_do_not_fit(family, mutations, message):
    with pytest.raises(ValueError, match=message):
        ProteinScoring(model(), target="third", mutations=mutations)(family)


def test_candidates_are_scored_one_by_one(tmp_path, family):
    """Each candidate's score is the one that it has as the last record of the file."""
    (tmp_path / "new.fa").write_text(">a\nMKVLA\n>b\nMRV\n")
    answer = ProteinScoring(model(), candidates=tmp_path / "new.fa")(family)
    assert answer.names == ["a", "b"]
    assert answer.scored == [6, 4]
    for name, sequence, nats in zip("ab", ("MKVLA", "MRV"), answer.nats, strict=True):
        (tmp_path / f"{name}.fa").write_text(A3M + f">{name}\n{sequence}\n")
        assert abs(ProteinScoring(model())(tmp_path / f"{name}.fa").nats - nats) < 1e-5


def test_targets(family):
    assert ProteinScoring(model())(family).target == "third"
    assert ProteinScoring(model(), target=0)(family).target == "first"
    assert ProteinScoring(model())("MKVL").homologs == 0
    for target, message in (("nobody", "no record named 'nobody'"), (7, "has 3 records"), ("-4", "has 3 records")):
        with pytest.raises(ValueError, match=message):
            ProteinScoring(model(), target=target)(family)


def test_more_homologs_than_fit(family):
    answer = ProteinScoring(model(), context_tokens=12)(family)
    assert answer.homologs == 1
    assert "1 of 2 homologs left out" in answer.summary()
    alone = ProteinScoring(model(), context_tokens=0)(family)
    assert abs(alone.nats - ProteinScoring(model())("MRVLSAGLVTQ").nats) < 1e-5


def test_generation(tmp_path, family):
    net = model()
    answer = ProteinGeneration(net, count=4, max_length=12, seed=1)(family)
    assert answer.homologs == 3
    assert len(answer.sequences) == 4
    assert all(len(s) <= 12 and set(s) <= set(Protein.LETTERS) for s in answer.sequences)
    assert ProteinGeneration(net, count=4, max_length=12, seed=1)(family).sequences == answer.sequences
    assert ProteinGeneration(net, count=4, max_length=12, seed=2)(family).sequences != answer.sequences
    longer = ProteinGeneration(net, count=8, max_length=60, seed=1)(family)
    assert all(done == (len(s) < 60) for s, done in zip(longer.sequences, longer.complete, strict=True))
    path = answer.save(tmp_path / "new.fa")
    assert [r.sequence for r in read_fasta(path)] == answer.sequences
    assert "nats" in answer.save(tmp_path / "new.csv").read_text()


def test_greedy_generation_is_the_models_own(family):
    """The likeliest residues, one after the other, are those of reading everything anew each time."""
    net = model(seed=3)
    answer = ProteinGeneration(net, count=1, max_length=8, temperature=0)(family)
    encode = Protein().encode
    whole = context([encode("MKVLAAGIVTQ"), encode("MKLAAAGIVT"), encode("MRVLSAGLVTQ"), []])
    costs = []
    with torch.no_grad():
        for place in range(8):
            scores = net(**whole.tensors())[0, -1]
            scores[[1, 2, 3, *range(29, 38)]] = -torch.inf  # residues and <cls> alone
            scores = scores.log_softmax(0)
            token = int(scores.argmax())
            costs.append(-float(scores[token]))
            if token not in range(4, 29):
                break
            whole.ids.append(token)
            whole.positions.append(place + 1)
            whole.sequences.append(3)
    tail = whole.ids[-(len(whole.ids) - 34) :] if len(whole.ids) > 34 else []
    assert answer.sequences == [Protein().decode(tail[-len(answer.sequences[0]) :] if answer.sequences[0] else [])]
    assert abs(answer.nats[0] - sum(costs) / len(costs)) < 1e-4


def test_filling_keeps_the_rest(family):
    """Two parts filled anew: the residues around them stay, and rows do not disturb each other."""
    net = model(seed=5)
    answer = ProteinGeneration(net, count=6, max_length=4, fill="3-4,8-8", target="first", seed=4)(family)
    assert answer.homologs == 2
    for text in answer.sequences:
        assert text.startswith("MK")
        assert text.endswith("VTQ")
        assert "AAG" in text
    greedy = {"count": 1, "max_length": 4, "fill": "3-4,8-8", "target": "first", "temperature": 0}
    alone = ProteinGeneration(net, **greedy)(family)
    three = ProteinGeneration(net, **greedy | {"count": 3})(family)
    assert three.sequences == alone.sequences * 3
    # the first patch is what the model says behind its mark
    encode = Protein().encode
    before = context([encode("MKLAAAGIVT"), encode("MRVLSAGLVTQ")])
    target = protein(encode("MKVLAAGIVTQ"), 2, [(2, 4), (7, 8)])
    start = target.ids.index(Protein.EOS) + 2
    whole = before + type(target)(target.ids[:start], target.positions[:start], target.sequences[:start])
    with torch.no_grad():
        token = int(net(**whole.tensors())[0, -1].argmax())
    patch = alone.sequences[0][2:]
    assert (token in range(4, 29)) == (not patch.startswith("AAG") or Protein().decode([token]) == patch[0])
    for fill in ("3", "5-3", "1-99"):
        with pytest.raises(ValueError, match=r"expected parts"):
            ProteinGeneration(net, fill=fill)(family)


def test_what_is_no_protein(tmp_path):
    pipe = ProteinScoring(model())
    (tmp_path / "d.fa").write_text(">gene\n" + "ACGT" * 20 + "\n")
    with pytest.raises(ValueError, match="'gene' has no letters but ACGT: it is DNA"):
        pipe(tmp_path / "d.fa")
    (tmp_path / "e.fa").write_text(">a\n---\n")
    with pytest.raises(ValueError, match="is empty"):
        pipe(tmp_path / "e.fa")
    (tmp_path / "f.fa").write_text("")
    with pytest.raises(ValueError, match="holds no sequence"):
        pipe(tmp_path / "f.fa")
    with pytest.raises(errors.BadArgument, match="no protein model"):
        ProteinScoring(torch.nn.Linear(2, 2))
    assert pipe([Record("a", "MKV"), Record("b", "MKJ")]).target == "b"  # J is <unk>, as in the original


def test_learnt_positions_bound_what_is_drawn(family):
    answer = ProteinGeneration(model("abs_1d"), count=1, max_length=500)(family)
    assert len(answer.sequences[0]) <= 63


def test_which_of_two_records_of_one_name():
    twice = [Record("a", "MKV"), Record("a", "MKL")]
    with pytest.raises(ValueError, match="2 records named 'a'; give the number of one, from 0: 0, 1"):
        ProteinScoring(model(), target="a")(twice)
    assert ProteinScoring(model(), target="0")(twice).residues == 3


def test_dots_of_an_alignment_are_gaps(tmp_path):
    (tmp_path / "a.a2m").write_text(">a\nMK..V-A\n>b\nMKlLVWA\n")
    (tmp_path / "b.fa").write_text(">a\nMKVA\n>b\nMKLLVWA\n")
    scoring = ProteinScoring(model())
    assert scoring(tmp_path / "a.a2m").nats == scoring(tmp_path / "b.fa").nats


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(ValueError, match="expected temperature"):
        ProteinGeneration(model(), temperature=temperature)


def test_parts_to_fill_are_counted_from_one(family):
    for fill, match in (("0-3", "fill is 0-3"), ("3-5,5-6", "fill is 5-6"), ("1-1,3-3,5-5,6-6,7-7,8-8", "at most 5")):
        with pytest.raises(ValueError, match=match):
            ProteinGeneration(model(), fill=fill, target="first")(family)
