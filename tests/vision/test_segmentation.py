"""UPerNet against another implementation, its faster form against the literal one, published files, and pictures."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from recipes import recipe
from torch import nn

import zoo
import zoo_kernels
from zoo.cli import run
from zoo_registry import errors
from zoo_vision import scenes
from zoo_vision.scenes import SemanticSegmentation, largest, palette
from zoo_vision.segmentation import FCNHead, Segmentor, UPerHead, convolve_resized, resize

VMAMBA = {
    "type": "MM_VSSM", "out_indices": (0, 1, 2, 3), "pretrained": "", "dims": 8, "depths": (1, 1, 1, 1),
    "ssm_d_state": 1, "ssm_dt_rank": "auto", "ssm_ratio": 1.0, "ssm_conv": 3, "ssm_conv_bias": False,
    "forward_type": "v05_noz", "mlp_ratio": 4.0, "downsample_version": "v3", "patchembed_version": "v2",
    "drop_path_rate": 0.2, "norm_layer": "ln2d",
}  # fmt: skip
MAMBAVISION = {
    "type": "MM_mamba_vision", "out_indices": (0, 1, 2, 3), "pretrained": "", "depths": (1, 1, 1, 2),
    "num_heads": (1, 2, 2, 4), "window_size": (8, 8, 8, 4), "dim": 16, "in_dim": 8, "mlp_ratio": 4,
    "drop_path_rate": 0.3, "norm_layer": "ln2d", "layer_scale": None,
}  # fmt: skip
SMALL = {"num_classes": 7, "head_channels": 12, "auxiliary_channels": 6}


def stirred(model: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
            nn.init.normal_(module.bias, 0, 0.1, generator=g)
    return model.eval()


@pytest.mark.parametrize(
    ("small", "full"), [((5, 7), (10, 13)), ((4, 4), (16, 16)), ((1, 1), (9, 5)), ((3, 6), (6, 6)), ((8, 9), (8, 15))]
)
def test_convolving_what_is_resized(small, full):
    x = torch.randn(2, 6, *small, dtype=torch.float64)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    expected = F.conv2d(resize(x, full), weight, padding=1)
    torch.testing.assert_close(convolve_resized(x, weight, full), expected, rtol=1e-12, atol=1e-12)


def test_heads_are_those_of_transformers():
    """The same weights in that library's UperNet."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    widths = [4, 6, 8, 10]
    config = UperNetConfig(
        hidden_size=12, num_labels=7, auxiliary_channels=5, auxiliary_num_convs=1, auxiliary_concat_input=False
    )
    maps = [torch.randn(2, c, 24 // 2**i, 20 // 2**i) for i, c in enumerate(widths)]
    pairs = [
        (UPerHead(widths, 12, 7), UperNetHead(config, widths), maps),
        (FCNHead(8, 5, 7), UperNetFCNHead(config, widths, in_index=2), maps[2]),
    ]
    for ours, theirs, given in pairs:
        named = {
            k.replace("batch_norm.", "bn.").replace("classifier.", "conv_seg."): v
            for k, v in stirred(theirs).state_dict().items()
        }
        ours.load_state_dict(named)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(given), theirs(maps), rtol=1e-5, atol=1e-6)


def test_the_quick_head_is_the_literal_one():
    head = stirred(UPerHead([4, 6, 8, 10], 12, 7))
    maps = [torch.randn(2, c, n, n + 3) for c, n in zip((4, 6, 8, 10), (33, 17, 9, 5), strict=True)]
    with torch.inference_mode():
        found = head(maps)
        with zoo_kernels.backend("reference"):
            literal = head(maps)
    torch.testing.assert_close(found, literal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(maps), literal, rtol=1e-5, atol=1e-5)  # with gradients


@pytest.mark.parametrize("body", [VMAMBA, MAMBAVISION])
def test_published_format(tmp_path, body):
    """A file as mmengine writes it, through the adapter and through a card."""
    name = "vmamba_tiny_s1l8_upernet" if body is VMAMBA else "mambavision_tiny_upernet"
    own = {"dims": 8, "depths": (1, 1, 1, 1)}
    if body is MAMBAVISION:
        own = {k: body[k] for k in ("depths", "num_heads", "window_size", "dim", "in_dim", "mlp_ratio")}
    model = stirred(zoo.create(name, **own, **SMALL))
    adapter = zoo.reference("upernet")
    theirs = adapter.to_reference(model.state_dict(), model=model)
    assert {"decode_head.psp_modules.3.1.bn.weight", "auxiliary_head.convs.0.conv.weight"} <= set(theirs)
    assert any(k.startswith(("backbone.layers.", "backbone.levels.")) for k in theirs)
    x = torch.randn(2, 3, 64, 50)
    config = {
        "backbone": body,
        "decode_head": {"type": "UPerHead", "num_classes": 7, "channels": 12, "in_index": [0, 1, 2, 3]},
        "auxiliary_head": {"type": "FCNHead", "num_classes": 7, "channels": 6, "num_convs": 1, "in_index": 2},
    }
    again = adapter.build(config, theirs)
    with torch.no_grad():
        expected = model(x)
        found = adapter.run(again, {"image": x})
    torch.testing.assert_close(found["logits"], expected)
    assert found["auxiliary_logits"].shape == (2, 7, 4, 4)
    torch.save({"meta": {"epoch": 1}, "state_dict": theirs}, tmp_path / "iter_160000.pth")
    loaded = zoo.load(f"{name}.ade20k", checkpoint=tmp_path / "iter_160000.pth", **own, **SMALL)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected)
    with pytest.raises(ValueError, match="MM_VSSM or MM_mamba_vision"):
        adapter.build({**config, "backbone": {"type": "ResNet"}}, theirs)
    with pytest.raises(ValueError, match=r"auxiliary_head map 1 by 2 convolutions; .* map 2 by 1"):
        adapter.build({**config, "auxiliary_head": {"in_index": 1, "num_convs": 2}}, theirs)
    with pytest.raises(ValueError, match=r"no argument 'chanels'.*channels"):
        adapter.build({**config, "decode_head": {"chanels": 3}}, theirs)


def test_other_classes_and_any_backbone(tmp_path):
    small = {"dims": 8, "depths": (1, 1, 1, 1), **SMALL}
    zoo.save(zoo.create("vmamba_tiny_s1l8_upernet", **small), tmp_path / "m")
    model = zoo.load(tmp_path / "m", num_classes=3)
    assert model.decode_head.conv_seg.weight.shape[0] == model.auxiliary_head.conv_seg.weight.shape[0] == 3
    body = zoo.create("efficientvim_m1", features_only=True)
    model = Segmentor(body, num_classes=3, head_channels=16, auxiliary_channels=8)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    before = model.loss(images, labels)
    before.backward()
    assert all(p.grad is not None for p in model.decode_head.parameters())
    assert all(p.grad is not None for p in model.auxiliary_head.parameters())
    labels[:, :32] = 255
    assert model.loss(images, labels) < before
    with pytest.raises(ValueError, match="features_only=True"):
        Segmentor(zoo.create("vim_micro"))
    with pytest.raises(ValueError, match=r"labels have shape .* expected \(2, 64, 64\)"):
        model.loss(images, labels[:, :60])


# -- pictures --------------------------------------------------------------------------------------------------------


class Brightest(nn.Module):
    """A made-up segmentor at a quarter of the size: class c where channel c is the brightest."""

    in_chans = 3

    def forward(self, x):
        return F.avg_pool2d(x, 4) * 100


def stripes(width: int = 96, height: int = 64) -> Image.Image:
    """A red, a green and a blue third."""
    values = np.zeros((height, width, 3), np.uint8)
    for c in range(3):
        values[:, c * width // 3 : (c + 1) * width // 3, c] = 255
    return Image.fromarray(values)


def test_every_pixel_gets_its_class(tmp_path):
    pipe = SemanticSegmentation(Brightest(), short_side=128)
    picture = stripes()
    picture.save(tmp_path / "three.png")
    found = pipe(tmp_path / "three.png")
    expected = np.repeat(np.arange(96) * 3 // 96, 64).reshape(96, 64).T
    assert found.classes.shape == (64, 96)
    assert (found.classes == expected).mean() > 0.98
    assert sum(found.shares.values()) == pytest.approx(1)
    assert set(found.shares) == {"class 0", "class 1", "class 2"}
    assert found.confidence > 0.95
    saved = Image.open(found.save(tmp_path / "out" / "three.png"))
    assert saved.mode == "P"
    assert np.array_equal(np.asarray(saved), found.classes)
    assert found.picture().size[0] > 480
    assert json.dumps(found.to_dict())
    with pytest.raises(errors.BadArgument, match=r"expected \.png"):
        found.save(tmp_path / "three.jpg")


def test_sizes_are_mmsegmentations():
    pipe = SemanticSegmentation(Brightest())
    assert pipe.size_of(683, 512) == (512, 683)
    assert pipe.size_of(512, 256) == (512, 1024)
    assert pipe.size_of(4000, 500) == (256, 2048)  # the longer side is reached first
    with pytest.raises(errors.BadArgument, match="short_side is 512, long_side 100"):
        SemanticSegmentation(Brightest(), long_side=100)


@pytest.mark.parametrize("count", [5, 300])
def test_a_few_classes_at_a_time_change_nothing(monkeypatch, count):
    logits = torch.randn(count, 7, 9) * 3
    whole = resize(resize(logits[None], (20, 31)), (50, 41))[0]
    for held in (1, 50 * 41 * 2, 1 << 24):
        monkeypatch.setattr(scenes, "HELD", held)
        classes = largest(logits, (20, 31), (50, 41))
        assert np.array_equal(classes, whole.argmax(0).numpy())
        assert classes.dtype == (np.uint8 if count <= 256 else np.uint16)


def test_colours_are_all_different():
    assert len(set(palette(150))) == 150


def test_ade20k_has_its_names():
    pipe = zoo.pipeline(zoo.create("efficientvim_m4_semantic_fpn", embed_dim=[16, 24, 32], depths=[1, 1, 1]))
    found = pipe(stripes(40, 30))
    assert found.classes.shape == (30, 40)
    from zoo_registry import read_labels

    card = zoo.info("mambavision_tiny_upernet").card
    names = read_labels(card)
    assert len(names) == 150
    assert (names[0], names[2], names[-1]) == ("wall", "sky", "flag")


def test_what_is_no_picture_or_no_segmentor(tmp_path):
    pipe = SemanticSegmentation(Brightest())
    with pytest.raises(errors.BadArgument, match="a tensor was given"):
        pipe(torch.zeros(3, 8, 8))
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(errors.BadArgument, match="not an image"):
        pipe(tmp_path / "a.png")
    with pytest.raises(errors.BadArgument, match="no map of logits"):
        SemanticSegmentation(zoo.create("vim_micro"), short_side=32)(stripes(64).convert("L"))


def test_command(tmp_path, capsys):
    zoo.save(zoo.create("vmamba_tiny_s1l8_upernet", dims=8, depths=(1, 1, 1, 1), **SMALL), tmp_path / "m")
    (tmp_path / "in").mkdir()
    stripes().save(tmp_path / "in" / "one.png")
    (tmp_path / "in" / "two.png").write_text("no picture")
    words = ["segment-images", str(tmp_path / "m"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    words += ["--save-picture", str(tmp_path / "drawn"), "--short-side", "64", "--keep-going", "--json"]
    assert run(words) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert Image.open(first["file"]).size == Image.open(tmp_path / "in" / "one.png").size
    assert Image.open(first["picture"]).size[0] > 480
    assert "not an image" in second["message"]


def test_the_demo_checkpoint_is_what_its_card_says():
    """The recipe's own scenes and measure, on a third of the held-out ones."""
    scenes_of = recipe("vision", "train_segmentor")
    pipe = zoo.pipeline("vmamba_micro_upernet.shapes")
    card = pipe.model.zoo_info.weights
    assert list(scenes_of.CLASSES) == pipe.names
    measured = scenes_of.measure(pipe, 66)
    assert abs(100 * measured["mIoU"] - card.metrics[0].value) < 5
    assert abs(100 * measured["pixels"] - card.metrics[1].value) < 1
