"""Pictures in, label maps as pictures out: for networks of two dimensions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo.cli import run
from zoo_medical.pipelines import MedicalSegmentation


class Bright(nn.Module):
    """Class 1 where red is above 0.5: what the pipeline does can be worked out by hand."""

    num_classes = 2

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans, self.seen = in_chans, set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 4
        self.seen.add(tuple(x.shape[1:]))
        return torch.cat([0.5 - x[:, :1], x[:, :1] - 0.5], dim=1) * 20


@pytest.fixture
def lesion(tmp_path):
    """50 rows of 70 columns; 10 x 30 of them are red."""
    image = np.full((50, 70, 3), 20, np.uint8)
    image[5:15, 30:60, 0] = 220
    Image.fromarray(image).save(tmp_path / "lesion.png")
    return image


def truth(image):
    return (image[..., 0] > 128).astype(np.uint8)


def test_a_picture_is_labelled_where_it_lies(lesion, tmp_path):
    model = Bright()
    pipe = MedicalSegmentation(model, patch=(32, 48), normalisation=(0, 255), label_set=["skin", "lesion"], mirror=True)
    answer = pipe(tmp_path / "lesion.png")
    assert model.seen == {(3, 32, 48)}  # rows first
    assert np.array_equal(answer.labels, truth(lesion))
    assert answer.shares == {"lesion": 300 / 3500}
    assert answer.volumes_ml == {}
    assert answer.summary() == "lesion 8.6%"
    assert np.array_equal(np.asarray(Image.open(answer.save(tmp_path / "map.png"))), answer.labels)
    with pytest.raises(zoo.errors.BadArgument, match=r"expected \.png"):
        answer.save(tmp_path / "map.nii.gz")
    shown = np.asarray(answer.picture())
    assert shown.shape == (50 + 2 * 14, 160, 3)
    assert shown[10, 40].tolist() == [225, 40, 40]  # half the picture's colour, half the label's
    assert shown[30, 40].tolist() == [20, 20, 20]


def test_a_picture_is_turned_as_its_camera_says(lesion, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.ascontiguousarray(np.rot90(lesion))).save(tmp_path / "turned.png", exif=exif)
    answer = MedicalSegmentation(Bright(), patch=(32, 48), normalisation=(0, 255))(tmp_path / "turned.png")
    assert np.array_equal(answer.labels, truth(lesion))


def test_greys_of_sixteen_bits_keep_their_values(lesion, tmp_path):
    grey = truth(lesion).astype(np.uint16) * 900 + 50  # of 12 bits, as cameras of microscopes write them
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    for channels in (1, 3):
        pipe = MedicalSegmentation(Bright(channels), patch=(32, 48))
        scan = pipe.read(tmp_path / "grey.tif")
        assert scan.data.shape == (channels, 50, 70, 1)
        np.testing.assert_array_equal(scan.data[0, ..., 0], grey)
        assert np.array_equal(pipe(tmp_path / "grey.tif").labels, truth(lesion))
    Image.fromarray(lesion[..., 0]).save(tmp_path / "bytes.jpg", quality=100)
    assert MedicalSegmentation(Bright(1), patch=(32, 48)).read(tmp_path / "bytes.jpg").data.shape == (1, 50, 70, 1)


def test_slices_and_pictures_are_fitted_to_the_window_and_back(lesion, tmp_path):
    import nibabel

    model = Bright()
    pipe = MedicalSegmentation(model, patch=(64, 64), normalisation="min-max", fit=True)
    ready = pipe.prepare(pipe.read(tmp_path / "lesion.png"))
    assert ready.shape == (3, 64, 64, 1)
    assert (float(ready.min()), round(float(ready.max()))) == (0.0, 255)
    labels = MedicalSegmentation(model, patch=(64, 64), normalisation=(0, 255), fit=True)(
        tmp_path / "lesion.png"
    ).labels
    assert labels.shape == (50, 70)
    assert (labels != truth(lesion)).sum() < 40  # of a border of 80 pixels
    assert model.seen == {(3, 64, 64)}
    volume = np.repeat(truth(lesion).astype(np.float32)[..., None], 4, axis=2)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1.0, 2.0, 3.0, 1.0])), tmp_path / "scan.nii")
    answer = MedicalSegmentation(Bright(1), patch=(64, 64), normalisation="none", fit=True)(tmp_path / "scan.nii")
    assert answer.labels.shape == volume.shape
    assert (answer.labels != volume).sum() < 160
    with pytest.raises(zoo.errors.BadArgument, match="fit is True"):
        zoo.pipeline("umamba_micro.phantoms", fit=True)


def test_pictures_that_do_not_fit(lesion, tmp_path):
    with pytest.raises(zoo.errors.BadArgument, match="is a picture; the model takes volumes"):
        zoo.pipeline("umamba_micro.phantoms")(tmp_path / "lesion.png")
    with pytest.raises(zoo.errors.BadArgument, match="spacing= is for scans"):
        MedicalSegmentation(Bright(), patch=(32, 32), spacing=(1, 1))(tmp_path / "lesion.png")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(zoo.errors.BadFile, match=r"words\.png is no picture"):
        MedicalSegmentation(Bright(), patch=(32, 32))(tmp_path / "words.png")
    with pytest.raises(ValueError, match="3 channels, the model takes 4"):
        MedicalSegmentation(Bright(4), patch=(32, 32)).read((tmp_path / "lesion.png",) * 3)


def test_the_command_line(lesion, tmp_path, capsys):
    small = {"dims": [8, 16, 32, 64], "dims_decoder": [64, 32, 16, 8], "depths": [1] * 4, "depths_decoder": [1] * 4}
    torch.manual_seed(0)
    model = zoo.create("vm_unet_isic", **small)
    with torch.no_grad():
        model.final_conv.weight.mul_(1000)  # answers that are not all one class
    zoo.save(model, tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "lesion.png").rename(tmp_path / "photos" / "lesion.png")
    words = [str(tmp_path / "model"), str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--pictures", "--json"]
    assert run(["segment-volume", *words]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    pipe = zoo.pipeline(zoo.create("vm_unet_isic", **small))
    ready = pipe.prepare(pipe.read(tmp_path / "photos" / "lesion.png"))
    assert (ready.shape, float(ready.min()), round(float(ready.max()))) == ((3, 256, 256, 1), 0.0, 255)
    labels = np.asarray(Image.open(row["label_map"]))
    assert labels.shape == (50, 70)
    assert row["label_map"].endswith("000_lesion_labels.png")
    assert Image.open(row["picture"]).size == (160, 50 + 14 * (1 + len(row["shares"])))
    assert sum(row["shares"].values()) == pytest.approx((labels > 0).mean())
    assert run(["segment-volume", *words, "--normalisation", "min-max", "--fit"]) == 0  # the defaults of its authors
    assert json.loads(capsys.readouterr().out)[0]["shares"] == row["shares"]
    assert run(["segment-volume", *words, "--normalisation", "z-score", "--no-fit"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["shares"] != row["shares"]
    assert run(["segment-volume", *words, "--normalisation", "300,-1"]) == 2
    assert "normalisation is (300.0, -1.0)" in capsys.readouterr().out


def test_pictures_are_measured(lesion, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "lesion.png").rename(tmp_path / "images" / "a [1].png")  # a name that is a pattern, too
    options = {"patch": (32, 48), "normalisation": (0, 255), "task": "medical-segmentation"}
    for mask in (truth(lesion), truth(lesion) * 255):
        Image.fromarray(mask).save(tmp_path / "labels" / "a [1].png")
        found = zoo.validate(Bright(), tmp_path, **options)
        assert found.metrics == {"mean_dice": 1.0, "mean_hd95_px": 0.0}
    moved = np.roll(truth(lesion), 3, axis=0)
    Image.fromarray(moved).save(tmp_path / "labels" / "a [1].png")
    found = zoo.validate(Bright(), tmp_path, **options)
    assert found.metrics["mean_dice"] == pytest.approx(0.7)
    assert found.metrics["mean_hd95_px"] == 3.0
    for wrong, message in (
        (truth(lesion)[:5], r"labels of shape \(5, 70\)"),
        (truth(lesion) * 7, "labels 0 to 7"),
        (lesion, "is a colour picture"),
    ):
        Image.fromarray(wrong).save(tmp_path / "labels" / "a [1].png")
        with pytest.raises(zoo.errors.BadFile, match=message):
            zoo.validate(Bright(), tmp_path, **options)
