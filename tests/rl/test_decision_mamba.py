"""Decision Mamba: its flags, windows, the tiled quirk and the causal form, the original's format."""

import pytest
import torch

import zoo
from zoo_rl.decision_mamba import DecisionMamba, arguments_of

SMALL = {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "num_layers": 2, "max_length": 6, "max_ep_len": 40,
         "d_state": 4}  # fmt: skip


def model(**more):
    torch.manual_seed(0)
    return DecisionMamba(**{**SMALL, **more}).eval()


def window(steps=6, batch=2):
    torch.manual_seed(1)
    return (
        torch.randn(batch, steps, 5), torch.rand(batch, steps, 3) * 2 - 1, torch.randn(batch, steps, 1),
        torch.arange(steps).expand(batch, -1),
    )  # fmt: skip


def original_config(**args):
    mamba = {"vocab_size": 8, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 1,
             "expand": 2, "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "hidden_act": "silu"}  # fmt: skip
    return {"mamba": mamba, "args": {"pretrained_lm": "mamba-130m", "lora": False, **args}, "state_dim": 5,
            "act_dim": 3, "hidden_size": 16, "max_length": 6, "max_ep_len": 40}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "own", "keys"),
    [
        ({"mlp_embedding": True}, {"predict_sr": True}, {"predict_action.fc1.weight", "embed_state.fc2.bias"}),
        ({"mlp_embedding": False}, {"predict_sr": True}, {"predict_action.0.weight", "embed_state.weight"}),
        ({"mlp_embedding": False}, {"action_tanh": False}, {"predict_action.0.bias", "predict_rtg.weight"}),
        ({"share_input_output_proj": True}, {"predict_sr": True}, {"embed_action.weight"}),
    ],
)
def test_the_originals_keys_both_ways(args, own, keys):
    adapter = zoo.reference("decision_mamba")
    config = {**original_config(**args), **own}
    first = DecisionMamba(**arguments_of(config))
    state = adapter.to_reference(first.state_dict(), model=first)
    assert keys <= state.keys()
    assert "transformer_model.lm_head.weight" in state
    assert "transformer_model.backbone.layers.1.mixer_group.A_log" in state
    again = adapter.build(config, state)
    with torch.no_grad():
        a, b = first.eval()(*window()), again(*window())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    bounded = not args.get("mlp_embedding") and own.get("action_tanh", True)
    assert bool((a["actions"].abs() <= 1).all()) or not bounded


def test_heads_follow_the_flags():
    assert set(model(predict_sr=False)(*window())) == {"actions"}
    linear = model(mlp_embedding=False)
    free = model(mlp_embedding=False, action_tanh=False)
    with torch.no_grad():
        torch.testing.assert_close(linear(*window())["actions"], torch.tanh(free(*window())["actions"]))
        shared = model(mlp_embedding=False, share_input_output_proj=True)
        hidden = shared.hidden(*window()).unflatten(1, (-1, 3))
        found = shared(*window())
        torch.testing.assert_close(found["actions"], torch.tanh(hidden[:, :, 1] @ shared.embed_action.weight))
        torch.testing.assert_close(found["states"], hidden[:, :, 2] @ shared.embed_state.weight)


def test_the_originals_features_go_backwards_and_the_causal_ones_do_not():
    states, actions, returns, times = window()
    other = states.clone()
    other[:, -1] += 1
    with torch.no_grad():
        for fine, moves in (("tiled", True), ("causal", False)):
            m = model(fine=fine)
            a, b = m(states, actions, returns, times), m(other, actions, returns, times)
            assert torch.allclose(a["actions"][:, :-1], b["actions"][:, :-1], atol=1e-6) != moves
        # the action of a step never sees itself
        later = actions.clone()
        later[:, -1] += 1
        for fine in ("tiled", "causal"):
            m = model(fine=fine)
            a, b = m(states, actions, returns, times), m(states, later, returns, times)
            torch.testing.assert_close(a["actions"], b["actions"])


def test_the_window_is_padded_with_zeros():
    m = model()
    states, actions, returns, times = window(3)
    padded = [torch.cat([torch.zeros(2, 3, *x.shape[2:], dtype=x.dtype), x], 1) for x in window(3)]
    with torch.no_grad():
        torch.testing.assert_close(m.get_action(*window(3)), m(*padded)["actions"][:, -1])
        long = window(11)
        torch.testing.assert_close(m.get_action(*long), m(*[x[:, -6:] for x in long])["actions"][:, -1])
        free = model(max_length=None)
        torch.testing.assert_close(free.get_action(states, actions, returns, times), free(*window(3))["actions"][:, -1])


def test_the_causal_form_steps():
    m = model(fine="causal")
    states, actions, returns, times = window(9)
    state = m.init_agent(2)
    found = []
    with torch.no_grad():
        for t in range(9):
            found.append(m.decide(state, states[:, t], returns[:, t], times[:, t]))
            m.record(state, actions[:, t], times[:, t])
        whole = m(states, actions, returns, times)["actions"]
    torch.testing.assert_close(torch.stack(found, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tiled"):
        model().init_agent(1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"bias": True, "conv_bias": False}, {"use_bias": True, "use_conv_bias": False}),
        ({"d_conv": 3, "expand": 3, "dt_rank": 5}, {"conv_kernel": 3, "expand": 3, "time_step_rank": 5}),
    ],
)
def test_begins_from_a_language_model(ours, theirs):
    m = model(num_layers=1, **ours)
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        **{"vocab_size": 8, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 1,
           "layer_norm_epsilon": 1e-5, **theirs}
    )  # fmt: skip
    language = transformers.MambaForCausalLM(config).eval()
    m.start_from(language.state_dict())
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        wanted = language.backbone.layers[0].mixer(x)
        torch.testing.assert_close(m.layers[0].mixer(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.layers[0].group_mixer(x), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no 'backbone\.layers\.1\.norm\.weight'"):
        model(**ours).start_from(language.state_dict())
    with pytest.raises(ValueError, match="expected "):
        DecisionMamba(5, 3, 8, 1, d_state=4, **ours).start_from(language.state_dict())


def test_bad_input():
    m = model()
    states, actions, returns, times = window()
    with pytest.raises(ValueError, match=r"states has shape \(2, 6, 4\); expected \(2, 6, 5\)"):
        m(states[..., :4], actions, returns, times)
    with pytest.raises(ValueError, match="actions has shape"):
        m(states, actions[:, :5], returns, times)
    with pytest.raises(ValueError, match="returns_to_go has shape"):
        m(states, actions, returns[..., 0], times)
    with pytest.raises(ValueError, match="fine is 'aligned'"):
        model(fine="aligned")
    with pytest.raises(ValueError, match="only linear embeddings"):
        model(share_input_output_proj=True)
    for args, word in (({"lora": True}, "lora"), ({"extend_positions": True}, "extend_positions")):
        with pytest.raises(ValueError, match=word):
            arguments_of(original_config(**args))
    with pytest.raises(ValueError, match="no configuration key 'n_heads'"):
        arguments_of({**original_config(), "n_heads": 3})


def test_a_silent_configuration_has_the_original_s_defaults():
    """No window, no next states, and transformers' Mamba (32 layers, 50280 tokens), not this model's own defaults."""
    found = arguments_of({"mamba": {"hidden_size": 32}, "args": {}, "state_dim": 5, "act_dim": 3})
    wanted = {"max_length": None, "predict_sr": False, "vocab_size": 50280, "num_layers": 32, "hidden_size": 32}
    assert wanted.items() <= found.items()


@pytest.mark.parametrize(("name", "argument", "value"), [("decision_mamba_micro", "max_length", 0)])
def test_sizes_that_are_none(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        zoo.create(name, device="meta", **{argument: value})
