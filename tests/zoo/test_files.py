"""Files of the user's: one clear error for whatever is wrong with them, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo import errors
from zoo.files import check_place, read_arrays, read_json, read_text, refused, whole
from zoo.images import read_picture


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", x=np.arange(1000.0), name=np.array("é"))
    return tmp_path / "a.npz"


def test_arrays(archive, tmp_path):
    found = read_arrays(archive)
    assert found["x"].shape == (1000,)
    assert str(found["name"]) == "é"
    np.save(tmp_path / "b.npy", np.ones(3))
    assert list(read_arrays(tmp_path / "b.npy")) == [""]


@pytest.mark.parametrize("content", [b"", b"only text", b"cut", b"object"])
def test_no_arrays(content, archive, tmp_path):
    path = tmp_path / "bad.npz"
    if content == b"object":
        np.savez(path, x=np.array([None], dtype=object))
    else:
        path.write_bytes(archive.read_bytes()[:700] if content == b"cut" else content)
    with pytest.raises(errors.BadFile, match=r"bad\.npz is no \.npz or \.npy file of plain arrays") as caught:
        read_arrays(path)
    assert "allow_pickle" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("read", [read_arrays, read_text, read_json, read_picture])
def test_folders_and_missing_files(read, tmp_path):
    with pytest.raises(errors.BadFile, match="is a folder; expected"):
        read(tmp_path)
    with pytest.raises(errors.LocalFileMissing, match="there is no file"):
        read(tmp_path / "nowhere")


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfring\n")
    assert read_text(path) == "ring\n"  # without the mark that some editors write
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(errors.BadFile, match=r"a\.txt is no text in UTF-8 \(byte 0 is 0xe9\); save it as UTF-8"):
        read_text(path)
    path.write_text("{")
    with pytest.raises(errors.BadFile, match=r"a\.txt is no JSON"):
        read_json(path)


def test_pictures_of_16_bits_keep_their_shades(tmp_path):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades * 257).save(tmp_path / "deep.png")
    Image.fromarray(shades.astype(np.uint8)).save(tmp_path / "flat.png")
    deep, flat = (np.asarray(read_picture(tmp_path / f"{n}.png")) for n in ("deep", "flat"))
    np.testing.assert_array_equal(deep, flat)


def test_pictures_are_turned_upright(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (4, 6)


def test_no_pictures(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_text("text")
    with pytest.raises(errors.BadFile, match=r"x\.png is no picture that can be read"):
        read_picture(path)
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(errors.BadFile, match="floating-point"):
        read_picture(tmp_path / "x.tif")
    Image.new("L", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(errors.BadFile, match="too many pixels"):
        read_picture(path)
    with pytest.raises(ValueError, match="given as int"):
        read_picture(3)
    with pytest.raises(ValueError, match="float64"):
        read_picture(np.ones((2, 2)))


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole(path) as work:
        work.write_text("one")

    def interrupted():
        with whole(path) as work:
            work.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    for folder in (tmp_path / "new", "."):  # the working directory has no name
        with pytest.raises(errors.StoreError, match="cannot be written: it is a folder"), whole(folder):
            pass
    with pytest.raises(errors.StoreError, match=r"a\.txt/b\.txt cannot be written: "), whole(path / "b.txt"):
        pass


def test_places_that_cannot_be_written(tmp_path):
    check_place(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match="is a file"):
        check_place(tmp_path / "file" / "below")


def test_refused_is_the_files_fault():
    """A ValueError becomes BadFile with the same sentence; the zoo's own errors and all others stay what they are."""
    with pytest.raises(errors.BadFile, match=r"^a.txt, line 3: no number$") as found, refused("a.txt"):
        raise ValueError("a.txt, line 3: no number")
    assert (found.value.path, found.value.exit_code) == ("a.txt", 5)
    with pytest.raises(errors.BadArgument), refused("a.txt"):
        raise errors.BadArgument("width is 0", argument="width", accepted=[])
    with pytest.raises(KeyError), refused("a.txt"):
        raise KeyError("x")
