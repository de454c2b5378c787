"""Fused decoding: the tokens of the plain model, chosen by itself, quantised on request, refused with a reason."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import zoo_kernels
from zoo_language.bdh import BDH
from zoo_language.decode import Decoder, decoder_for, why_not
from zoo_language.generation import Sampling, generate
from zoo_language.mamba import MambaLM
from zoo_language.scoring import score

KINDS = {
    "mamba": {"ssm": {"d_state": 4}},
    "mamba_biases": {"ssm": {"d_state": 17, "d_conv": 3, "bias": True, "conv_bias": False}, "tie_embeddings": False},
    "mamba2": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}},
    "mamba2_groups": {
        "layer": "Mamba2",
        "ssm": {"d_state": 33, "headdim": 8, "ngroups": 2, "D_has_hdim": True, "norm_before_gate": True,
                "dt_limit": (0.01, 0.2)},
    },
    "mamba2_no_norm": {"layer": "Mamba2", "ssm": {"d_state": 16, "headdim": 16, "rmsnorm": False, "bias": True}},
}  # fmt: skip


def build(kind="mamba", **more):
    torch.manual_seed(0)
    model = MambaLM(d_model=32, n_layer=3, vocab_size=50, **(KINDS[kind] | more)).eval()
    with torch.no_grad():  # a fresh model's logits are almost flat: make choices far from ties
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prompt(length, seed=0):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_gives_what_the_model_gives(kind):
    model = build(kind)
    decoder = model.fast_decoder()
    assert decoder.weights == "float32"
    plain = model.prefill(torch.tensor([prompt(5)]))
    fused = plain.fork()
    for token in prompt(12, 1):
        want, found = model.step(torch.tensor([token]), plain), decoder.step(token, fused)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert fused.position.tolist() == [17]
    for own, other in zip(plain.layers, fused.layers, strict=True):
        for key in own:
            torch.testing.assert_close(other[key], own[key], rtol=1e-5, atol=1e-5)
    assert fused.logits is not None
    assert fused.logits.shape == plain.logits.shape


@pytest.mark.parametrize("kind", KINDS)
def test_generation_gives_the_same_tokens(kind):
    model = build(kind)
    for how in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)):
        found, state = generate(model, [prompt(6)], max_new_tokens=20, sampling=how)
        with zoo_kernels.backend("reference"):
            plain, other = generate(model, [prompt(6)], max_new_tokens=20, sampling=how)
        assert found[0].tokens == plain[0].tokens
        torch.testing.assert_close(state.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_chosen_where_it_applies():
    model = build()
    if zoo_kernels._native.missing("mamba_step"):
        assert decoder_for(model) is None
        return
    first = decoder_for(model)
    assert first is not None
    assert decoder_for(model) is first
    with torch.no_grad():
        model.layers[0].mixer.A_log += 1.0
    second = decoder_for(model)  # small tensors are copies: a changed model needs a new decoder
    assert second is not first
    state = model.prefill(torch.tensor([prompt(4)]))
    want = model.step(torch.tensor([7]), state.fork())
    torch.testing.assert_close(second.step(7, state), want, rtol=1e-5, atol=1e-5)
    assert decoder_for(build().train()) is None
    assert decoder_for(build().bfloat16()) is None


@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", 8), ("float16", 11), ("int8", 6)])
def test_smaller_weights(weights, bits):
    model = build("mamba2")
    decoder = model.fast_decoder(weights)
    assert decoder.nbytes < model.fast_decoder("float32").nbytes * (0.6 if weights != "int8" else 0.4)
    state = model.prefill(torch.tensor([prompt(5)]))
    want = model.step(torch.tensor([7]), state.fork())
    found = decoder.step(7, state)
    error = float((found - want).abs().max() / want.abs().max())
    assert 0 < error < 10 * 2.0**-bits
    texts, _ = generate(model, [prompt(5)], max_new_tokens=4, decoder=decoder)
    assert len(texts[0].tokens) == 4


def test_scores_through_a_decoder():
    """The perplexity that quantised weights cost is measured token by token, with what generates."""
    model = build("mamba2")
    ids = prompt(60)
    plain = score(model, ids, text_bytes=60)
    same = score(model, ids, text_bytes=60, decoder=model.fast_decoder())
    assert same.tokens == plain.tokens
    assert same.nats == pytest.approx(plain.nats, rel=1e-5)
    small = score(model, ids, text_bytes=60, decoder=model.fast_decoder("int8"))
    assert small.nats == pytest.approx(plain.nats, rel=0.05)
    assert small.nats != same.nats


def test_half_precision_models_decode_on_request():
    model = build().bfloat16()
    decoder = model.fast_decoder()
    assert decoder.weights == "bfloat16"
    state = model.prefill(torch.tensor([prompt(5)]))
    want = model.step(torch.tensor([7]), state.fork()).float()
    torch.testing.assert_close(decoder.step(7, state), want, rtol=0.05, atol=0.05)


def test_refusals_say_why():
    attention = {"causal": True, "head_dim": 8, "num_heads": 4, "rotary_emb_dim": 4}
    with pytest.raises(ValueError, match="BDH is not a stack of Mamba"):
        Decoder(BDH(50, levels=3, d_model=16, heads=2, multiplier=8))
    assert "mixer of block 1 is MultiHeadAttention" in str(why_not(build(attention_layers=[1], attention=attention)))
    assert "block 0 has an MLP" in str(why_not(build(d_intermediate=40)))
    assert "RMS" in str(why_not(build(rms_norm=False)))
    assert "float32, bfloat16 or float16" in str(why_not(build().double()))
    with pytest.raises(ValueError, match="weights is 'int4'; expected one of float32, bfloat16"):
        build().fast_decoder("int4")
    decoder = build().fast_decoder()
    with pytest.raises(ValueError, match="the state holds 2 texts"):
        decoder.step(1, build().init_state(2))
    with pytest.raises(ValueError, match="made by"):
        decoder.step(1, build("mamba2").init_state(1))


def test_threads_decode_with_one_model():
    model = build()
    want = [generate(model, [prompt(4, i)], max_new_tokens=40)[0][0].tokens for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: generate(model, [prompt(4, i)], max_new_tokens=40)[0][0].tokens, range(4))
        assert list(found) == want


@pytest.mark.parametrize("name", ["A_log", "D", "conv1d.weight"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_is_written_through_data_is_seen(kind, name):
    """As averages of weights are swapped in: no version is counted, and the decoder has copies."""
    model = build(kind)
    generate(model, [prompt(4)], max_new_tokens=1)
    model.layers[1].mixer.get_parameter(name).data.add_(2.0)
    found, state = generate(model, [prompt(4)], max_new_tokens=6)
    whole = torch.tensor([prompt(4) + found[0].tokens])
    torch.testing.assert_close(state.logits, model.prefill(whole).logits, rtol=1e-4, atol=1e-5)
