"""zoo train-volumes and pretrain-volumes: folders to networks that the pipeline and zoo validate read."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, fit
from zoo.training import held_out as drawn
from zoo_medical.augmentation import augmented
from zoo_medical.cases import Cubes, Patches, describe, labelled, on_grid, prepare, survey
from zoo_medical.commands_training import objective
from zoo_medical.losses import ProbabilityLoss
from zoo_medical.phantoms import phantom
from zoo_medical.pipelines import MedicalSegmentation
from zoo_medical.validation import find_cases
from zoo_registry import errors

#: a U-Mamba of a moment
TINY = {"features": [8, 12], "kernels": 3, "strides": [1, 2]}
SMALL = ["--patch", "16,16,16", *(word for k, v in TINY.items() for word in ("--set", f"{k}={json.dumps(v)}"))]
AUTOENCODER = {
    "img_size": 32, "channels": [4, 6, 8, 8, 12], "depths": [1] * 5, "expansion": [2] * 5, "depth": 1,
    "decoder_width": 16,
}  # fmt: skip
VM_UNET = {"dims": [8, 16, 32, 64], "dims_decoder": [64, 32, 16, 8], "depths": [1] * 4, "depths_decoder": [1] * 4}


def nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def raw(folder: Path, count: int = 6, channels: int = 1, side: int = 16, name: str = "large organ") -> Path:
    """nnU-Net's raw data of phantoms in which one organ has a label; a second channel is the first turned over."""
    for i in range(count):
        made = phantom(i, (side,) * 3, (96 / side,) * 3, fine=1)
        for channel in range(channels):
            image = made.image if channel == 0 else 3 - made.image
            nifti(folder / "imagesTr" / f"case_{i}_{channel:04d}.nii.gz", image, made.affine)
        nifti(folder / "labelsTr" / f"case_{i}.nii.gz", (made.labels == 1).astype(np.uint8), made.affine)
    about = {"labels": {"background": 0, name: 1}, "channel_names": {str(c): "MR" for c in range(channels)}}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def held_out(folder: Path, target: Path, seed: int = 0, share: float = 0.2) -> Path:
    """The held-out cases of a folder as one of their own."""
    cases = find_cases(folder)
    for images, truth in (cases[i] for i in drawn([None] * len(cases), share, seed)[1]):
        for path in (*(images if isinstance(images, tuple) else (images,)), truth):
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.parent.name)
    return target


def test_it_learns_and_the_saved_folder_measures_the_same(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 10), tmp_path / "out"
    words = ["--steps", "40", "--rate", "1e-2", "--score-every", "20", "--json"]
    assert run(["train-volumes", "umamba_bot_3d", str(data), "--out", str(out), *SMALL, *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"]["mean_dice"] > 0.45  # by chance: 0.1
    assert (said["cases"], said["held_out"]) == (8, 2)
    assert said["preprocess"]["spacing"] == [6.0, 6.0, 6.0]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    found = zoo.validate(out, held_out(data, tmp_path / "held"))
    assert found.metrics == pytest.approx(said["metrics"], rel=1e-5)
    assert found.per_class.keys() == {"large organ"}
    card = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert [m["value"] for m in card["metrics"]] == list(said["metrics"].values())
    assert not zoo.load(out).deep_supervision
    scan = str(data / "imagesTr" / "case_0_0000.nii.gz")
    assert run(["segment-volume", str(out), scan, "--out", str(tmp_path / "labels")]) == 0
    assert "large organ" in capsys.readouterr().out


def test_channels_and_the_window_of_ct(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 3, channels=2), tmp_path / "out"
    about = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "CT", "1": "CT"}}))
    words = ["--steps", "1", "--json", "--held-out", "0"]
    assert run(["train-volumes", "umamba_bot_3d", str(data), "--out", str(out), *SMALL, *words]) == 0
    said = json.loads(capsys.readouterr().out)
    low, high = said["preprocess"]["normalisation"]
    inside = np.concatenate(
        [
            np.asarray(nibabel.load(path).dataobj)[np.asarray(nibabel.load(truth).dataobj) > 0]
            for images, truth in find_cases(data)
            for path in images
        ]
    )
    assert (low, high) == pytest.approx(np.percentile(inside, [0.5, 99.5]), abs=2e-4)
    assert said["metrics"] == {}
    files = [str(data / "imagesTr" / f"case_0_000{i}.nii.gz") for i in range(2)]
    assert run(["segment-volume", str(out), *files, "--channels-together", "--out", str(tmp_path / "labels")]) == 0
    assert zoo.load(out).in_chans == 2


def pictures(folder: Path, count: int = 5) -> Path:
    """Bright discs on noise, with masks of 0 and 255."""
    draw = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    y, x = np.mgrid[:40, :48]
    for i in range(count):
        inside = (y - draw.integers(12, 28)) ** 2 + (x - draw.integers(12, 36)) ** 2 < 81
        grey = np.clip(draw.normal(80, 20, inside.shape) + 100 * inside, 0, 255).astype(np.uint8)
        Image.fromarray(np.stack([grey, grey, 255 - grey], axis=2)).save(folder / "images" / f"{i}.png")
        Image.fromarray((255 * inside).astype(np.uint8)).save(folder / "labels" / f"{i}.png")
    return folder


def test_pictures(tmp_path, capsys):
    data, out = pictures(tmp_path / "data"), tmp_path / "out"
    sizes = [word for k, v in TINY.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    words = ["--patch", "32,32", "--steps", "30", "--rate", "1e-2", "--held-out", "0.4", "--json", *sizes]
    assert run(["train-volumes", "umamba_bot_2d", str(data), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["preprocess"] == {"orientation": "RAS", "normalisation": "z-score", "patch": [32, 32]}
    assert said["metrics"]["mean_dice"] > 0.6  # a disc fills an eighth of its picture
    found = zoo.validate(out, held_out(data, tmp_path / "held", share=0.4))
    assert found.metrics == pytest.approx(said["metrics"], rel=1e-5)
    words = ["train-volumes", "umamba_bot_2d", str(data), "--out", str(out)]
    assert run([*words, "--spacing", "1", "1", "1"]) == 2
    assert "--spacing is for scans" in capsys.readouterr().err


def test_a_network_of_one_class_reads_pictures_as_its_authors(tmp_path, capsys):
    data, out = pictures(tmp_path / "data", 2), tmp_path / "out"
    sizes = [word for k, v in VM_UNET.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    words = ["--patch", "32,32", "--steps", "1", "--held-out", "0", "--json", *sizes]
    assert run(["train-volumes", "vm_unet_isic", str(data), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)["preprocess"]
    assert (said["normalisation"], said["fit"], said["patch"]) == ("min-max", True, [32, 32])
    assert zoo.load(out).gives_probability
    ((image, truth), _) = find_cases(data)
    pipe = zoo.pipeline(str(out))
    prepare(pipe, (image, truth), 2, tmp_path, 0)
    patch, labels = Patches(tmp_path, 1, (32, 32), 1, augment=False)(0)
    assert patch.shape == (1, 3, 32, 32)
    assert patch[0, 0][labels[0, 0] == 1].mean() > 1.5 * patch[0, 0][labels[0, 0] == 0].mean()  # labels resized alike


def test_slices_of_scans_for_a_network_of_pictures(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 3), tmp_path / "out"
    sizes = ["--set", "in_chans=1", *(w for k, v in TINY.items() for w in ("--set", f"{k}={json.dumps(v)}"))]
    words = ["--patch", "16,16", "--steps", "2", "--held-out", "0.3", "--json", *sizes]
    assert run(["train-volumes", "umamba_bot_2d", str(data), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["preprocess"]["spacing"] == [6.0, 6.0]  # of slices, whose distance stays
    found = zoo.validate(out, held_out(data, tmp_path / "held", share=0.3))
    assert found.metrics == pytest.approx(said["metrics"], rel=1e-5)


def test_weights_to_start_with_say_how_scans_are_read(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 3), tmp_path / "out"
    words = ["--start", "umamba_micro.phantoms", "--steps", "1", "--json"]
    assert run(["train-volumes", "umamba_micro", str(data), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["preprocess"]["spacing"] == [3.0, 3.0, 3.0]
    assert said["preprocess"]["patch"] == [32, 32, 32]
    tuned = zoo.load(out)
    assert tuned.num_classes == 2
    assert zoo.pipeline(tuned).labels() == ["background", "large organ"]


def test_pre_training_is_a_start(tmp_path, capsys):
    data, out, tuned = raw(tmp_path / "data", 4, side=32), tmp_path / "pretrained", tmp_path / "tuned"
    sizes = [word for k, v in AUTOENCODER.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    words = ["--normalisation", "z-score", "--spacing", "3", "3", "3", "--held-out", "0.25", "--json", *sizes]
    words += ["--steps", "2"]
    assert run(["pretrain-volumes", "mambamim_pretrain", str(data / "imagesTr"), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    scans = sorted((data / "imagesTr").iterdir())
    held = scans[drawn([None] * 4, 0.25)[1][0]]
    assert zoo.pipeline(str(out))(held).loss == pytest.approx(said["metrics"]["loss"], rel=1e-5)
    words = ["--start", str(out), "--steps", "1", "--rate", "1e-9", "--json"]
    assert run(["train-volumes", "mambamim_hybird", str(data), "--out", str(tuned), *words]) == 0
    assert json.loads(capsys.readouterr().out)["preprocess"]["patch"] == [32, 32, 32]
    key = "embeddings.stem.weight"
    encoder = zoo.load(out).sparse_encoder.state_dict()[key]
    torch.testing.assert_close(zoo.load(tuned).state_dict()[key], encoder, atol=1e-6, rtol=0)
    words = ["train-volumes", "mambamim_hybird", str(data), "--out", str(tuned), "--start", str(out)]
    assert run([*words, "--patch", "48,48,48"]) == 2
    assert "has an encoder of other sizes" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(tmp_path):
    data = labelled(raw(tmp_path / "data", 3), None, 0.0, 0, lambda case: [1], "RAS", quiet=True)
    folder = tmp_path / "prepared"
    folder.mkdir()
    pipe = MedicalSegmentation(zoo.create("umamba_bot_3d", **TINY, num_classes=2), patch=(16, 16, 16))
    for number, case in enumerate(data.train):
        prepare(pipe, case, 2, folder, number)

    def train(run, report):
        torch.manual_seed(1)
        model = zoo.create("umamba_bot_3d", **TINY, num_classes=2, deep_supervision=True)
        batches = Patches(folder, 3, (16, 16, 16), 2, seed=3)
        fit(model, batches, objective, Settings(steps=4, rate=1e-2), run=run, report=report)
        return model

    (tmp_path / "run").mkdir()
    zoo.testing.check_resume(train, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("umamba_micro", {"A_log", "D"}),
        ("segmamba_brats", {"A_log", "D", "conv_bias", "dt_bias"}),
        ("swin_umamba_d", {"A_log", "D", "dt_bias"}),
        ("vm_unet_isic", {"A_log", "D", "dt_bias"}),
        ("mambamim_pretrain", {"A_log", "A_b_log", "D", "mask_token", "pos_embed", "0", "1", "2", "3", "4"}),
    ],
)
def test_scans_and_positions_are_not_decayed(name, ends):
    network = zoo.create(name, device="meta")
    assert {key.rpartition(".")[2] for key in network.no_weight_decay()} == ends


# -- what is cut from scans --------------------------------------------------------------------------------------------


def test_labels_lie_on_the_grid_of_their_scan(tmp_path):
    """A scan whose intensities are its labels, with axes exchanged and flipped: both are prepared alike."""
    labels = np.zeros((20, 30, 12), np.uint8)
    labels[3:9, 10:25, 2:7], labels[12:18, 4:9, 5:11] = 1, 2
    affine = np.array([[0, -1.5, 0, 40], [-2.0, 0, 0, 10], [0, 0, 1.0, -5], [0, 0, 0, 1]])
    nifti(tmp_path / "images" / "a.nii", labels.astype(np.float32), affine)
    nifti(tmp_path / "labels" / "a.nii", labels, affine)
    ((image, truth),) = find_cases(tmp_path)
    model = zoo.create("umamba_bot_3d", **TINY)
    pipe = MedicalSegmentation(model, patch=(16, 16, 16), normalisation="none", crop=True)
    scan = pipe.read(image)
    ready = pipe.prepare(scan)
    placed = on_grid(torch.from_numpy(labels.astype(np.int64)), scan, ready)
    assert placed.shape == ready.shape[1:]  # the box around what is not zero
    assert torch.equal(placed.float(), ready[0])
    found = survey([(image, truth)], [1], 3, "RAS")
    assert found.spacings[0] == pytest.approx((1.5, 2.0, 1.0))  # of the axes after they were turned
    assert found.labels == [{0, 1, 2}]
    pipe = MedicalSegmentation(model, patch=(16, 16, 16), normalisation="none", spacing=(1, 1, 1))
    scan = pipe.read(image)
    ready = pipe.prepare(scan)
    placed = on_grid(torch.from_numpy((labels == 1).astype(np.int64)), scan, ready)
    assert ((ready[0] > 0.5) & (ready[0] < 1.5) != placed.bool()).float().mean() < 0.03  # borders, and of 2


def test_a_third_of_the_patches_holds_a_label(tmp_path):
    image = np.arange(40**3, dtype=np.float32).reshape(1, 40, 40, 40)
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[1, 38, 20] = 1
    np.save(tmp_path / "0.image.npy", image)
    np.save(tmp_path / "0.labels.npy", labels)
    np.save(tmp_path / "0.places.npy", np.array([[1, 1, 38, 20]], np.int32))
    batches = Patches(tmp_path, 1, (8, 8, 8), 2, augment=False)
    holds = [bool(truth.any()) for index in range(12) for truth in batches(index)[1]]
    assert all(holds[2::3])
    assert sum(holds) <= 10
    images, truth = batches(1)
    assert images.shape == truth.shape == (2, 1, 8, 8, 8)
    assert truth.dtype == torch.int64
    assert torch.equal(images, batches(1)[0])
    where = (truth[0, 0] == 1).nonzero()[0]  # patch 2
    assert where.tolist() == [1, 6, 4]  # the middle, moved to stay inside
    assert images[0, 0][tuple(where)] == image[0, 1, 38, 20]
    slices = Patches(tmp_path, 1, (8, 8), 1, augment=False)
    assert slices(2)[0].shape == (1, 1, 8, 8)
    assert slices(2)[1].any()
    assert Cubes(tmp_path, 1, 16, 3)(0).shape == (3, 1, 16, 16, 16)


def test_small_scans_lie_as_in_the_pipelines_windows(tmp_path):
    seen = []

    class Window(torch.nn.Module):
        in_chans, num_classes = 1, 2

        def forward(self, x):
            seen.append(x)
            return x.expand(-1, 2, -1, -1, -1)

    image = torch.randn(1, 5, 8, 11)
    MedicalSegmentation(Window(), patch=(8, 8, 8)).forward(image[None])
    np.save(tmp_path / "0.image.npy", image[:, :, :, :8].numpy())
    np.save(tmp_path / "0.labels.npy", np.zeros((5, 8, 8), np.uint8))
    np.save(tmp_path / "0.places.npy", np.zeros((0, 4), np.int32))
    assert torch.equal(Patches(tmp_path, 1, (8, 8, 8), 1, augment=False)(2)[0], seen[0])


@pytest.mark.parametrize("sides", [(24, 24, 24), (32, 32)])
def test_augmentation_moves_labels_with_the_image(sides):
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sides), indexing="ij"))
    ball = (grid.sub(0.2).square().sum(0) < 0.3).float()[None]
    changed = 0
    for seed in range(12):
        image, labels = augmented(2 * ball + 1, ball.to(torch.int32), seed)
        again = augmented(2 * ball + 1, ball.to(torch.int32), seed)
        assert torch.equal(image, again[0])
        assert torch.equal(labels, again[1])
        above = image > (image.min() + image.max()) / 2
        assert 2 * (above & (labels > 0)).sum() / (above.sum() + (labels > 0).sum()) > 0.9
        changed += not torch.equal(labels, ball)
    assert changed > 8
    still = [torch.equal(augmented(ball, ball, seed, flips=False)[1], ball) for seed in range(12)]
    assert 4 < sum(still) < 12  # most are not turned, and none is flipped


def test_binary_loss_of_probabilities():
    p = torch.tensor([[[[0.9, 0.2]]], [[[0.5, 0.5]]]], requires_grad=True)
    t = torch.tensor([[[[1, 0]]], [[[0, 0]]]])
    cross = -(np.log(0.9) + np.log(0.8) + 2 * np.log(0.5)) / 4
    dice = ((2 * 0.9 + 1) / (1.1 + 1 + 1) + 1 / 2) / 2
    found = ProbabilityLoss()(p, t)
    found.backward()
    assert found.item() == pytest.approx(cross + 1 - dice)
    with torch.autocast("cpu", torch.bfloat16):
        assert ProbabilityLoss()(p, t).item() == pytest.approx(found.item())
    with pytest.raises(ValueError, match=r"the probability has shape \(2, 1, 1, 2\)"):
        ProbabilityLoss()(p, t[0])


# -- folders -----------------------------------------------------------------------------------------------------------


def test_descriptions(tmp_path):
    path = tmp_path / "dataset.json"
    assert describe(tmp_path).labels is None
    path.write_text('{"labels": {"0": "background", "1": "liver"}, "modality": {"1": "PET", "0": "CT"}}')
    assert (describe(tmp_path).labels, describe(tmp_path).channels) == (["background", "liver"], ["CT", "PET"])
    for labels, said in (
        ('{"background": 0, "whole": [1, 2]}', "regions of several labels"),
        ('{"background": 0, "liver": 2}', "without a gap"),
        ('{"background": 0, "liver": 1, "ignore": 2}', "no label"),
        ("[1, 2]", "expected names with one number each"),
    ):
        path.write_text(f'{{"labels": {labels}}}')
        with pytest.raises(errors.BadFile, match=said):
            describe(tmp_path)


def test_what_is_wrong_is_said_before_the_training(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 3), tmp_path / "out"

    def refused(*words, name="umamba_bot_3d", folder=data):
        code = run(["train-volumes", name, str(folder), "--out", str(out), *SMALL, "--steps", "1", *words])
        assert code
        assert not out.exists()
        return capsys.readouterr().err

    assert "patch is [15, 16, 16]" in refused("--patch", "15,16,16")
    assert "expected the sides of a window" in refused("--patch", "15x16")
    assert "is for image-classification" in refused(name="vim_tiny")
    assert "expected 'z-score'" in refused("--normalisation", "histogram")
    assert "the data have 2 labels" in refused("--set", "num_classes=1")
    assert "is a umamba_micro" in refused("--start", "umamba_micro.phantoms")
    assert "holds no imagesTr" in refused(folder=tmp_path)
    truth = data / "labelsTr" / "case_1.nii.gz"
    kept = truth.read_bytes()
    truth.write_bytes(kept[: len(kept) // 2])
    assert "case_1.nii.gz: cannot be read as NIfTI" in refused()
    nifti(truth, np.ones((16, 16, 15), np.uint8), np.eye(4))
    assert "labels of shape (16, 16, 15)" in refused()
    nifti(truth, np.full((16, 16, 16), 3, np.uint8), nibabel.load(data / "imagesTr" / "case_1_0000.nii.gz").affine)
    assert "labels 3 to 3; the model has 0 to 1" in refused()
    truth.write_bytes(kept)
    shutil.copy(data / "imagesTr" / "case_2_0000.nii.gz", data / "imagesTr" / "case_2_0001.nii.gz")
    assert "expected the same of all" in refused("--held-out", "0")
    (data / "imagesTr" / "case_2_0001.nii.gz").unlink()
    about = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "T1", "1": "T2"}}))
    assert "names 2 channels (T1, T2)" in refused()


def test_labels_of_sides_are_not_flipped_unless_asked(tmp_path, capsys):
    data, out = raw(tmp_path / "data", 2, name="left kidney"), tmp_path / "out"
    words = ["train-volumes", "umamba_bot_3d", str(data), "--out", str(out), *SMALL, "--steps", "1", "--held-out", "0"]
    assert run(words) == 0
    assert "patches are not flipped" in capsys.readouterr().out
    assert run([*words, "--flips"]) == 0
    assert "patches are flipped along every axis" in capsys.readouterr().out


def test_a_network_reads_scans_as_thick_as_those_it_was_trained_on(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for i in range(2):
        made = phantom(i, (20, 20, 6), (2.0, 2.0, 20.0), fine=1)
        nifti(data / "images" / f"{i}.nii", made.image, made.affine)
        nifti(data / "labels" / f"{i}.nii", made.labels, made.affine)
    words = ["train-volumes", "umamba_bot_3d", str(data), "--out", str(out), *SMALL, "--steps", "1", "--held-out", "0"]
    assert run(words) == 0
    pipe = zoo.pipeline(str(out))
    assert pipe.spacing == (2.0, 2.0, 20.0)
    assert pipe(data / "images" / "0.nii").labels.shape == (20, 20, 6)  # ten times longer in one axis
