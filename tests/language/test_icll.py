"""In-context language learning: mixers and switches of the original that no recorded vector holds."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo_language.icll import InContextLM, arguments_of
from zoo_language.icll_convolutions import H3, S4D, Hyena
from zoo_language.icll_mixers import GLA, Attention, mixer, ngram_weights
from zoo_language.icll_task import InContextTask

CONFIG = {"d_model": 8, "n_layer": 2, "d_inner": 12, "vocab_size": 11, "layer": {"_name_": "retention", "n_heads": 2}}


@pytest.mark.parametrize("use_gk", [False, True])
@pytest.mark.parametrize("use_gv", [False, True])
def test_gated_linear_attention_is_its_recurrence(use_gk, use_gv):
    torch.manual_seed(0)
    layer = GLA(16, 2, use_gk, use_gv).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    state = torch.zeros(2, 2, q.shape[-1], 8, dtype=torch.float64)
    rows = []
    for t in range(9):
        if use_gk:
            state = state * (F.logsigmoid(layer.k_gate(x[:, t])) / 16).exp().view(2, 2, -1, 1)
        if use_gv:
            state = state * (F.logsigmoid(layer.v_gate(x[:, t])) / 16).exp().view(2, 2, 1, -1)
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :] * layer.scale
        rows.append((q[:, t, :, :, None] * state).sum(-2))
    heads = F.layer_norm(torch.stack(rows, 1), (8,)).flatten(-2)
    torch.testing.assert_close(layer(x), layer.out_proj(F.silu(layer.g_proj(x)) * heads))


def test_wide_h3_heads_pair_every_key_with_every_value():
    """Two convolutions written out; the original joins the channels with heads innermost."""
    torch.manual_seed(0)
    layer = H3(6, 4, head_dim=2, disc="zoh", real_type="softplus", n_ssm=3, l_max=5)
    x, p = torch.randn(1, 7, 6), 2
    q, k, v = layer.q_proj(x)[0], layer.k_proj(x)[0], layer.v_proj(x)[0]
    shift, taps = layer.shift_taps(5), layer.taps(5)
    moved = [sum(shift[:, lag] * k[t - lag] for lag in range(min(t + 1, shift.shape[1]))) for t in range(7)]
    k = torch.stack(moved) + layer.ssm_k_D * k
    want = torch.zeros(7, p, 3)
    for h in range(3):
        for i in range(p):
            for j in range(p):
                both = k[:, h * p + i] * v[:, h * p + j]
                y = [sum(taps[h, lag] * both[t - lag] for lag in range(min(t + 1, 5))) for t in range(7)]
                want[:, j, h] += (torch.stack(y) + layer.D[h] * both) * q[:, h * p + i]
    torch.testing.assert_close(layer(x)[0], layer.output_linear(want.flatten(1)), atol=1e-5, rtol=1e-4)


def test_s4d_walks_from_both_ends():
    torch.manual_seed(0)
    layer = S4D(4, 8, channels=2, bidirectional=True, activation="id", n_ssm=2)
    x = torch.randn(1, 6, 4)
    taps = layer.taps(6)  # kernels 0, 1 forwards, 2, 3 from the end
    want = torch.zeros(6, 2, 4)
    for c in range(2):
        for t in range(6):
            want[t, c] = layer.D[c] * x[0, t]
            want[t, c] += sum(taps[c, :, t - s] * x[0, s] for s in range(t + 1))
            want[t, c] += sum(taps[2 + c, :, s - t - 1] * x[0, s] for s in range(t + 1, 6))
    torch.testing.assert_close(layer(x)[0], layer.output_linear(want.flatten(1)), atol=1e-5, rtol=1e-4)


def test_hyena_of_order_three_convolves_twice():
    torch.manual_seed(0)
    layer = Hyena(4, 10, order=3, filter_order=8, short_filter_order=1, shift=0.1, post_order_ffn=True)
    x = torch.randn(1, 6, 4)
    mixed = layer.in_proj(x)[0] * layer.short_filter.weight[:, 0, 0] + layer.short_filter.bias
    first, second, third, v = mixed.chunk(4, dim=-1)
    taps = layer.filter_fn(6)
    for o, gate in enumerate((third, second)):
        u = v * gate
        rows = [sum(taps[o::2, lag] * u[t - lag] for lag in range(t + 1)) for t in range(6)]
        v = (torch.stack(rows) + layer.filter_fn.bias[o::2] * u) * layer.ord_proj_w[o]
    torch.testing.assert_close(layer(x)[0], layer.out_proj(v * first), atol=1e-5, rtol=1e-4)


def test_trained_features_of_a_filter_are_read():
    """The original trains them unless ``lr_pos_emb`` is 0: what the checkpoint holds counts."""
    layer = {"_name_": "hyena", "l_max": 9, "filter_order": 4, "num_inner_mlps": 1, "local_order": 3}
    config = CONFIG | {"layer": layer, "n_layer": 1}
    adapter = zoo.reference("icll")
    torch.manual_seed(0)
    model = zoo_model(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    start = adapter.to_reference(model.state_dict(), model=model)
    key = "backbone.layers.0.mixer.filter_fn.pos_emb.z"
    ids = {"input_ids": torch.arange(9)[None]}
    other = adapter.build(config, start | {key: start[key] + torch.randn(1, 9, 3)})
    found = [adapter.run(m, ids)["mid/mixer0"] for m in (adapter.build(config, start), other)]
    assert not torch.allclose(*found, rtol=1e-2, atol=1e-3)
    assert set(adapter.to_reference(other.state_dict(), model=other)) == set(start)


def zoo_model(config):
    return InContextLM(**arguments_of(config))


def test_buffers_come_back_in_the_original_format():
    """Retention's angles and decays follow from its sizes, and the original loads strictly."""
    model = zoo_model(CONFIG)
    found = zoo.reference("icll").to_reference(model.state_dict(), model=model)
    assert found["backbone.layers.1.mixer.xpos.decay"].tolist() == pytest.approx([-(2**-5), -(2**-6)], rel=0.02)
    assert found["backbone.layers.1.mixer.xpos.angle"].shape == (4,)


def test_arguments_of_the_original():
    found = arguments_of(CONFIG | {"d_inner": None, "layer_norm_epsilon": 1e-3, "residual_in_fp32": True})
    assert (found["d_inner"], found["norm_eps"], found.get("blocks", True)) == (32, 1e-3, True)
    attention = {"attn_layer_idx": [0, 1], "attn_cfg": {"num_heads": 2, "causal": False, "bias": False}}
    layers = arguments_of(CONFIG | attention)["layers"]
    assert [entry["causal"] for entry in layers] == [False, True]  # the original takes it out of the shared mapping
    assert not layers[1]["bias"]
    bare = {k: v for k, v in CONFIG.items() if k != "d_inner"}
    assert arguments_of(bare)["blocks"] is False
    assert arguments_of(CONFIG, "SimpleLMHeadModelNoFFN")["blocks"] is False
    with pytest.raises(ValueError, match="no configuration key heads"):
        arguments_of(CONFIG | {"heads": 2})


def test_what_the_study_does_not_run_is_refused():
    with pytest.raises(ValueError, match="transposed=False alone"):
        mixer("s4d", 8, transposed=True)
    with pytest.raises(ValueError, match="no argument rate"):
        mixer("gla", 8, n_heads=1, rate=2)
    with pytest.raises(ValueError, match="disc is 'dss'"):
        mixer("h3", 8, disc="dss")


def test_attention_switches():
    torch.manual_seed(0)
    layer = Attention(8, 2, linear=True, softmax_scale=0.3, causal=False, bias=False)
    x = torch.randn(1, 5, 8)
    q, k, v = layer.Wqkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
    want = torch.einsum("blhd,bshd,bshe->blhe", q, k, v) * 0.3
    torch.testing.assert_close(layer(x), layer.out_proj(want.flatten(-2)))
    assert Attention(8, 2, dwconv=True)(x).shape == x.shape


def test_ngram_weights_with_another_shift():
    ids = torch.tensor([[1, 2, 1, 2]])
    assert ngram_weights(ids, 1, 0)[0, 2].tolist() == [1, 0, 0, 0]  # the match itself
    assert ngram_weights(ids, 1, 1)[0, 2].tolist() == [0, 1, 0, 0]  # what followed it


@pytest.mark.parametrize("vocabulary", [5, 29, 40])
def test_vocabularies_that_have_no_letters(vocabulary):
    """The 28th letter was the separator itself."""
    with pytest.raises(ValueError, match=f"vocabulary is {vocabulary}; expected 6 to 28"):
        InContextTask(vocabulary)
    assert InContextTask(28).sample().text
