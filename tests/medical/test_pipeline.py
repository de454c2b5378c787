"""NIfTI in, label map out: orientation, spacing, windows, mirroring, volumes, pictures, and what is refused."""

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import zoo
from zoo.cli import run
from zoo_medical.label_sets import LABEL_SETS
from zoo_medical.montage import montage
from zoo_medical.pipelines import MedicalSegmentation

#: a VM-UNet of a moment
SMALL = {"dims": [8, 16, 32, 64], "dims_decoder": [64, 32, 16, 8], "depths": [1] * 4, "depths_decoder": [1] * 4}


class Threshold(nn.Module):
    """Class 1 where the first channel is above 0.5: what the pipeline does can be worked out by hand."""

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.in_chans = in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - x[:, :1], x[:, :1] - 0.5], dim=1) * 20


def volume(path, shape=(20, 30, 12), affine=None):
    data = np.zeros(shape, np.float32)
    data[3:9, 10:25, 2:7] = 1.0
    affine = np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return data


def test_labels_lie_where_the_file_has_them(tmp_path):
    # axes exchanged and flipped, voxels of 2 x 1.5 x 1 mm
    affine = np.array([[0, -1.5, 0, 40], [-2.0, 0, 0, 10], [0, 0, 1.0, -5], [0, 0, 0, 1]])
    data = volume(tmp_path / "scan.nii.gz", affine=affine)
    pipeline = MedicalSegmentation(Threshold(), patch=tuple(np.array([16, 16, 8])), normalisation="none", mirror=True)
    answer = pipeline(tmp_path / "scan.nii.gz")
    assert np.array_equal(answer.labels, data.astype(np.uint8))
    assert answer.volumes_ml == pytest.approx({"label 1": data.sum() * 3.0 / 1000})
    saved = nibabel.load(answer.save(tmp_path / "labels.nii.gz"))
    assert np.allclose(saved.affine, affine)
    assert np.array_equal(np.asarray(saved.dataobj), data)
    picture = answer.picture()
    assert np.asarray(picture).std() > 0
    answer.save_picture(tmp_path / "overlay.png")
    assert (tmp_path / "overlay.png").stat().st_size > 100


def test_another_spacing_and_back(tmp_path):
    data = volume(tmp_path / "scan.nii", affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    pipeline = MedicalSegmentation(Threshold(), patch=(16, 16, 16), normalisation="none", spacing=(1, 1, 1))
    assert pipeline.prepare(pipeline.read(tmp_path / "scan.nii")).shape == (
        1,
        20,
        30,
        34,
    )  # between the first and the last voxel's middle
    answer = pipeline(tmp_path / "scan.nii")
    assert answer.labels.shape == data.shape
    overlap = 2 * (answer.labels * data).sum() / (answer.labels.sum() + data.sum())
    assert overlap > 0.9


def test_windows_blend_to_what_one_window_says(tmp_path):
    image = np.random.default_rng(0).normal(size=(21, 17, 9)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "scan.nii")
    for patch in ((8, 8, 8), (32, 32, 32)):  # smaller than the scan, and larger
        pipeline = MedicalSegmentation(Threshold(), patch=patch, normalisation="none", overlap=0.5)
        found = pipeline.forward(pipeline.prepare(pipeline.read(tmp_path / "scan.nii"))[None])
        torch.testing.assert_close(found[0, 1], torch.from_numpy(image - 0.5) * 20, atol=1e-4, rtol=1e-4)


class Ramp(nn.Module):
    """Logits that grow along the first axis of the window: windows, weights and flips show in the result."""

    in_chans = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(float(x.shape[2])).view(1, 1, -1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return torch.cat([torch.zeros_like(ramp), ramp], dim=1)


def test_windows_weigh_as_a_gaussian():
    pipeline = MedicalSegmentation(Ramp(), patch=(8, 8, 8), overlap=0.5)
    found = pipeline.forward(torch.zeros(1, 1, 12, 8, 8))[0, 1, :, 4, 4]
    weight = np.exp(-0.5 * ((np.arange(8) - 3.5) / (0.125 * 8)) ** 2)
    weight = np.maximum(weight, 1e-3)
    place = np.arange(4, 8)  # seen by both windows: places 4..7 of the first, 0..3 of the second
    expected = (weight[place] * place + weight[place - 4] * (place - 4)) / (weight[place] + weight[place - 4])
    np.testing.assert_allclose(found[4:8].numpy(), expected, atol=0.02)
    np.testing.assert_allclose(found[:4].numpy(), np.arange(4), atol=1e-4)


def test_mirrors_average_over_all_flips():
    everywhere = torch.zeros(1, 1, 8, 8, 8)
    for mirror, expected in ((True, 3.5), ((0,), 3.5), ((1, 2), None)):
        pipeline = MedicalSegmentation(Ramp(), patch=(8, 8, 8), mirror=mirror)
        found = pipeline.forward(everywhere)[0, 1]
        ramp = torch.arange(8.0).view(-1, 1, 1).expand(8, 8, 8)
        torch.testing.assert_close(found, ramp if expected is None else torch.full((8, 8, 8), expected))
    assert len(MedicalSegmentation(Ramp(), patch=(8, 8, 8), mirror=True).flips) == 8


def test_other_axes_and_a_crop(tmp_path):
    data = np.zeros((20, 24, 16), np.float32)
    data[5:15, 6:20, 3:12] = np.random.default_rng(0).uniform(0.1, 0.4, (10, 14, 9))
    data[8:12, 10:14, 5:9] = 1.0
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.0, -1.0, 2.0, 1.0])), tmp_path / "scan.nii")
    pipeline = MedicalSegmentation(Threshold(), patch=(8, 8, 8), normalisation="none", orientation="SPL", crop=True)
    ready = pipeline.prepare(pipeline.read(tmp_path / "scan.nii"))
    assert ready.shape == (1, 9, 14, 10)  # slices first, as SimpleITK's arrays have them
    torch.testing.assert_close(ready[0], torch.from_numpy(data[5:15, 6:20, 3:12]).permute(2, 1, 0))
    answer = pipeline(tmp_path / "scan.nii")
    assert np.array_equal(answer.labels, (data == 1.0).astype(np.uint8))


def test_the_montage_has_square_voxels_a_legend_and_the_patients_right_on_the_left():
    image = np.zeros((20, 10, 4), np.float32)
    labels = np.zeros((20, 10, 4), np.uint8)
    labels[15:, :, :] = 1  # at large x of RAS: the patient's right
    picture = montage(image, labels, np.diag([1.0, 2.0, 5.0, 1.0]), {1: "organ: 1.0 ml"}, slices=1)
    assert picture.size == (160, 160 + 2 * 14)
    pixels = np.asarray(picture)
    assert pixels[80, 10].tolist() == [115, 30, 30]
    assert pixels[80, 150].tolist() == [0, 0, 0]
    assert pixels[160:].max() > 100


def test_labels_have_names(tmp_path):
    volume(tmp_path / "scan.nii")
    for names, expected in (("brats2023", "necrotic tumour core"), (["nothing", "lump"], "lump"), (None, "label 1")):
        pipeline = MedicalSegmentation(Threshold(), patch=(8, 8, 8), normalisation="none", label_set=names)
        answer = pipeline(tmp_path / "scan.nii")
        assert list(answer.volumes_ml) == [expected]
        assert answer.to_dict()["warning"] == "not for clinical use"
    assert pipeline.named_labels("btcv")[6] == "liver"
    assert all(labels[0] == "background" and len(set(labels)) == len(labels) for labels in LABEL_SETS.values())


def test_options_that_make_no_sense():
    for option, value in (
        ("label_set", "organs"),
        ("overlap", 1.0),
        ("mirror", (3,)),
        ("normalisation", "max"),
        ("spacing", (1.0,)),
    ):
        with pytest.raises(zoo.errors.BadArgument, match=option):
            MedicalSegmentation(Threshold(), **{"patch": (8, 8, 8), option: value})


def test_two_dimensional_networks_read_slices(tmp_path):
    volume(tmp_path / "scan.nii.gz")
    torch.manual_seed(0)
    model = zoo.create("vm_unet_synapse", dims=[8, 16, 32, 64], dims_decoder=[64, 32, 16, 8], depths=[1] * 4,
                       depths_decoder=[1] * 4, state=2, num_classes=3)  # fmt: skip
    answer = zoo.pipeline(model, patch=(32, 32), overlap=0.0)(tmp_path / "scan.nii.gz")
    assert answer.labels.shape == (20, 30, 12)


def test_wrong_channels(tmp_path):
    volume(tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match="1 channels, the model takes 4"):
        MedicalSegmentation(Threshold(4), patch=(8, 8, 8))(tmp_path / "scan.nii.gz")


def test_truncated_file(tmp_path):
    volume(tmp_path / "scan.nii")
    whole = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path / "cut.nii")


def test_truncated_compressed_file(tmp_path):
    volume(tmp_path / "scan.nii.gz")
    whole = (tmp_path / "scan.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.nii.gz").write_text("these are words")
    for name in ("cut.nii.gz", "words.nii.gz"):
        with pytest.raises(ValueError, match="truncated or of another kind"):
            MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path / name)


def test_anisotropic_volume(tmp_path):
    volume(tmp_path / "scan.nii", affine=np.diag([0.5, 0.5, 6.0, 1.0]))
    with pytest.raises(ValueError, match=r"12\.0 times longer"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path / "scan.nii")
    with pytest.raises(ValueError, match=r"12\.0 times longer"):  # the card's spacing is nothing the user asked for
        zoo.pipeline("umamba_micro.phantoms")(tmp_path / "scan.nii")
    for asked in ({"spacing": (3, 3, 3)}, {"anisotropy": 12.5}):
        labels = zoo.pipeline("umamba_micro.phantoms", **asked)(tmp_path / "scan.nii").labels
        assert labels.shape == (20, 30, 12)


def test_sequences_on_different_grids(tmp_path):
    volume(tmp_path / "a.nii")
    volume(tmp_path / "b.nii", affine=np.diag([2.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="another grid"):
        MedicalSegmentation(Threshold(2), patch=(8, 8, 8))((tmp_path / "a.nii", tmp_path / "b.nii"))


def test_lengths_in_other_units_become_millimetres(tmp_path):
    data = volume(tmp_path / "mm.nii")
    pipeline = MedicalSegmentation(Threshold(), patch=(16, 16, 8), normalisation="none")
    expected = pipeline(tmp_path / "mm.nii")
    for unit, scale in (("meter", 0.001), ("micron", 1000.0)):
        image = nibabel.Nifti1Image(data, np.diag([scale, scale, scale, 1.0]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "scan.nii")
        answer = pipeline(tmp_path / "scan.nii")
        assert answer.volumes_ml == pytest.approx(expected.volumes_ml, rel=1e-5)
        np.testing.assert_allclose(answer.affine, expected.affine, rtol=1e-5)


def test_channels_where_itk_writes_them(tmp_path):
    data = np.random.default_rng(0).normal(size=(8, 9, 7, 1, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "scan.nii")
    found = MedicalSegmentation(Threshold(2), patch=(8, 8, 8)).read(tmp_path / "scan.nii").data
    np.testing.assert_array_equal(found, data[:, :, :, 0].transpose(3, 0, 1, 2))


@pytest.mark.parametrize("dtype", [[("R", "u1"), ("G", "u1"), ("B", "u1")], "complex64"])
def test_voxels_that_are_no_numbers(tmp_path, dtype):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), dtype), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(zoo.errors.BadFile, match=r"scan\.nii: holds voxels of"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path / "scan.nii")


def test_what_is_no_file():
    for wrong in (np.zeros((4, 4, 4)), None, (), (np.zeros(3),)):
        with pytest.raises(zoo.errors.BadArgument, match="expected the path of a scan"):
            MedicalSegmentation(Threshold(), patch=(8, 8, 8)).read(wrong)


class OneClass(Threshold):
    """Logits of one class: above 0 where the first channel is above 0.5."""

    num_classes = 1

    def forward(self, x):
        return (x[:, :1] - 0.5) * 0.2


def test_one_class_is_a_logit_unless_the_network_says_otherwise(tmp_path):
    data = volume(tmp_path / "scan.nii")
    answer = MedicalSegmentation(OneClass(), patch=(16, 16, 8), normalisation="none")(tmp_path / "scan.nii")
    assert np.array_equal(answer.labels, data)

    class Probability(OneClass):
        gives_probability = True

        def forward(self, x):
            return super().forward(x).sigmoid()

    answer = MedicalSegmentation(Probability(), patch=(16, 16, 8), normalisation="none")(tmp_path / "scan.nii")
    assert np.array_equal(answer.labels, data)
    assert zoo.create("vm_unet_isic", **SMALL).gives_probability
    assert not zoo.create("vm_unet_isic", num_classes=2, **SMALL).gives_probability


def test_options_that_the_network_would_refuse_or_misread():
    for options, message in (
        ({"patch": (30, 32, 32)}, r"multiples of \[8, 8, 8\], as \[32, 32, 32\]"),
        ({"patch": (32, 32)}, "three numbers"),
        ({"patch": (0, 32, 32)}, "at least 1"),
        ({"patch": (8.5, 32, 32)}, "at least 1"),
        ({"orientation": "XYZ"}, "one letter of each pair"),
        ({"orientation": "RAR"}, "one letter of each pair"),
        ({"spacing": (float("nan"), 1, 1)}, "spacing is"),
        ({"normalisation": (3.0, 1.0)}, "normalisation is"),
        ({"mirror": (0, 0)}, "each once"),
        ({"window_batch": 0}, "window_batch is 0"),
        ({"anisotropy": float("nan")}, "anisotropy is nan"),
        ({"label_set": ["body", "organ"]}, "has 2 names.*expected 6 different names"),
        ({"label_set": ["background", "a", "b", "b", "c", "d"]}, "has 6 names, 5 of them different"),
    ):
        with pytest.raises(zoo.errors.BadArgument, match=message):
            zoo.pipeline("umamba_micro.phantoms", **options)
    with pytest.raises(zoo.errors.BadArgument, match=r"multiples of \[32, 32\]"):
        zoo.pipeline(zoo.create("vm_unet_isic", **SMALL), patch=(100, 64))


def test_a_label_map_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    volume(tmp_path / "scan.nii")
    answer = MedicalSegmentation(Threshold(), patch=(16, 16, 8), normalisation="none")(tmp_path / "scan.nii")
    for wrong in ("labels.png", "labels"):
        with pytest.raises(zoo.errors.BadArgument, match=r"\.nii\.gz"):
            answer.save(tmp_path / wrong)
    before = answer.save(tmp_path / "labels.nii.gz").read_bytes()

    def breaks(image, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nibabel, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        answer.save(tmp_path / "labels.nii.gz")
    assert (tmp_path / "labels.nii.gz").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"scan.nii", "labels.nii.gz"}


def test_commands_refuse_before_the_work(tmp_path, capsys):
    volume(tmp_path / "scan.nii")
    volume(tmp_path / "BIG.NII.GZ")
    scan = str(tmp_path / "scan.nii")
    assert run(["segment-volume", "umamba_micro.phantoms", scan, "--out", f"{scan}/out"]) == 3
    assert "is a file" in capsys.readouterr().err
    assert run(["segment-volume", "mambamim_pretrain", scan, "--out", str(tmp_path / "out")]) == 2
    assert "mambamim_pretrain is for masked-pretraining" in capsys.readouterr().err
    (tmp_path / "bad.nii").write_text("words")
    given = [str(tmp_path / "BIG.NII.GZ"), str(tmp_path / "bad.nii")]
    assert run(["segment-volume", "umamba_micro.phantoms", *given, "--out", str(tmp_path / "out")]) == 5
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["000_BIG.nii.gz"]  # what was done before is kept


def test_labels_that_do_not_belong_to_their_scan(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    data = volume(tmp_path / "images" / "a.nii")
    model = zoo.create("umamba_micro", num_classes=2)

    def measured(labels, affine=None):
        affine = np.eye(4) if affine is None else affine
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "labels" / "a.nii")
        return zoo.validate(model, tmp_path)

    dice = measured(data.astype(np.uint8)).metrics["mean_dice"]
    assert measured(data[..., None]).metrics["mean_dice"] == dice
    for labels, affine, message in (
        (data, np.diag([-1.0, 1.0, 1.0, 1.0]), r"another grid than its scan, up to 38\.0 mm"),
        (data * 0.5, None, "no whole numbers"),
        (data * 2, None, "labels 0 to 2; the model has 0 to 1"),
        (data[:5], None, r"labels of shape \(5, 30, 12\)"),
    ):
        with pytest.raises(zoo.errors.BadFile, match=message):
            measured(labels, affine)
    (tmp_path / "labels" / "a.nii").write_bytes(b"words")
    with pytest.raises(zoo.errors.BadFile, match="truncated or of another kind"):
        zoo.validate(model, tmp_path)
    volume(tmp_path / "images" / "a.nii.gz")
    with pytest.raises(zoo.errors.BadArgument, match="same image twice"):
        zoo.validate(model, tmp_path)
