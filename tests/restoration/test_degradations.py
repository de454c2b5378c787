"""Degradations against their definitions and Pillow; metrics against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from zoo_restoration import degradations as d
from zoo_restoration import metrics


def image(height=24, width=36, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -- blur and noise


def test_blur_is_the_convolution_with_a_gaussian():
    x = image(9, 11)
    kernel = d.gaussian_kernel(1.2, 5)
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    wanted = torch.nn.functional.conv2d(wide.flatten(0, 1)[:, None], torch.outer(kernel, kernel)[None, None])
    torch.testing.assert_close(d.gaussian_blur(x, 1.2, 5), wanted.view(x.shape))


def test_kernel():
    kernel = d.gaussian_kernel(2.0)
    assert len(kernel) == 13
    assert float(kernel.sum()) == pytest.approx(1)
    assert float(kernel[8] / kernel[6]) == pytest.approx(math.exp(-0.5))
    for sigma, size in ((0, 3), (1, 4), (1, -1)):
        with pytest.raises(ValueError, match="odd size"):
            d.gaussian_kernel(sigma, size)


def test_blur_keeps_constants_and_images_smaller_than_its_kernel():
    torch.testing.assert_close(d.gaussian_blur(torch.full((1, 3, 2, 3), 0.3), 4.0), torch.full((1, 3, 2, 3), 0.3))


def test_noise_has_its_deviation_and_its_seed():
    x = torch.zeros(1, 3, 128, 128)
    first, second = (d.add_noise(x, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.1, rel=0.02)


# -- sizes


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_pillows_away_from_the_edges(factor):
    x = image(48, 60).float()[0, 0]
    wanted = np.asarray(Image.fromarray(x.numpy()).resize((60 // factor, 48 // factor), Image.Resampling.BICUBIC))
    found = d.downsample(x, factor).numpy()
    assert np.abs(found - wanted)[2:-2, 2:-2].max() < 1e-6


def test_bicubic_is_matlabs_at_the_edges():
    """A row of 1 .. 8 halved: weights of a = -0.5 over 8 positions, mirrored beyond the edge with the edge repeated."""
    row = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    kernel = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    around = torch.cat([row.flip(1)[:, -3:], row, row.flip(1)[:, :3]], 1)  # 3 2 1 | 1 .. 8 | 8 7 6
    wanted = torch.stack([(around[0, 2 * i : 2 * i + 8] * kernel).sum() for i in range(4)])
    torch.testing.assert_close(d.resize_bicubic(row, 1, 4)[0], wanted)


@pytest.mark.parametrize("size", [(24, 36), (12, 18), (72, 108), (25, 31), (5, 7)])
def test_bicubic_keeps_constants(size):
    y = d.resize_bicubic(torch.full((1, 24, 36), 0.7, dtype=torch.float64), *size)
    torch.testing.assert_close(y, torch.full((1, *size), 0.7, dtype=torch.float64))


def test_bicubic_keeps_straight_lines_inside():
    ramp = torch.linspace(0, 1, 32, dtype=torch.float64).expand(1, 32, 32)
    steps = d.resize_bicubic(ramp, 32, 64)[0, 0, 8:-8].diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5 / 31))


def test_same_size_is_the_image():
    torch.testing.assert_close(d.resize_bicubic(image(), 24, 36), image())


def test_lost_resolution_has_the_size_of_the_image():
    x = image(25, 33)
    y = d.lose_resolution(x, 8)
    assert y.shape == x.shape
    torch.testing.assert_close(y, d.resize_bicubic(d.resize_bicubic(x, 3, 4), 25, 33))


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="crop it to multiples"):
        d.downsample(image(25, 36), 2)
    assert d.crop_to_multiple(image(25, 37), 4).shape[2:] == (24, 36)
    with pytest.raises(ValueError, match="smaller than one pixel"):
        d.crop_to_multiple(image(3, 9), 4)


# -- masks


def test_box():
    x = image(20, 40, batch=3)
    mask = d.box_mask(x, 0.25, torch.Generator().manual_seed(0))
    for one in mask[:, 0]:
        rows, columns = torch.nonzero(one.sum(1) < 40)[:, 0], torch.nonzero(one.sum(0) < 20)[:, 0]
        assert len(rows) == 10
        assert len(columns) == 20
        assert float((1 - one).sum()) == 200
        assert int(rows[-1] - rows[0]) == 9


def test_pixels():
    mask = d.pixel_mask(image(20, 40, batch=2), 0.3, torch.Generator().manual_seed(0))
    assert (mask == 0).flatten(1).sum(1).tolist() == [240, 240]
    assert not torch.equal(mask[0], mask[1])
    with pytest.raises(ValueError, match="above 0 and below 1"):
        d.pixel_mask(image(), 1.0)


# -- by name


@pytest.mark.parametrize(
    "text",
    [
        "blur:sigma=1.5,noise=0.02",
        "noise:std=0.1",
        "down:factor=8",
        "bicubic:scale=3",
        "box:share=0.5",
        "pixels:share=0.2",
    ],
)
def test_names(text):
    spoil = d.Degradation.parse(text)
    assert str(spoil) == text
    assert d.Degradation.parse(str(spoil)) == spoil
    x = image()
    y, again = (spoil(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(y, again)
    assert y.shape == (1, 3, 24 // spoil.scale, 36 // spoil.scale)
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1
    assert not torch.equal(y, x)


def test_names_apply_what_they_say():
    x = image()
    torch.testing.assert_close(d.Degradation.parse("blur:sigma=1.5")(x), d.gaussian_blur(x, 1.5))
    torch.testing.assert_close(d.Degradation.parse("bicubic:scale=4")(x), d.downsample(x, 4).clamp(0, 1))
    torch.testing.assert_close(d.Degradation.parse("down")(x), d.lose_resolution(x, 8).clamp(0, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpeg", "expected one of blur"),
        ("blur:strength=2", "it has sigma, size, noise"),
        ("blur:sigma=x", "no name=number"),
    ],
)
def test_names_that_are_not(text, said):
    with pytest.raises(ValueError, match=said):
        d.Degradation.parse(text)


# -- metrics


def test_psnr():
    a = torch.full((2, 3, 16, 16), 0.5)
    b = a.clone()
    b[1] += 0.1
    found = metrics.psnr(a, b)
    assert found[0] == float("inf")
    assert float(found[1]) == pytest.approx(20, abs=1e-4)


def test_luma_of_white_black_and_green():
    x = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 1, 0]])[:, :, None, None]
    wanted = torch.tensor([235, 16, 16 + 128.553]) / 255
    torch.testing.assert_close(metrics.luma(x)[:, 0, 0, 0], wanted)
    grey = torch.rand(1, 1, 4, 4)
    assert metrics.luma(grey) is grey


def test_the_border_counts_for_nothing():
    a = image(20, 22)
    b = a.clone()
    b[..., :2, :] = 0
    b[..., -2:] = 0
    assert metrics.psnr(a, b, border=2) == float("inf")
    assert float(metrics.ssim(a, b, border=2)) == pytest.approx(1)
    assert float(metrics.psnr(a, b, border=1)) < 30


def test_on_luma():
    a, b = image(), image().flip(3)
    wanted = metrics.psnr(metrics.luma(a), metrics.luma(b))
    torch.testing.assert_close(metrics.psnr(a, b, y=True), wanted)
    torch.testing.assert_close(metrics.ssim(a, b, y=True), metrics.ssim(metrics.luma(a), metrics.luma(b)))


def test_ssim_is_its_definition_window_by_window():
    a = image(14, 13)[0, 0].numpy()
    b = np.clip(a + 0.2 * np.random.default_rng(0).standard_normal(a.shape), 0, 1)
    weights = np.outer(*(2 * [d.gaussian_kernel(1.5, 11).numpy()]))
    values = []
    for i in range(4):
        for j in range(3):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    pair = [torch.from_numpy(x)[None, None] for x in (a, b)]
    assert float(metrics.ssim(*pair)) == pytest.approx(np.mean(values))


def test_metrics_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="expected the same"):
        metrics.psnr(image(), image(20, 20))
    with pytest.raises(ValueError, match="nothing would be left"):
        metrics.psnr(image(), image(), border=12)
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(image(), image(), border=8)
