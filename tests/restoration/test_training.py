"""Training: crops, the averaged model, a run that is interrupted, and the commands."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import zoo
from zoo import errors
from zoo_restoration import commands
from zoo_restoration.degradations import Degradation, gaussian_blur
from zoo_restoration.drawings import drawing
from zoo_restoration.folders import ImageFolder
from zoo_restoration.images import from_pixels, read_picture, write_picture
from zoo_restoration.training import Settings, Trainer, crops, measure, to_tensor

BLUR = Degradation.parse("blur:sigma=1,noise=0.02")
FEW = Settings(steps=6, batch_size=2, patch=16, learning_rate=1e-3, save_every=3, ema=0.9)


def images(count=4, size=32):
    return [drawing(i, size) for i in range(count)]


# -- crops


def test_crops_are_pieces_of_the_images_turned_and_flipped():
    image = np.arange(24 * 24 * 3, dtype=np.uint16).reshape(24, 24, 3)
    x, _ = crops([image], Settings(batch_size=40, patch=8), 0)
    pieces = np.lib.stride_tricks.sliding_window_view(image, (8, 8), (0, 1))
    seen = set()
    for one in (x * 65535).round().to(torch.int64).numpy():
        flipped = (one, one[:, ::-1], one[:, :, ::-1], one[:, ::-1, ::-1])
        ways = [*flipped, *(np.swapaxes(w, 1, 2) for w in flipped)]
        found = [i for i, way in enumerate(ways) if (pieces == way).all((2, 3, 4)).any()]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 8


def test_crops_follow_from_the_step():
    first, again, other = (crops(images(), FEW, step)[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert crops(images(), Settings(batch_size=1, patch=20), 0, multiple=3)[0].shape == (1, 3, 18, 18)
    with pytest.raises(ValueError, match="larger images or smaller crops"):
        crops([np.zeros((12, 40, 3), np.uint8)], FEW, 0)


# -- the trainer


def test_it_learns(restorer):
    """On one image, to be sure that the loss falls for the reason that it should."""
    only = images(1)
    before = measure(restorer, only, Degradation.parse("blur:sigma=1"))
    trainer = Trainer(
        restorer, only, Degradation.parse("blur:sigma=1"),
        Settings(steps=150, batch_size=2, patch=32, learning_rate=1e-2, ema=0.8),
    )  # fmt: skip
    after = measure(trainer.train(), only, Degradation.parse("blur:sigma=1"))
    given = measure(lambda x: x, only, Degradation.parse("blur:sigma=1"))
    assert after["psnr"] > max(before["psnr"], given["psnr"]) + 0.5


def test_an_interrupted_run_is_the_whole_run(restorer, tmp_path):
    start = {k: v.clone() for k, v in restorer.state_dict().items()}
    whole = Trainer(restorer, images(), BLUR, FEW).train().state_dict()
    restorer.load_state_dict(start)
    first = Trainer(restorer, images(), BLUR, FEW, folder=tmp_path)
    for _ in range(4):  # written after step 3, then interrupted
        first.one_step()
    second = Trainer(zoo.create("serpent_micro", dims=[4, 6], state=2), images(), BLUR, FEW, folder=tmp_path)
    assert second.step == 3
    found = second.train().state_dict()
    for key, value in whole.items():
        assert torch.equal(found[key], value), key
    assert Trainer(restorer, images(), BLUR, FEW, folder=tmp_path).step == 6


@pytest.mark.parametrize("change", ["steps", "degradation", "images"])
def test_a_run_with_other_settings_is_not_gone_on_with(restorer, tmp_path, change):
    Trainer(restorer, images(), BLUR, FEW, folder=tmp_path).train()
    settings = Settings(steps=7, batch_size=2, patch=16, learning_rate=1e-3, ema=0.9) if change == "steps" else FEW
    spoil = Degradation.parse("noise") if change == "degradation" else BLUR
    data = images(5) if change == "images" else images()
    with pytest.raises(ValueError, match=f"other {change}"):
        Trainer(restorer, data, spoil, settings, folder=tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "other"])
def test_a_damaged_run_is_named(restorer, tmp_path, damage):
    path = tmp_path / "run.safetensors"
    Trainer(restorer, images(), BLUR, FEW, folder=tmp_path).save()
    if damage == "other":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"text" * 9 if damage == "text" else path.read_bytes()[:3000])
    with pytest.raises(errors.BadFile, match=r"run\.safetensors is no run that can be gone on with"):
        Trainer(restorer, images(), BLUR, FEW, folder=tmp_path)


def test_the_averaged_model_is_an_average(restorer):
    trainer = Trainer(restorer, images(), BLUR, Settings(steps=2, batch_size=1, patch=16, ema=0.9))
    name = "head.weight"
    start = restorer.state_dict()[name].clone()
    trainer.one_step()
    one = restorer.state_dict()[name].clone()
    torch.testing.assert_close(trainer.averaged.state_dict()[name], 0.1 * start + 0.9 * one)
    trainer.one_step()
    two = restorer.state_dict()[name]
    keep = 2 / 11
    wanted = keep * (0.1 * start + 0.9 * one) + (1 - keep) * two
    torch.testing.assert_close(trainer.averaged.state_dict()[name], wanted)


def test_the_rate_falls_by_half_a_cosine(restorer):
    trainer = Trainer(restorer, images(), BLUR, Settings(steps=100, learning_rate=1.0))
    found = []
    for trainer.step in (0, 50, 100):
        found.append(trainer.rate())
    assert found == pytest.approx([1.0, 0.505, 0.01])


def test_what_does_not_fit(restorer, enlarger):
    with pytest.raises(ValueError, match="expected the same factor"):
        Trainer(enlarger, images(), BLUR)
    with pytest.raises(ValueError, match="no image"):
        Trainer(restorer, [], BLUR)
    with pytest.raises(ValueError, match="must be positive"):
        Settings(steps=0)
    with pytest.raises(ValueError, match="no image to measure"):
        measure(restorer, [], BLUR)


# -- folders


def test_a_folder(tmp_path, folder):
    write_picture(from_pixels(np.full((20, 20), 7, np.uint16)), folder / "sub" / "grey.png")
    every = ImageFolder(folder)
    assert len(every) == 7
    grey = every[[p.name for p in every.files].index("grey.png")]
    assert grey.shape == (20, 20, 3)
    assert grey.dtype == np.uint16
    assert (grey == 7).all()
    train, held = every.split(0.3)
    assert len(train) == 5
    assert len(held) == 2
    assert not set(train.files) & set(held.files)
    assert len(ImageFolder(folder).split(0.01)[1]) == 1
    assert len(ImageFolder(folder).split(0.0)[1]) == 0
    with pytest.raises(ValueError, match="holds no image"):
        ImageFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="takes grey images"):
        ImageFolder(folder, channels=1)[0]


# -- the command line


def train(folder, out, *more):
    arguments = [
        "serpent_micro", str(folder), "--out", str(out), "--degradation", "blur:sigma=1", "--steps", "4",
        "--batch-size", "1", "--patch", "16", "--save-every", "2", "--set", "dims=[4, 6]", "--set", "state=2", *more,
    ]  # fmt: skip
    return CliRunner().invoke(commands.train_restorer, arguments, catch_exceptions=False)


def test_training_restoring_and_validating_by_commands(folder, tmp_path):
    said = json.loads(train(folder, tmp_path / "run", "--json").output)
    assert said["steps"] == 4
    assert (said["images"], said["held_out"]) == (5, 1)
    model = zoo.load(tmp_path / "run" / "model")
    assert model.zoo_info.config["dims"] == [4, 6]
    found = zoo.validate(model, folder, limit=2)  # the degradation is on the saved card
    assert found.notes == "degradation blur:sigma=1"
    again = train(folder, tmp_path / "run")
    assert "going on after step 4" in again.output
    for i in range(2):
        clean = to_tensor(drawing(i, 24))[None]
        pixels = (gaussian_blur(clean, 1.0)[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
        write_picture(from_pixels(pixels), tmp_path / "in" / f"{i}.png")
    name = str(tmp_path / "run" / "model")
    result = CliRunner().invoke(
        commands.restore, [name, str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--pictures", "--json"],
        catch_exceptions=False, standalone_mode=False,
    )  # fmt: skip
    rows = json.loads(result.output)
    assert [row["width"] for row in rows] == [24, 24]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "000_0.png", "000_0_before_after.png", "001_1.png", "001_1_before_after.png",
    }  # fmt: skip
    assert read_picture(tmp_path / "out" / "000_0.png").size == (24, 24)


def test_an_interrupted_command_says_where_it_goes_on(folder, tmp_path, monkeypatch):
    step = Trainer.one_step

    def interrupted(trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "one_step", interrupted)
    stopped = train(folder, tmp_path / "run")
    assert "holds the run up to step 2" in stopped.output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.safetensors"]
    monkeypatch.setattr(Trainer, "one_step", step)
    assert "going on after step 2" in train(folder, tmp_path / "run").output


def test_small_images_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"clean/\d\.png has 36 x 40 pixels and the crops 64"):
        train(folder, tmp_path / "run", "--patch", "64")


def test_training_refuses_other_models(folder, tmp_path):
    pytest.importorskip("zoo_generation")
    words = ["dimsum_micro", str(folder), "--out", str(tmp_path / "run"), "--degradation", "noise"]
    with pytest.raises(errors.BadArgument, match="dimsum_micro is for image-generation; expected a model for"):
        CliRunner().invoke(commands.train_restorer, words, catch_exceptions=False)


def test_upscale_to_one_file(tmp_path, enlarger):
    zoo.save(enlarger, tmp_path / "m")
    write_picture(from_pixels(np.zeros((6, 10, 4), np.uint8)), tmp_path / "a.png")
    run = CliRunner()
    result = run.invoke(
        commands.upscale, [str(tmp_path / "m"), str(tmp_path / "a.png"), "--out", str(tmp_path / "b.webp")],
        catch_exceptions=False, standalone_mode=False,
    )  # fmt: skip
    assert result.return_value == 0
    assert "10 x 6 enlarged to 20 x 12" in result.output
    assert read_picture(tmp_path / "b.webp").alpha is not None
    both = [str(tmp_path / "m"), str(tmp_path / "a.png"), str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    assert "give a folder" in run.invoke(commands.upscale, both).output


def test_a_file_that_cannot_be_read(tmp_path, restorer):
    zoo.save(restorer, tmp_path / "m")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    write_picture(from_pixels(np.zeros((8, 8, 3), np.uint8)), tmp_path / "in" / "b.png")
    result = CliRunner().invoke(
        commands.restore,
        [str(tmp_path / "m"), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--keep-going"],
        catch_exceptions=False, standalone_mode=False,
    )  # fmt: skip
    assert result.return_value == 1
    assert "a.png" in result.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["001_b.png"]
