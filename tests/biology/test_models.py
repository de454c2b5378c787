"""The networks against their own definitions: directions, equivariance, states, positions."""

import pytest
import torch

import zoo
import zoo.testing
from zoo_biology.dna import COMPLEMENT, dna_xlstm
from zoo_biology.protein import POSITIONS, ProtXLSTM
from zoo_biology.xlstm import XLSTMLM

DNA = {"d_model": 32, "num_blocks": 3, "slstm_at": [1], "slstm": {"num_heads": 2}, "ffn": {}, "bidirectional": True}


def lively(model, seed=0):
    """Random weights everywhere, so that gates, norms and recurrences all do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def ids(length=20, high=12, batch=2):
    return torch.randint(0, high, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("more", [{}, {"rotary_positions": True}, {"mlstm": {"conv_causal": False}, "bias": True}])
@pytest.mark.parametrize("alternating", [True, False])
def test_both_directions_are_flips(more, alternating):
    model = lively(dna_xlstm(**DNA, **more, alternating=alternating))
    tokens = ids()
    x = model.embed(tokens)
    rotary = model._rotary(20)[0]

    def run(block, x):
        return block(x, rotary=rotary) if block.is_mlstm else block(x)

    for i, block in enumerate(model.blocks):
        back = run(block, x.flip(1)).flip(1)
        if alternating:
            x = back if i % 2 == 0 else run(block, x)
        else:
            x = run(block, x) + back
    zoo.testing.assert_close(model(tokens), model.head(model.finish(x)), tolerance=1e-10)


def test_a_native_memory_reads_both_ways_once():
    model = lively(dna_xlstm(**{**DNA, "slstm_at": ()}, native=True))
    tokens = ids()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 12
    first = model.hidden(tokens)[:, 0]
    assert (first - model.hidden(other)[:, 0]).abs().max() > 1e-6  # the first row hears the last
    causal = lively(dna_xlstm(**{**DNA, "slstm_at": ()}, native=True, native_causal=True))
    assert torch.equal(causal.hidden(tokens)[:, :-1], causal.hidden(other)[:, :-1])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_reverse_complement(bidirectional, heads):
    """Exact with one head; the reference's own deviation with several, which its golden file holds, is kept."""
    config = DNA | {"slstm_at": "all", "slstm": {"num_heads": heads}, "bidirectional": bidirectional, "rcps": True}
    model = lively(dna_xlstm(**config))
    complement = torch.tensor(COMPLEMENT)
    tokens = ids()
    there = model(tokens)
    back = model(complement[tokens.flip(1)]).flip(1)[..., complement]
    if heads == 1:
        assert torch.equal(there, back)
    else:
        assert (there - back).abs().max() > 1e-3


CAUSAL = {
    "dna": lambda: dna_xlstm(**{**DNA, "bidirectional": False}, rotary_positions=True),
    "dna with sinusoids": lambda: dna_xlstm(**{**DNA, "bidirectional": False}, sinusoidal_positions=True),
    "slstm without convolution": lambda: XLSTMLM(12, 32, 2, "all", slstm={"num_heads": 2, "conv_width": 0}, ffn={}),
    "mixed": lambda: XLSTMLM(12, 32, 3, [1], mlstm={"num_heads": 2}, slstm={"num_heads": 2}, ffn={"act": "relu^2"}),
    **{p: lambda p=p: ProtXLSTM(12, 32, 2, positions=p, max_positions=24, max_sequences=8) for p in POSITIONS},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_step_by_step_and_in_pieces(name):
    """One token at a time, and a piece after a piece, give what the whole gives; the state keeps its size."""
    model = lively(CAUSAL[name]())
    tokens = ids()
    whole = model(tokens)
    state = model.init_state(2)
    size = state.nbytes
    if name == "rot":  # counted from 0 in every call, as the original does
        first = model(tokens[:, :1], state=state)
        zoo.testing.assert_close(first[:, 0], whole[:, 0], tolerance=1e-9)
        assert (model(tokens[:, 1:2], state=state)[:, 0] - whole[:, 1]).abs().max() > 1e-4
        return
    steps = torch.stack([model.step(tokens[:, t], state) for t in range(20)], dim=1)
    zoo.testing.assert_close(steps, whole, tolerance=1e-9)
    assert state.nbytes == size
    assert state.position.tolist() == [20, 20]
    state = model.init_state(2)
    pieces = torch.cat([model(tokens[:, a:b], state=state) for a, b in ((0, 1), (1, 8), (8, 20))], dim=1)
    zoo.testing.assert_close(pieces, whole, tolerance=1e-9)


def test_a_fork_is_independent():
    model = lively(CAUSAL["mixed"]())
    state = model.init_state(1)
    model(ids(batch=1), state=state)
    copies = state.fork(3)
    model.step(torch.tensor([1, 2, 3]), copies)
    expected = model.step(torch.tensor([1]), state.fork())
    assert copies.batch == 3
    again = model.step(torch.tensor([1]), state)
    assert torch.equal(again, expected)


def test_padding_behind_the_end_changes_nothing():
    model = lively(CAUSAL["mixed"]())
    tokens, lengths = ids(), torch.tensor([20, 13])
    state = model.init_state(2)
    model(tokens, state=state, lengths=lengths)
    short = model.init_state(1)
    model(tokens[1:, :13], state=short)
    assert state.position.tolist() == [20, 13]
    for own, expected in zip(state.select(torch.tensor([1])).layers, short.layers, strict=True):
        for key, value in expected.items():
            zoo.testing.assert_close(own[key], value, tolerance=1e-9, what=key)


def test_positions_restart_and_count_proteins():
    """In rot_2d a token's place and its protein's number both tell; without positions neither does."""
    tokens = ids(12)
    base = torch.arange(12).expand(2, 12)
    for positions, heard in (("rot_2d", (True, True)), ("rot_1d", (True, False)), ("none", (False, False))):
        model = lively(ProtXLSTM(12, 32, 2, positions=positions, max_positions=24, max_sequences=8))
        plain = model(tokens)
        moved = model(tokens, position_ids=base * 3)
        numbered = model(tokens, sequence_ids=base // 4)
        assert ((moved - plain).abs().max() > 1e-6, (numbered - plain).abs().max() > 1e-6) == heard, positions


def test_learnt_tables_end():
    model = ProtXLSTM(12, 32, 1, positions="abs_2d", max_positions=6, max_sequences=3)
    with pytest.raises(ValueError, match="positions 0 to 5"):
        model(ids(7))
    with pytest.raises(ValueError, match="sequence_ids reach 3"):
        model(ids(4), sequence_ids=torch.full((2, 4), 3))
    with pytest.raises(ValueError, match="expected that of the ids"):
        model(ids(4), position_ids=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("name", ["dna_xlstm_1k_slstm", "chem_xlstm_slstm", "protxlstm_26m"])
def test_no_ids_are_refused(name):
    model = zoo.testing.case(name).build().eval()
    with pytest.raises(ValueError, match=r"expected integers \(batch, length\)"):
        model(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"expected integers \(batch, length\)"):
        model(torch.zeros(5, dtype=torch.long))


def test_checkpointing_changes_no_gradient():
    model = lively(CAUSAL["mixed"]()).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(ids()).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        zoo.testing.assert_close(b, a, tolerance=1e-10)


def test_masked_models_do_not_step():
    assert not hasattr(dna_xlstm(**DNA), "step")
    assert hasattr(dna_xlstm(**{**DNA, "bidirectional": False}), "step")
    assert not hasattr(dna_xlstm(**{**DNA, "bidirectional": False}, mlstm={"conv_causal": False}), "step")


@pytest.mark.parametrize(("name", "argument", "value"), [("dna_mlstm_small", "num_blocks", 0)])
def test_sizes_that_are_none(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        zoo.create(name, device="meta", **{argument: value})
