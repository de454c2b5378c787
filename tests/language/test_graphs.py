"""Decoding by recorded steps. The recording itself needs a CUDA device; here a stand-in runs the function again, which
works on the same fixed memory as a graph does."""

from __future__ import annotations

import logging

import pytest
import torch

from zoo_language import graphs
from zoo_language.generation import Sampling, generate
from zoo_language.graphs import GraphDecoder
from zoo_language.mamba import MambaLM

PROMPTS = [[5, 9, 2, 44, 8], [7, 1, 3], [60]]


def replayed(function):
    """What a graph would do: the recording changes nothing, each replay does the work."""
    return function


@pytest.fixture(params=["Mamba1", "Mamba2", "Mamba3"])
def model(request):
    torch.manual_seed(0)
    ssm = {} if request.param == "Mamba1" else {"headdim": 16, "d_state": 16}
    return MambaLM(d_model=32, n_layer=2, vocab_size=64, layer=request.param, ssm=ssm).eval()


def test_generation_is_the_same(model, monkeypatch) -> None:
    def run(**options):
        sampling = Sampling(temperature=0.9, top_k=20, seed=7)
        texts, state = generate(model, PROMPTS, max_new_tokens=12, sampling=sampling, stop_tokens=[3, 17], **options)
        return [(t.tokens, t.reason) for t in texts], state

    want, state = run()
    made: list[GraphDecoder] = []

    def graphed(model):
        made.append(GraphDecoder(model, capture=replayed))
        return made[-1]

    monkeypatch.setattr(graphs, "graph_decoder_for", graphed)
    found, after = run(cuda_graphs=True)
    assert found == want
    assert torch.equal(after.logits, state.logits)
    assert torch.equal(after.position, state.position)
    assert 3 in made[0].recorded
    assert made[0].recorded[3].state.batch == 3


def test_the_memory_of_a_recorded_step_never_moves(model) -> None:
    decoder = GraphDecoder(model, capture=replayed)
    state = model.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    plain = state.fork()
    own = decoder.adopt(state)
    places = [t.data_ptr() for layer in own.layers for t in layer.values()]
    for token in (8, 9, 10):
        got = decoder.step(torch.tensor([token, token + 1]), own).clone()
        assert torch.equal(got, model.step(torch.tensor([token, token + 1]), plain))
    assert [t.data_ptr() for layer in own.layers for t in layer.values()] == places
    assert torch.equal(own.position, plain.position)
    assert decoder.adopt(own) is own
    again = decoder.adopt(state)  # what was read since is forgotten
    assert again is own
    assert again.position.tolist() == [3, 3]


def test_what_cannot_be_recorded_says_why(model, caplog) -> None:
    with caplog.at_level(logging.WARNING, "zoo"):
        generate(model, [[1, 2]], max_new_tokens=2, cuda_graphs=True)
    assert "CUDA graphs were asked for, but the model is on cpu: decoding step by step" in caplog.text
    decoder = GraphDecoder(model, capture=replayed)
    with pytest.raises(ValueError, match="has read nothing yet"):
        decoder.adopt(model.init_state(1))
    state = model.prefill(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="use what adopt"):
        decoder.step(torch.tensor([1]), state)


def test_growing_caches_are_refused() -> None:
    model = MambaLM(
        d_model=32, n_layer=2, vocab_size=64, attention_layers=(1,), attention={"num_heads": 4}
    ).eval()  # fmt: skip
    state = model.prefill(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="of layer 1 grows with the text"):
        GraphDecoder(model, capture=replayed).adopt(state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device(model) -> None:
    model = model.cuda()
    want = generate(model, PROMPTS, max_new_tokens=12)[0]
    found = generate(model, PROMPTS, max_new_tokens=12, cuda_graphs=True)[0]
    assert [t.tokens for t in found] == [t.tokens for t in want]
