"""Clouds to the patches that a masked autoencoder rebuilds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo import errors
from zoo.cli import run
from zoo_point_cloud.files import read_cloud
from zoo_point_cloud.pointmamba import chamfer


@pytest.fixture(scope="module")
def model():
    return zoo.testing.case("pointmamba_pretrain").build().eval()


@pytest.fixture
def file(tmp_path):
    """An egg of 300 points, far from the origin."""
    p = np.random.default_rng(0).normal(size=(300, 3))
    p = p / np.linalg.norm(p, axis=1, keepdims=True) * [5, 5, 8] + [100, 50, -20]
    np.savetxt(tmp_path / "egg.xyz", p, fmt="%.6f")
    return tmp_path / "egg.xyz"


def test_the_answer_is_the_models(model, file):
    """By hand: unit sphere, patches, a seeded mask in the order of the curve; and back to the file's coordinates."""
    answer = zoo.pipeline(model, seed=5)(file)
    raw = read_cloud(file).points
    centred = raw - raw.mean(axis=0)
    radius = np.sqrt((centred**2).sum(axis=1)).max()
    points = torch.from_numpy(centred / radius)[None]
    drawn = torch.rand(1, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 8, dtype=torch.bool).scatter_(1, drawn.argsort(dim=1, stable=True)[:, :4], True)
    parts = {}
    with torch.no_grad():
        found = model(points, mask=mask, order="hilbert", record=parts.__setitem__)
    assert answer.loss == pytest.approx(found["loss"].item(), rel=1e-4)
    assert (answer.patches, answer.hidden_patches, answer.points) == (8, 4, 300)
    centres = parts["center_sorted"][mask][:, None]
    for name, patches in (("rebuilt", found["rebuilt"]), ("hidden", parts["gt"])):
        expected = (patches + centres).numpy() * radius + raw.mean(axis=0)
        np.testing.assert_allclose(getattr(answer, name), expected, atol=2e-4)
    off = chamfer(torch.from_numpy(answer.rebuilt).double(), torch.from_numpy(answer.hidden).double(), "cdl1")
    assert answer.distance == pytest.approx(float(off), rel=1e-3)


def test_patches_are_points_of_the_file(model, file):
    answer = zoo.pipeline(model)(file)
    raw = read_cloud(file).points
    for patches in (answer.seen, answer.hidden):
        nearest = np.abs(patches.reshape(-1, 1, 3) - raw).max(axis=2).min(axis=1)
        assert nearest.max() < 1e-3


def test_the_seed_decides(model, file):
    pipe = zoo.pipeline(model)
    other = read_cloud(file).points * 2 + 1
    first, second, third = pipe(file), *pipe([other[::-1].copy(), str(file)], batch_size=2)
    np.testing.assert_allclose(third.rebuilt, first.rebuilt, atol=1e-4)
    assert second.loss != first.loss
    assert not np.array_equal(zoo.pipeline(model, seed=1)(file).hidden, first.hidden)
    assert not np.array_equal(zoo.pipeline(model, order="hilbert-trans")(file).rebuilt, first.rebuilt)
    assert zoo.pipeline(model, mask_ratio=0.25)(file).hidden_patches == 2
    assert model.mask_ratio == 0.6


def test_blocks_are_hidden_around_one_centre(file):
    model = zoo.testing.case("pointmamba_pretrain").build(mask_type="block").eval()
    answer = zoo.pipeline(model)(file)
    assert answer.hidden_patches == 4
    centre = answer.hidden.mean(axis=1)
    spread = np.linalg.norm(centre - centre.mean(axis=0), axis=1).mean()
    everything = np.concatenate([centre, answer.seen.mean(axis=1)])
    assert spread < np.linalg.norm(everything - everything.mean(axis=0), axis=1).mean()


def test_files(model, file, tmp_path):
    answer = zoo.pipeline(model)(file)
    written = read_cloud(answer.save(tmp_path / "out" / "egg.ply"))
    assert len(written) == (4 + 4) * 8
    np.testing.assert_allclose(written.world()[:32].reshape(4, 8, 3), answer.rebuilt, atol=1e-4)
    assert np.allclose(written.colors[0] * 255, (230, 120, 30), atol=1)
    answer.save_picture(tmp_path / "egg.png")
    pixels = np.asarray(Image.open(tmp_path / "egg.png"))
    for colour in ((150, 150, 150), (70, 110, 190), (230, 120, 30)):
        assert (pixels == colour).all(axis=-1).sum() > 50


def test_far_coordinates(model, file):
    """Where float32 has no millimetres the origin stays apart, and comes back in files."""
    far = read_cloud(file).points.astype(np.float64) + np.array([3e6, 5e6, 0])
    answer = zoo.pipeline(model)(far)
    assert answer.origin is not None
    near = answer.hidden.reshape(-1, 1, 3).astype(np.float64) + answer.origin - far
    assert np.abs(near).max(axis=2).min(axis=1).max() < 1e-2


def test_mistakes(model, file, tmp_path):
    for ratio in (0, 1, 0.1):
        with pytest.raises(errors.BadArgument, match=r"mask_ratio is .*; expected a share that hides some of the 8"):
            zoo.pipeline(model, mask_ratio=ratio)
    with pytest.raises(errors.BadArgument, match="order is 'z'; expected 'hilbert'"):
        zoo.pipeline(model, order="z")
    with pytest.raises(errors.BadArgument, match="expected PointMambaMAE"):
        zoo.pipeline(zoo.testing.case("pointmamba_modelnet").build(), task="point-cloud-pretraining")
    (tmp_path / "few.xyz").write_text("1 2 3\n4 5 6\n")
    with pytest.raises(ValueError, match="2 points; pointmamba_pretrain needs at least 8"):
        zoo.pipeline(model)(tmp_path / "few.xyz")
    same = zoo.pipeline(model)(np.ones((20, 3), np.float32))
    np.testing.assert_allclose(same.hidden, 1, atol=1e-6)


def test_the_command_line(model, file, tmp_path, capsys):
    zoo.save(model, tmp_path / "mine")
    words = ["predict", str(tmp_path / "mine"), str(file), "--pictures", str(tmp_path / "out"), "--json"]
    assert run([*words, "-o", "mask_ratio=0.5", "-o", "seed=3"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(zoo.pipeline(model, mask_ratio=0.5, seed=3)(file).loss, rel=1e-5)
    assert said["hidden_patches"] == 4
    assert Image.open(said["picture"]).size[0] > 100
