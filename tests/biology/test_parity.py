"""Parity with the originals: recorded outputs and gradients, keys both ways, and what the flags say of themselves."""

from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.reference import read_golden
from zoo_biology.bio_xlstm import Adapter

TESTS = Path(__file__).parents[1]
FILES = sorted((TESTS / "golden").glob("bio_xlstm__*"))
CELLS = [p for p in FILES if p.stem.endswith(("mlstm_kernels", "slstm_cell"))]  # of the package's operators alone
NETWORKS = [p for p in FILES if p not in CELLS]


def test_there_are_files():
    assert len(NETWORKS) == 5
    assert len(CELLS) == 2


@pytest.mark.parametrize("path", NETWORKS + CELLS, ids=lambda p: p.stem)
def test_golden(path):
    zoo.testing.check_golden(path, grad=True)


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("told", [True, False], ids=["by source", "by arguments"])
def test_keys_run_both_ways(path, told):
    golden = read_golden(path)
    adapter = Adapter()
    model = adapter.build(golden.config, golden.state, source=golden.source if told else "")
    again = adapter.to_reference(model.state_dict(), model=model)
    assert again.keys() == golden.state.keys()
    assert all(torch.equal(again[key], value) for key, value in golden.state.items())


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_published_prefixes_are_read(path):
    """Files hold the network as an attribute: backbone., model. or model.backbone. stand before its keys."""
    golden = read_golden(path)
    bare = {key.removeprefix("backbone."): value for key, value in golden.state.items()}
    for prefix in ("", "backbone.", "model.", "model.backbone."):
        model = Adapter().build(golden.config, {prefix + k: v for k, v in bare.items()}, source=golden.source)
        found = Adapter().run(model, golden.inputs)
        zoo.testing.assert_close(found["logits"], golden.outputs["logits"])


def test_the_layout_of_cuda_checkpoints_is_read():
    golden = read_golden(TESTS / "golden" / "bio_xlstm__slstm_lm.safetensors")
    layer = "xlstm_block_stack.blocks.0.xlstm.slstm_cell."
    heads, width = 2, 8
    state = dict(golden.state)
    plain = state[layer + "_recurrent_kernel_"].view(heads, 4, width, width)
    state[layer + "_recurrent_kernel_"] = plain.permute(0, 3, 1, 2).reshape(heads, width, 4 * width)
    state[layer + "_bias_"] = state[layer + "_bias_"].view(4, heads, width).transpose(0, 1).reshape(-1)
    adapter = Adapter()
    model = adapter.build(golden.config, state, source=golden.source)
    zoo.testing.assert_close(adapter.run(model, golden.inputs)["logits"], golden.outputs["logits"])
    again = adapter.to_reference(model.state_dict(), model=model)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def _config(name):
    return read_golden(TESTS / "golden" / f"bio_xlstm__{name}.safetensors").config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_such_key": 1}, "no_such_key"),
        ({"slstm_block": {"slstm": {"function": "lstm"}}, "slstm_at": [0]}, "function = 'lstm' is not built"),
        ({"slstm_block": {"slstm": {"group_norm_weight": False}}, "slstm_at": [0]}, "group_norm_weight"),
        ({"slstm_block": {"feedforward": {"act_fn": "tanh"}}, "slstm_at": [0]}, "act is 'tanh'"),
        ({"slstm_at": [5]}, r"blocks \[5\]; the network has 2"),
        ({"slstm_at": "none"}, "expected a list of block indices or 'all'"),
        ({"mlstm_block": {"mlstm": {"conv1d_kernel_size": 0}}}, "a convolution of width 0"),
    ],
)
def test_refusals_name_the_setting(change, message):
    with pytest.raises(ValueError, match=message):
        Adapter().build(_config("chem_mlstm_lm") | change, {}, source="NX-AI/xlstm@x:xLSTMLMModel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s_lstm_at": [], "d_model": 32}, "sLSTM blocks alone"),
        ({"s_position_embeddings": True}, "exclude each other"),
        ({"m_backend": "triton", "rcps": False}, "m_backend is 'triton'"),
        ({"vocab_size": 9, "complement_map": None}, "give complement"),
    ],
)
def test_refusals_of_dna(change, message):
    with pytest.raises(ValueError, match=message):
        Adapter().build(_config("dna_rcps_slstm") | change, {}, source="ml-jku/DNA-xLSTM@x:xLSTMLMHeadModel")


@pytest.mark.parametrize(
    ("name", "config", "prefix", "wrapped"),
    [
        ("dna_xlstm_1k_slstm", {"d_model": 32, "num_blocks": 2, "slstm_at": [0, 1]}, "model.backbone.", True),
        ("dna_xlstm_1k_ps", {"d_model": 32, "num_blocks": 2, "slstm_at": [0, 1]}, "backbone.", False),
        ("protxlstm_26m", {"d_model": 32, "num_blocks": 2}, "backbone.", False),
        ("chem_xlstm_15m", {"d_model": 64, "num_blocks": 1}, "model.", False),
    ],
)
def test_a_file_of_the_authors_is_loaded(tmp_path, name, config, prefix, wrapped):
    """A pickled state dict under the originals' keys, as their servers hold it, given as checkpoint=."""
    model = zoo.create(name, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.reference_prefix = prefix
    state = Adapter().to_reference(model.state_dict(), model=model)
    assert all(key.startswith(prefix) for key in state)
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "file.pt")
    if name == "dna_xlstm_1k_ps":  # no weights are known, so the card says nothing of their format
        again = zoo.from_reference("bio_xlstm", DNA_SCRIPT, torch.load(tmp_path / "file.pt", weights_only=True))
    else:
        again = zoo.load(name, checkpoint=tmp_path / "file.pt", **config)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


DNA_SCRIPT = {
    "d_model": 32, "n_layer": 2, "vocab_size": 12, "s_lstm_at": [0, 1], "s_num_heads": 4, "s_proj_factor": 1.1,
    "s_round_proj_up_dim_up": False, "s_round_proj_up_to_multiple_of": 8, "bidirectional": True, "rcps": True,
}  # fmt: skip


def test_a_published_configuration_gives_the_arguments():
    """Prot-xLSTM's config.json is its dataclass as a dictionary, private fields included."""
    config = _config("prot_rot2d_chunkwise") | {"_block_map": "0,0", "slstm_at": [], "slstm_block": None}
    found = Adapter().arguments(config)
    assert found["positions"] == "rot_2d"
    assert (found["max_positions"], found["max_sequences"]) == (24, 8)
    assert zoo.create("protxlstm_26m", **found).d_model == 32
