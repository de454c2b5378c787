"""PointMamba's masked pre-training as a loop, from files to a classifier that starts from it."""

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo.cli import run
from zoo_point_cloud.pretraining import cloud_batches, pretrain, start_from

SMALL = {"embed_dim": 24, "depth": 1, "num_groups": 8, "group_size": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Spheres, boxes and rings of 200 points."""
    folder, r = tmp_path_factory.mktemp("clouds"), np.random.default_rng(0)
    for i in range(9):
        p = r.normal(size=(200, 3))
        p /= np.linalg.norm(p, axis=1, keepdims=True) if i % 3 else np.abs(p).max(axis=1, keepdims=True)
        p *= [1, 1, 0.2 if i % 3 == 1 else 1]
        np.save(folder / f"{i}.npy", p.astype(np.float32))
    return sorted(folder.iterdir())


def test_batches(files):
    first, second = cloud_batches(files, 64, 4, seed=1), cloud_batches(files, 64, 4, seed=1)
    a = next(first)
    assert a.shape == (4, 64, 3)
    assert torch.equal(a, next(second))
    assert not torch.equal(a, next(first))
    with pytest.raises(ValueError, match="200 points; batches of 500"):
        next(cloud_batches(files, 500, 4))
    with pytest.raises(ValueError, match="no point-cloud files"):
        next(cloud_batches([], 500, 4))


def test_the_loss_falls_and_a_classifier_starts_from_it(files):
    torch.manual_seed(0)
    model = zoo.create("pointmamba_pretrain", decoder_depth=1, **SMALL)
    losses = pretrain(model, cloud_batches(files, 64, 8), 30, rate=3e-3)
    assert len(losses) == 30
    points = next(cloud_batches(files, 64, 32, seed=9))
    model.eval()
    with torch.no_grad():
        patches = model.trunk.group(points)[0]
        # An answer that knows nothing: every point at its patch's centre.
        ignorant = 2 * patches.pow(2).sum(-1).mean() / 2
        loss = model(points, order="hilbert")["loss"]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert loss < ignorant
    classifier = zoo.create("pointmamba_modelnet", **SMALL).eval()
    fresh = start_from(classifier, model)
    assert all(name.startswith("head.") for name in fresh)
    with torch.no_grad():
        tokens, pos, _, _ = model.trunk.sequence(points)
        expected = model.trunk.blocks(tokens, pos)[0].mean(dim=1)
        torch.testing.assert_close(classifier.forward_features(points), expected)
    with pytest.raises(ValueError, match="does not fit"):
        start_from(zoo.create("pointmamba_modelnet", **{**SMALL, "embed_dim": 32}), model)


def test_training_goes_on_after_an_interruption(files, tmp_path):
    def trained(run, report):
        torch.manual_seed(0)
        model = zoo.create("pointmamba_pretrain", decoder_depth=1, **SMALL)
        pretrain(model, cloud_batches(files, 64, 4), 5, report=report, run=run)
        return model

    zoo.testing.check_resume(trained, tmp_path, after=3)


def test_what_cannot_go_on(files):
    model = zoo.create("pointmamba_pretrain", decoder_depth=1, **SMALL)
    with pytest.raises(ValueError, match="ended after 1 of 3"):
        pretrain(model, [next(cloud_batches(files, 64, 4))], 3)
    with pytest.raises(ValueError, match="steps is 0"):
        pretrain(model, [], 0)


def test_command(files, tmp_path, capsys):
    settings = [f"--set={k}={v}" for k, v in {**SMALL, "decoder_depth": 1}.items()]
    arguments = ["pretrain-points", "pointmamba_pretrain", str(files[0].parent), "--out", str(tmp_path / "out")]
    assert run([*arguments, "--steps=2", "--batch-size=4", "--points=64", *settings]) == 0
    assert "9 clouds" in capsys.readouterr().out
    assert zoo.load(tmp_path / "out").trunk.embed_dim == 24
    np.save(tmp_path / "holes.npy", np.concatenate([np.load(files[0]), np.full((3, 3), np.nan)]))
    arguments[2] = str(tmp_path / "holes.npy")
    rest = ["--steps=1", "--batch-size=2", "--points=64", *settings]
    assert run([*arguments, *rest]) == 5
    assert "3 of 203 points have NaN" in capsys.readouterr().err
    assert run([*arguments, *rest, "--invalid=drop"]) == 0
    arguments[2] = str(tmp_path / "nowhere.ply")
    assert run([*arguments, *rest]) == 3
    assert "there is no file or folder" in capsys.readouterr().err
    for option, message in (("--rate=nan", "nan is no rate"), ("--seed=-1", "-1 is not in the range")):
        assert run([*arguments, *rest, option]) == 2
        assert message in capsys.readouterr().err
    assert run(["pretrain-points", "pcm_micro", str(files[0]), "--out", str(tmp_path)]) == 2
    assert "expected PointMambaMAE" in capsys.readouterr().err


def test_files_are_looked_at_before_the_first_step(files, tmp_path, capsys):
    """The bad one of them would otherwise be found whenever chance takes it."""
    for number in range(3):
        np.save(tmp_path / f"small {number}.npy", np.zeros((50, 3)))
    with pytest.raises(ValueError, match=r"small 2\.npy has 50 points; batches of 64"):
        next(cloud_batches([*files[:8], tmp_path / "small 2.npy"], 64, 1))
    (tmp_path / "notes.odt").write_text("no cloud")
    (tmp_path / ".hidden.ply").write_text("what some systems leave beside a file")
    settings = [f"--set={k}={v}" for k, v in {**SMALL, "decoder_depth": 1}.items()]
    command = ["pretrain-points", "pointmamba_pretrain", "--out", str(tmp_path / "out"), "--steps=1", *settings]
    command += ["--batch-size=2", "--points=40"]
    assert run([*command, str(files[0]), str(tmp_path / "notes.odt")]) == 1
    assert "no format is known by the ending '.odt'" in capsys.readouterr().err
    assert run([*command, str(tmp_path / "small*.npy"), str(tmp_path)]) == 0  # a pattern, and a folder
    assert "6 clouds" in capsys.readouterr().out
