"""What users of timm expect of Vim, MambaOut, EfficientViM and MambaVision, beside the contract of every card."""

import pytest
import timm
import timm.data
import timm.optim
import torch
from torchvision.ops import FeaturePyramidNetwork

import zoo
import zoo.testing
import zoo_vision
from zoo_vision._base import check_indices
from zoo_vision.vim import Vim
from zoo_vision.vim_dense import SimpleFeaturePyramid, VimDet, VimSeg
from zoo_vision.vim_parts import resample_positions

#: one card a family, built tiny
NAMES = ["vim_tiny_patch16_224", "mambaout_femto", "efficientvim_m1", "efficientvim_m1_dist", "mambavision_base_1k"]
VIM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "d_state": 4, "num_classes": 7}


def tiny(name, **overrides):
    case = zoo.testing.case(name)
    return case.build(**overrides), case.inputs()[""]


@pytest.mark.parametrize("name", NAMES)
def test_pyramid_feeds_an_fpn_head(name):
    model, x = tiny(name, features_only=True)
    maps = model(x)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert [m.shape[1] for m in maps] == channels
    assert [(-(-x.shape[2] // s), -(-x.shape[3] // s)) for s in strides] == [tuple(m.shape[2:]) for m in maps]
    fpn = FeaturePyramidNetwork(channels, 8)
    out = fpn({str(i): m for i, m in enumerate(maps)})
    sum(o.square().mean() for o in out.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without


@pytest.mark.parametrize("name", NAMES)
def test_pyramid_maps_are_those_of_the_whole_model(name):
    whole, x = tiny(name)
    indices = [0, len(whole.feature_info) - 1]
    part, _ = tiny(name, features_only=True, out_indices=indices)
    state = {k: v for k, v in whole.state_dict().items() if k not in part.dropped_keys}
    part.load_state_dict(state)
    expected = whole.eval().forward_intermediates(x, indices, intermediates_only=True)
    for found, wanted in zip(part.eval()(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    nhwc = (
        whole.forward_intermediates(x, [indices[0]], output_fmt="NHWC", intermediates_only=True)
        if (
            "efficientvim" not in name  # timm's model gives NCHW only
        )
        else [expected[0].permute(0, 2, 3, 1)]
    )
    torch.testing.assert_close(nhwc[0], expected[0].permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_pyramid_loads_a_classifiers_checkpoint(name, tmp_path):
    whole, x = tiny(name)
    zoo.save(whole, tmp_path / "m")
    maps = zoo.load(tmp_path / "m", features_only=True)(x)
    expected = whole.eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(maps[-1], expected[-1])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_equal_gradients(name):
    grads = []
    for enabled in (False, True):
        model, x = tiny(name)
        model.eval()  # batch norms would otherwise count a recomputed batch twice
        model.set_grad_checkpointing(enabled)
        model(x).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_answer(name):
    model, x = tiny(name)
    model.eval()
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    zoo.testing.assert_close(found, expected, tolerance=1e-4, what=name)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "mambavision_base_1k", "efficientvim_m1"])
def test_onnxruntime_gives_the_same_answer(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    smaller = {"depth": 2, "patch_size": 16, "stride": 16} if name.startswith("vim") else {}
    model, x = tiny(name, **smaller)
    made = zoo.export(model, tmp_path / "m.onnx", inputs=x)
    assert made.dynamic == ("batch",)
    assert made.difference <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_for_recipes(name):
    model, _ = tiny(name)
    free = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    assert set(free) <= set(dict(model.named_parameters()))
    layers = timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.7)
    assert sum(len(g["params"]) for g in layers) == len([p for p in model.parameters() if p.requires_grad])
    assert len({g["lr_scale"] for g in layers}) > 1


def test_feature_indices_are_checked():
    assert check_indices(None, 4) == 4
    assert check_indices([-1, 0], 4) == [0, 3]
    for bad in (0, 5, [], [4], [-5]):
        with pytest.raises(ValueError, match="feature"):
            check_indices(bad, 4)
    with pytest.raises(ValueError, match="features_only"):
        tiny("vim_tiny_patch16_224", out_indices=[1])
    with pytest.raises(ValueError, match="output_fmt"):
        Vim(**VIM).forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")


# -- timm's registry ---------------------------------------------------------------------------------------------------


def test_timm_creates_our_models():
    zoo_vision.register_timm()
    assert zoo_vision.register_timm() == []  # once is enough
    assert {"vim_tiny", "vim_tiny_patch16_224", "mambavision_tiny_1k"} <= set(timm.list_models("*"))
    assert "vim_tiny.in1k" in timm.list_pretrained("vim_tiny*")
    model = timm.create_model("vim_tiny", num_classes=3, depth=1, img_size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    maps = timm.create_model("vim_tiny", features_only=True, out_indices=(0, 1), depth=2, img_size=32)
    assert [m.shape for m in maps(torch.zeros(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert timm.create_model("mambaout_femto").__class__.__module__ == "timm.models.mambaout"  # timm's own stays


def test_timm_loads_the_demo_checkpoint():
    zoo_vision.register_timm()
    model = timm.create_model("vim_micro.digits", pretrained=True)
    assert model.pretrained_cfg["tag"] == "digits"
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.5,)


# -- Vim ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ["middle", "head", "double", "none"])
def test_other_image_sizes(cls):
    model = Vim(**VIM, cls_token=cls, dynamic_img_size=True).eval()
    assert model(torch.randn(2, 3, 40, 56)).shape == (2, 7)
    fixed = Vim(**VIM, cls_token=cls)
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        fixed(torch.randn(1, 3, 40, 56))


def test_position_tables_are_resampled_with_the_class_token_in_its_place():
    table = torch.zeros(1, 17, 2)
    table[0, 8] = 100.0  # the class token of a 4 x 4 grid
    table[0, [i for i in range(17) if i != 8], 0] = torch.arange(16.0)
    grown = resample_positions(table, (4, 4), (6, 6), "middle")
    assert grown.shape == (1, 37, 2)
    assert torch.equal(grown[0, 18], table[0, 8])
    rest = torch.cat([grown[:, :18], grown[:, 19:]], dim=1)
    assert rest.abs().max() < 20  # the class token did not leak into the image
    assert torch.equal(resample_positions(table, (4, 4), (4, 4), "middle"), table)


def test_a_checkpoint_loads_at_another_size(tmp_path):
    model = Vim(**VIM)
    case = zoo.testing.case("vim_tiny_patch16_224")
    model = case.build(dynamic_img_size=False)
    zoo.save(model, tmp_path / "m")
    larger = zoo.load(tmp_path / "m", img_size=48)
    assert any("pos_embed" in change for change in larger.zoo_info.changes)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 7)
    expected = resample_positions(model.pos_embed, (4, 4), (6, 6), "middle")
    torch.testing.assert_close(larger.pos_embed, expected)


@pytest.mark.parametrize("cls", ["middle", "head", "double", "none"])
def test_naming_the_default_paths_changes_nothing(cls):
    """The walk with index tensors, class tokens inserted, equals the two raster directions."""
    torch.manual_seed(0)
    default = Vim(**VIM, cls_token=cls).eval()
    named = Vim(**VIM, cls_token=cls, paths="raster + reverse(raster)").eval()
    named.load_state_dict(default.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(named(x), default(x), rtol=1e-4, atol=1e-5)


def test_scan_paths_by_name():
    x = torch.randn(2, 3, 32, 32)
    model = zoo.create("vim_tiny", paths="hilbert + reverse(hilbert)", **VIM)
    assert model(x).shape == (2, 7)
    four = Vim(**VIM, paths="cross")
    assert four.layers[0].mixer.scan.A_log.shape[0] == 4
    four(x).sum().backward()
    assert Vim(**VIM, mixer="none", paths="column")(x).shape == (2, 7)
    with pytest.raises(ValueError, match="unknown path"):
        Vim(**VIM, paths="hilbrt")
    with pytest.raises(ValueError, match="walks one"):
        Vim(**VIM, mixer="none", paths="cross")
    with pytest.raises(ValueError, match="takes no other paths"):
        Vim(**VIM, paired_layers=True, paths="cross")
    with pytest.raises(ValueError, match="holds one or two"):
        zoo.reference("vim").to_reference(four.state_dict(), model=four)


def test_arguments_are_checked():
    for bad in ({"mixer": "v3"}, {"cls_token": "start"}, {"pool": "token"}):
        with pytest.raises(ValueError, match="expected one of"):
            Vim(**VIM, **bad)
    with pytest.raises(zoo.errors.BadArgument, match="embed_dim"):
        zoo.create("vim_tiny", embed_dims=3)
    with pytest.raises(ValueError, match="even number of patches"):
        Vim(**{**VIM, "img_size": 40}, rope=True, cls_token="none")(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="reads its class token"):
        Vim(**VIM).reset_classifier(3, global_pool="mean")


def test_low_precision_keeps_the_stream_in_float32():
    model = Vim(**VIM).eval().to(torch.bfloat16)
    streams = []
    model.layers[2].register_forward_hook(lambda _m, _i, out: streams.append(out[1].dtype))
    out = model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert streams == [torch.float32]


def test_dense_backbones():
    common = {"embed_dim": 8, "depth": 4, "d_state": 2}
    seg = VimSeg(img_size=64, out_indices=[0, 1, 2, 3], **common)
    assert [m.shape[2] for m in seg(torch.randn(2, 3, 64, 64))] == [16, 8, 4, 2]
    assert seg.feature_info.reduction() == [4, 8, 16, 32]
    det = VimDet(img_size=64, last_layer="add", rope=True, rope_residual=True, **common)
    pyramid = SimpleFeaturePyramid(8, 16)
    maps = pyramid(det(torch.randn(1, 3, 64, 64))[0])
    assert [tuple(m.shape[1:]) for m in maps] == [(16, n, n) for n in (16, 8, 4, 2, 1)]
    for bad in ({"last_layer": "norm"}, {"cls_token": "head"}, {"out_indices": [4]}):
        with pytest.raises(ValueError, match=r"expected|have none"):
            VimSeg(img_size=64, **{"out_indices": [0], **common, **bad})
    with pytest.raises(ValueError, match="no last norm"):
        VimDet(img_size=64, last_layer="add & norm", **common)


@pytest.mark.parametrize(
    "options",
    [
        {"out_indices": [1]},
        {"out_indices": [0, 2], "residual_features": True},
        {"out_indices": [0, 3], "residual_features": True, "last_layer": "add & norm"},
        {"out_indices": [1, 2], "fpn": False},
    ],
)
def test_unused_parameters_of_the_segmentation_backbone_are_exactly_those_named(options):
    model = VimSeg(img_size=64, embed_dim=8, depth=4, d_state=2, **options)
    sum(m.square().sum() for m in model(torch.randn(1, 3, 64, 64))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(n.startswith(model.unused_parameters) for n in without), without
    assert all(any(n.startswith(u) for n in without) for u in model.unused_parameters)


# -- EfficientViM, MambaVision -----------------------------------------------------------------------------------------


def test_efficientvim_state_parameter_has_no_effect():
    """As in the original: A is constant along the softmax."""
    model, x = tiny("efficientvim_m1")
    model.eval()
    before = model(x)
    with torch.no_grad():
        model.stages[0].blocks[0].mixer.A.add_(5.0)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_dense_efficientvim_keeps_batch_norm_in_eval_mode():
    model, x = tiny("efficientvim_m4_fpn")
    model.train()
    norm = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(x)
    assert torch.equal(norm.running_mean, before)


def test_mambavision_pads_windows_and_crops_again():
    model, _ = tiny("mambavision_base_1k", features_only=True, pyramid_norm="ln2d")
    maps = model.eval()(torch.randn(1, 3, 70, 46))
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 12), (9, 6), (5, 3), (3, 2)]
    assert {n.split(".")[0] for n, _ in model.named_parameters()} >= {f"outnorm{i}" for i in range(4)}
    with pytest.raises(ValueError, match="pyramid_norm"):
        tiny("mambavision_base_1k", pyramid_norm="ln")
    with pytest.raises(ValueError, match="depths"):
        tiny("mambavision_base_1k", depths=[1, 1, 1])
