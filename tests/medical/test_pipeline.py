"""NIfTI in, label map out: orientation, spacing, windows, mirroring, volumes, pictures, and what is refused."""

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import zoo
from zoo_medical.pipelines import MedicalSegmentation
from zoo_medical.sliding_window import gaussian_weights, sliding_window, starts


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
    pipeline = MedicalSegmentation(Threshold(), patch=(16, 16, 8), normalisation="none", mirror=True)
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
    assert pipeline.prepare(pipeline.read(tmp_path / "scan.nii")).shape == (1, 20, 30, 36)
    answer = pipeline(tmp_path / "scan.nii")
    assert answer.labels.shape == data.shape
    overlap = 2 * (answer.labels * data).sum() / (answer.labels.sum() + data.sum())
    assert overlap > 0.9


def test_two_dimensional_networks_read_slices(tmp_path):
    volume(tmp_path / "scan.nii.gz")
    torch.manual_seed(0)
    model = zoo.create("vm_unet_synapse", dims=[8, 16, 32, 64], dims_decoder=[64, 32, 16, 8], depths=[1] * 4,
                       depths_decoder=[1] * 4, state=2, num_classes=3)  # fmt: skip
    answer = zoo.pipeline(model, patch=(32, 32), overlap=0.0)(tmp_path / "scan.nii.gz")
    assert answer.labels.shape == (20, 30, 12)


def test_windows_blend_to_what_one_window_says():
    torch.manual_seed(0)
    image = torch.randn(2, 21, 17)
    blended = sliding_window(image, lambda x: x * 3, (8, 8), overlap=0.5)
    torch.testing.assert_close(blended, image * 3)
    small = sliding_window(image[:, :5, :6], lambda x: x * 3, (8, 8))
    torch.testing.assert_close(small, image[:, :5, :6] * 3)


def test_mirrors_average_over_all_flips():
    ramp = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    found = sliding_window(torch.zeros(1, 8, 8), lambda x: x + ramp, (8, 8), mirror=True)
    torch.testing.assert_close(found, torch.full((1, 8, 8), 3.5))


def test_windows_cover_everything():
    for length, patch, overlap in ((100, 32, 0.5), (33, 32, 0.5), (64, 32, 0.0), (10, 32, 0.5)):
        covered = np.zeros(max(length, patch), bool)
        for start in starts(length, patch, overlap):
            covered[start : start + patch] = True
        assert covered[:length].all()
    weights = gaussian_weights((9, 5))
    assert weights.shape == (9, 5)
    assert weights.argmax() == 22
    assert (weights > 0).all()


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


def test_anisotropic_volume(tmp_path):
    volume(tmp_path / "scan.nii", affine=np.diag([0.5, 0.5, 6.0, 1.0]))
    with pytest.raises(ValueError, match=r"12\.0 times longer"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path / "scan.nii")


def test_sequences_on_different_grids(tmp_path):
    volume(tmp_path / "a.nii")
    volume(tmp_path / "b.nii", affine=np.diag([2.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="another grid"):
        MedicalSegmentation(Threshold(2), patch=(8, 8, 8))((tmp_path / "a.nii", tmp_path / "b.nii"))
