"""SambaY's switches beyond those of the golden files, and its configurations."""

import pytest
import torch

import zoo
from zoo_language.attention import rotary
from zoo_language.sambay import SambaY
from zoo_language.sambay_formats import arguments_of

SMALL = {"vocab_size": 50, "n_layer": 8, "d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ff": 48, "window": 4}


def build(seed=0, **arguments):
    torch.manual_seed(seed)
    model = SambaY(**(SMALL | arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("source", ["scan", "attention", "mlp"])
def test_units_behind_mamba2_norm_whatever_their_memory(source):
    norms = [build(gmu_source=source, rnn_type=kind).layers[6].mixer.norm for kind in ("mamba", "mamba2")]
    assert [n is not None for n in norms] == [False, True]


ABLATIONS: dict[str, dict] = {
    "full_per_layer": {"full_per_layer": 2},
    "adaptive_rope": {"adaptive_rope": True, "yoco_window": 6, "rope_base": 10000},
    "rotary_share": {"rotary_share": 0.5, "rope_base": 100},
    "yoco_nope": {"yoco_nope": True, "rope_base": 100},
    "gated": {"gated": True, "attn_bias": True},
    "qk_norm": {"qk_norm": True},
    "attn_norm": {"attn_norm": True},
    "attn_scale": {"attn_scale": 0.1},
    "constant_lambda": {"constant_lambda": True, "differential": True},
    "bias": {"bias": True},
    "scale_embed": {"scale_embed": True},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_numbers_and_decode_as_they_read(name, ids):
    model = build(**ABLATIONS[name])
    with torch.no_grad():
        logits = model(ids)
        plain = SambaY(**(SMALL | {k: v for k, v in ABLATIONS[name].items() if k != name})).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        assert (plain(ids) - logits).abs().max() > 1e-4
        state = model.init_state(2)
        pieces = [model(ids[:, :5], state=state)] + [model.step(ids[:, t], state)[:, None] for t in range(5, 13)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, rtol=1e-4, atol=1e-4)


def test_windows_and_phases_of_each_layer():
    model = build(full_per_layer=4, rope_base=100, yoco_nope=True)
    windows = {i: layer.mixer.window for i, layer in enumerate(model.layers) if layer.role in ("window", "full")}
    assert windows == {1: 4, 3: None, 5: None}
    turns = {i: layer.mixer.rotary for i, layer in enumerate(model.layers) if hasattr(layer.mixer, "rotary")}
    assert turns == {1: (8, 100.0), 3: None, 5: None, 7: None}
    model = build(adaptive_rope=True, rope_base=10000, yoco_window=6)
    bases = [layer.mixer.rotary[1] for layer in model.layers if hasattr(layer.mixer, "rotary")]
    assert bases == pytest.approx([0.09 * 4**1.628] * 2 + [0.09 * 4096**1.628] * 2)
    with pytest.raises(ValueError, match="every attention needs one"):
        build(adaptive_rope=True, rope_base=10000)


def test_rotary_share_leaves_the_other_channels():
    x = torch.randn(1, 5, 2, 8)
    turned = rotary(x, torch.arange(5)[None], *build(rotary_share=0.5, rope_base=10000).layers[1].mixer.rotary)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], x[:, 1:, :, :4])


def test_configurations_take_the_originals_defaults_and_precedence():
    found = arguments_of({})
    assert (found["n_layer"], found["d_model"], found["heads"], found["head_dim"]) == (16, 4096, 32, 128)
    assert (found["vocab_size"], found["padding_multiple"], found["ff"], found["mup_d0"]) == (50254, 512, 16384, 16)
    assert (found["yoco"], found["rnn_per_layer"], found["rope_base"], found["window"]) == (False, -1, 10000, None)
    width = {"n_layer": 8, "n_head": 2, "intermediate_size": 40}
    assert arguments_of(width | {"n_embd": 32})["ff"] == 40
    assert arguments_of(width | {"ar": 4})["ff"] == 128  # the aspect ratio sets both anew
    padded = arguments_of({"n_layer": 4, "n_head": 2, "n_embd": 8, "vocab_size": 70, "padded_vocab_size": 90})
    assert SambaY(**padded).embedding.weight.shape == (90, 8)
    both = arguments_of({"yoco": True, "gmu_yoco": True, "gmu_attn": True, "gmu_mlp": True})
    assert both["gmu_source"] == "mlp"  # it is written last
    scaled = {"n_layer": 4, "n_head": 2, "n_embd": 8, "vocab_size": 8, "mup": True}
    assert SambaY(**arguments_of(scaled)).logit_scale == 4
    assert SambaY(**arguments_of(scaled | {"use_muonh": True})).logit_scale == 1


@pytest.mark.parametrize("switch", [{"fa2": False}, {"use_cu_seqlen": True}, {"moe": True}, {"post_norm": True}])
def test_switches_that_are_not_built_are_refused_by_name(switch):
    (name,) = switch
    with pytest.raises(ValueError, match=name):
        arguments_of(switch)


def test_an_mlp_memory_replaces_the_scan_that_is_kept_before(ids):
    model = build(gmu_source="mlp")
    found = zoo.reference("sambay").run(model, {"input_ids": ids})
    assert [k for k in found if k.startswith("mid/gmu_memory")] == ["mid/gmu_memory4", "mid/gmu_memory5"]
    assert model.layers[4].memory is None
    torch.testing.assert_close(found["logits"], model(ids))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", ["scan", "attention"])
def test_the_key_table_follows_from_the_keys_alone(source, tied):
    model = build(gmu_source=source, tied=tied, rnn_type="mamba2", n_layer=12)
    adapter = zoo.reference("sambay")
    ours = model.state_dict()
    theirs = adapter.to_reference(ours, model=model)
    assert "transformer.h.8.attn.gmu.norm.weight" in theirs
    assert "transformer.h.6.attn.in_proj.weight" in theirs
    assert adapter.rules(theirs).to_zoo(theirs).keys() == ours.keys()
    assert adapter.rules(ours).to_reference(ours).keys() == theirs.keys()
    with pytest.raises(ValueError, match="model="):
        adapter.rules({"model.embed_tokens.weight": torch.zeros(1)})


# -- the released Phi-4-mini-flash -------------------------------------------------------------------------------------


def released(model, prefix):
    """A model's weights under the keys of the released checkpoint, by its description, not by our table."""
    found = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.embedding.weight}
    found |= {f"model.final_layernorm.{k}": v for k, v in model.norm_f.state_dict().items()}
    for i, layer in enumerate(model.layers):
        at, own = f"model.layers.{i}.", layer.mixer.state_dict()
        found |= {f"{at}input_layernorm.{k}": v for k, v in layer.norm_1.state_dict().items()}
        found |= {f"{at}post_attention_layernorm.{k}": v for k, v in layer.norm_2.state_dict().items()}
        found |= {f"{at}mlp.fc1.weight": layer.mlp.w1.weight, f"{at}mlp.fc2.weight": layer.mlp.w3.weight}
        if layer.role in ("window", "full", "cross"):
            q, k, v = (own.get(f"{n}_proj.weight") for n in "qkv")
            rows, biases = [q], [own["q_proj.bias"]]
            if layer.role != "cross":
                rows += [k, v]
                biases += [torch.randn(k.shape[0]), own["v_proj.bias"]]  # a key bias changes nothing
            attention = {"Wqkv.weight": torch.cat(rows), "Wqkv.bias": torch.cat(biases)}
            attention |= {k.replace("proj.", "out_proj."): v for k, v in own.items() if k.startswith("proj.")}
            attention |= {prefix + k.removeprefix("da."): v for k, v in own.items() if k.startswith("da.")}
            own = attention
        found |= {f"{at}attn.{k}": v for k, v in own.items()}
    return {k: v.detach() for k, v in found.items()}


@pytest.mark.parametrize("prefix", ["inner_cross_attn.", ""])
def test_the_released_keys_and_configuration_are_read(prefix, ids):
    model = build(differential=True, attn_bias=True, attn_out_bias=True, layer_norm=True, tied=True, padding_multiple=1)
    config = {
        "model_type": "phi4flash", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": [None, 4, None, 4] + 4 * [None],
        "mb_per_layer": 2, "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "mamba_dt_rank": "auto",
    }  # fmt: skip
    state = released(model, prefix)
    again = zoo.reference("sambay").build(config, state)
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    del state["lm_head.weight"]
    zoo.reference("sambay").build(config, state)
    with pytest.raises(ValueError, match="mamba_d_state"):
        zoo.reference("sambay").arguments(config | {"mamba_d_state": 32})
