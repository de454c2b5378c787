"""Vim, MambaOut, EfficientViM and MambaVision against the originals: recorded tensors, keys both ways."""

import argparse
from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.reference import read_golden

TESTS = Path(__file__).parents[1]
SYSTEMS = ("vim", "mambaout", "efficientvim", "mambavision")
GOLDEN = [p for s in SYSTEMS for p in sorted((TESTS / "golden").glob(f"{s}__*.safetensors*"))]
#: ablations that the golden files leave out, recorded from the originals in the same format
RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.safetensors"))


def test_there_are_files():
    assert (len(GOLDEN), len(RECORDED)) == (13, 11)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=True, grad_tolerance=1e-4)


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.name.split(".")[0])
def test_recorded(path):
    zoo.testing.check_golden(path)


@pytest.mark.parametrize("path", GOLDEN + RECORDED, ids=lambda p: p.name.split(".")[0])
def test_state_dict_goes_back_to_the_original(path):
    golden = read_golden(path)
    adapter = zoo.reference(golden.system)
    model = adapter.build(golden.config, golden.state, source=golden.source)
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == golden.state.keys()
    for key, tensor in golden.state.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("path", GOLDEN + RECORDED, ids=lambda p: p.name.split(".")[0])
def test_the_class_follows_from_arguments_and_keys(path):
    """Users bring a config and a state dict; they need not name the class."""
    golden = read_golden(path)
    adapter = zoo.reference(golden.system)
    named = adapter.build(golden.config, golden.state, source=golden.source)
    assert type(adapter.build(golden.config, golden.state)) is type(named)


@pytest.mark.parametrize("system", SYSTEMS)
def test_unknown_arguments_are_refused_by_name(system):
    with pytest.raises(ValueError, match="no argument 'd_stat'"):
        zoo.reference(system).build({"d_stat": 3}, {})


def test_missing_and_unexpected_keys_are_named():
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    adapter = zoo.reference("vim")
    state = dict(golden.state)
    state["layers.0.mixer.nonsense"] = torch.zeros(1)
    with pytest.raises(zoo.errors.KeysDoNotMatch, match="nonsense"):
        adapter.build(golden.config, state)
    del state["layers.0.mixer.nonsense"], state["norm_f.weight"]
    with pytest.raises(zoo.errors.KeysDoNotMatch, match="norm_f"):
        adapter.build(golden.config, state)
    del state["layers.0.mixer.x_proj_b.weight"]
    with pytest.raises(ValueError, match="needs all of them together"):
        adapter.build(golden.config, state)


def test_what_the_originals_swallow_is_ignored_and_what_they_refuse_is_refused():
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    adapter = zoo.reference("vim")
    adapter.build(
        {**golden.config, "if_devide_out": False, "pretrained_cfg": None, "drop_block_rate": None}, golden.state
    )
    with pytest.raises(ValueError, match="final_pool_type"):
        adapter.build({**golden.config, "final_pool_type": "avg"}, golden.state)
    with pytest.raises(ValueError, match="layer_idx"):
        adapter.build({**golden.config, "ssm_cfg": {"layer_idx": 3}}, golden.state)
    seg = read_golden(TESTS / "golden/vim__seg_backbone.safetensors")
    with pytest.raises(ValueError, match="in_chans is its d_state"):
        adapter.build({**seg.config, "d_state": 4}, seg.state, source=seg.source)


def test_a_checkpoint_of_parallel_training_loads():
    golden = read_golden(TESTS / "golden/mambavision__tiny_flavour.safetensors")
    adapter = zoo.reference("mambavision")
    for prefix in ("module.", "model."):
        model = adapter.build(golden.config, {prefix + k: v for k, v in golden.state.items()})
        torch.testing.assert_close(model(golden.inputs["image"]), golden.outputs["logits"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stem", ["vim__midclstok_v2", "mambaout__original", "mambaout__timm_plus_rw"])
def test_parallel_training_hides_neither_class_nor_format(stem):
    golden = read_golden(TESTS / f"golden/{stem}.safetensors")
    adapter = zoo.reference(golden.system)
    model = adapter.build(golden.config, {"module." + k: v for k, v in golden.state.items()})
    found = adapter.run(model, golden.inputs)
    for name, expected in golden.outputs.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("stem", "prefix"), [("vim__seg_backbone", "backbone."), ("vim__det_backbone", "backbone.net.")]
)
def test_vims_backbone_is_found_in_a_segmentor_and_a_detector(stem, prefix):
    golden = read_golden(TESTS / f"golden/{stem}.safetensors")
    adapter = zoo.reference("vim")
    heads = {"decode_head.conv.weight": torch.zeros(1), "backbone.simfp_2.0.weight": torch.zeros(1)}
    whole = {prefix + k: v for k, v in golden.state.items()}
    whole |= heads if prefix != "backbone." else {"decode_head.conv.weight": torch.zeros(1)}
    model = adapter.build(golden.config, whole, source=golden.source)
    name = next(iter(golden.outputs))
    torch.testing.assert_close(adapter.run(model, golden.inputs)[name], golden.outputs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem", ["vim__midclstok_v2", "efficientvim__plain", "mambavision__tiny_flavour"])
def test_a_users_checkpoint_in_the_originals_format_loads(stem, tmp_path):
    """As the originals' scripts write it, arguments and all; EfficientViM's keys are ours, its shapes are not."""
    golden = read_golden(TESTS / f"golden/{stem}.safetensors")
    names = {"vim": "vim_tiny", "efficientvim": "efficientvim_m1", "mambavision": "mambavision_tiny_1k"}
    shared = ("img_size", "depth", "embed_dim", "d_state", "depths", "state_dim", "mlp_ratio", "dim", "in_dim",
              "window_size", "num_heads")  # fmt: skip
    name, config = names[golden.system], {k: v for k, v in golden.config.items() if k in shared}
    if golden.system == "efficientvim":
        config.pop("in_dim")  # the image channels there
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": golden.state, "state_dict": golden.state, "args": argparse.Namespace(lr=1e-3)}, file)
    key = {"mambavision": "state_dict"}.get(golden.system, "model")
    model = zoo.load(name, checkpoint=file, subkey=key, num_classes=10, **config)
    torch.testing.assert_close(model(golden.inputs["image"]), golden.outputs["logits"], rtol=1e-3, atol=1e-3)


def test_detection_checkpoints_give_backbone_and_neck():
    golden = read_golden(TESTS / "golden/efficientvim__dense_fpn.safetensors")
    adapter = zoo.reference("efficientvim")
    heads = {"roi_head.bbox_head.fc_cls.weight": torch.zeros(2, 2), "rpn_head.rpn_cls.bias": torch.zeros(1)}
    whole = golden.state | heads
    model = adapter.build(golden.config, whole)
    torch.testing.assert_close(model(golden.inputs["image"])[0], golden.outputs["fpn0"], rtol=1e-4, atol=1e-4)


def test_timm_and_original_keys_give_the_same_mambaout():
    golden = read_golden(TESTS / "golden/mambaout__original.safetensors")
    adapter = zoo.reference("mambaout")
    original = adapter.build(golden.config, golden.state)
    ours = {k: v.clone() for k, v in original.state_dict().items()}
    timm_config = {k: v for k, v in golden.config.items() if k != "head_dropout"}
    again = adapter.build(timm_config, ours)
    assert torch.equal(original(golden.inputs["image"]), again(golden.inputs["image"]))
    assert adapter.to_reference(ours).keys() == golden.state.keys()  # without a model: the original's format


def test_a_recorded_permutation_and_class_position_are_replayed():
    """Random orders of the original, given as inputs: the identity changes nothing, another order does."""
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    adapter = zoo.reference("vim")
    model = adapter.build(golden.config, golden.state)
    image = golden.inputs["image"]
    tokens = model.pos_embed.shape[1]
    with torch.no_grad():
        same = adapter.run(model, {"image": image, "shuffle_indices": torch.arange(tokens)})
        other = adapter.run(model, {"image": image, "shuffle_indices": torch.arange(tokens).flip(0)})
    torch.testing.assert_close(same["features"], golden.outputs["features"], rtol=1e-4, atol=1e-4)
    assert (other["features"] - same["features"]).abs().max() > 1e-3
    head = adapter.build({**golden.config, "use_middle_cls_token": False}, golden.state)
    with torch.no_grad():
        moved = adapter.run(head, {"image": image, "token_position": torch.tensor((tokens - 1) // 2)})
    torch.testing.assert_close(moved["features"], golden.outputs["features"], rtol=1e-4, atol=1e-4)


def test_vims_slow_path_walks_forwards_alone():
    """The mixer's own path without the fused operator never reads the backward parameters, nor halves."""
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    adapter, image = zoo.reference("vim"), golden.inputs["image"]
    slow = adapter.build({**golden.config, "ssm_cfg": {"use_fast_path": False}}, golden.state)
    one_way = {k: v for k, v in golden.state.items() if "_b." not in k and not k.endswith(("A_b_log", "D_b"))}
    assert len(one_way) < len(golden.state)
    plain = adapter.build({**golden.config, "bimamba_type": "none"}, one_way)
    assert torch.equal(slow(image), plain(image))
    fast = adapter.build({**golden.config, "ssm_cfg": {"use_fast_path": True}}, golden.state)
    torch.testing.assert_close(fast(image), golden.outputs["logits"], rtol=1e-4, atol=1e-4)


def test_vims_maximum_is_over_axis_1_whatever_that_is():
    """Of a class token's logits it is over the classes: (batch,)."""
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    adapter = zoo.reference("vim")
    model = adapter.build({**golden.config, "final_pool_type": "max"}, golden.state)
    found = adapter.run(model, golden.inputs)
    torch.testing.assert_close(found["logits"], golden.outputs["logits"].amax(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["features"], golden.outputs["features"], rtol=1e-4, atol=1e-4)


def test_a_vim_without_blocks_normalises_its_tokens():
    """A single layer makes no pair: the original then skips it, and has no residual to add."""
    golden = read_golden(TESTS / "golden/vim__midclstok_v2.safetensors")
    state = {k: v for k, v in golden.state.items() if not k.startswith(("layers.1.", "layers.2."))}
    model = zoo.reference("vim").build({**golden.config, "depth": 1, "if_bidirectional": True}, state)
    tokens, _, slots = model.embed(golden.inputs["image"])
    torch.testing.assert_close(model(golden.inputs["image"]), model.head(model.norm_f(tokens[:, slots[0]])))


def test_the_detection_backbones_map_has_the_name_that_was_given():
    golden = read_golden(TESTS / "golden/vim__det_backbone.safetensors")
    adapter = zoo.reference("vim")
    model = adapter.build({**golden.config, "out_feature": "p4"}, golden.state, source=golden.source)
    torch.testing.assert_close(
        adapter.run(model, golden.inputs)["p4"], golden.outputs["last_feat"], rtol=1e-4, atol=1e-4
    )


def test_taps_behind_the_last_block_give_nothing():
    """As the original's default list for 12 blocks does in a shallower backbone."""
    golden = read_golden(TESTS / "golden/vim__seg_backbone.safetensors")
    adapter = zoo.reference("vim")
    config = {k: v for k, v in golden.config.items() if k != "out_indices"} | {"if_fpn": False}
    state = {k: v for k, v in golden.state.items() if not k.startswith("fpn")}
    found = adapter.run(adapter.build(config, state, source=golden.source), golden.inputs)  # blocks 3, 5, 7, 11 of 4
    hidden = found["mid/layer3_hidden"]
    assert "feat1" not in found
    torch.testing.assert_close(found["feat0"], hidden.transpose(1, 2).unflatten(2, (4, 4)))
    config["use_residual_as_feature"] = True  # the stream after the loop is for a list that ends at the last block
    found = adapter.run(adapter.build(config, state, source=golden.source), golden.inputs)
    assert not any(name.startswith("feat") for name in found)
