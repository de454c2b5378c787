"""Phi-Mamba's format: blocks of different settings, teachers of different shapes, what it refuses."""

import copy
import logging

import pytest
import torch

import zoo
from zoo_language.mohawk import hidden_state_loss, matrix_loss
from zoo_language.phi_mamba import PhiMambaLM
from zoo_language.phi_mamba_formats import arguments_of

MIXER, ATTENTION = "modules.mixers.discrete_mamba2", "modules.mixers.phi_attention"


def block(layers, core=None):
    kind = ATTENTION if core is None else MIXER
    return {"n_layers": layers, "BlockType": "modules.phi_block", "CoreType": kind, "core_input": core or {}}


def config(*blocks, d_model=16):
    body = {"d_model": d_model, "n_layer": sum(b["n_layers"] for b in blocks), "lm_head_prenorm": "layer"}
    named = {f"Block{i + 1}": b for i, b in enumerate(blocks)}
    return {"LanguageModel": {"input": {"vocab_size": 40}}, "MixerModel": {"input": body}} | named


def core(**settings):
    return {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 4, **settings}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def test_each_group_of_blocks_has_its_own_mixer(ids):
    groups = [core(d_state=6, bias=True), core(n_v_heads=2, n_qk_heads=1, d_conv=2, expand=2, activation="silu")]
    given = config(block(1, groups[0]), block(1), block(2, groups[1]))
    arguments = arguments_of(given)
    assert arguments["blocks"] == ["mamba", "attention", "mamba", "mamba"]
    assert arguments["heads"] == 4
    torch.manual_seed(0)
    model = PhiMambaLM(**arguments).eval()
    found = [(m.d_state, m.v_heads, m.qk_heads, m.d_conv, m.d_inner, m.activation) for m in
             (model.layers[i].mixer for i in (0, 2, 3))]  # fmt: skip
    assert found == [(6, 4, 4, 4, 16, None)] + [(4, 2, 1, 2, 32, "silu")] * 2
    assert [model.layers[i].mixer.z_bias is None for i in (0, 2)] == [True, False]
    adapter = zoo.reference("phi_mamba")
    again = adapter.build(given, adapter.to_reference(model.state_dict(), model=model))
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


def test_equal_mixers_are_written_once():
    assert isinstance(arguments_of(config(block(1, core()), block(1), block(1, core())))["mixer"], dict)


def test_a_teacher_turns_the_share_that_its_configuration_says(ids):
    student = config(block(1, core(n_v_heads=2, n_qk_heads=2)))
    torch.manual_seed(1)
    teacher = PhiMambaLM(40, 16, ["attention"], heads=2, rotary_share=0.25, pad_vocab_size_multiple=1).eval()
    names = {"embedding.": "embed_tokens.", "norm_f.": "final_layernorm.", ".mixer.": ".self_attn."}
    state = {}
    for key, value in teacher.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[f"teacher.{key}"] = value
    own = PhiMambaLM(**arguments_of(student))
    adapter = zoo.reference("phi_mamba")
    state |= {f"student.{k}": v for k, v in adapter.to_reference(own.state_dict(), model=own).items()}
    shape = {"hidden": 16, "heads": 2, "layers": 1, "vocab": 40}
    for share, same in ((0.25, True), (0.5, False)):
        pair = adapter.build({"student": student, "teacher": shape | {"partial_rotary_factor": share}}, state)
        found = adapter.run(pair, {"input_ids": ids})["teacher_logits"]
        assert torch.allclose(found, teacher(ids)) == same


def test_what_the_original_does_not_have_is_refused(caplog):
    good = config(block(1, core()))
    for where, value, message in (
        (("MixerModel", "input", "n_layer"), 3, "n_layer is 3, the blocks have 1"),
        (("MixerModel", "input", "lm_head_prenorm"), "rms", "lm_head_prenorm is 'rms'"),
        (("Block1", "CoreType"), "modules.mixers.gla", "modules.mixers.gla"),
        (("Block1", "core_input", "activation"), "relu", "activation is 'relu'"),
    ):
        bad = copy.deepcopy(good)
        inner = bad
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        with pytest.raises(ValueError, match=message):
            arguments_of(bad)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        arguments_of(config(block(1, core(colour=1))))
    assert "['colour'] change nothing" in caplog.text
    with pytest.raises(ValueError, match="mixer lists 1 layers, blocks 2"):
        PhiMambaLM(40, 16, ["mamba", "mamba"], [{}])


def test_losses_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"mixing matrices are \(1, 4, 3, 3\), the teacher's \(1, 2, 3, 3\)"):
        matrix_loss(torch.zeros(1, 4, 3, 3), torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="hidden states"):
        hidden_state_loss(torch.zeros(1, 3, 8), torch.zeros(1, 3, 1))
