"""Molecules drawn and scored, alone and after others."""

import pytest
import torch

import zoo
from zoo_biology.molecules import MoleculeGeneration, MoleculeScoring, well_formed
from zoo_biology.tokens import Vocabulary
from zoo_biology.xlstm import XLSTMLM
from zoo_registry import errors

WORDS = Vocabulary.learn(["CCO", "c1ccccc1(N).Cl", "[NH3+]", "C=O"])


def model(seed=0, **more):
    torch.manual_seed(seed)
    made = XLSTMLM(len(WORDS), 32, 2, mlstm={"num_heads": 2}, **more).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("c1ccccc1(N)", True), ("C%12CC%12", True), ("C1CC%01", True), ("F/C=C\\F", True), ("[NH3+]C.Cl", True),
        ("", False), ("C1CC", False), ("C(", False), ("C)(", False), ("C[N", False), ("C]", False), ("C!", False),
    ],
)  # fmt: skip
def test_syntax(smiles, expected):
    assert well_formed(smiles) is expected


def test_generation_is_a_seed_and_the_model():
    pipe = MoleculeGeneration(model(), count=5, max_length=12, seed=1, vocabulary=WORDS)
    first, again = pipe(None), pipe(None)
    assert first.molecules == again.molecules
    assert len(first.molecules) == 5
    assert (
        MoleculeGeneration(model(), count=5, max_length=12, seed=2, vocabulary=WORDS)(None).molecules != first.molecules
    )
    batches = MoleculeGeneration(model(), count=5, max_length=12, temperature=0, batch=2, vocabulary=WORDS)(None)
    assert len(set(batches.molecules)) == 1


@pytest.mark.parametrize("context", [None, ["CCO", "C=O"]])
def test_greedy_generation_is_the_models_own(context):
    net = model(seed=4)
    found = MoleculeGeneration(net, count=1, max_length=9, temperature=0, vocabulary=WORDS)(context)
    ids = [WORDS.begin, *WORDS.encode("CCO.C=O." if context else "")]
    ends = {0, WORDS.begin, WORDS.end} | ({WORDS.labels["."]} if context else set())
    drawn = []
    with torch.no_grad():
        for _ in range(9):
            label = int(net(torch.tensor([ids]))[0, -1].argmax())
            if label in ends:
                break
            drawn.append(label)
            ids.append(label)
    assert found.molecules == [WORDS.decode(drawn)]
    assert found.context == (context or [])


def test_context_from_files_and_strings(tmp_path):
    (tmp_path / "a.smi").write_text("CCO one\nC=O two\n")
    pipe = MoleculeGeneration(model(), count=3, max_length=9, vocabulary=WORDS)
    expected = pipe(["CCO", "C=O"])
    assert pipe(tmp_path / "a.smi").molecules == expected.molecules
    assert pipe(str(tmp_path / "a.smi")).molecules == expected.molecules
    assert pipe("CCO.C=O").molecules == expected.molecules
    assert pipe("CCO").molecules != expected.molecules


def test_scores_are_those_of_the_whole_text():
    net = model()
    answer = MoleculeScoring(net, batch=2, vocabulary=WORDS)(["CCO", "c1ccccc1", "C"])
    assert answer.names == ["CCO", "c1ccccc1", "C"]
    assert answer.scored == [4, 9, 2]
    for smiles, nats in zip(answer.names, answer.nats, strict=True):
        ids = torch.tensor([WORDS.begin, *WORDS.encode(smiles), WORDS.end])
        with torch.no_grad():
            cost = -net(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])
        assert abs(nats - float(cost.mean())) < 1e-5


def test_scores_in_context():
    net = model()
    answer = MoleculeScoring(net, context=["C=O", "CC"], vocabulary=WORDS)(["CCO"])
    ids = torch.tensor([WORDS.begin, *WORDS.encode("C=O.CC.CCO.")])
    with torch.no_grad():
        cost = -net(ids[None, :-1])[0, -4:].log_softmax(-1).gather(1, ids[-4:, None])
    assert abs(answer.nats[0] - float(cost.mean())) < 1e-5


def test_saving(tmp_path):
    found = MoleculeGeneration(model(), count=3, max_length=6, vocabulary=WORDS)(None)
    assert found.save(tmp_path / "a.smi").read_text().splitlines() == found.molecules
    assert found.save(tmp_path / "a.csv").read_text().startswith("smiles,nats,valid")


def test_refusals(tmp_path):
    net = model()
    with pytest.raises(errors.BadArgument, match=r"init_arguments\.json"):
        MoleculeGeneration(net)
    with pytest.raises(errors.BadArgument, match="for a model of 3"):
        MoleculeGeneration(XLSTMLM(3, 32, 1), vocabulary=WORDS)
    pipe = MoleculeScoring(net, vocabulary=WORDS)
    with pytest.raises(ValueError, match="Br, which this model was not trained on"):
        pipe(["CBr"])
    with pytest.raises(ValueError, match="no SMILES"):
        pipe(["C C O!"])
    (tmp_path / "e.smi").write_text("")
    with pytest.raises(ValueError, match="holds no molecule"):
        pipe(tmp_path / "e.smi")
    for bad in ({"count": 0}, {"batch": 0}, {"max_length": 0}):
        with pytest.raises(errors.BadArgument):
            MoleculeGeneration(net, vocabulary=WORDS, **bad)
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="expected temperature"):
            MoleculeGeneration(net, vocabulary=WORDS, **bad)
    plain = Vocabulary.learn(["CCO"])
    with pytest.raises(ValueError, match=r"has no '\.'"):
        MoleculeGeneration(XLSTMLM(len(plain), 32, 1), vocabulary=plain)(["CC"])


def test_sampling_filters():
    from zoo_biology.sampling import Sampling

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(500, 1)
    for how, kept in ((Sampling(top_k=2), {0, 1}), (Sampling(top_p=0.5), {0}), (Sampling(), {0, 1, 2, 3})):
        token, cost = how.draw(logits, how.generator())
        assert set(token.tolist()) == kept
        assert torch.allclose(cost, -logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_empty_molecules_are_none():
    pipe = zoo.pipeline("chem_xlstm_micro", "molecule-scoring")
    with pytest.raises(ValueError, match="molecule 2 of 2 is empty"):
        pipe(["CCO", " "])
    with pytest.raises(ValueError, match="no molecules were given"):
        pipe([])
    assert zoo.pipeline("chem_xlstm_micro", "molecule-generation", count=1)(None).source == "no context"
