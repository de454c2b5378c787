"""docs/medical.md: its Python runs, its commands are typed, and its example for nnU-Net makes networks."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import run as run_bundle

from zoo.cli import run
from zoo_medical.commands import segment_volume
from zoo_medical.label_sets import LABEL_SETS
from zoo_medical.phantoms import LABELS, phantom
from zoo_registry import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "medical.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(OWN_DATA,) = re.findall(r"\n## Train on your own data\n(.*?)\n## ", PAGE, re.DOTALL)


def typed(page: str) -> list[str]:
    """Lines of a page's shell commands."""
    return [
        line.partition("#")[0]
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]


COMMANDS = typed(PAGE.replace(OWN_DATA, ""))
MICRO = f"autoencoder = zoo.create('mambamim_pretrain', **{resolve('mambamim_pretrain').card.tiny | {'img_size': 32}}"
#: Smaller patches and cubes than printed, which changes nothing but the time.
SMALLER = (
    ("[16, 96, 96]", "[16, 64, 64]"),
    ("1, 16, 96, 96", "1, 16, 64, 64"),
    ("img_size=96", "img_size=32"),
    ("96, 96, 96", "32, 32, 32"),
    ('"mambamim_hybird",', '"mambamim_hybird", img_size=32,'),
    ('autoencoder = zoo.create("mambamim_pretrain", img_size=32', MICRO),
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder that the page is read in, with its examples."""
    for name in ("phantoms", "monai_bundle", "nnunet"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / "examples" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def voxels(path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI file's voxels and affine."""
    image = nibabel.Nifti1Image.from_filename(path)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippets_run(index, checkout, capsys):
    code = SNIPPETS[index]
    for printed, smaller in SMALLER:
        code = code.replace(printed, smaller)
    names: dict = {}
    exec(compile(code, f"medical.md, snippet {index + 1}", "exec"), names)
    if "answer" in names:
        assert set(names["answer"].volumes_ml) == set(LABELS[1:])
        assert "large organ" in capsys.readouterr().out
        scan, place = voxels("examples/phantoms/images/phantom_1.nii.gz")
        labels, its_place = voxels("out/labels.nii.gz")
        assert labels.shape == scan.shape
        np.testing.assert_allclose(its_place, place, atol=1e-5)
        assert Path("out/overlay.png").stat().st_size > 1000
    if "loss_of" in names:
        assert all(p.grad is not None for n, p in names["network"].named_parameters() if "seg_layers.0" not in n)
    if "pretraining" in names:
        assert torch.isfinite(names["loss"])
        key = "embeddings.stem.weight"
        assert torch.equal(names["network"].state_dict()[key], names["pretraining"].sparse_encoder.state_dict()[key])
    if "rebuilt" in names:
        assert np.isfinite(names["rebuilt"].loss)
        assert all(Path(name).stat().st_size > 1000 for name in ("rebuilt.nii.gz", "rebuilt.png"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("zoo ")])
def test_commands_run(command, checkout, capsys):
    words = shlex.split(command)
    if "_micro." in command:
        assert run(words[1:]) == 0
        assert "large organ" in capsys.readouterr().out
        assert "--pictures" not in command or list(checkout.glob("out/*.png"))
    else:  # of a checkpoint and scans that the reader has: its options are those of the command
        Path(words[words.index("--checkpoint") + 1]).touch()
        given = segment_volume.make_context("segment-volume", words[2:]).params
        assert given["name"] in ("segmamba_brats.brats2023", "vm_unet_isic")
        if given["name"] == "vm_unet_isic":
            assert given["pictures"]
        else:
            assert len(given["inputs"]) == 4
            assert given["channels_together"]


def test_training_runs_as_printed(checkout, capsys):
    """The section's commands one after the other, with networks of a moment on two made-up scans, without a GPU."""
    tiny = {
        "umamba_enc_3d_16x96x96": {
            "features": [4, 6, 8],
            "kernels": 3,
            "strides": [1, 2, 2],
            "input_size": [16, 16, 16],
        },
        "mambamim_pretrain": resolve("mambamim_pretrain").card.tiny,
        "mambamim_hybird": {},  # whose sizes are the pre-training's
    }
    for i in range(2):
        made = phantom(i, (20, 20, 20), (5.0, 5.0, 5.0), fine=1)
        for place, values in (
            (f"Dataset001_Organs/imagesTr/case_{i}_0000.nii.gz", made.image),
            (f"Dataset001_Organs/labelsTr/case_{i}.nii.gz", made.labels),
            (f"ct-scans/{i}.nii.gz", made.image * 100),
            ("scan.nii.gz", made.image),
        ):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, made.affine), place)
    for command in typed(OWN_DATA):
        words = shlex.split(command.replace("--device cuda", ""))[1:]
        if words[0] in ("train-volumes", "pretrain-volumes"):
            sizes = [w for k, v in tiny[words[1]].items() for w in ("--set", f"{k}={json.dumps(v)}")]
            words += ["--steps", "1", "--spacing", "5", "5", "5", *sizes]
        assert run(words) == 0, capsys.readouterr().err
        if words[0] == "segment-volume":
            assert voxels("labels/000_scan.nii.gz")[0].shape == (20, 20, 20)
    said = capsys.readouterr().out
    assert said.count("try: zoo segment-volume ./organs scan.nii.gz") == 2
    assert "try: zoo train-volumes mambamim_hybird FOLDER --start ./pretrained" in said


def test_the_bundle_runs_as_printed(checkout):
    """Its commands' arguments, through the function that ``python -m monai.bundle run`` calls; one epoch of them."""
    printed = [shlex.split(c) for c in COMMANDS if "monai.bundle run" in c]
    assert len(printed) == 2
    for words in printed:
        at = words.index("run") + 1
        options = dict(zip((w.removeprefix("--") for w in words[at::2]), words[at + 1 :: 2], strict=True))
        if "epochs" in options:
            options["epochs"] = 1  # type: ignore[assignment]
        run_bundle(**options)
    (labels,) = Path("out").glob("*.nii.gz")
    assert voxels(labels)[0].shape == voxels("examples/phantoms/images/phantom_1.nii.gz")[0].shape


@pytest.mark.parametrize("mamba", ["Enc", "Bot"])
def test_the_trainer_for_nnunet(mamba, monkeypatch):
    """The example, with nnU-Net's own trainer where it is installed; else with an empty class in its place, for what
    nnU-Net asks of the example is then all that runs. ``nnUNetv2_train`` itself is left out: it plans on a data set."""
    if importlib.util.find_spec("nnunetv2") is None:
        stand_in = types.ModuleType("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
        stand_in.nnUNetTrainer = type("nnUNetTrainer", (), {})  # type: ignore[attr-defined]
        parts = stand_in.__name__.split(".")
        for end in range(1, len(parts)):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert "export nnUNet_extTrainer=$PWD/examples/nnunet" in COMMANDS
    path = ROOT / "examples" / "nnunet" / "nnUNetTrainerZooUMamba.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (printed,) = re.findall(r"nnUNetv2_train .* -tr (\w+)", PAGE)
    assert hasattr(module, printed)
    trainer = getattr(module, f"nnUNetTrainerZooUMamba{mamba}")
    plans = types.SimpleNamespace(
        patch_size=[8, 16, 16],
        network_arch_init_kwargs={
            "n_stages": 3, "features_per_stage": [4, 6, 8], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2], "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True,
        },
    )  # fmt: skip
    network = trainer.build_network_architecture(None, plans, 2, 3, True)
    image = torch.randn(1, 2, 8, 16, 16)
    assert [tuple(o.shape[2:]) for o in network(image)] == [(8, 16, 16), (8, 8, 8)]
    running = trainer.__new__(trainer)
    running.network, running.is_ddp = network, False
    running.set_deep_supervision_enabled(False)
    assert network(image).shape == (1, 3, 8, 16, 16)


def test_named_label_sets_exist():
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `label_set`")]
    assert set(re.findall(r'"(\w+)"', row)) == set(LABEL_SETS)
