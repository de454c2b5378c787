"""The engine, the state as a value, scoring: on small random models of every kind of layer."""

import math

import pytest
import torch

from zoo_language.bdh import BDH
from zoo_language.birdie_lm import BirdieLM
from zoo_language.bmojo_lm import BMojoLM
from zoo_language.dynamax import DynamaxLM
from zoo_language.generation import Sampling, choose, generate, stream
from zoo_language.hax import HaxLM
from zoo_language.hydra_lm import HydraLM
from zoo_language.icll import InContextLM
from zoo_language.mamba import MambaLM
from zoo_language.memmamba import MemMambaLM
from zoo_language.phi_mamba import PhiMambaLM
from zoo_language.sambay import SambaY
from zoo_language.scoring import continuation_loglikelihood, score
from zoo_language.state import State

ATTENTION = {"causal": True, "head_dim": 8, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "d_conv": 3}
KINDS = {
    "mamba": {"ssm": {"d_state": 4}},
    "mamba2": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}},
    "mamba3": {"layer": "Mamba3", "ssm": {"d_state": 8, "headdim": 8}},
    "mimo": {"layer": "Mamba3", "ssm": {"d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 2}},
    "hybrid": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}, "attention_layers": [1], "attention": ATTENTION},
    "mlp": {"ssm": {"d_state": 4}, "d_intermediate": 40, "rms_norm": False, "tie_embeddings": False},
}


SAMBAY = {"heads": 4, "kv_heads": 2, "head_dim": 8, "ff": 48, "window": 3}
OTHERS = {
    "sambay": lambda: SambaY(50, 8, 32, **SAMBAY, differential=True),
    "sambay_mamba2": lambda: SambaY(50, 4, 32, **SAMBAY, rnn_type="mamba2", rope_base=10000.0),
    "sambay_attn": lambda: SambaY(50, 8, 32, **SAMBAY, gmu_source="attention", mup=True, depth_scale=True),
    "phi_mamba": lambda: PhiMambaLM(50, 32, ["mamba", "attention", "mamba"], MIXER, heads=4),
    "icll": lambda: InContextLM(16, 50, [{"mixer": "gla", "n_heads": 2}, {"mixer": "ngram", "ngram": 1}], 32),
    "gated_ssm": lambda: BirdieLM(50, 16, 24, 3),
    "hawk": lambda: BirdieLM(50, 16, 24, 3, kind="hawk"),
    "hax": lambda: HaxLM(32, 2, 50, "mamba2", "sign_bin_lsh+key_selection", 4, 3, 32, MAMBA2, causal=True),
    "hax_window": lambda: HaxLM(32, 2, 50, "mamba", "sliding_window+dilated", 4, 3, 32, {"d_state": 4}),
    "bmojo": lambda: BMojoLM(32, 2, 50, 4, 2, 6, 24, bmojo_layers=[1], window=4, ssm="gka", eidetic=2),
    "memmamba": lambda: MemMambaLM(32, 3, 50, {"d_state": 4}, 6, 4, chunk=3, cross_layer_every=2),
    "dynamax": lambda: DynamaxLM({**EXITS, "layer": "Mamba2", "ssm": MAMBA2}, stride=1, exit_kind="mamba"),
    "hydra_lm": lambda: HydraLM(16, 2, 50, ssm={"d_state": 4}, heads=2, window=4, chunk=3, attention_every=2, slots=2),
    "bdh": lambda: BDH(50, levels=3, d_model=16, heads=2, multiplier=8),
}
EXITS = {"d_model": 32, "n_layer": 3, "vocab_size": 50}
MAMBA2 = {"d_state": 8, "headdim": 8}
MIXER = {"d_state": 8, "v_heads": 4, "qk_heads": 2}


def build(kind):
    torch.manual_seed(0)
    if kind in OTHERS:
        model = OTHERS[kind]().eval()
    else:
        model = MambaLM(d_model=32, n_layer=3, vocab_size=50, **KINDS[kind]).eval()
    with torch.no_grad():  # a fresh model's logits are almost flat: make choices far from ties
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[*KINDS, *OTHERS])
def model(request):
    return build(request.param)


def prompt(length, seed=0):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_steps_equal_the_whole(model):
    ids = torch.tensor([prompt(12), prompt(12, 1)])
    with torch.no_grad():
        whole = model(ids)
        state = model.init_state(2)
        first = model(ids[:, :5], state=state)
        second = model(ids[:, 5:8], state=state)  # prefill in two pieces
        rest = [model.step(ids[:, t], state)[:, None] for t in range(8, 12)]
    torch.testing.assert_close(torch.cat([first, second, *rest], dim=1), whole, rtol=1e-4, atol=1e-5)
    assert state.position.tolist() == [12, 12]


def test_unequal_prompts_give_what_they_give_alone(model):
    prompts = [prompt(9), prompt(2, 1), prompt(5, 2)]
    how = Sampling(temperature=1.0, top_p=0.9, seed=[7, 8, 9])
    texts, state = generate(model, prompts, max_new_tokens=12, sampling=how)
    assert state.position.tolist() == [21, 14, 17]
    for i, text in enumerate(texts):
        alone, _ = generate(model, [prompts[i]], max_new_tokens=12, sampling=Sampling(1.0, top_p=0.9, seed=[7 + i]))
        assert alone[0].tokens == text.tokens


def test_greedy_equals_argmax_of_the_whole(model):
    texts, _ = generate(model, [prompt(6)], max_new_tokens=8)
    ids = prompt(6)
    with torch.no_grad():
        for token in texts[0].tokens:
            assert int(model(torch.tensor([ids]))[0, -1, : model.vocab_size].argmax()) == token
            ids.append(token)


def test_long_prompts_are_read_in_chunks(model):
    ids = torch.tensor([prompt(23), prompt(23, 1)])
    lengths = torch.tensor([23, 9])
    whole = model.prefill(ids, lengths=lengths)
    pieces = model.prefill(ids, lengths=lengths, chunk=5)
    torch.testing.assert_close(whole.logits, pieces.logits, rtol=1e-4, atol=1e-5)
    assert pieces.position.tolist() == [23, 9]


def test_state_is_a_value(model, tmp_path):
    """Save, load in place of reading again, fork, stack: all continue alike."""
    state = model.prefill(torch.tensor([prompt(9)]))
    expected, _ = generate(model, [[]], state=state.fork(), max_new_tokens=6)
    loaded = State.load(state.save(tmp_path / "notes.state"))
    assert loaded.position.tolist() == [9]
    assert generate(model, [[]], state=loaded, max_new_tokens=6)[0][0].tokens == expected[0].tokens
    forked = state.fork(3)
    assert [t.tokens for t in generate(model, [[]] * 3, state=forked, max_new_tokens=6)[0]] == [expected[0].tokens] * 3
    other = model.prefill(torch.tensor([prompt(4, 5)]))
    both = State.stack([other.fork(), state.fork()])
    texts, _ = generate(model, [[], []], state=both, max_new_tokens=6)
    assert texts[1].tokens == expected[0].tokens
    assert texts[0].tokens == generate(model, [[]], state=other, max_new_tokens=6)[0][0].tokens
    assert generate(model, [[]], state=state, max_new_tokens=6)[0][0].tokens == expected[0].tokens  # not moved by forks


def test_recurrent_states_do_not_grow():
    model = build("mamba2")
    sizes = {model.prefill(torch.tensor([prompt(n)])).nbytes for n in (1, 10, 300)}
    assert len(sizes) == 1


def test_state_files_are_checked(tmp_path):
    model = build("mamba")
    state = model.prefill(torch.tensor([prompt(3)]))
    with pytest.raises(ValueError, match=r"made by .*, not by"):
        build("mamba2").prefill(torch.tensor([prompt(3)]), state=state)
    (tmp_path / "bad").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        State.load(tmp_path / "bad")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no state file"):
        State.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="the state holds 1 texts, prompts 2"):
        generate(model, [[1], [2]], state=state)


def test_stop_tokens_and_strings():
    model = build("mamba")
    plain, _ = generate(model, [prompt(6)], max_new_tokens=10)
    tokens = plain[0].tokens
    end = tokens[3]
    texts, state = generate(model, [prompt(6)], max_new_tokens=10, stop_tokens=[end])
    first = tokens.index(end)
    assert texts[0].tokens == tokens[:first]
    assert texts[0].reason == "stop"
    assert state.position.tolist() == [6 + first]

    def decode(ids):
        return "".join(chr(ord("a") + i % 26) for i in ids)

    whole = decode(tokens)
    texts, _ = generate(model, [prompt(6)], max_new_tokens=10, stop_strings=[whole[4:6]], decode=decode)
    assert texts[0].text == whole[: whole.find(whole[4:6])]
    assert texts[0].reason == "string"


def test_streaming_gives_the_same_tokens():
    model = build("mamba2")
    whole, _ = generate(model, [prompt(4), prompt(3, 1)], max_new_tokens=5)
    rows = {0: [], 1: []}
    for row, token in stream(model, [prompt(4), prompt(3, 1)], max_new_tokens=5):
        rows[row].append(token)
    assert [rows[0], rows[1]] == [t.tokens for t in whole]


def chosen(logits, how, draws=4000, seen=()):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[choose(torch.tensor(logits), seen, how, generator)] += 1
    return counts / draws


LOGITS = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.25), [0.5263, 0.3158, 0.1579, 0]),
        (Sampling(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_sampling_distributions(how, expected):
    torch.testing.assert_close(chosen(LOGITS, how), torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)


def test_repetition_penalty():
    generator = torch.Generator()
    assert choose(torch.tensor([2.0, 1.9]), [0], Sampling(repetition_penalty=1.2), generator) == 1
    assert choose(torch.tensor([-1.0, -1.1]), [0], Sampling(repetition_penalty=1.2), generator) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"min_p": 1.0}, "min_p is 1.0"),
    ],
)
def test_bad_sampling(bad, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**bad)


def test_bad_prompts():
    model = build("mamba")
    with pytest.raises(ValueError, match="prompt 0 has the token 50"):
        generate(model, [[50]])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, [[]])
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [])
    with pytest.raises(ValueError, match=r"input_ids is torch\.float32"):
        model(torch.zeros(1, 3))


def test_scores_do_not_depend_on_the_window(model):
    ids = prompt(40)
    whole = score(model, ids, text_bytes=100, window=64)
    pieces = score(model, ids, text_bytes=100, window=7)
    assert pieces.tokens == whole.tokens == 39
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2) / 100)
    fresh = score(model, ids, text_bytes=100, window=7, carry_state=False)
    assert fresh.nats != pytest.approx(whole.nats, rel=1e-4)


def test_loglikelihood_of_a_continuation():
    model = build("mamba")
    context, continuation = prompt(5), prompt(3, 1)
    value, greedy = continuation_loglikelihood(model, context, continuation)
    ids = torch.tensor([context + continuation])
    logprobs = model(ids).detach()[0, :, : model.vocab_size].log_softmax(-1)
    by_hand = sum(float(logprobs[4 + i, token]) for i, token in enumerate(continuation))
    assert value == pytest.approx(by_hand, rel=1e-5)
    texts, _ = generate(model, [context], max_new_tokens=3)
    assert continuation_loglikelihood(model, context, texts[0].tokens)[1]
    assert greedy == (texts[0].tokens == continuation)


@pytest.mark.parametrize("kind", [*KINDS, "phi_mamba", "sambay"])
def test_checkpointing_keeps_gradients(kind):
    model = build(kind)
    ids = torch.tensor([prompt(7)])
    model.train()
    model(ids).square().mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)
