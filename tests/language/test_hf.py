"""transformers' generate on the zoo's models: equal to our engine, with its processors, streamers, beams, padding."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from zoo_language.generation import generate  # noqa: E402
from zoo_language.hf import wrap  # noqa: E402
from zoo_language.icll import InContextLM  # noqa: E402
from zoo_language.mamba import MambaLM  # noqa: E402

ATTENTION = {"causal": True, "head_dim": 8, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4}
KINDS = {
    "mamba": {"ssm": {"d_state": 4}},
    "mamba2": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}},
    "hybrid": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}, "attention_layers": [1], "attention": ATTENTION},
}


def build(kind):
    torch.manual_seed(0)
    if kind == "icll":
        model = InContextLM(16, 50, [{"mixer": "gla", "n_heads": 2}, {"mixer": "ngram", "ngram": 1}], 32).eval()
    else:
        model = MambaLM(d_model=32, n_layer=2, vocab_size=50, **KINDS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prompt(length, seed=0):
    return torch.randint(2, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=[*KINDS, "icll"])
def model(request):
    return build(request.param)


def ours(model, prompts, count):
    return [text.tokens for text in generate(model, prompts, max_new_tokens=count)[0]]


def test_greedy_equals_our_engine(model):
    ids = torch.tensor([prompt(6)])
    found = wrap(model).generate(ids, max_new_tokens=10, do_sample=False)
    assert found[0, 6:].tolist() == ours(model, [prompt(6)], 10)[0]


def test_left_padded_batches(model):
    prompts = [prompt(7), prompt(2, 1), prompt(5, 2)]
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    found = wrap(model, pad_token_id=0).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert found[:, 7:].tolist() == ours(model, prompts, 8)


def test_without_a_state_gives_the_same():
    model = build("mamba")
    ids = torch.tensor([prompt(6)])
    found = wrap(model).generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert found[0, 6:].tolist() == ours(model, [prompt(6)], 6)[0]


def test_beams_reorder_states():
    """Beam search with states finds what it finds when every step reads the whole text again."""
    model, ids = build("mamba2"), torch.tensor([prompt(5), prompt(5, 1)])
    how = {"max_new_tokens": 7, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
    hf = wrap(model, pad_token_id=0)
    assert torch.equal(hf.generate(ids, **how), hf.generate(ids, use_cache=False, **how))


def test_processors_and_streamers():
    model = build("mamba2")
    greedy = ours(model, [prompt(6)], 8)[0]
    banned = greedy[2]

    class Ban(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, banned] = -torch.inf
            return scores

    class Keep:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    keep = Keep()
    found = wrap(model).generate(
        torch.tensor([prompt(6)]), max_new_tokens=8, do_sample=False, streamer=keep,
        logits_processor=transformers.LogitsProcessorList([Ban()]),
    )  # fmt: skip
    assert found[0, 6:8].tolist() == greedy[:2]
    assert banned not in found[0, 6:].tolist()
    assert keep.ended
    assert keep.tokens == found[0].tolist()


def test_sampling_and_stopping():
    model = build("mamba")
    end = ours(model, [prompt(6)], 8)[0][3]
    found = wrap(model, eos_token_id=end, pad_token_id=0).generate(
        torch.tensor([prompt(6)]), max_new_tokens=20, do_sample=False
    )
    assert found[0, -1] == end
    assert end not in found[0, 6:-1].tolist()
    transformers.set_seed(0)
    several = wrap(model).generate(
        torch.tensor([prompt(6)]), max_new_tokens=5, do_sample=True, temperature=2.0, num_return_sequences=3
    )
    assert several.shape == (3, 11)
    assert len({tuple(row) for row in several.tolist()}) > 1


def test_goes_on_from_a_state():
    model = build("mamba")
    state = model.prefill(torch.tensor([prompt(9)]))
    before = state.fork()
    whole = ours(model, [prompt(9) + prompt(2, 1)], 6)[0]
    found = wrap(model).generate(torch.tensor([prompt(2, 1)]), state=state, max_new_tokens=6, do_sample=False)
    assert found[0, 2:].tolist() == whole
    assert torch.equal(state.layers[0]["ssm"], before.layers[0]["ssm"])  # the caller's state stays


def test_loss_and_gradients():
    model = build("mamba").train()
    ids = torch.tensor([prompt(6)])
    out = wrap(model)(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(model(ids)[0, :-1, :50], ids[0, 1:])
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert model.layers[0].mixer.A_log.grad is not None


def test_the_loss_of_padded_rows_is_that_of_their_texts():
    """The first token behind padding was counted as predicted by the padding."""
    model = build("mamba")
    prompts = [prompt(9), prompt(4, 1)]
    ids = torch.tensor([prompts[0], [0] * 5 + prompts[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    out = wrap(model)(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    nats = [
        torch.nn.functional.cross_entropy(model(row[None])[0, :-1, :50], row[1:], reduction="sum")
        for row in map(torch.tensor, prompts)
    ]
    torch.testing.assert_close(out.loss, sum(nats) / (8 + 3))


def test_errors():
    hf = wrap(build("mamba"))
    ids = torch.tensor([prompt(4)])
    with pytest.raises(ValueError, match="row 0 of attention_mask is all 0"):
        hf(ids, attention_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="has holes"):
        hf(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="is no language model of the zoo"):
        wrap(torch.nn.Linear(1, 1))
