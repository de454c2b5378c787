"""Files in and out: bits, transparency, orientation, colour profiles, formats; and files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from zoo_registry import errors
from zoo_restoration import images
from zoo_restoration.images import Picture, from_pixels, read_picture, write_picture

RANDOM = np.random.default_rng(0)
SHAPES = {"grey": (5, 7), "grey with alpha": (5, 7, 2), "RGB": (5, 7, 3), "RGBA": (5, 7, 4)}


def pixels(kind, bits):
    return RANDOM.integers(0, 1 << bits, SHAPES[kind], dtype=np.uint8 if bits == 8 else np.uint16)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_what_is_written_is_read_again(tmp_path, kind, bits, ending):
    before = from_pixels(pixels(kind, bits))
    write_picture(before, tmp_path / f"x{ending}")
    after = read_picture(tmp_path / f"x{ending}")
    assert after.bits == bits
    assert (after.alpha is None) == (kind in ("grey", "RGB"))
    shown = before.pixels()
    if after.colours.shape != before.colours.shape:  # grey with alpha may have become colours
        assert kind == "grey with alpha"
        shown = np.concatenate([np.repeat(shown[..., :1], 3, axis=2), shown[..., 1:]], axis=2)
    assert np.array_equal(after.pixels(), shown)
    assert [p.name for p in tmp_path.iterdir()] == [f"x{ending}"]  # nothing beside it


def test_sixteen_bits_are_not_eight_stretched(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    colours = np.stack([ramp, ramp[::-1], ramp.T], axis=2)
    write_picture(from_pixels(colours), tmp_path / "ramp.png")
    assert np.array_equal(read_picture(tmp_path / "ramp.png").pixels(), colours)
    with (tmp_path / "ramp.png").open("rb") as file:
        header = file.read(26)
    assert header[24:26] == bytes([16, 2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_pictures_stand_upright(tmp_path, orientation, ending):
    image = Image.fromarray(np.kron(pixels("RGB", 8), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x{ending}", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / f"x{ending}")).convert("RGB")
    found = read_picture(tmp_path / f"x{ending}")
    assert np.array_equal(found.pixels(), np.asarray(wanted))
    assert found.size == wanted.size


def test_deep_pictures_stand_upright(tmp_path):
    stored = pixels("RGB", 16)
    write_picture(from_pixels(stored), tmp_path / "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:33] + chunk + whole[33:])  # behind the header
    found = read_picture(tmp_path / "x.png")
    assert found.bits == 16
    assert np.array_equal(found.pixels(), np.rot90(stored, -1))


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg", ".webp"])
def test_the_colour_profile_stays(tmp_path, ending):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels("RGB", 8)).save(tmp_path / f"a{ending}", icc_profile=profile)
    write_picture(read_picture(tmp_path / f"a{ending}"), tmp_path / f"b{ending}")
    assert Image.open(tmp_path / f"b{ending}").info["icc_profile"] == profile
    if ending in (".png", ".tif"):
        write_picture(Picture(RANDOM.random((4, 4, 3)), None, 16, profile), tmp_path / f"c{ending}")
        assert read_picture(tmp_path / f"c{ending}").profile == profile


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LAB", "HSV", "YCbCr", "RGBX"])
def test_other_kinds_of_colour(mode):
    image = Image.fromarray(pixels("RGB", 8)).convert("1" if mode == "1" else "RGB")
    if mode == "P":
        image = image.quantize(16)
    elif mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode != "1":
        image = image.convert(mode)
    picture = read_picture(image)
    assert picture.colours.shape == (5, 7, 1 if mode == "1" else 3)
    assert np.array_equal(
        picture.pixels(), from_pixels(np.asarray(image.convert("L" if mode == "1" else "RGB"))).pixels()
    )


def test_a_transparent_colour_of_a_palette(tmp_path):
    image = Image.fromarray(pixels("RGB", 8)).quantize(4)
    image.save(tmp_path / "x.png", transparency=2)
    found = read_picture(tmp_path / "x.png")
    assert np.array_equal(found.alpha == 0, np.asarray(image) == 2)


def test_values_are_rounded_and_clipped():
    picture = Picture(np.array([[[-1.0], [0.5], [2.0], [0.1]]], np.float32))
    assert picture.pixels()[0, :, 0].tolist() == [0, 128, 255, 26]
    assert picture.pixels(16)[0, :, 0].tolist() == [0, 32768, 65535, 6554]
    assert picture.grey
    assert picture.pillow().mode == "L"


# -- what is refused


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image"):
        read_picture(tmp_path / "x.png")
    Image.fromarray(pixels("RGB", 8)).resize((64, 64)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.png: cannot be read as an image"):
        read_picture(tmp_path / "cut.png")
    write_picture(from_pixels(pixels("RGB", 16)), tmp_path / "deep.png")
    data = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "deep.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"deep\.png: cannot be read as an image"):
        read_picture(tmp_path / "deep.png")


def test_more_than_one_frame(tmp_path):
    frames = [Image.fromarray(pixels("RGB", 8)) for _ in range(3)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="holds 3 frames"):
        read_picture(tmp_path / "x.tif")


def test_floating_point(tmp_path):
    Image.fromarray(RANDOM.random((4, 4)).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="floating-point"):
        read_picture(tmp_path / "x.tif")


def test_arrays_of_another_form():
    for wrong in (np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8 or uint16"):
            read_picture(wrong)
    with pytest.raises(ValueError, match="expected a file"):
        read_picture(7)


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(pixels("RGB", 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS raises the limit"):
        read_picture(tmp_path / "x.png")


def test_formats_that_cannot_hold_it(tmp_path):
    with pytest.raises(ValueError, match=r"write \.png"):
        write_picture(from_pixels(pixels("RGBA", 8)), tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="an image is written as"):
        write_picture(from_pixels(pixels("RGB", 8)), tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


def test_without_rasterio(tmp_path, monkeypatch):
    def missing(module, what, requirement, **_):
        raise errors.MissingExtra(f"{what} needs {module}", extra="deep", command="pip")

    monkeypatch.setattr(images, "optional", missing)
    with pytest.raises(errors.MissingExtra, match="colour of 16 bits a channel needs rasterio"):
        write_picture(from_pixels(pixels("RGB", 16)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    write_picture(from_pixels(pixels("grey", 16)), tmp_path / "grey.png")  # Pillow has that
    assert read_picture(tmp_path / "grey.png").bits == 16
