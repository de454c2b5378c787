"""Convolutions by bands of rows, and with their batch norms folded in: the numbers of the modules called one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo_kernels
from zoo.layers import bands
from zoo.layers.bands import by_bands, conv_chain, conv_norm, plain
from zoo.layers.inference import by_rows
from zoo.layers.vss import BatchNormLast, ConvDownsample, ConvLast, PatchEmbed


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Bands of few rows, so that small images have many."""
    monkeypatch.setattr(bands, "BAND", 40)


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """The images that went by bands."""
    seen: list[int] = []
    plain_by_bands = bands.by_bands
    monkeypatch.setattr(bands, "by_bands", lambda *a, **k: seen.append(len(a[1])) or plain_by_bands(*a, **k))
    return seen


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (7, 1, 3), (3, 2, 1), (2, 2, 0), (4, 4, 0), (1, 3, 0)]
)
@pytest.mark.parametrize("height", [11, 23, 24])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("act", [None, nn.SiLU(), nn.Softplus()])
def test_bands_give_the_numbers_of_whole_images(kernel, stride, padding, height, before: bool, act) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, kernel, stride, padding, groups=2)
    enter, leave = nn.Linear(5, 6), nn.LayerNorm(8)
    x = torch.randn(2, height, 17, 5 if before else 6)
    with torch.inference_mode():
        whole = conv((enter(x) if before else x).permute(0, 3, 1, 2))
        whole = (whole if act is None else act(whole)).permute(0, 2, 3, 1)
        for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            first, second = by_bands(
                conv, layout, before=enter if before else None, act=act, after=lambda y: (y, leave(y))
            )
            torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(second, leave(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", ["ln", "bn"])
def test_embedding_and_downsampling(dtype, norm: str, used) -> None:
    torch.manual_seed(0)
    close = {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    image, x = torch.randn(2, 3, 37, 64, dtype=dtype), torch.randn(2, 19, 22, 6, dtype=dtype)
    for layer, value in (
        (PatchEmbed(3, 8, overlap=True, norm=norm), image),
        (PatchEmbed(3, 8, norm=norm), image),
        (ConvDownsample(6, 8, norm=norm), x),
        (ConvDownsample(6, 8, 2, norm=norm), x),
    ):
        layer = layer.to(dtype).eval()
        want = layer(value)
        with torch.inference_mode():
            torch.testing.assert_close(layer(value), want.detach(), **close)
    assert len(used) == 5


def test_modules_are_called_where_more_is_wanted(used) -> None:
    conv, norm, x = ConvLast(6, 8, 3, padding=1).eval(), BatchNormLast(8), torch.randn(2, 19, 22, 6)
    conv_chain(conv, x, after=norm.eval()).sum().backward()
    with torch.no_grad():
        conv_chain(conv, x, after=norm.train())  # statistics of the whole batch
        norm.eval()
        with zoo_kernels.backend("reference"):
            conv_chain(conv, x, after=norm)
        seen: list[torch.Size] = []
        handle = norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        conv_chain(conv, x, after=lambda y: norm(y), watched=(norm,))
        handle.remove()
        torch.compile(lambda x: conv_chain(conv, x, after=norm), backend="eager", fullgraph=True)(x)
        torch.vmap(lambda x: conv_chain(conv, x, after=norm))(x[None])
        for other in (ConvLast(6, 8, 3, padding="same"), ConvLast(6, 8, 3, padding=1, padding_mode="circular")):
            assert not plain(other, x)
    assert seen == [(2, 19, 22, 8)]
    assert not used
    with torch.no_grad():
        conv_chain(conv, x, after=norm)
    assert used == [2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.Mish()])
@pytest.mark.parametrize("add", [False, True])
def test_conv_with_its_norm(bias: bool, affine: bool, act, add: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8, affine=affine)
    x, other = torch.randn(2, 6, 9, 11), torch.randn(2, 8, 9, 11) if add else None
    with torch.no_grad():
        for value in (norm.running_mean, norm.weight, norm.bias):
            if value is not None:
                value.normal_()
        norm.running_var.uniform_(0.1, 3)
        conv_norm(conv, norm.train(), x, add=other, act=act)  # the statistics move
    want = norm.eval()(conv(x))
    want = want if other is None else want + other
    want = want if act is None else act(want)
    with torch.inference_mode():
        torch.testing.assert_close(conv_norm(conv, norm, x, add=other, act=act), want.detach(), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 1


def test_rows_of_maps_that_lie_in_one_another() -> None:
    """Halves of a map in height, width and channels; written to a part of another."""
    torch.manual_seed(0)
    whole, place = torch.randn(2, 60, 100, 12), torch.zeros(2, 60, 2, 50, 7)
    layer = nn.Linear(6, 7)
    with torch.inference_mode():
        half = whole.view(2, 60, 2, 50, 12)[:, :, 1, :, 3:9]
        want = layer(half)
        torch.testing.assert_close(by_rows(layer, half), want)
        assert by_rows(layer, half, out=place[:, :, 1]).data_ptr() == place[:, :, 1].data_ptr()
        torch.testing.assert_close(place[:, :, 1], want)
        assert not place[:, :, 0].any()
        torch.testing.assert_close(
            by_rows(layer, whole.permute(2, 0, 1, 3)[..., :6]), layer(whole[..., :6]).permute(2, 0, 1, 3)
        )
