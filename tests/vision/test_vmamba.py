"""VMamba: parity with the original, every forward type, the habits of a backbone, paths by name."""

from pathlib import Path

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

import zoo
import zoo.testing
from zoo.reference import read_golden
from zoo_registry import load_cards
from zoo_vision.vmamba import VMambaAdapter, forward_type, translate, vmamba

TESTS = Path(__file__).parents[1]
GOLDEN = sorted((TESTS / "golden").glob("vmamba__*.safetensors*"))
TINY = {"depths": (1, 1, 2, 1), "dims": 8, "num_classes": 7}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**config):
    return vmamba(**{**TINY, **config}).eval()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=True)


def test_there_are_files():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_state_dict_goes_back_to_the_original(path):
    golden, adapter = read_golden(path), VMambaAdapter()
    model = adapter.build(golden.config, golden.state, source=golden.source)
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == golden.state.keys()
    for key, tensor in golden.state.items():
        assert torch.equal(back[key], tensor), key


def test_legacy_names_and_segmentor_checkpoints_load():
    golden, adapter = read_golden(TESTS / "golden/vmamba__v0_vanilla.safetensors"), VMambaAdapter()
    old = {}
    for key, tensor in golden.state.items():
        key = key.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        key = key.replace(".op.", ".self_attention.").removeprefix("classifier.")
        old[key.replace(".norm.", ".ln_1.") if ".blocks." in key else key] = tensor
    assert "layers.0.blocks.0.ln_1.weight" in old
    model = adapter.build(golden.config, old, source=golden.source)
    torch.testing.assert_close(model(golden.inputs["image"]), golden.outputs["logits"], rtol=1e-4, atol=1e-4)

    parallel = adapter.build(golden.config, {f"module.{k}": v for k, v in old.items()}, source=golden.source)
    assert torch.equal(parallel(golden.inputs["image"]), model(golden.inputs["image"]))

    golden = read_golden(TESTS / "golden/vmamba__backbone_ln2d.safetensors")
    whole = {f"backbone.{k}": v for k, v in golden.state.items()} | {"decode_head.conv.weight": torch.zeros(1)}
    maps = adapter.build(golden.config, whole, source=golden.source)(golden.inputs["image"])
    torch.testing.assert_close(maps[3], golden.outputs["stage3"], rtol=1e-4, atol=1e-4)


def test_a_backbone_of_the_first_stages_ignores_the_later_ones():
    golden, adapter = read_golden(TESTS / "golden/vmamba__backbone_ln2d.safetensors"), VMambaAdapter()
    config = {**golden.config, "out_indices": [0, 2]}
    state = {k: v for k, v in golden.state.items() if not k.startswith(("outnorm1", "outnorm3"))}
    model = adapter.build(config, state, source=golden.source)
    found = adapter.run(model, golden.inputs)
    for name in ("stage0", "stage2"):
        torch.testing.assert_close(found[name], golden.outputs[name], rtol=1e-4, atol=1e-4)


def test_convolution_weights_of_linear_layers_load():
    golden, adapter = read_golden(TESTS / "golden/vmamba__v05_noz_s2.safetensors"), VMambaAdapter()
    state = {k: v[..., None, None] if "mlp" in k and v.dim() == 2 else v for k, v in golden.state.items()}
    model = adapter.build(golden.config, state, source=golden.source)
    torch.testing.assert_close(model(golden.inputs["image"]), golden.outputs["logits"], rtol=1e-4, atol=1e-4)


# -- what the original can be told ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v0", {"gate": True, "conv": 3, "act": "silu"}),
        ("v05_noz", {"gate": False, "out_norm": "norm"}),
        ("v04_onnone_nozact", {"gate": True, "gate_act": False, "out_norm": "none"}),
        ("v05_oncnorm_noz_oact_no32", {"gate": False, "out_act": True, "out_norm": "norm_conv"}),
        ("v052d_ondwconv3_noz", {"paths": "raster+raster+reverse(raster)+reverse(raster)", "out_norm": "conv"}),
        ("v052dc_onsoftmax_noz", {"core": "cascade", "out_norm": "softmax"}),
        ("m0_noz", {"core": "ssd", "gate": False}),
    ],
)
def test_forward_types(name, expected):
    found = forward_type(name)
    assert {k: found[k] for k in expected} == expected


@pytest.mark.parametrize("name", ["xv1a", "v9", "v05_nozz", "m0"])
def test_other_forward_types_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        forward_type(name)


@pytest.mark.parametrize(
    "options",
    [
        {"forward_type": f"{kind}{norm}{z}", "ssm_init": init}
        for kind, norm, z, init in [
            ("v05", "_onnone", "_noz", "v1"),
            ("v04", "_ondwconv3", "", "v2"),
            ("v03", "_oncnorm", "_nozact", "v0"),
            ("v051d", "_onsoftmax", "_noz", "v0"),
            ("v052d", "_onsigmoid", "_noz_oact", "v0"),
        ]
    ]
    + [
        {"norm_layer": "BN", "downsample_version": "v2"},
        {"gmlp": True, "mlp_act_layer": "silu"},
        {"ssm_conv": -1, "ssm_act_layer": "relu"},
        {"ssm_ratio": 0.0},
        {"mlp_ratio": 0.0, "ssm_dt_rank": 3},
        {"patch_norm": False, "patchembed_version": "v1", "downsample_version": "v1"},
    ],
    ids=str,
)
def test_every_flag_builds_trains_and_goes_back(options):
    config = {"depths": [1, 1, 1, 1], "dims": 8, "ssm_d_state": 2, "forward_type": "v05_noz", **options}
    adapter = VMambaAdapter()
    model = vmamba(**translate(config))
    state = model.state_dict()
    again = adapter.build(config, adapter.to_reference(state, model=model))
    x = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(again(x), model.eval()(x))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_any_number_of_stages(stages):
    config = {"depths": [1] * stages, "dims": 4, "ssm_d_state": 2, "forward_type": "v05_noz", "num_classes": 5}
    adapter = VMambaAdapter()
    model = vmamba(**translate(config)).eval()
    state = adapter.to_reference(model.state_dict(), model=model)
    assert f"layers.{stages - 1}.blocks.0.norm.weight" in state
    x = torch.randn(1, 3, 64, 96)
    found = adapter.run(adapter.build(config, state), {"image": x})
    torch.testing.assert_close(found["logits"], model(x))
    assert found["mid/final_norm"].shape == (1, *(max(n >> stages + 1, 1) for n in (64, 96)), 4 << stages - 1)
    pyramid = vmamba(**translate(config), features_only=True)
    assert [tuple(m.shape[1:]) for m in pyramid(x)] == [
        (4 << i, max(16 >> i, 1), max(24 >> i, 1)) for i in range(stages)
    ]
    with pytest.raises(ValueError, match="depths"):
        vmamba(depths=[1] * stages, dims=[4] * (stages + 1))


def test_an_odd_patch_is_halved_downwards():
    config = {"depths": [1, 1, 1, 1], "dims": 8, "forward_type": "v05_noz", "patch_size": 5, "patchembed_version": "v2"}
    model = vmamba(**translate(config)).eval()
    assert model.patch_embed.conv1.weight.shape[2:] == (3, 3)  # stride 2, kernel 3, as of patch size 4
    assert model.patch_embed(torch.randn(1, 3, 50, 34)).shape == (1, 13, 9, 8)
    assert model.feature_info[0]["reduction"] == 4
    with pytest.raises(ValueError, match="patch_size is 1"):
        vmamba(**translate({**config, "patch_size": 1}))


def test_what_the_original_swallows_changes_nothing():
    plain = {"depths": [1, 1, 1, 1], "dims": 8, "forward_type": "v05_noz"}
    assert translate({**plain, "post_norm": True, "ssm_rank_ratio": 2.0}) == translate(plain)


def test_layouts_and_tables_are_the_originals():
    golden, adapter = read_golden(TESTS / "golden/vmamba__backbone_ln2d.safetensors"), VMambaAdapter()
    config = {k: v for k, v in golden.config.items() if k != "norm_layer"}  # its backbone starts from "ln"
    model = adapter.build(config, golden.state, source=golden.source)
    found = adapter.run(model, golden.inputs)
    torch.testing.assert_close(found["stage3"], golden.outputs["stage3"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found["mid/patch_embed"].permute(0, 3, 1, 2), golden.mids["patch_embed"], rtol=1e-4, atol=1e-4
    )

    golden = read_golden(TESTS / "golden/vmamba__v3_gate.safetensors")  # it resamples the table on loading
    model = adapter.build({**golden.config, "imgsize": 96}, golden.state, source=golden.source)
    wanted = torch.nn.functional.interpolate(golden.state["pos_embed"], size=(24, 24), mode="bicubic")
    torch.testing.assert_close(model.pos_embed.data, wanted)


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="ssm_ratoi"):
        VMambaAdapter().build({"ssm_ratoi": 2.0}, {})
    with pytest.raises(ValueError, match="ssm_init"):
        translate({"forward_type": "m0_noz", "ssm_init": "v0"})


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_scan_strategy_is_a_name():
    model = zoo.create("vmamba_tiny", paths="hilbert+reverse(hilbert)", **TINY).eval()
    scan = model.stages[0].blocks[0].op.scan
    assert scan.x_proj.shape[0] == 2
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match="hilbret"):
        tiny(paths="hilbret")


def test_paths_decide_what_reaches_what():
    """Seen from the first token, one row-major walk shows nothing of what comes later, four ways show all."""
    for paths, sees in (("raster", False), ("cross", True)):
        op = tiny(paths=paths, conv=-1).stages[0].blocks[0].op
        x = torch.randn(1, 6, 5, 8, requires_grad=True)
        op(x)[0, 0, 0].sum().backward()
        assert (x.grad[0, 3, 3].abs().sum() > 0) == sees


def test_cross_is_equivariant_to_transposition():
    """Transposing the image and exchanging the row and column sets of parameters transposes the result."""
    scan = tiny().stages[0].blocks[0].op.scan
    x = torch.randn(2, 6, 5, 8)
    y = scan(x)
    with torch.no_grad():
        for p in scan.parameters():
            p.copy_(p[[1, 0, 3, 2]])
    torch.testing.assert_close(scan(x.transpose(1, 2)), y.transpose(1, 2), rtol=1e-5, atol=1e-6)


# -- habits -----------------------------------------------------------------------------------------------------------


def test_pyramid_feeds_an_fpn():
    model = zoo.create("vmamba_tiny_s1l8", features_only=True, **TINY).eval()
    channels = model.feature_info.channels()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.randn(1, 3, 96, 64))
    fpn = FeaturePyramidNetwork(channels, 16)
    merged = fpn({str(i): m for i, m in enumerate(maps)})
    assert [tuple(m.shape[1:]) for m in merged.values()] == [(16, 24, 16), (16, 12, 8), (16, 6, 4), (16, 3, 2)]


def test_pyramid_norms_are_an_option():
    plain = tiny(features_only=True, out_indices=(1, 2), pyramid_norm=False)
    assert not any("out_norms" in k for k in plain.state_dict())
    normed = tiny(features_only=True, out_indices=(1, 2))
    assert sorted(normed.out_norms) == ["1", "2"]
    maps = normed(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [16, 32]
    torch.testing.assert_close(maps[0].mean(1), torch.zeros_like(maps[0].mean(1)), atol=1e-5, rtol=0)


def test_a_classifier_checkpoint_fills_a_pyramid(tmp_path):
    model = zoo.create("vmamba_tiny_s1l8", **TINY)
    zoo.save(model, tmp_path / "m")
    pyramid = zoo.load(tmp_path / "m", features_only=True)
    assert torch.equal(pyramid.stages[0].blocks[0].op.in_proj.weight, model.stages[0].blocks[0].op.in_proj.weight)
    assert any("out_norms" in text for text in pyramid.zoo_info.changes)
    x = torch.randn(1, 3, 64, 64)
    last = model.eval().forward_intermediates(x, [3], intermediates_only=True)[0]
    expected = torch.nn.functional.layer_norm(last.permute(0, 2, 3, 1), (64,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(pyramid(x)[3], expected, rtol=1e-4, atol=1e-5)


def test_position_table_is_resampled_on_request_alone():
    model = tiny(pos_embed=True, img_size=64)
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.randn(1, 3, 96, 64))
    model.set_input_size((96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 7)


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny().train()
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-6, msg=key)


def test_channels_last_and_odd_sizes():
    model = tiny()
    x = torch.randn(2, 3, 50, 70)
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)),
        model(x),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny", "vmamba_tiny_m2"])
def test_compiles_and_exports(name):
    assert zoo.testing.check_compile(name)
    assert zoo.testing.check_export(name)


def test_stochastic_depth_drops_whole_samples():
    model = tiny(drop_path_rate=0.5).train()
    rates = [b.drop_path.rate for s in model.stages for b in s.blocks]
    assert rates[0] == 0.0
    assert rates[-1] == 0.5
    drop = model.stages[3].blocks[0].drop_path
    y = drop(torch.ones(64, 2, 2, 3)).flatten(1)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y.min(1).values, y.max(1).values)


# -- published files --------------------------------------------------------------------------------------------------


def test_published_formats_load_by_tag(tmp_path):
    """A training checkpoint (weights under "model") and a detector's (under "state_dict", below "backbone.")."""
    small = {"depths": (1, 1, 2, 1), "dims": 8}
    adapter, x, file = VMambaAdapter(), torch.randn(1, 3, 64, 64), tmp_path / "published.pth"
    model = zoo.create("vmamba_tiny_s1l8", **small).eval()
    torch.save({"model": adapter.to_reference(model.state_dict(), model=model), "epoch": 3}, file)
    torch.testing.assert_close(zoo.load("vmamba_tiny_s1l8.in1k", checkpoint=file, **small)(x), model(x))

    pyramid = zoo.create("vmamba_tiny_s1l8.coco_mask_rcnn_1x", **small).eval()
    state = {f"backbone.{k}": v for k, v in adapter.to_reference(pyramid.state_dict(), model=pyramid).items()}
    torch.save({"meta": {}, "state_dict": state | {"neck.conv.weight": torch.zeros(2)}}, file)
    again = zoo.load("vmamba_tiny_s1l8.coco_mask_rcnn_1x", checkpoint=file, **small)
    for found, expected in zip(again(x), pyramid(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_published_checkpoint_has_a_card_and_a_place():
    cards = [c for c in load_cards("zoo_vision") if c.system == "vmamba"]
    weights = [w for c in cards for w in c.weights.values() if w.package_file is None]
    # 9 classifiers, 8 + 5 detectors, 7 segmentors, and the latter once more as wholes with their heads
    assert len(weights) == 29 + 13 + 7
    places = {w.where for w in weights}
    assert len(places) == 29
    assert all(p.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v") for p in places)
    assert all(w.metrics for w in weights)
    with pytest.raises(zoo.errors.NotOnHub, match="vssm1_tiny_0230s_ckpt_epoch_264"):
        zoo.load("vmamba_tiny")


def test_the_demo_scores_what_its_card_says():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    from PIL import Image
    from sklearn.model_selection import train_test_split

    _, images, _, labels = train_test_split(
        digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    pipe = zoo.pipeline("vmamba_micro.digits")
    drawn = [
        Image.fromarray((i / 16 * 255).round().astype("uint8")).resize((64, 64), Image.Resampling.BICUBIC)
        for i in images
    ]
    with torch.no_grad():
        found = pipe.model(torch.stack([pipe.prepare(i) for i in drawn])).argmax(1)
    score = 100 * (found.numpy() == labels).mean()
    (stated,) = zoo.info("vmamba_micro.digits").weights.metrics
    assert score == pytest.approx(stated.value, abs=0.25)  # one image is 0.22
