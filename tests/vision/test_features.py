"""Maps of dense backbones from picture files."""

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo_registry import errors
from zoo_vision.features import ImageFeatures, principal

TINY = {"embed_dim": 16, "depth": 4, "d_state": 4, "img_size": 64}


def photo(path, width=90, height=70):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_maps_of_a_picture(tmp_path):
    model = zoo.create("vim_tiny_seg", **TINY, out_indices=[0, 1, 2, 3])
    pipe = zoo.pipeline(model)
    found = pipe(photo(tmp_path / "a.png"))
    assert found.shapes == [(16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2)]
    with torch.no_grad():
        expected = model(pipe.prepare(pipe.read(tmp_path / "a.png"))[None])
    for ours, theirs in zip(found.maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-5, atol=1e-6)
    assert found.image.size == (64, 64)
    assert found.picture().size[0] > 700
    with np.load(found.save(tmp_path / "out" / "a.npz")) as saved:
        assert np.array_equal(saved["map_2"], found.maps[2])
    with pytest.raises(errors.BadArgument, match=r"expected \.npz"):
        found.save(tmp_path / "a.png")
    assert found.summary().startswith("4 map(s): 16x16x16, 16x8x8")


def test_any_pyramid_and_one_map(tmp_path):
    photo(tmp_path / "a.png")
    pyramid = zoo.create("vmamba_tiny_s1l8", dims=8, depths=(1, 1, 1, 1), features_only=True, out_indices=(1, 3))
    assert len(ImageFeatures(pyramid)(tmp_path / "a.png").maps) == 2
    detector = ImageFeatures(zoo.create("vim_tiny_det", **TINY))
    assert detector(tmp_path / "a.png").shapes == [(16, 4, 4)]
    with pytest.raises(errors.BadArgument, match="features_only=True"):
        ImageFeatures(zoo.create("vmamba_tiny_s1l8", dims=8, depths=(1, 1, 1, 1)))(tmp_path / "a.png")


def test_principal_components_are_colours():
    g = np.random.default_rng(0)
    where = g.random((6, 7))
    maps = (g.normal(size=(5, 1, 1)) * where).astype(np.float32)  # one direction alone
    colours = principal(maps)
    assert colours.shape == (6, 7, 3)
    order = np.argsort(where.ravel())
    reds = colours[..., 0].ravel().astype(int)[order]
    assert (np.diff(reds) >= 0).all() or (np.diff(reds) <= 0).all()
    assert principal(maps[:2]).shape == (6, 7, 3)
    assert principal(np.zeros((4, 3, 3), np.float32)).shape == (3, 3, 3)
