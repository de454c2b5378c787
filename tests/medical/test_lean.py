"""The networks' ways in little memory give what their definitions give, and are left alone where they must not go."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
import zoo_kernels
from zoo_medical import lean

ENC = {"features": [8, 12, 70], "kernels": [[1, 3, 3], 3, 3], "strides": [1, [1, 2, 2], 2], "num_classes": 3}
NETWORKS = {
    "segmamba": ("segmamba_brats", {"slices": [16, 8, 4, 2], "feat_size": (8, 12, 16, 20), "hidden_size": 24},
                 (2, 4, 32, 32, 64)),
    "enc": ("umamba_enc_3d", {**ENC, "input_size": [8, 16, 16], "deep_supervision": True}, (2, 1, 8, 16, 16)),
    "bot": ("umamba_bot_3d", ENC, (2, 1, 8, 16, 16)),
    "images": ("umamba_enc_2d", {"features": [4, 6, 8], "strides": [1, 2, 2], "num_classes": 3, "input_size": [16, 24]},
               (2, 3, 16, 24)),
    "mambamim": ("mambamim_hybird", {"img_size": 32, "channels": [4, 6, 8, 10, 12], "depths": [1] * 5,
                                     "expansion": [2] * 5, "depth": 1, "num_classes": 3}, (2, 1, 32, 32, 32)),
}  # fmt: skip


@pytest.fixture(params=["small pieces", "as used"])
def pieces(request, monkeypatch):
    """Many slabs and blocks even of small maps."""
    if request.param == "small pieces":
        for name, value in (("BLOCK", 500), ("SLAB", 1000), ("LAYERS", 3)):
            monkeypatch.setattr(lean, name, value)


def network(name: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.create(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no norm or bias at the values it starts from
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("which", NETWORKS)
def test_same_numbers(which, pieces):
    name, options, shape = NETWORKS[which]
    model = network(name, options)
    image = 3 * torch.randn(shape) + 5
    kept = image.clone()
    want = model(image)  # with gradients: the definitions
    with torch.inference_mode():
        got = model(image)
    torch.testing.assert_close(image, kept, rtol=0, atol=0)
    for a, b in zip([want] if torch.is_tensor(want) else want, [got] if torch.is_tensor(got) else got, strict=True):
        assert b.is_contiguous()
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # the tolerance of golden files


def test_whoever_watches_gets_the_definition():
    """A hook on a skip sees the map that the encoder gave, not what the decoder would have written over it."""
    name, options, shape = NETWORKS["segmamba"]
    model, image = network(name, options), torch.randn(shape)
    seen: dict[str, torch.Tensor] = {}
    model.encoder1.register_forward_hook(lambda module, args, output: seen.update(map=output))
    with torch.no_grad():
        assert not lean.lean(model, image)
        model(image)
        torch.testing.assert_close(seen["map"], model.encoder1.layer(image))


def test_only_plain_inference():
    model, image = nn.Conv3d(1, 1, 1), torch.randn(1, 1, 2, 2, 2)

    class Adapter(nn.Conv3d):
        """A layer of another package, whose forward does more than its weight says."""

    assert not lean.lean(model, image)
    with torch.no_grad():
        assert lean.lean(model, image)
        assert not lean.lean(nn.Sequential(Adapter(1, 1, 1)), image)
        assert not lean.lean(model, image.double())
        assert not lean.lean(model.bfloat16(), image)
        model.float()
        with zoo_kernels.backend("reference"):
            assert not lean.lean(model, image)
        with torch.autocast("cpu", torch.bfloat16):
            assert not lean.lean(model, image)


def test_instance_norm_with_a_large_mean():
    x = 1e3 + torch.randn(1, 3, 20, 20, 20)
    want = F.instance_norm(x.double()).float()
    got = lean.normalise(lean.channel_last(x), lean.Norm())
    assert (got - want).abs().max() < 1e-3
    with pytest.raises(ValueError, match="spatial"):
        lean.normalise(torch.zeros(1, 3, 1, 1, 1), lean.Norm())


@pytest.mark.parametrize(("stride", "size"), [((2, 2, 2), (3, 4, 5)), ((1, 2, 2), (3, 4, 5)), ((2, 2), (5, 3))])
def test_enlarging_is_the_transposed_convolution(stride, size, pieces):
    kind = nn.ConvTranspose3d if len(size) == 3 else nn.ConvTranspose2d
    conv = kind(6, 4, stride, stride=stride, bias=False)
    x = torch.randn(2, 6, *size)
    with torch.no_grad():
        torch.testing.assert_close(lean.enlarge(x, conv), conv(x), rtol=1e-5, atol=1e-5)


def test_one_map_may_be_written_over(pieces):
    """Two convolutions of two maps side by side, their results in the place of both."""
    a, b = (lean.channel_last(torch.randn(2, 4, 13, 6, 5)) for _ in range(2))
    three, one = nn.Conv3d(8, 4, 3, padding=1), nn.Conv3d(8, 4, 1)
    with torch.no_grad():
        want = [conv(torch.cat([a, b], dim=1)) for conv in (three, one)]
        lean.convolve_onto([a, b], [three, one], [a, b])
    torch.testing.assert_close(a, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b, want[1], rtol=1e-5, atol=1e-5)
