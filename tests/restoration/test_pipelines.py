"""Files through the pipelines: of any kind, whole and in tiles; and measuring."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo import errors
from zoo.building import describe
from zoo.cli import run
from zoo_restoration import metrics, pipelines
from zoo_restoration.degradations import Degradation, resize_bicubic
from zoo_restoration.images import from_pixels, read_picture, write_picture
from zoo_restoration.pipelines import ImageRestoration, SuperResolution
from zoo_restoration.validation import degradation_for, validate_images

RANDOM = np.random.default_rng(0)


class Same(nn.Module):
    """Gives what it gets, ``scale`` times as large: what a pipeline does around a network shows."""

    def __init__(self, scale=1, in_chans=3, multiple=1):
        super().__init__()
        self.scale, self.in_chans, self.multiple = scale, in_chans, multiple
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3) * self.weight


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_every_kind_of_file_comes_back_as_it_was(tmp_path, bits, channels, ending):
    pixels = RANDOM.integers(0, 1 << bits, (13, 9, channels), dtype=np.uint8 if bits == 8 else np.uint16)
    write_picture(from_pixels(pixels), tmp_path / f"in{ending}")
    answer = ImageRestoration(Same())(tmp_path / f"in{ending}")
    assert (answer.width, answer.height, answer.bits, answer.scale) == (9, 13, bits, 1)
    answer.save(tmp_path / f"out{ending}")
    before, after = (read_picture(tmp_path / f"{name}{ending}") for name in ("in", "out"))
    assert np.array_equal(before.pixels(), after.pixels())


def test_a_grey_image_stays_grey(restorer):
    grey = RANDOM.integers(0, 256, (16, 12), dtype=np.uint8)
    answer = ImageRestoration(restorer)(grey)
    assert answer.image.grey
    with torch.no_grad():
        three = restorer(torch.from_numpy(grey / np.float32(255)).expand(1, 3, -1, -1))
    torch.testing.assert_close(torch.from_numpy(answer.image.colours[..., 0]), three[0].mean(0).clamp(0, 1))


def test_the_answer_is_the_networks(restorer):
    pixels = RANDOM.integers(0, 256, (17, 22, 3), dtype=np.uint8)
    answer = ImageRestoration(restorer)(pixels)
    with torch.no_grad():
        wanted = restorer(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None])[0].clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(answer.image.colours).permute(2, 0, 1), wanted)


def test_transparency_is_enlarged(enlarger):
    pixels = RANDOM.integers(0, 256, (10, 8, 4), dtype=np.uint8)
    answer = SuperResolution(enlarger)(pixels)
    assert answer.image.alpha.shape == (20, 16)
    wanted = resize_bicubic(torch.from_numpy(pixels[..., 3] / np.float32(255)), 20, 16).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(answer.image.alpha), wanted)
    assert str(answer).endswith("8 x 10 enlarged to 16 x 20")
    assert answer.picture().size == (36, 20)


def test_rotated_photographs(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RANDOM.integers(0, 256, (8, 24, 3), dtype=np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    answer = ImageRestoration(Same())(tmp_path / "x.jpg")
    assert (answer.width, answer.height) == (8, 24)
    answer.save(tmp_path / "y.jpg")
    assert not Image.open(tmp_path / "y.jpg").getexif().get(0x0112)  # upright, and not turned once more


# -- tiles


def test_large_images_go_through_in_tiles(monkeypatch):
    monkeypatch.setattr(pipelines, "WHOLE", 40 * 40)
    model = Same(scale=2, multiple=8)
    pixels = RANDOM.integers(0, 256, (50, 600, 3), dtype=np.uint8)
    answer = SuperResolution(model)(pixels)
    assert np.array_equal(answer.image.pixels(), pixels.repeat(2, 0).repeat(2, 1))
    assert answer.tiles == 2 == len(model.seen)
    assert "in 2 tiles of 512" in answer.notes
    assert max(shape[3] for shape in model.seen) == 512
    model.seen.clear()
    whole = SuperResolution(model, tile=0)(pixels)
    assert len(model.seen) == whole.tiles == 1
    assert not whole.notes


def test_tiles_of_scans_come_near_the_whole(restorer):
    """Not equal: a scan sees its tile alone. Near, because the residual and near pixels make most of it."""
    pixels = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = ImageRestoration(restorer, tile=0)(pixels).image.colours
    tiled = ImageRestoration(restorer, tile=32, overlap=16)(pixels)
    assert tiled.tiles == 9
    difference = np.abs(whole - tiled.image.colours).max()
    assert 0 < difference < 0.1


def test_the_mean_over_flips_and_turns(restorer):
    pixels = RANDOM.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    pipe = ImageRestoration(restorer, ensemble=True)
    one, turned = pipe(pixels).image.colours, pipe(np.ascontiguousarray(np.rot90(pixels))).image.colours
    np.testing.assert_allclose(np.rot90(one), turned, atol=1e-5)
    plain = ImageRestoration(restorer)
    assert (
        np.abs(
            np.rot90(plain(pixels).image.colours) - plain(np.ascontiguousarray(np.rot90(pixels))).image.colours
        ).max()
        > 1e-4
    )


# -- what is refused


def test_models_that_do_not_fit(restorer):
    other = Same()
    card = dataclasses.replace(restorer.zoo_info, card=msgspec.structs.replace(restorer.zoo_info.card, task="counting"))
    describe(other, card)
    with pytest.raises(errors.BadArgument, match="does not enlarge"):
        SuperResolution(Same())
    with pytest.raises(errors.BadArgument, match="is for counting; expected a model for image-restoration or"):
        ImageRestoration(other)
    with pytest.raises(errors.BadArgument, match="takes 4 channels"):
        ImageRestoration(Same(in_chans=4))
    with pytest.raises(errors.BadArgument, match="0 for the whole image"):
        ImageRestoration(Same(), tile=-1)
    with pytest.raises(ValueError, match="convert it to grey"):
        ImageRestoration(Same(in_chans=1))(np.zeros((8, 8, 3), np.uint8))


def test_failures_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    write_picture(from_pixels(np.zeros((8, 8, 3), np.uint8)), tmp_path / "good.png")
    found = ImageRestoration(Same())(tmp_path, keep_going=True)
    assert [type(r).__name__ for r in found] == ["Failure", "Restored"]
    assert "bad.png" in str(found[0])


# -- measuring


def test_files_are_at_fault(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").mkdir()
    for name, error in (("a.png", errors.BadFile), ("b.png", errors.BadFile), ("c.png", errors.LocalFileMissing)):
        with pytest.raises(error, match=name):
            read_picture(tmp_path / name)


def test_where_images_go_is_looked_at_first(tmp_path, capsys):
    """A wrong ending is no folder's name; what cannot be written is said before anything is read."""
    (tmp_path / "file").touch()
    for out, message in (("a.gif", "expected .png"), ("file/a.png", "file is a file"), ("file", "file is a file")):
        assert run(["restore", "serpent_micro", str(tmp_path / "none.png"), "--out", str(tmp_path / out)]) != 0
        assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_validation_degrades_and_compares(folder, restorer):
    found = validate_images(restorer, folder, degradation="blur:sigma=1", limit=3)
    assert found.samples == 3
    spoil = Degradation.parse("blur:sigma=1")
    given, ours = [], []
    for i in range(3):
        clean = torch.from_numpy(read_picture(folder / f"{i}.png").colours).permute(2, 0, 1)[None]
        spoilt = (spoil(clean) * 255).round() / 255
        with torch.no_grad():
            restored = (restorer(spoilt).clamp(0, 1) * 255).round() / 255
        given.append(float(metrics.psnr(spoilt, clean)))
        ours.append(float(metrics.ssim(restored, clean, y=True)))
    assert found.metrics["given psnr"] == pytest.approx(np.mean(given))
    assert found.metrics["ssim_y"] == pytest.approx(np.mean(ours))


def test_validation_of_pairs_is_that_of_the_same_degradation(folder, enlarger):
    spoil = Degradation.parse("bicubic:scale=2")
    for path in sorted(folder.iterdir()):
        clean = torch.from_numpy(read_picture(path).colours).permute(2, 0, 1)[None]
        small = (spoil(clean)[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
        write_picture(from_pixels(small), folder.parent / "degraded" / path.name)
    pairs = validate_images(enlarger, folder.parent)
    alone = validate_images(enlarger, folder)
    assert pairs.samples == alone.samples == 6
    for name, value in alone.metrics.items():
        assert pairs.metrics[name] == pytest.approx(value), name
    assert set(alone.metrics) == {p + m for p in ("", "given ") for m in ("psnr", "psnr_y", "ssim", "ssim_y")}


def test_what_to_take_off(restorer, enlarger):
    with pytest.raises(ValueError, match="give degradation="):
        degradation_for(restorer, None)
    assert str(degradation_for(enlarger, None)) == "bicubic:scale=2"
    with pytest.raises(ValueError, match="expected the same factor"):
        degradation_for(enlarger, "noise:std=0.1")


def test_a_missing_partner(folder, restorer):
    (folder.parent / "degraded").mkdir()
    with pytest.raises(ValueError, match=r"no degraded image for 0\.png"):
        validate_images(restorer, folder.parent)


def test_zoo_validate_takes_it(folder):
    found = zoo.validate(zoo.create("serpent_micro").eval(), folder, degradation="noise:std=0.05", limit=2)
    assert found.metrics["given psnr"] == pytest.approx(26, abs=1)
