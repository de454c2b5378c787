"""DICOM series: slices in any order to one volume in its place, and clear errors for what is not one."""

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from torch import Tensor, cat, nn

from zoo_medical.dicom import read_series
from zoo_medical.pipelines import MedicalSegmentation


class Threshold(nn.Module):
    """Class 1 where the voxel is above 0.5."""

    in_chans = 1

    def forward(self, x: Tensor) -> Tensor:
        return cat([0.5 - x, x - 0.5], dim=1)


SHAPE = (12, 10, 6)  # columns, rows, slices


def write_series(folder, voxels, *, series="1.2.3", description="chest", step=(0.0, 0.0, 2.5), iop=(1, 0, 0, 0, 1, 0)):
    """``voxels`` (columns, rows, slices) in Hounsfield units, as CT slices with shuffled names."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{(k * 7) % 11:02d}_{description}"
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.SeriesDescription, data.Modality = series, description, "CT"
        data.Columns, data.Rows = voxels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelSpacing = [1.5, 0.8]  # between rows, between columns
        data.ImageOrientationPatient = list(iop)
        data.ImagePositionPatient = [-40 + k * step[0], -30 + k * step[1], 100 + k * step[2]]
        data.SliceThickness = 2.5
        data.PixelData = (voxels[:, :, k].T + 1024).astype(np.uint16).tobytes()
        data.save_as(path)
    return folder


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.float32)


def test_a_series_in_its_place(tmp_path, voxels):
    found, affine = read_series(write_series(tmp_path / "ct", voxels))
    assert np.array_equal(found, voxels)
    # DICOM's (left, back, up) in mm: column 2, row 3, slice 4
    place = np.array([-40 + 2 * 0.8, -30 + 3 * 1.5, 100 + 4 * 2.5])
    np.testing.assert_allclose(affine @ [2, 3, 4, 1], [-place[0], -place[1], place[2], 1], atol=1e-5)


def test_slices_that_run_downwards_and_sagittal_ones(tmp_path, voxels):
    found, affine = read_series(write_series(tmp_path / "down", voxels, step=(0, 0, -2.5)))
    assert np.array_equal(found, voxels[:, :, ::-1])  # ordered along the normal of rows and columns
    np.testing.assert_allclose(affine[:3, 2], [0, 0, 2.5], atol=1e-6)
    sagittal = write_series(tmp_path / "sagittal", voxels, step=(2.5, 0, 0), iop=(0, 1, 0, 0, 0, -1))
    found, affine = read_series(sagittal)
    assert nibabel.aff2axcodes(affine)[:2] == ("P", "I")
    np.testing.assert_allclose(np.abs(np.linalg.det(affine[:3, :3])), 0.8 * 1.5 * 2.5, atol=1e-6)


def test_a_folder_is_one_input_and_the_label_map_lies_on_it(tmp_path, voxels):
    folder = write_series(tmp_path / "ct", voxels)
    pipeline = MedicalSegmentation(Threshold(), patch=(8, 8, 8), normalisation="none", mirror=True)
    answer = pipeline(folder)
    assert np.array_equal(answer.labels, (voxels > 0.5).astype(np.uint8))
    assert answer.volumes_ml["label 1"] == pytest.approx((voxels > 0.5).sum() * 0.8 * 1.5 * 2.5 / 1000)
    saved = nibabel.load(answer.save(tmp_path / "labels.nii.gz"))
    np.testing.assert_allclose(saved.affine, read_series(folder)[1])
    assert isinstance(pipeline([folder]), list)


def test_one_of_several_series(tmp_path, voxels):
    write_series(tmp_path, voxels)
    write_series(tmp_path, voxels + 1, series="1.2.4", description="late")
    with pytest.raises(ValueError, match=r"2 series; give series=.*1\.2\.3 \(CT 'chest', 6 files\).*'late'"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8))(tmp_path)
    assert np.array_equal(read_series(tmp_path, "late")[0], voxels + 1)
    assert np.array_equal(read_series(tmp_path, "1.2.3")[0], voxels)
    with pytest.raises(ValueError, match="0 series are called 'early'"):
        read_series(tmp_path, "early")


def changed(path, **tags):
    data = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.save_as(path)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ({"ImagePositionPatient": [-40, -30, 102.5]}, "lie at the same place"),
        ({"PixelSpacing": [1.5, 1.5]}, "its PixelSpacing differs"),
        ({"Rows": 9}, "12 x 9 pixels, but"),
        ({"NumberOfFrames": 3}, "holds 3 frames"),
        ({"SamplesPerPixel": 3}, "is a colour image"),
    ],
)
def test_slices_that_do_not_fit(tmp_path, voxels, tags, message):
    write_series(tmp_path / "ct", voxels)
    changed(tmp_path / "ct" / "03_chest", **tags)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "ct")


def test_what_is_missing_or_cut(tmp_path, voxels):
    folder = write_series(tmp_path / "ct", voxels)
    whole = (folder / "03_chest").read_bytes()
    (folder / "03_chest").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="03_chest: its pixels cannot be read; is the file truncated"):
        read_series(folder)
    (folder / "03_chest").unlink()
    with pytest.raises(ValueError, match="slices are missing"):
        read_series(folder)
    with pytest.raises(ValueError, match="is one slice of a DICOM series; give the folder"):
        MedicalSegmentation(Threshold(), patch=(8, 8, 8)).read(folder / "00_chest")
    tilted = write_series(tmp_path / "tilted", voxels, step=(0.0, 0.6, 2.5))
    with pytest.raises(ValueError, match="gantry was tilted"):
        read_series(tilted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no DICOM images"):
        read_series(tmp_path / "empty")
