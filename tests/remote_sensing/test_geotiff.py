"""Pairs of GeoTIFFs: what is read, what is refused and why, and what is written back."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from zoo_registry import errors
from zoo_remote_sensing.change_maps import count_buildings
from zoo_remote_sensing.changemamba import Damage, SemanticChange
from zoo_remote_sensing.pipelines import ChangeDetection, DamageAssessment, SemanticChangeDetection
from zoo_remote_sensing.rasters import Scene

rasterio = pytest.importorskip("rasterio")
UTM = "EPSG:32632"


class Difference(nn.Module):
    """Calls a pixel changed where its first band rose: an answer that can be computed without tiles."""

    num_classes, in_chans = 2, 3

    def forward(self, before, after):
        rise = (after - before)[:, :1]
        return torch.cat([0.05 - rise, rise - 0.05], dim=1) * 100


class Semantic(Difference):
    semantic_classes = 7

    def forward(self, before, after):
        # class 1 before, and after it class 5 where it is bright, class 2 elsewhere
        first = torch.zeros(len(before), 7, *before.shape[2:])
        first[:, 1] = 1
        second = torch.zeros_like(first)
        bright = after[:, 0] > 1.0
        second[:, 2], second[:, 5] = (~bright).float(), bright.float()
        return SemanticChange(super().forward(before, after), first, second)


class Damaged(Difference):
    damage_classes = 5

    def forward(self, before, after):
        building = torch.stack([before[:, 0] < 0, before[:, 0] > 0], dim=1).float()
        damage = torch.zeros(len(before), 5, *before.shape[2:])
        damage[:, 1], damage[:, 4] = (after[:, 0] > 0).float(), (after[:, 0] <= 0).float()
        return Damage(building, damage)


def place(scale=0.5):
    return {"crs": UTM, "transform": rasterio.transform.from_origin(500_000, 5_400_000, scale, scale)}


def write(path, pixels, **where):
    height, width, count = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=str(pixels.dtype), **where
    ) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


@pytest.fixture
def pair(tmp_path):
    """150 x 90 pixels of half a metre; a block of 20 x 30 rises."""
    before = np.full((90, 150, 3), 60, np.uint8)
    after = before.copy()
    after[40:60, 70:100] = 200
    return write(tmp_path / "before.tif", before, **place()), write(tmp_path / "after.tif", after, **place())


def test_map_lies_where_the_scene_lies(pair, tmp_path):
    pipe = ChangeDetection(Difference(), tile=64, overlap=16)
    found = pipe.write(pair, tmp_path / "out" / "map.tif", picture=tmp_path / "map.png", summary=tmp_path / "map.json")
    assert (found.pixels, found.changed_pixels) == (90 * 150, 600)
    assert found.hectares == pytest.approx(600 * 0.25 / 10_000)
    with rasterio.open(found.files["map"]) as written, rasterio.open(pair[0]) as source:
        assert (written.crs, written.transform, written.shape) == (source.crs, source.transform, source.shape)
        assert written.descriptions == ("changed",)
        assert written.tags(1)["classes"] == "0 unchanged, 1 changed"
        assert written.colormap(1)[1] == (255, 0, 0, 255)
        changed = written.read(1)
    assert changed[40:60, 70:100].all()
    assert changed.sum() == 600
    assert json.loads((tmp_path / "map.json").read_text())["hectares"] == pytest.approx(0.015)
    from PIL import Image

    shown = np.asarray(Image.open(tmp_path / "map.png"))
    assert shown.shape == (90, 150, 3)
    assert shown[50, 80].tolist() == [227, 100, 100]  # half the picture's 200, half red
    assert shown[0, 0].tolist() == [60, 60, 60]
    # the map in memory, saved later, is the same file
    whole = pipe(pair)
    assert np.array_equal(whole.changed, changed)
    with rasterio.open(whole.save(tmp_path / "again.tif")) as again:
        assert np.array_equal(again.read(1), changed)


def test_scenes_are_read_tile_by_tile(pair, tmp_path, monkeypatch):
    windows = []
    read = Scene.read
    monkeypatch.setattr(Scene, "read", lambda self, *box: windows.append(box[2:]) or read(self, *box))
    ChangeDetection(Difference(), tile=32, overlap=8).write(pair, tmp_path / "map.tif")
    assert set(windows) == {(32, 32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (90, 149, 3)}, "150 x 90 and 149 x 90 pixels"),
        ({"shape": (90, 150, 4)}, "3 and 4 bands"),
        ({"crs": "EPSG:32633"}, "projections EPSG:32632 and EPSG:32633"),
        ({"crs": None, "transform": None}, "projections EPSG:32632 and none"),
        ({"transform": (0.5, 0, 500_000.4, 0, -0.5, 5_400_000)}, "different grids"),
        ({"shape": (90, 150, 1)}, "after.tif has 1 band; expected bands"),
        ({"dtype": "uint16"}, "holds uint16; expected uint8"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pair, change, message):
    where = place()
    if change.get("transform"):
        where["transform"] = rasterio.Affine(*change["transform"])
    if "crs" in change:
        where["crs"] = change["crs"]
        if change["crs"] is None:
            del where["transform"]
    write(pair[1], np.zeros(change.get("shape", (90, 150, 3)), change.get("dtype", "uint8")), **where)
    with pytest.raises(errors.BadArgument, match=message):
        ChangeDetection(Difference())(pair)


def test_reflectances_and_other_band_orders(tmp_path):
    before = np.zeros((40, 40, 4), np.uint16)
    after = before.copy()
    after[:10, :, 2] = 3000  # the third band is red here
    pair = write(tmp_path / "a.tif", before, **place()), write(tmp_path / "b.tif", after, **place())
    pipe = ChangeDetection(Difference(), tile=32, overlap=8, bands=(3, 2, 1), value_range=(0, 3000))
    assert pipe(pair).changed_pixels == 400
    with pytest.raises(errors.BadArgument, match=r"has 4 bands; expected bands \[5, 2, 1\]"):
        ChangeDetection(Difference(), bands=(5, 2, 1))(pair)
    with pytest.raises(errors.BadArgument, match="low < high"):
        ChangeDetection(Difference(), value_range=(3000, 0))(pair)


def test_pixels_without_data_count_nowhere(tmp_path):
    before = np.full((40, 40, 3), 60, np.uint8)
    after = np.full((40, 40, 3), 200, np.uint8)
    after[:, :10] = 0
    pair = write(tmp_path / "a.tif", before, **place()), write(tmp_path / "b.tif", after, nodata=0, **place())
    found = ChangeDetection(Difference(), tile=32, overlap=8)(pair)
    assert (found.pixels, found.changed_pixels, found.share) == (1200, 1200, 1.0)
    assert (found.changed[:, :10] == 255).all()


def test_feet_and_ground_control_points(tmp_path):
    feet = {"crs": "EPSG:2225", "transform": rasterio.transform.from_origin(6_000_000, 2_000_000, 10, 10)}
    picture = np.zeros((40, 40, 3), np.uint8)
    pair = write(tmp_path / "a.tif", picture, **feet), write(tmp_path / "b.tif", picture + 200, **feet)
    survey_foot = 1200 / 3937
    assert ChangeDetection(Difference())(pair).hectares == pytest.approx(1600 * (10 * survey_foot) ** 2 / 1e4)
    points = [
        rasterio.control.GroundControlPoint(row, col, 500_000 + col, 5_400_000 - row)
        for row, col in ((0, 0), (0, 40), (40, 0))
    ]
    pair = [write(tmp_path / f"{n}.tif", picture, gcps=points, crs=UTM) for n in "cd"]
    found = ChangeDetection(Difference()).write(pair, tmp_path / "map.tif")
    assert found.hectares is None
    with rasterio.open(found.files["map"]) as written:
        assert [(p.row, p.col, p.x, p.y) for p in written.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        assert written.gcps[1] == rasterio.crs.CRS.from_string(UTM)


def test_from_to_in_hectares(pair, tmp_path):
    found = SemanticChangeDetection(Semantic(), tile=64, overlap=16).write(pair, tmp_path / "map.tif")
    assert found.from_to == {"class 1": {"class 5": 600}}
    named = SemanticChangeDetection(Semantic(), class_names=["unchanged", *"abcdef"])(pair)
    assert named.rows() == [("a", "e", 600, pytest.approx(0.015))]
    assert "a > e: 0.0" in str(named)
    with rasterio.open(found.files["map"]) as written:
        assert written.descriptions == ("changed", "before", "after")
        assert set(np.unique(written.read(3))) == {0, 5}


def test_buildings_are_counted_by_damage(tmp_path):
    before = np.zeros((300, 200, 3), np.uint8)
    after = np.zeros_like(before)
    for top, stands in ((10, True), (50, False), (120, True), (250, False)):  # rows 50 to 80 cross a strip of 64
        before[top : top + 30, 20:60] = 200
        after[top : top + 30, 20:60] = 200 if stands else 0
    pair = write(tmp_path / "a.tif", before, **place()), write(tmp_path / "b.tif", after, **place())
    pipe = DamageAssessment(Damaged(), tile=64, overlap=16)
    found = pipe.write(pair, tmp_path / "map.tif")
    assert found.buildings == {"no damage": 2, "minor damage": 0, "major damage": 0, "destroyed": 2}
    assert found.damage_pixels["destroyed"] == 2 * 30 * 40
    assert found.changed_pixels == 2 * 30 * 40
    assert pipe(pair).buildings == found.buildings
    assert "2 buildings" in str(found)


def test_a_building_that_crosses_strips_diagonally_is_one():
    grades = np.zeros((130, 130), np.uint8)
    for i in range(130):
        grades[i, i] = 1
    grades[0, 129] = 2
    names = ["background", "a", "b"]
    read = lambda top, left, h, w: {"after": grades[top : top + h, left : left + w]}  # noqa: E731
    assert count_buildings(read, 130, 130, names, "after") == {"a": 1, "b": 1}


def test_an_interrupted_map_leaves_no_file(pair, tmp_path):
    class Breaks(Difference):
        def forward(self, before, after):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        ChangeDetection(Breaks()).write(pair, tmp_path / "out" / "map.tif")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_rasterio_the_error_says_what_to_install(pair, tmp_path, monkeypatch):
    import sys

    from PIL import Image

    monkeypatch.setitem(sys.modules, "rasterio", None)
    pipe = ChangeDetection(Difference(), pixel_area=4.0)
    with pytest.raises(errors.MissingExtra, match=r"ssm-zoo-remote-sensing\[geo\]"):
        pipe(pair)
    # pictures need no rasterio
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 40), (255, 255, 255)).save(tmp_path / "b.png")
    found = pipe.write((tmp_path / "a.png", tmp_path / "b.png"), tmp_path / "map.png", picture=tmp_path / "over.png")
    assert found.hectares == pytest.approx(0.8)
    assert np.asarray(Image.open(tmp_path / "map.png")).all()
