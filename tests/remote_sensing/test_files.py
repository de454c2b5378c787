"""Pairs as people have them: folders, depths, bands, transparency, damage, outputs that cannot be."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from zoo.cli import run
from zoo_registry import errors
from zoo_remote_sensing.pipelines import ChangeDetection

rasterio = pytest.importorskip("rasterio")


class Difference(nn.Module):
    """Calls a pixel changed where its first band rose: an answer that can be computed without tiles."""

    num_classes, in_chans = 2, 3

    def forward(self, before, after):
        rise = (after - before)[:, :1]
        return torch.cat([0.05 - rise, rise - 0.05], dim=1) * 100


def write(path, pixels, **more):
    height, width, count = pixels.shape
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.5)}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=str(pixels.dtype), **place, **more
    ) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


def pictures(folder, names, images):
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return tuple(folder / name for name in names)


@pytest.fixture
def rising():
    """40 x 50 pixels, of which 10 x 20 rise."""
    before = np.full((40, 50, 3), 60, np.uint8)
    after = before.copy()
    after[10:20, 20:40] = 200
    return before, after


@pytest.fixture
def pair(rising, tmp_path):
    return write(tmp_path / "before.tif", rising[0]), write(tmp_path / "after.tif", rising[1])


def test_folders_say_which_date_is_earlier_or_are_refused(rising, tmp_path):
    before, after = rising
    pictures(tmp_path, ("T1/x.png", "T1/y.png", "T2/x.png", "T2/y.png"), (before, after, after, before))
    pipe = ChangeDetection(Difference())
    for given in (tmp_path, [tmp_path / "T1", tmp_path / "T2"], str(tmp_path)):
        found = pipe(given)
        assert [f.changed_pixels for f in found] == [200, 0]
        assert [f.source.count("x.png") for f in found] == [2, 0]
    pictures(tmp_path, ("T1/x.bmp",), (before,))
    with pytest.raises(errors.BadArgument, match=r"x\.bmp and x\.png"):
        pipe(tmp_path)
    (tmp_path / "T1/x.bmp").unlink()
    # in the order of names the later date would come first
    pictures(tmp_path / "flat", ("a_after.png", "a_before.png"), (after, before))
    for wrong in (tmp_path / "flat", str(tmp_path / "flat" / "*.png"), [tmp_path / "T1", tmp_path / "T1/x.png"]):
        with pytest.raises(errors.BadArgument, match="in order"):
            pipe(wrong)
    with pytest.raises(errors.BadArgument, match="expected a pair"):
        pipe.read(tmp_path)
    assert [f.changed_pixels for f in pipe([[before, after], (after, before)])] == [200, 0]
    with pytest.raises(errors.BadArgument, match=r"shape \(0, 50, 3\)"):
        pipe((before[:0], after[:0]))


def test_pictures_of_sixteen_bits_keep_their_shades(rising, tmp_path):
    deep = [image[..., 0].astype(np.uint16) * 257 for image in rising]
    assert ChangeDetection(Difference())(pictures(tmp_path, ("a.png", "b.png"), deep)).changed_pixels == 200


def test_bands_and_values_of_pictures_and_arrays(rising, tmp_path):
    before, after = rising
    after[..., 1:] = before[..., 1:]  # red alone rises
    for given in (pictures(tmp_path, ("a.png", "b.png"), rising), rising):
        assert ChangeDetection(Difference(), bands=(3, 2, 1))(given).changed_pixels == 0
        assert ChangeDetection(Difference(), bands=(1, 2, 3))(given).changed_pixels == 200
        assert ChangeDetection(Difference(), value_range=(200, 255))(given).changed_pixels == 0
        with pytest.raises(errors.BadArgument, match=r"3 bands; expected bands \[4, 1, 1\]"):
            ChangeDetection(Difference(), bands=(4, 1, 1))(given)
    deep = tuple(np.dstack([np.zeros_like(d[..., :1]), d]).astype(np.float32) * 10 for d in rising)
    deep[0][:, :30] = np.nan
    found = ChangeDetection(Difference(), bands=(2, 3, 4), value_range=(0, 2550))(deep)
    assert (found.pixels, found.changed_pixels) == (40 * 20, 100)
    with pytest.raises(errors.BadArgument, match="holds float32; expected uint8"):
        ChangeDetection(Difference(), bands=(2, 3, 4))(deep)
    with pytest.raises(errors.BadArgument, match="4 bands"):
        ChangeDetection(Difference(), value_range=(0, 2550))(deep)


def test_transparent_and_undefined_pixels_have_no_data(rising, tmp_path):
    before, after = rising
    clear = np.dstack([after, np.full((40, 50), 255, np.uint8)])
    clear[:, :30, 3] = 0
    found = ChangeDetection(Difference())(pictures(tmp_path, ("a.png", "b.png"), (before, clear)))
    assert (found.pixels, found.changed_pixels) == (40 * 20, 100)
    floats = [image.astype(np.float32) for image in rising]
    floats[1][:, :30] = np.nan  # and no nodata value in the header
    pair = tuple(write(tmp_path / f"{i}.tif", image) for i, image in enumerate(floats))
    found = ChangeDetection(Difference(), value_range=(0, 255), tile=32, overlap=8)(pair)
    assert (found.pixels, found.changed_pixels) == (40 * 20, 100)


def test_outputs_are_refused_before_the_work(pair, tmp_path):
    class Never(Difference):
        def forward(self, before, after):
            raise AssertionError("the scene was mapped")

    pipe, before = ChangeDetection(Never()), pair[0].read_bytes()
    (tmp_path / "file").write_text("")
    for wrong, message in (
        ({"path": tmp_path / "map.jpg"}, r"expected \.tif, \.tiff, \.png"),
        ({"path": None, "picture": tmp_path / "map.xyz"}, "expected .png"),
        ({"path": pair[0]}, "one of the pair"),
        ({"path": None, "summary": pair[1]}, "one of the pair"),
        ({"path": tmp_path / "file" / "map.tif"}, "cannot be written"),
        ({"path": None, "summary": tmp_path / "file" / "map.json"}, "cannot be written"),
    ):
        with pytest.raises((errors.BadArgument, errors.StoreError), match=message):
            pipe.write(pair, **{"path": None} | wrong)
    assert pair[0].read_bytes() == before
    for option in ({"pixel_area": -1.0}, {"pixel_area": float("nan")}, {"value_range": (0, float("inf"))}):
        with pytest.raises(errors.BadArgument, match=next(iter(option))):
            ChangeDetection(Never(), **option)(pair)


def test_files_that_cannot_be_read_are_named(pair, tmp_path):
    write(pair[1], np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    data = pair[1].read_bytes()
    pair[1].write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.BadFile, match=r"after\.tif cannot be read; is it cut short"):
        ChangeDetection(Difference()).write(pair, tmp_path / "map.tif")
    pair[1].write_bytes(b"")
    with pytest.raises(errors.BadFile, match=r"after\.tif is not a raster"):
        ChangeDetection(Difference())(pair)
    with pytest.raises(errors.LocalFileMissing, match=r"no file .*none\.png"):
        ChangeDetection(Difference())((pair[0], tmp_path / "none.png"))
    assert {p.name for p in tmp_path.iterdir()} == {"before.tif", "after.tif"}


def test_files_are_closed_after_an_answer_and_opened_for_its_picture(pair):
    found = ChangeDetection(Difference())(pair)
    assert found.scene.file is None
    assert found.picture().size == (50, 40)
    assert found.scene.file is None
    assert np.array_equal(pickle.loads(pickle.dumps(found)).changed, found.changed)


def test_names_are_as_many_as_classes(pair, tmp_path):
    with pytest.raises(errors.BadArgument, match="class_names has 3 names; the model has 2"):
        ChangeDetection(Difference(), class_names=["a", "b", "c"])
    (tmp_path / "names.txt").write_bytes("\ufeffstays\r\nmoves\r\n".encode())
    words = ["--labels", str(tmp_path / "names.txt"), "--map", str(tmp_path / "map.tif")]
    assert run(["change", "changemamba_micro.scenes", *map(str, pair), *words]) == 0
    with rasterio.open(tmp_path / "map.tif") as written:
        assert written.tags(1)["classes"] == "0 stays, 1 moves"
