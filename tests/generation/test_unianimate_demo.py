"""UniAnimate's demo answers from files, on the command line too; training and measuring on folders of clips."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from recipes import recipe

import zoo
from zoo.cli.predict import predict as predict_command
from zoo_generation.unianimate import media
from zoo_generation.unianimate.commands import animate, train_animation
from zoo_generation.unianimate.data import Batches, Clip, psnr, read_clips
from zoo_generation.unianimate.drawing import draw
from zoo_generation.unianimate.latents import PatchLatents
from zoo_generation.unianimate.pipeline import HumanAnimation
from zoo_generation.unianimate.poses import read_poses
from zoo_registry import errors, package_path

ROOT = Path(__file__).parents[2]
MODEL = "unianimate_micro.figures"
FIGURE, POSES = (package_path("zoo_generation", f"demo/figure.{kind}") for kind in ("png", "npz"))
QUICK = {"steps": 2, "frames": 3}


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(MODEL, **QUICK)


@pytest.fixture(scope="module")
def figures():
    return recipe("generation", "stick_figures")


def test_the_figure_moves(figures):
    """The demo is nearer to the true video than the reference is, for a figure it never saw."""
    clip = figures.random_clip(np.random.default_rng(31337), 6, 32)
    answer = zoo.pipeline(MODEL, aligned=False)((clip.reference, (clip.poses, clip.reference_pose)))
    copied = np.repeat(clip.reference[None], 6, axis=0)
    assert psnr(answer.frames, clip.frames) > psnr(copied, clip.frames) + 1.0


def test_sample(pipe, tmp_path):
    answer = pipe((FIGURE, POSES))
    assert answer.frames.shape == (3, 32, 32, 3)
    assert answer.frames.dtype == np.uint8
    assert answer.frames.std() > 5
    assert np.array_equal(pipe((FIGURE, POSES)).frames, answer.frames)  # the seed's noise
    other = zoo.pipeline(MODEL, **QUICK, seed=1)((FIGURE, POSES))
    assert not np.array_equal(other.frames, answer.frames)
    assert "3 frames of 32 x 32" in answer.summary()
    assert Image.open(answer.save(tmp_path / "a.gif", scale=4)).size == (128, 128)
    assert answer.picture().size == (96, 32)
    assert next(pipe.model.parameters()).dtype == torch.float32  # half precision is for the disk


def test_each_kind_of_poses(pipe, tmp_path):
    """Key points in npz and JSON, and drawn poses in a folder, give the same video where nothing is aligned."""
    poses, own = read_poses(POSES)
    pipe = zoo.pipeline(MODEL, **QUICK, aligned=False)
    expected = pipe((FIGURE, POSES)).frames

    def frame(body):
        seen = ~np.isnan(body[:18]).any(-1)
        points = [v for (x, y), s in zip(np.nan_to_num(body[:18]), seen, strict=True) for v in (x, y, float(s))]
        return {"people": [{"pose_keypoints_2d": points}]}

    path = tmp_path / "poses.json"
    path.write_text(json.dumps({"frames": [frame(b) for b in poses.body], "reference": frame(own.body[0])}))
    assert np.array_equal(pipe((str(FIGURE), str(path))).frames, expected)
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i, picture in enumerate(draw(poses, (64, 64), width=1.0)):
        Image.fromarray(picture).save(folder / f"{i:04d}.png")
    Image.fromarray(draw(own, (64, 64), width=1.0)[0]).save(
        folder / media.POSE_OF_REFERENCE, quality=100, subsampling=0
    )
    found = pipe((FIGURE, folder)).frames  # the reference's pose went through a JPEG
    assert np.abs(found.astype(int) - expected).mean() < 4
    detected = zoo.pipeline(
        MODEL, **QUICK, aligned=False, detector=lambda pictures: poses if len(pictures) > 1 else own
    )
    shades = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    media.write_frames(shades, tmp_path / "a.gif", 8)
    assert np.array_equal(detected((FIGURE, tmp_path / "a.gif")).frames, expected)


def test_windows_and_options():
    answer = zoo.pipeline(MODEL, steps=1, frames=9, size=4, overlap=1)((FIGURE, POSES))
    assert len(answer.frames) == 9
    assert len(zoo.pipeline(MODEL, steps=1, every=5)((FIGURE, POSES)).frames) == 3
    noise = [zoo.pipeline(MODEL, steps=1, frames=1, prior=p)((FIGURE, POSES)).frames for p in (None, 949, -1)]
    assert np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], noise[2])


def test_the_first_frame_condition():
    """Models with local_image begin with the picture; features come from whatever has the two methods."""

    class Features:
        def picture(self, x):
            return x.mean((2, 3))[:, None, :1].expand(-1, -1, 16)

        def prompt(self):
            return torch.ones(1, 5, 16)

    sizes = {"dim": 32, "dim_mult": [1], "num_res_blocks": 0, "num_heads": 2, "head_dim": 16, "attn_scales": []}
    model = zoo.create("unianimate_unet", **sizes, context_dim=16, num_tokens=2, resolution=[32, 32], zero_init=False)
    options = {**QUICK, "latents": "patch", "clip": Features(), "pose_size": (32, 32)}
    first, about = (HumanAnimation(model, **options, first_frame=f)((FIGURE, POSES)).frames for f in (True, False))
    assert first.shape == about.shape == (3, 8, 8, 3)
    assert not np.array_equal(first, about)
    with pytest.raises(errors.BadArgument, match="give clip=FOLDER"):
        HumanAnimation(model, latents="patch")
    with pytest.raises(errors.BadArgument, match="give autoencoder=PATH"):
        HumanAnimation(model, clip=Features())


def test_what_does_not_fit_is_said(pipe, tmp_path):
    poses, _ = read_poses(POSES)
    poses.save(tmp_path / "alone.npz")
    with pytest.raises(ValueError, match="has no pose of the person"):
        pipe((FIGURE, tmp_path / "alone.npz"))
    with pytest.raises(ValueError, match="holds no key points"):
        pipe((FIGURE, FIGURE))
    with pytest.raises(ValueError, match="no picture that can be read"):
        pipe((POSES, POSES))
    with pytest.raises(ValueError, match="expected a pair"):
        pipe.read(FIGURE)
    with pytest.raises(ValueError, match="first_frame=True needs"):
        zoo.pipeline(MODEL, first_frame=True)
    with pytest.raises(ValueError, match="frames is 0"):
        zoo.pipeline(MODEL, frames=0)
    with pytest.raises(ValueError, match="detector is given without pose"):
        zoo.pipeline(MODEL, detector="yolox_l.onnx")
    for wrong, message in (
        ({"pose": "dw-ll_ucoco_384.onnx"}, "pose is given without detector"),
        ({"fps": 0}, "fps is 0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"prior": 1000}, "prior is 1000; expected -1 for noise alone, or 0 to 999"),
        ({"pose_size": 3}, "pose_size is 3; expected width and height"),
        ({"pose_size": [0, 9]}, r"pose_size is \[0, 9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.pipeline(MODEL, **wrong)


def test_the_callers_random_numbers_stay_as_they_are(pipe):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    pipe((FIGURE, POSES))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("out", ["a.xyz", "a", "file/a.gif"])
def test_what_cannot_be_written_is_said_before_the_work(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(HumanAnimation, "forward", lambda *_: pytest.fail("the work was done first"))
    with pytest.raises((errors.BadArgument, errors.StoreError), match=f"{out} (ends in|cannot be written)"):
        CliRunner().invoke(animate, [MODEL, str(FIGURE), str(POSES), "--out", out], catch_exceptions=False)


def test_commands(tmp_path, figures, monkeypatch):
    """Animate, predict, train on a folder, measure what was trained."""
    monkeypatch.chdir(tmp_path)
    quick = ["--out", "a.gif", "--steps", "1", "--frames", "2", "--scale", "2", "--json"]
    run = CliRunner().invoke(animate, [MODEL, str(FIGURE), str(POSES), *quick], catch_exceptions=False)
    assert json.loads(run.stdout)["file"] == "a.gif"
    assert Image.open("a.gif").size == (64, 64)
    given = [MODEL, str(FIGURE), str(POSES), "-o", "steps=1", "-o", "frames=2"]
    run = CliRunner().invoke(predict_command, [*given, "--pictures", "out"], catch_exceptions=False)
    assert "2 frames of 32 x 32" in run.output
    r = np.random.default_rng(0)
    for i in range(2):
        figures.save_clip(figures.random_clip(r, 4, 32), tmp_path / "clips" / f"{i}")
    options = ["--steps", "2", "--batch-size", "2", "--frames", "3", "--start", MODEL]
    run = CliRunner().invoke(
        train_animation, ["unianimate_micro", "clips", "--out", "tuned", *options], catch_exceptions=False
    )
    assert "saved to tuned" in run.output
    facts = json.loads(Path("tuned/config.json").read_text())["pretrained_cfg"]
    assert "preprocess" in facts
    assert not {"metrics", "tag"} & set(facts)  # those of what it started from
    found = zoo.validate("./tuned", "clips", steps=2, limit=1)
    assert found.samples == 1
    assert set(found.metrics) == {"psnr", "psnr_copied"}
    assert len(zoo.pipeline("./tuned", **QUICK)((FIGURE, POSES)).frames) == 3


def test_clips(tmp_path, figures):
    r = np.random.default_rng(0)
    clip = figures.random_clip(r, 6, 32)
    figures.save_clip(clip, tmp_path / "a")
    (read,) = read_clips(tmp_path, (32, 32))
    assert np.array_equal(read.reference, clip.reference)
    assert np.abs(read.frames.astype(int) - clip.frames).mean() < 6  # a GIF has 256 colours
    assert np.allclose(read.poses.body, clip.poses.body, atol=1e-6, equal_nan=True)
    (tmp_path / "a" / "reference.png").unlink()
    (alone,) = read_clips(tmp_path, (16, 16))
    cut = alone.cut(r, 3)
    assert len(cut.frames) == 3
    assert cut.reference.shape == (16, 16, 3)
    assert any(np.array_equal(cut.reference, f) for f in alone.frames)
    model = zoo.create("unianimate_micro", resolution=[64, 64])
    batch = Batches(model, PatchLatents(), pose_size=(32, 32)).of([cut, alone.cut(r, 3)])
    assert batch.x0.shape == (2, 4, 3, 8, 8)
    assert batch.conditions["dwpose"].shape == (2, 3, 4, 32, 32)
    assert batch.conditions["randomref"].shape == (2, 4, 3, 8, 8)
    with pytest.raises(ValueError, match="has 6 frames; expected 9"):
        read_clips(tmp_path, (16, 16), 9)
    with pytest.raises(ValueError, match="6 frames and 5 poses"):
        Clip(clip.frames, clip.poses[:5])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="lacks frames"):
        read_clips(tmp_path, (16, 16))


@pytest.mark.parametrize("page", ["docs/generation.md", "plugins/generation/README.md"])
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = (ROOT / page).read_text(encoding="utf-8").partition("## UniAnimate")[2]
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", about, re.DOTALL):
        exec(code, names)
    assert Path("figure.gif").exists()
    assert "frames of 32 x 32" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cards_figures_hold(figures):
    """The recipe's unseen clips are generated from a seed, so its figures can be taken again."""
    own = recipe("generation", "train_unianimate")
    found = own.measure(zoo.pipeline(MODEL, aligned=False), own.unseen_clips(16))
    for metric in zoo.info(MODEL).weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.05)
