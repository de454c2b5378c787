"""``zoo.validate`` on folders of labelled pairs and scenes, as the data sets come."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo_registry import errors
from zoo_remote_sensing.changemamba import Damage, SemanticChange
from zoo_remote_sensing.labelled import read_label
from zoo_remote_sensing.palettes import COLOURS

pytest.importorskip("torchmetrics")


class Threshold(nn.Module):
    """Changed where the later picture is bright; land cover and damage by brightness: exact answers to score."""

    in_chans, num_classes = 3, 2

    def forward(self, before, after):
        return torch.cat([-after[:, :1], after[:, :1]], dim=1)


class Cover(Threshold):
    semantic_classes = 7

    def forward(self, before, after):
        cover = torch.zeros(len(after), 7, *after.shape[2:])
        cover[:, 2] = 1
        return SemanticChange(super().forward(before, after), cover, cover.flip(1))  # from class 2 to class 4


class Wrecks(Threshold):
    damage_classes = 5

    def forward(self, before, after):
        damage = torch.full((len(after), 5, *after.shape[2:]), -9.0)
        damage[:, 1], damage[:, 4] = -after[:, 0], after[:, 0]
        return Damage(super().forward(before, before), damage)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def bright(mask):
    return np.repeat(mask[..., None], 3, axis=2) * 255


@pytest.mark.parametrize("folders", [("T1", "T2", "GT"), ("A", "B", "label")])
@pytest.mark.parametrize("one", [1, 255])
def test_binary_pairs(tmp_path, folders, one):
    label = np.zeros((40, 50), bool)
    label[:10] = True
    for name, found in (("a", label), ("b", label ^ (np.arange(50) < 5))):  # b: 50 misses and 150 false alarms
        for folder, pixels in zip(folders, (bright(~label), bright(found), label * one), strict=True):
            save(tmp_path / folder / f"{name}.png", pixels)
    found = zoo.validate(Threshold(), tmp_path, "binary-change-detection", tile=32, overlap=8)
    assert found.samples == 2
    hits, misses, alarms = 950, 50, 150
    assert found.metrics["F1"] == pytest.approx(2 * hits / (2 * hits + misses + alarms))
    assert found.metrics["IoU"] == pytest.approx(hits / (hits + misses + alarms))
    assert found.metrics["OA"] == pytest.approx(1 - 200 / 4000)
    assert zoo.validate(Threshold(), tmp_path, "binary-change-detection", limit=1).metrics["F1"] == 1.0
    (tmp_path / folders[2] / "b.png").unlink()
    with pytest.raises(errors.BadArgument, match="no file for 1 of"):
        zoo.validate(Threshold(), tmp_path, "binary-change-detection")


def test_labels_that_are_none(tmp_path):
    for folder in ("T1", "T2", "GT"):
        save(tmp_path / folder / "a.png", np.full((32, 32, 3) if folder != "GT" else (32, 32), 7))
    with pytest.raises(ValueError, match="0 and 1, or 0 and 255"):
        zoo.validate(Threshold(), tmp_path, "binary-change-detection")
    with pytest.raises(errors.BadArgument, match="GT_T1 or labelA or label1"):
        zoo.validate(Cover(), tmp_path, "semantic-change-detection")


def test_semantic_pairs_in_numbers_and_in_colours(tmp_path):
    moved = np.zeros((32, 40), bool)
    moved[:, :20] = True
    before, after = np.where(moved, 2, 0), np.where(moved, 4, 0)
    after[:8, :20] = 5  # what a quarter of it became is something else
    palette = np.array(COLOURS["second"], np.uint8)
    for root, form in (("numbers", lambda x: x), ("colours", lambda x: palette[x])):
        for folder, pixels in (
            ("im1", bright(moved)), ("im2", bright(moved)), ("label1", form(before)), ("label2", form(after)),
        ):  # fmt: skip
            save(tmp_path / root / folder / "a.png", pixels)
    names = zoo.create("changemamba_scd_tiny", dims=[8, 8, 8, 8], depths=[1] * 4, decoder_dim=8, mlp_ratio=1.0)
    model = Cover()
    model.zoo_info = names.zoo_info  # the label set of SECOND, whose colours are known
    one, other = (zoo.validate(model, tmp_path / root, codes="pairs").metrics for root in ("numbers", "colours"))
    assert one == other
    assert one["IoU"] == one["F1"] == 1.0
    assert one["F_scd"] == pytest.approx(3 / 4)
    dates = zoo.validate(model, tmp_path / "numbers", codes="dates")
    assert dates.metrics["F_scd"] == pytest.approx(7 / 8)
    assert "dates" in dates.notes
    save(tmp_path / "colours" / "label1" / "a.png", np.full((32, 40, 3), 77) * [1, 0, 1])
    with pytest.raises(errors.BadArgument, match=r"the colour \(77, 0, 77\)"):
        zoo.validate(model, tmp_path / "colours")


@pytest.mark.parametrize(("folder", "tail"), [("masks", ""), ("targets", "_target")])
def test_damage_pairs(tmp_path, folder, tail):
    building, wreck = np.zeros((32, 40), bool), np.zeros((32, 40), bool)
    building[:16], wreck[:, :10] = True, True
    save(tmp_path / "images" / "x_1_pre_disaster.png", bright(building))
    save(tmp_path / "images" / "x_1_post_disaster.png", bright(wreck))
    save(tmp_path / folder / f"x_1_pre_disaster{tail}.png", building)
    save(tmp_path / folder / f"x_1_post_disaster{tail}.png", building * np.where(wreck, 4, 1))
    found = zoo.validate(Wrecks(), tmp_path, "damage-assessment")
    assert found.metrics["F1_loc"] == found.metrics["OA"] == 1.0
    assert found.metrics["F1_clf"] == 0.0  # two grades do not occur
    assert set(found.per_class) == {"no damage", "destroyed"}


def test_hyperspectral_scene(tmp_path):
    torch.manual_seed(0)
    model = zoo.create("morpmamba_houston", bands=4, dim=8, state=8, num_classes=3).eval()
    cube = np.random.default_rng(0).normal(size=(9, 8, 6)).astype(np.float32)
    truth = zoo.pipeline(model)(cube).classes.astype(np.int64) + 1
    truth[0] = 0  # unlabelled
    np.save(tmp_path / "scene.npy", cube)
    np.save(tmp_path / "scene_gt.npy", truth)
    found = zoo.validate(model, tmp_path)
    assert found.samples == 64
    assert found.metrics["OA"] == found.metrics["AA"] == found.metrics["mIoU"] == 1.0
    np.save(tmp_path / "other.npy", cube)
    with pytest.raises(errors.BadArgument, match="2 cubes"):
        zoo.validate(model, tmp_path)


def test_scenes_to_labels(tmp_path):
    """RSMamba's own checkpoint file: answers in the names of its data set, by the vision plugin's pipeline."""
    torch.manual_seed(0)
    small = {"arch": None, "dim": 8, "depth": 1, "img_size": 32, "shuffle_seed": 0}
    model = zoo.create("rsmamba_base_uc", **small)
    theirs = zoo.reference("rsmamba").to_reference(model.state_dict(), model=model)
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "ours.pth")
    for name in ("harbor", "forest"):
        save(tmp_path / "images" / name / "a.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    model = zoo.load("rsmamba_base_uc.uc_merced", checkpoint=tmp_path / "ours.pth", **small)
    found = zoo.pipeline(model, top_k=21)(tmp_path / "images" / "forest" / "a.png")
    assert {"harbor", "forest", "tenniscourt"} < set(found.labels)
    measured = zoo.validate(model, tmp_path / "images")
    assert measured.samples == 2
    assert "matched to the classes by label" in measured.notes


def test_measures_without_a_meaning_are_none(tmp_path):
    for name in ("T1", "T2", "GT"):
        (tmp_path / name).mkdir()
        Image.new("RGB" if name != "GT" else "L", (40, 40)).save(tmp_path / name / "a.png")
    found = zoo.validate("changemamba_micro.scenes", tmp_path)
    assert found.metrics["kappa"] is None
    assert found.metrics["OA"] == 1
    (tmp_path / "GT" / "a.png").write_bytes(b"")
    with pytest.raises(errors.BadFile, match=r"a\.png is no picture"):
        zoo.validate("changemamba_micro.scenes", tmp_path)


def test_labels_of_sixteen_bits(tmp_path):
    labels = np.array([[0, 300], [7, 255]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert read_label(tmp_path / "a.png").tolist() == labels.tolist()


def test_labels_that_do_not_fit_the_cube(tmp_path):
    torch.manual_seed(0)
    model = zoo.create("morpmamba_houston", bands=4, dim=8, state=8, num_classes=3).eval()
    cube = np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32)
    cube[0, 0] = np.nan
    np.save(tmp_path / "cube.npy", cube)
    np.save(tmp_path / "cube_gt.npy", np.ones((6, 5), np.uint8))
    assert zoo.validate(model, tmp_path).metrics["OA"] is not None
    np.save(tmp_path / "cube_gt.npy", np.ones((5, 6), np.uint8))
    with pytest.raises(errors.BadArgument, match=r"\(5, 6\) pixels"):
        zoo.validate(model, tmp_path)
    np.save(tmp_path / "cube_gt.npy", np.full((6, 5), 0.5))
    with pytest.raises(errors.BadArgument, match="expected class numbers"):
        zoo.validate(model, tmp_path)
