"""What a user does with the shipped checkpoint: the commands, the demo, measuring; phantoms and measures by hand."""

import json
import math
import statistics
from pathlib import Path

import nibabel
import numpy as np
import pytest

import zoo
from zoo.cli import run
from zoo_medical.phantoms import LABELS, phantom
from zoo_medical.validation import compare, find_cases
from zoo_registry import package_path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "examples" / "phantoms"


@pytest.fixture
def typed(capsys):
    """Types ``zoo WORDS``; gives the exit code, standard output and standard error."""

    def type_in(*words):
        code = run([str(w) for w in words])
        found = capsys.readouterr()
        return code, found.out, found.err

    return type_in


def test_phantoms_are_the_same_body_on_every_grid():
    first, again, finer = phantom(3), phantom(3), phantom(3, (60, 60, 60), (1.6, 1.6, 1.6))
    assert np.array_equal(first.image, again.image)
    assert set(np.unique(first.labels)) == set(range(len(LABELS)))
    for label in range(1, len(LABELS)):
        coarse_ml = (first.labels == label).sum() * 8.0
        fine_ml = (finer.labels == label).sum() * 1.6**3
        assert coarse_ml == pytest.approx(fine_ml, rel=0.12)
    assert not np.array_equal(first.labels, phantom(4).labels)
    assert first.image.min() >= 0
    x = np.argwhere(first.labels == LABELS.index("right twin")).mean(axis=0)
    assert nibabel.affines.apply_affine(first.affine, x)[0] > 0  # RAS: the right side


def test_measures_by_hand():
    truth, found = np.zeros((10, 10, 4), int), np.zeros((10, 10, 4), int)
    truth[2:6, 2:6, 1:3] = 1
    found[3:7, 2:6, 1:3] = 1  # one voxel of 2 mm further
    rows = compare(found, truth, (2.0, 1.0, 3.0), 3)
    assert rows[1]["dice"] == pytest.approx(2 * 24 / 64)
    assert rows[1]["hd95_mm"] == pytest.approx(2.0)
    assert math.isnan(rows[2]["dice"])


def test_the_demo_finds_the_organs_of_bodies_it_has_not_seen(tmp_path):
    pipe = zoo.pipeline("umamba_micro.phantoms")
    scores = []
    for seed in (0, 1, 2):
        made = phantom(seed, (40, 36, 30), (2.5, 2.5, 3.5))
        image = nibabel.Nifti1Image(made.image, made.affine).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
        nibabel.save(image, tmp_path / "scan.nii.gz")
        answer = nibabel.as_closest_canonical(nibabel.load(pipe(tmp_path / "scan.nii.gz").save(tmp_path / "l.nii.gz")))
        rows = compare(np.asarray(answer.dataobj), made.labels, (2.5, 2.5, 3.5), len(LABELS))
        scores += [row["dice"] for row in rows[1:]]
    assert statistics.fmean(scores) > 0.8  # the card has the figure over 24 bodies


def test_segment_volume(tmp_path, typed):
    code, out, _ = typed(
        "segment-volume", "umamba_micro.phantoms", SAMPLES / "images", "--out", tmp_path, "--pictures", "--json"
    )
    assert code == 0
    (row,) = json.loads(out)
    assert set(row["volumes_ml"]) == set(LABELS[1:])
    assert row["warning"] == "not for clinical use"
    scan = nibabel.load(SAMPLES / "images" / "phantom_1.nii.gz")
    labels = nibabel.load(row["label_map"])
    assert labels.shape == scan.shape
    assert np.allclose(labels.affine, scan.affine)
    assert Path(row["picture"]).stat().st_size > 1000
    truth = np.asarray(nibabel.load(SAMPLES / "labels" / "phantom_1.nii.gz").dataobj)
    for index, name in enumerate(LABELS[1:], start=1):
        real = (truth == index).sum() * 2.5 * 2.5 * 4.0 / 1000
        assert row["volumes_ml"][name] == pytest.approx(real, rel=0.4)


def test_channels_together_and_failures(tmp_path, typed):
    scan = SAMPLES / "images" / "phantom_1.nii.gz"
    code, _, err = typed(
        "segment-volume", "umamba_micro.phantoms", scan, scan, "--channels-together", "--out", tmp_path
    )
    assert code != 0
    assert "2 channels, the model takes 1" in err
    slices = nibabel.Nifti1Image(np.ones((20, 20, 4), np.float32), np.diag([2.0, 2.0, 20.0, 1.0]))
    nibabel.save(slices, tmp_path / "slices.nii")
    words = ("segment-volume", "umamba_micro.phantoms", tmp_path / "slices.nii", "--out", tmp_path)
    code, _, err = typed(*words)
    assert code != 0
    assert "10.0 times longer" in err
    assert typed(*words, "--anisotropy", 10)[0] == typed(*words, "--spacing", 3, 3, 3)[0] == 0
    (tmp_path / "cut.nii.gz").write_bytes(scan.read_bytes()[:5000])
    code, out, _ = typed(
        "segment-volume", "umamba_micro.phantoms", tmp_path / "cut.nii.gz", scan, "--out", tmp_path, "--keep-going"
    )
    assert code == 1
    assert "truncated" in out
    assert (tmp_path / "001_phantom_1.nii.gz").is_file()


def test_validate(tmp_path, typed):
    code, out, _ = typed("validate", "umamba_micro.phantoms", SAMPLES, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["samples"] == 1
    assert found["metrics"]["mean_dice"] > 0.75
    assert found["metrics"]["mean_hd95_mm"] < 10
    assert set(found["per_class"]) == set(LABELS[1:])
    with pytest.raises(zoo.errors.BadArgument, match="holds no imagesTr and labelsTr"):
        zoo.validate("umamba_micro.phantoms", tmp_path)


def test_cases_as_nnunet_lays_them_out(tmp_path):
    for name in ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ((images, truth),) = find_cases(tmp_path)
    assert [p.name for p in images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert truth.name == "a.nii.gz"
    (tmp_path / "labelsTr" / "c.nii.gz").touch()
    with pytest.raises(zoo.errors.BadArgument, match="for these labels"):
        find_cases(tmp_path)


def test_zoo_demo(tmp_path, typed):
    code, out, _ = typed("demo", "--domain", "medical", "--out", tmp_path, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert "large organ" in row["answer"]
    assert Path(row["picture"]).is_file()
    assert package_path("zoo_medical", "demo/samples/phantom_0.nii.gz").is_file()
