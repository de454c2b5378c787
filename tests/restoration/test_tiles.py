"""Tiles: equal to the whole where the receptive field permits, seams that fade, bounded work."""

import itertools

import pytest
import torch
from torch import nn

from zoo_restoration import tiles
from zoo_restoration.contrast import Contrast
from zoo_restoration.sizes import pad_to_multiple


def local(scale=1):
    """Three convolutions: each output depends on 3 pixels around it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()]
    layers += [nn.Conv2d(8, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("size", [(37, 50), (16, 64), (16, 17), (40, 16), (90, 33)])
def test_local_networks_give_the_whole_image(scale, size):
    model, x = local(scale), torch.rand(3, *size)
    with torch.no_grad():
        y = tiles.run(model, x, tile=16, overlap=8, margin=3, scale=scale)
        torch.testing.assert_close(y, model(x[None])[0], atol=1e-5, rtol=0)
        narrow = tiles.run(model, x, tile=16, overlap=8, margin=0, scale=scale)
        assert float((narrow - model(x[None])[0]).abs().max()) > 1e-4  # the margin is what does it


def test_windows_lie_as_in_the_whole_image():
    """Attention in windows, without scans: tiles on the grid of its windows, a margin of its reach."""
    torch.manual_seed(0)
    model = Contrast(2, dim=8, groups=1, blocks=0, window=4, heads=2, head="direct").eval()
    x = torch.rand(3, 45, 38)
    with torch.no_grad():
        y = tiles.run(model, x, tile=32, overlap=24, margin=10, scale=2, multiple=model.multiple)
        torch.testing.assert_close(y, model(x[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [16, 17, 24, 31, 47, 100, 1000])
def test_weights_add_up_and_fade(length):
    begins = tiles.starts(length, 16, 8)
    assert begins[0] == 0
    assert begins[-1] == max(length - 16, 0)
    assert all(0 < b - a <= 8 for a, b in itertools.pairwise(begins))
    table = tiles.weights(length, 16, begins, 8, 2)
    torch.testing.assert_close(table.sum(0), torch.ones(length))
    for begin, row in zip(begins, table, strict=True):
        assert not row[:begin].any()
        assert not row[begin + 16 :].any()
        if begin:
            assert not row[begin : begin + 2].any()
        if begin + 16 < length:
            assert not row[begin + 14 : begin + 16].any()
    # no step at a seam: neighbours differ by the ramp at most
    assert float(table.diff(dim=1).abs().max()) <= 0.25 + 1e-6


def test_no_tile_is_larger_than_it_was_asked_to_be_and_all_are_counted():
    sizes, said = [], []

    def watched(x):
        sizes.append(tuple(x.shape))
        return x

    x = torch.rand(3, 70, 45)
    y = tiles.run(watched, x, tile=30, overlap=9, multiple=8, on_tile=lambda done, of: said.append((done, of)))
    torch.testing.assert_close(y, x)
    assert set(sizes) == {(1, 3, 32, 32)}
    assert len(sizes) == tiles.count(70, 45, 30, 9, 8) == said[-1][0] == said[-1][1]


def test_small_images_are_one_tile():
    x = torch.rand(3, 7, 5)
    torch.testing.assert_close(tiles.run(lambda t: t, x, tile=32, overlap=8, multiple=8), x)
    assert tiles.count(7, 5, 32, 8, 8) == 1
    assert pad_to_multiple(x, 8).shape == (3, 8, 8)


@pytest.mark.parametrize(("tile", "overlap", "margin"), [(16, 16, 0), (16, 8, 4), (16, 0, 0), (16, 8, -1)])
def test_overlaps_that_leave_no_room(tile, overlap, margin):
    with pytest.raises(ValueError, match="expected an overlap below the tile"):
        tiles.run(lambda x: x, torch.rand(3, 40, 40), tile=tile, overlap=overlap, margin=margin)
