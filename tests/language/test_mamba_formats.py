"""Mamba's formats: configurations, single mixers and packed texts beyond those of the golden files."""

import pytest
import torch

import zoo
from zoo.layers import Mamba, Mamba2, Mamba3
from zoo_language.attention import MultiHeadAttention
from zoo_language.mamba import MambaLM

LM = "models/mixer_seq_simple.py:MambaLMHeadModel"


def shaken(model, seed=0):
    """Every parameter away from the constant that it starts at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def published(model, system="mamba2"):
    """Its state dict under the original's keys."""
    return zoo.reference(system).to_reference(model.state_dict(), model=model)


def read(system, config, state, source=""):
    return zoo.reference(system).build(config, state, source=source)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))


# -- language models ---------------------------------------------------------------------------------------------------


def test_an_untied_head_keeps_its_name(ids):
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 40, "ssm_cfg": {"d_state": 4}, "tie_embeddings": False}
    model = shaken(MambaLM(16, 1, 40, ssm={"d_state": 4}, tie_embeddings=False))
    state = published(model)
    assert "lm_head.weight" in state
    assert not any(k.startswith("backbone.lm_head") for k in state)
    again = read("mamba", config, state, LM)
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)
    again(ids).square().mean().backward()
    assert zoo.reference("mamba").gradients(again).keys() == state.keys()


def test_attention_indices_that_no_layer_has_say_nothing(ids):
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 40, "attn_cfg": {"num_heads": 2, "layer_idx": 0}}
    model = shaken(MambaLM(16, 2, 40, attention_layers=[1], attention={"num_heads": 2}))
    again = read("mamba", config | {"attn_layer_idx": [1, 2, 7]}, published(model), LM)
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


def test_limits_of_dt_hold_in_passes_and_as_published_not_in_steps(ids):
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 4, "dt_limit": [0.1, 0.3]}
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 40, "ssm_cfg": ssm}
    limited = shaken(MambaLM(16, 1, 40, "Mamba2", {k: v for k, v in ssm.items() if k != "layer"}))
    free = MambaLM(16, 1, 40, "Mamba2", {"d_state": 4, "headdim": 4})
    free.load_state_dict(limited.state_dict())
    adapter = zoo.reference("mamba2")
    model = read("mamba2", config, published(limited), LM)
    call = {"step": "prefill the first 1 tokens with an inference cache"}
    found = adapter.run(model, {"input_ids": ids}, call=call)
    torch.testing.assert_close(found["logits"], limited(ids))
    assert not torch.allclose(found["logits"], free(ids), atol=1e-3)
    # the original's prompt is a pass, its steps know no limits
    state = limited.prefill(ids[:, :1])
    expected = torch.stack([free.step(ids[:, t], state) for t in range(1, 11)], dim=1)
    torch.testing.assert_close(found["step_logits"][:, 1:], expected)
    assert model.layers[0].mixer.dt_limit == (0.1, 0.3)


@pytest.mark.parametrize(("layer", "packing"), [("Mamba2", "seq_idx"), ("Mamba3", "cu_seqlens")])
def test_packed_texts_do_not_see_each_other(layer, packing):
    model = shaken(MambaLM(16, 2, 40, layer, {"d_state": 8, "headdim": 4}))
    texts = [torch.randint(0, 40, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 8)]
    packed = {
        "seq_idx": torch.tensor([[0] * 5 + [1] + [2] * 8], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 5, 6, 14], dtype=torch.int32),
    }
    row = {"input_ids": torch.cat(texts, dim=1)}
    adapter = zoo.reference("mamba")
    alone = torch.cat([model(t) for t in texts], dim=1)
    for name, value in packed.items():  # each kind of mixer looks at its own description only
        found = adapter.run(model, row | {name: value})["logits"]
        assert torch.allclose(found, alone, atol=1e-5) == (name == packing)


def test_attention_refuses_packed_texts(ids):
    model = MambaLM(16, 1, 40, attention_layers=[0], attention={"num_heads": 2})
    with pytest.raises(ValueError, match="packed into one"):
        model(ids, resets=torch.zeros(2, 11, dtype=torch.bool))


def test_transformers_activation_other_than_silu_is_refused():
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        read("mamba", {"hidden_size": 8, "hidden_act": "gelu"}, {"backbone.embeddings.weight": torch.zeros(4, 8)})


# -- single mixers -----------------------------------------------------------------------------------------------------

MIXERS: dict[str, tuple[type, dict, dict]] = {
    "Mamba": (Mamba, {"d_model": 16, "d_state": 4, "d_conv": 3, "dt_rank": 2}, {"use_fast_path": False}),
    "Mamba2": (Mamba2, {"d_model": 16, "d_state": 4, "headdim": 8, "d_ssm": 16}, {"sequence_parallel": False}),
    "Mamba3": (Mamba3, {"d_model": 16, "d_state": 8, "headdim": 8}, {"dropout": 0.1, "n_layer": 4, "chunk_size": 8}),
    "MHA": (MultiHeadAttention, {"d_model": 16, "num_heads": 2, "causal": True, "d_conv": 3}, {"layer_idx": 0}),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", MIXERS)
def test_single_mixers_are_read_by_source_or_by_keys(kind, named):
    build, arguments, silent = MIXERS[kind]
    mixer = shaken(build(**arguments))
    config = {("embed_dim" if kind == "MHA" and k == "d_model" else k): v for k, v in (arguments | silent).items()}
    adapter = zoo.reference("mamba")
    model = adapter.build(config, mixer.state_dict(), source=f"modules/file.py:{kind}" if named else "")
    u = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    found = adapter.run(model, {"u": u}, call={"step": "step_y: zero caches, one token at a time"})
    torch.testing.assert_close(found["y"], mixer(u), rtol=0, atol=0)
    assert adapter.to_reference(model.state_dict(), model=model).keys() == mixer.state_dict().keys()
    if kind == "MHA":  # as published, the first token's convolved values stand in the cache of raw ones
        assert (found["step_y"] - found["y"])[:, 1:].abs().max() > 1e-3
        found["step_y"][:, 1:] = found["y"][:, 1:]
    torch.testing.assert_close(found["step_y"], found["y"], rtol=1e-4, atol=1e-5)


def test_simple_mamba2_knows_its_activation_by_two_names():
    mixer = shaken(Mamba2(16, d_state=4, headdim=8))
    u = torch.randn(1, 6, 16)
    found = []
    for activation in ("silu", "swish"):
        config = {"d_model": 16, "d_state": 4, "headdim": 8, "activation": activation}
        found.append(read("mamba2", config, mixer.state_dict())(u))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        read("mamba2", {"d_model": 16, "activation": "relu"}, mixer.state_dict(), "mamba2_simple.py:Mamba2Simple")


def test_minimal_ssd_goes_on_from_states():
    generator = torch.Generator().manual_seed(3)
    X, B, C = (torch.randn(2, 12, 3, n, generator=generator) for n in (4, 5, 5))
    A = -torch.rand(2, 12, 3, generator=generator)
    adapter = zoo.reference("mamba2")
    model = adapter.build({"block_len": 4}, {})
    whole = adapter.run(model, {"X": X, "A": A, "B": B, "C": C})
    first = adapter.run(model, {k: v[:, :4] for k, v in {"X": X, "A": A, "B": B, "C": C}.items()})
    rest = {k: v[:, 4:] for k, v in {"X": X, "A": A, "B": B, "C": C}.items()}
    second = adapter.run(model, rest | {"initial_states": first["final_state"][:, None]})
    torch.testing.assert_close(torch.cat([first["Y"], second["Y"]], dim=1), whole["Y"])
    torch.testing.assert_close(second["final_state"], whole["final_state"])


@pytest.mark.parametrize("kind", MIXERS)
def test_the_key_table_follows_from_the_keys_alone(kind):
    build, arguments, _ = MIXERS[kind]
    state = build(**arguments).state_dict()
    model = read(
        "mamba", {("embed_dim" if kind == "MHA" and k == "d_model" else k): v for k, v in arguments.items()}, state
    )
    assert zoo.reference("mamba").rules(state).to_zoo(state).keys() == model.state_dict().keys()


# -- transformers' format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 0.4)])
def test_transformers_mamba2_gives_its_numbers(limit):
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 4, "state_size": 8,
        "n_groups": 2, "conv_kernel": 3, "chunk_size": 4, "use_bias": True, "layer_norm_epsilon": 1e-3,
        "time_step_limit": limit,
    }  # fmt: skip
    torch.manual_seed(5)
    peer = shaken(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config)))
    model = read("mamba2", config, peer.state_dict())
    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(6))
    call = {"generated": "greedy generate from the first 4 tokens to total length 12"}
    with torch.no_grad():
        found = zoo.reference("mamba2").run(model, {"input_ids": ids}, call=call)
        torch.testing.assert_close(found["logits"], peer(ids).logits, rtol=1e-4, atol=1e-4)
        peer.generation_config.eos_token_id = None
        expected = peer.generate(ids[:, :4], max_length=12, do_sample=False, pad_token_id=1)
    assert torch.equal(found["generated"], expected)
    assert published(model).keys() == peer.state_dict().keys()
    arguments = zoo.reference("mamba2").arguments(config | {"model_type": "mamba2"})
    assert (arguments["layer"], arguments["ssm"]["ngroups"], arguments["tie_embeddings"]) == ("Mamba2", 2, False)


def test_transformers_mamba2_heads_must_fill_the_width():
    with pytest.raises(ValueError, match="num_heads 3 times head_dim 4 is not expand times hidden_size 16"):
        zoo.reference("mamba2").arguments({"model_type": "mamba2", "hidden_size": 16, "num_heads": 3, "head_dim": 4})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"colour": 1}, "no configuration key"),
        ({"ssm_cfg": {"colour": 1}}, "Mamba1 has no argument"),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "colour": 1}}, "MHA has no argument"),
        ({"attn_layer_idx": [0]}, "attn_cfg has no num_heads"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "layer is 'Mamba9'"),
    ],
)
def test_configurations_that_the_original_does_not_have_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        read("mamba", {"d_model": 16, "n_layer": 1, "vocab_size": 40} | config, {})


def test_a_single_mixer_refuses_arguments_by_name():
    with pytest.raises(ValueError, match=r"Mamba2 has no argument \['colour'\]"):
        read("mamba2", {"d_model": 16, "colour": 1}, {}, "mamba2.py:Mamba2")
