"""Volumes to the cells that a masked autoencoder rebuilds."""

import json

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo import errors
from zoo.cli import run


@pytest.fixture(scope="module")
def model():
    """Windows of 32^3, so 8 cells each, of which 2 are seen."""
    return zoo.testing.case("mambamim_pretrain").build().eval()


@pytest.fixture
def scan(tmp_path):
    """A body of -100 to 200 HU in air, 40 x 30 x 33 voxels of 1.5 mm in RAS; its box is 36 x 28 x 33."""
    data = np.full((40, 30, 33), -1000, np.float32)
    data[3:39, 1:29] = np.random.default_rng(0).uniform(-100, 200, (36, 28, 33))
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = [10, -20, 30]
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


def test_the_answer_is_the_models(model, scan):
    """By hand: HU to 0..1, the body's box, zeros up to whole windows, a seeded mask a window, and the loss."""
    answer = zoo.pipeline(model, seed=4)(scan)
    data = np.asarray(nibabel.load(scan).dataobj)[3:39, 1:29]
    image = np.clip((data + 175) / 425, 0, 1)
    np.testing.assert_allclose(answer.image, image, atol=1e-5)
    np.testing.assert_allclose(answer.affine[:3, 3], [10 + 3 * 1.5, -20 + 1.5, 30])
    whole = np.zeros((64, 32, 64), np.float32)
    whole[:36, :28, :33] = image
    chance = torch.Generator().manual_seed(4)
    rebuilt, hidden, losses = whole.copy(), np.zeros(whole.shape, bool), []
    for x in (0, 32):
        for z in (0, 32):
            window = torch.from_numpy(whole[x : x + 32, :, z : z + 32])[None, None]
            seen = torch.rand(1, 8, generator=chance).argsort(dim=1)[:, :2]
            active = torch.zeros(1, 8, dtype=torch.bool).scatter(1, seen, True).view(1, 1, 2, 2, 2)
            with torch.no_grad():
                made = model.reconstruct(window, active)
            for i, j, k in np.ndindex(2, 2, 2):
                cell = (slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16), slice(16 * k, 16 * k + 16))
                there = (slice(x + 16 * i, x + 16 * i + 16), cell[1], slice(z + 16 * k, z + 16 * k + 16))
                if active[0, 0, i, j, k]:
                    continue
                true, guess = window[0, 0][cell], made[0, 0][cell]
                deviation = (true.var() + 1e-6).sqrt()
                rebuilt[there] = guess * deviation + true.mean()
                hidden[there] = True
                if x + 16 * i < 36 and z + 16 * k < 33:  # else the cell holds nothing of the volume
                    losses.append((guess - (true - true.mean()) / deviation).square().mean().item())
    inside = (slice(36), slice(28), slice(33))
    np.testing.assert_array_equal(answer.hidden, hidden[inside])
    np.testing.assert_allclose(answer.rebuilt, rebuilt[inside], atol=1e-4)
    np.testing.assert_array_equal(answer.masked, np.where(answer.hidden, 0, answer.image))
    assert answer.hidden_cells == len(losses)
    assert answer.cells == 3 * 2 * 3
    assert answer.loss == pytest.approx(np.mean(losses), rel=1e-4)
    off = np.abs(answer.rebuilt - answer.image)[answer.hidden].mean()
    assert answer.error == pytest.approx(off, rel=1e-4)


def test_the_seed_decides(model, scan):
    first = zoo.pipeline(model)(scan)
    again = zoo.pipeline(model)([scan, scan], batch_size=2)
    assert all(np.array_equal(one.rebuilt, first.rebuilt) for one in again)
    assert not np.array_equal(zoo.pipeline(model, seed=1)(scan).hidden, first.hidden)
    assert zoo.pipeline(model, mask_ratio=0.5)(scan).hidden.mean() < 0.6 < first.hidden.mean()
    assert model.mask_ratio == 0.75


def test_a_window_is_what_visualise_shows(model, tmp_path):
    data = np.random.default_rng(1).uniform(-175, 250, (32, 32, 32)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.5, 1.5, 1.5, 1])), tmp_path / "a.nii")
    answer = zoo.pipeline(model)(tmp_path / "a.nii")
    image = torch.from_numpy((data + 175) / 425)[None, None]
    active = model.draw_mask(1, generator=torch.Generator().manual_seed(0))
    _, masked, filled = model.visualise(image, active)
    np.testing.assert_allclose(answer.masked, masked[0, 0], atol=1e-5)
    np.testing.assert_allclose(answer.rebuilt, filled[0, 0], atol=1e-4)
    expected = model.loss(image, model.reconstruct(image, active), active).item()
    assert answer.loss == pytest.approx(expected, rel=1e-4)


def test_files(model, scan, tmp_path):
    answer = zoo.pipeline(model)(scan)
    for what in ("image", "masked", "rebuilt", "hidden"):
        written = nibabel.load(answer.save(tmp_path / "out" / f"{what}.nii.gz", what))
        np.testing.assert_allclose(np.asarray(written.dataobj), getattr(answer, what), atol=1e-6)
        np.testing.assert_allclose(written.affine, answer.affine)
    with pytest.raises(ValueError, match="what is 'all'; expected one of image, masked"):
        answer.save(tmp_path / "a.nii", "all")
    with pytest.raises(ValueError, match=r"as .nii or .nii.gz"):
        answer.save(tmp_path / "a.png")


def test_the_picture_shows_the_three_side_by_side(model, scan):
    answer = zoo.pipeline(model)(scan)
    answer.image[:], answer.masked[:], answer.rebuilt[:] = 1.0, 0.5, 0.0
    for flip in (1, -1):
        answer.affine = np.diag([1.5 * flip, 1.5, 1.5, 1])
        row = np.asarray(answer.picture(slices=1))[20, :, 0].astype(int)
        thirds = [part.mean() for part in np.array_split(row, 3)]
        assert thirds[0] > 200 > thirds[1] + 30 > 60 > thirds[2]


def test_other_grids(model, tmp_path):
    """Another spacing and orientation come to 1.5 mm in RAS; MR has an intensity scale of its own."""
    data = np.random.default_rng(2).normal(200, 50, (24, 24, 24)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-3.0, 3.0, 3.0, 1])), tmp_path / "mr.nii")
    answer = zoo.pipeline(model, normalisation="z-score", crop=False)(tmp_path / "mr.nii")
    assert answer.image.shape == (47, 47, 47)
    assert abs(answer.image.mean()) < 0.05
    np.testing.assert_allclose(np.diag(answer.affine)[:3], 1.5)
    flat = np.zeros((20, 20, 20), np.float32)
    nibabel.save(nibabel.Nifti1Image(flat, np.diag([1.5, 1.5, 1.5, 1])), tmp_path / "flat.nii")
    assert np.isfinite(zoo.pipeline(model)(tmp_path / "flat.nii").loss)


def test_mistakes(model, tmp_path):
    for ratio in (0, 1, 0.01, 0.99):
        with pytest.raises(errors.BadArgument, match=rf"mask_ratio is {ratio}; expected .* 8 cells"):
            zoo.pipeline(model, mask_ratio=ratio)
    with pytest.raises(errors.BadArgument, match="rebuilds nothing"):
        zoo.pipeline(zoo.testing.case("mambamim_hybird").build(), task="masked-pretraining")
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 20, 2), np.float32), np.eye(4)), tmp_path / "two.nii")
    with pytest.raises(ValueError, match="2 channels, the model takes 1"):
        zoo.pipeline(model)(tmp_path / "two.nii")


def test_the_command_line(model, scan, tmp_path, capsys):
    zoo.save(model, tmp_path / "mine")
    words = ["predict", str(tmp_path / "mine"), str(scan), "--pictures", str(tmp_path / "out"), "--json"]
    assert run([*words, "-o", "mask_ratio=0.5", "-o", "seed=3"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(zoo.pipeline(model, mask_ratio=0.5, seed=3)(scan).loss, rel=1e-5)
    assert said["warning"] == "not for clinical use"
    assert Image.open(said["picture"]).size[0] > 100
