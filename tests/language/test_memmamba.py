"""MemMamba's stated properties: what is noted, who reads it, and when it is Mamba."""

import pytest
import torch

from zoo_language.mamba import MambaLM
from zoo_language.memmamba import MemMambaLM, Note, fidelity, layer_fidelity, token_fidelity


def build(**more):
    torch.manual_seed(0)
    arguments = {"ssm": {"d_state": 4}, "note_dim": 6, "pool": 3, "chunk": 4, "cross_layer_every": 2} | more
    model = MemMambaLM(16, 4, 40, **arguments).eval()
    with torch.no_grad():  # recalled notes count, and scores lie on both sides of their thresholds
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(length=21, batch=2):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("off", [{"note_threshold": 1.0}, {"forget_threshold": 1.0, "cross_layer_every": 0}])
def test_without_notes_or_reading_it_is_mamba(off):
    model = build(**off)
    plain = MambaLM(16, 4, 40, ssm={"d_state": 4}).eval()
    kept = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(kept)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), plain(ids()))
        assert (build()(ids()) - plain(ids())).abs().max() > 0.01


def test_a_new_model_is_mamba_and_learns_to_note():
    torch.manual_seed(0)
    model = MemMambaLM(
        16, 3, 40, ssm={"d_state": 4}, pool=3, chunk=2, cross_layer_every=2, note_threshold=0.3, zero_init=True
    )
    plain = MambaLM(16, 3, 40, ssm={"d_state": 4})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(model(ids()), plain(ids()))  # o is zero
    with torch.no_grad():
        for layer in model.layers:
            layer.cross_token.o.weight.normal_()
    model(ids()).square().sum().backward()
    for name in ("score1", "score2", "compress"):
        assert getattr(model.layers[0].note, name).weight.grad.abs().max() > 0
    assert model.layers[0].forget1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("more", [{}, {"chunk": 1}, {"cross_token": False}, {"cross_layer_every": 0}, {"pool": 30}])
def test_pieces_and_steps_equal_the_whole(more):
    model = build(**more)
    x = ids()
    with torch.no_grad():
        whole = model(x)
        state = model.init_state(2)
        found = [model(x[:, :6], state=state), model(x[:, 6:13], state=state)]
        found += [model.step(x[:, t], state)[:, None] for t in range(13, 21)]
        torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-5)
        size = state.nbytes
        state = model.init_state(2)
        model(x[:, :9], state=state, lengths=torch.tensor([9, 5]))
        at = torch.tensor([9, 5])
        for _ in range(8):
            logits = model.step(x[[0, 1], at], state)
            torch.testing.assert_close(logits, whole[[0, 1], at], rtol=1e-4, atol=1e-5)
            at += 1
    assert state.nbytes == size  # whatever was read


def test_causal():
    model = build()
    other = ids()
    other[:, 12] = (other[:, 12] + 1) % 40
    with torch.no_grad():
        a, b = model(ids()), model(other)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_pool_keeps_the_highest_scores(chunk):
    torch.manual_seed(0)
    note = Note(16, 6, 4, 0.5, chunk)
    x = 3 * torch.randn(1, 17, 16)
    notes, scores = note.notes(x)
    assert 0 < (scores == -torch.inf).sum() < 17
    views = note(x, None, None, None)
    for t in range(17):
        before = range(t // chunk * chunk)  # a note serves later chunks alone
        best = [j for j in sorted(before, key=lambda j: (-float(scores[0, j]), j)) if scores[0, j] > 0.5][:4]
        piece = views.piece[t]
        assert int(views.valid[0, piece].sum()) == len(best)
        torch.testing.assert_close(views.notes[0, piece, : len(best)], notes[0, best])


def test_statistics():
    model = build()
    found = model.memory(ids())
    assert len(found) == 4
    for layer in found:
        assert torch.equal(layer["notes"], (layer["scores"] > 0.5).sum(1))
    assert sum(int(layer["reads"].sum()) for layer in found) > 0
    assert all(int(layer["reads"].sum()) == 0 for layer in build(forget_threshold=1.0).memory(ids()))


def test_fidelity():
    torch.manual_seed(0)
    tokens = torch.randn(2000, 4)
    assert fidelity(tokens, tokens) == pytest.approx(1)
    assert layer_fidelity([tokens, 2 * tokens, tokens @ torch.randn(4, 4)], 1) == pytest.approx(1)
    state, states = torch.zeros(4), []
    for token in tokens:
        state = 0.6 * state + token
        states.append(state)
    lags = [token_fidelity(tokens, torch.stack(states), lag) for lag in range(4)]
    assert lags == sorted(lags, reverse=True)
    with pytest.raises(ValueError, match="gap is 3"):
        layer_fidelity([tokens] * 3, 3)


def test_what_is_refused():
    with pytest.raises(ValueError, match="pool is 0"):
        build(pool=0)
    with pytest.raises(ValueError, match="cross_layer_every"):
        build(cross_layer_every=-1)
