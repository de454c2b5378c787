"""Beside MONAI: its blocks and our networks' blocks, its losses, its tensors, a bundle; nnU-Net's plans."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle
from monai.data import MetaTensor
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock

import zoo
from zoo_medical.losses import DiceCE, deep_supervision_weights
from zoo_medical.nnunet import read_checkpoint, umamba_from_plans
from zoo_medical.phantoms import LABELS, phantom
from zoo_medical.unetr_blocks import BasicBlock, UpBlock

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "examples" / "monai_bundle" / "configs"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["instance", "batch", ("instance", {"affine": True}), ("group", {"num_groups": 2})])
def test_blocks_are_those_of_monai(dims, residual, norm):
    torch.manual_seed(0)
    x, skip = torch.randn(2, 6, *[4] * dims), torch.randn(2, 4, *[8] * dims)
    pairs = (
        (UnetrBasicBlock(dims, 6, 4, 3, 1, norm, residual), BasicBlock(dims, 6, 4, norm, residual), (x,)),
        (UnetrUpBlock(dims, 6, 4, 3, 2, norm, residual), UpBlock(dims, 6, 4, norm, residual), (x, skip)),
    )
    for theirs, ours, inputs in pairs:
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.5)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))
        theirs.eval(), ours.eval()
        with torch.no_grad():  # the lean way, where there is one
            torch.testing.assert_close(ours(*inputs), theirs(*inputs))


def test_metatensors_go_in():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 32, 32, 32)
    for name, small in (
        ("umamba_enc_3d", {"features": [4, 6], "kernels": 3, "strides": [1, 2], "input_size": [32] * 3}),
        ("segmamba_brats", {"in_chans": 1, "feat_size": [4] * 4, "hidden_size": 4, "depths": [1] * 4,
                            "slices": [16, 8, 4, 2]}),
        ("mambamim_hybird", {"img_size": 32, "channels": [4, 4, 4, 4, 6], "depths": [1] * 5, "depth": 1}),
    ):  # fmt: skip
        network = zoo.create(name, **small).eval()
        torch.testing.assert_close(network(MetaTensor(image)), network(image))


def test_the_loss_is_dice_and_cross_entropy_over_resolutions():
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, s, s, s, requires_grad=True) for s in (8, 4, 2)]
    target = torch.randint(0, 3, (2, 1, 8, 8, 8))

    def one(scores, labels):
        p, t = scores.softmax(1), F.one_hot(labels[:, 0].long(), 3).movedim(-1, 1).float()
        overlap, sizes = (v.sum((0, 2, 3, 4))[1:] for v in (p * t, p + t))
        return (1 - (2 * overlap + 1e-5) / (sizes + 1e-5)).mean() + F.cross_entropy(scores, labels[:, 0].long())

    halved = F.interpolate(target.float(), size=(4, 4, 4), mode="nearest-exact")
    expected = (one(logits[0], target) * 2 + one(logits[1], halved)) / 3  # the coarsest weighs nothing
    found = DiceCE(3)(logits, target)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert logits[0].grad.abs().sum() > 0
    torch.testing.assert_close(DiceCE()(logits[0], target), one(logits[0], target))
    assert deep_supervision_weights(1) == [1.0]
    assert deep_supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    with pytest.raises(ValueError, match="gave 2 outputs, this loss was built for outputs=3"):
        DiceCE(3)(logits[:2], target)
    with pytest.raises(ValueError, match=r"expected class indices of shape \(2, 1, 8, 8, 8\)"):
        DiceCE()(logits[0], target[:, 0])


def phantom_files(folder, seeds):
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for seed in seeds:
        made = phantom(seed, (36, 32, 24), (2.5, 3.0, 4.0), fine=1)
        for kind, voxels in (("images", made.image), ("labels", made.labels)):
            nibabel.save(nibabel.Nifti1Image(voxels, made.affine), folder / kind / f"case_{seed}.nii.gz")
    return made


def test_a_bundle_segments(tmp_path):
    made = phantom_files(tmp_path, [0])
    run_bundle(
        config_file=str(BUNDLE / "inference.json"), meta_file=str(BUNDLE / "metadata.json"),
        images=str(tmp_path / "images"), labels=str(tmp_path / "out"),
    )  # fmt: skip
    written = nibabel.load(tmp_path / "out" / "case_0_labels.nii.gz")
    np.testing.assert_allclose(written.affine, made.affine, atol=1e-4)
    ours = zoo.pipeline("umamba_micro.phantoms")(tmp_path / "images" / "case_0.nii.gz")
    assert (np.asarray(written.dataobj) == ours.labels).mean() > 0.999  # MONAI's own transforms and ours agree


def test_a_bundle_trains(tmp_path):
    phantom_files(tmp_path, [1000, 1001])
    run_bundle(
        config_file=str(BUNDLE / "train.json"), images=str(tmp_path / "images"), labels=str(tmp_path / "labels"),
        checkpoint=str(tmp_path / "umamba.pt"), epochs=1,
    )  # fmt: skip
    network = zoo.create("umamba_micro")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(torch.load(tmp_path / "umamba.pt", weights_only=True))
    assert any(not torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_the_bundles_files_name_what_the_model_has():
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "inference.json"))
    parser.read_meta(str(BUNDLE / "metadata.json"))
    channels = parser["_meta_#network_data_format#outputs#pred#channel_def"]
    assert tuple(channels[str(i)] for i in range(len(channels))) == LABELS


PLANS = {  # as nnU-Net v2 writes them
    "n_stages": 4, "features_per_stage": [4, 6, 8, 8], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [2, 2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2, 2], "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("mamba", ["enc", "bot"])
def test_plans_make_a_network(mamba):
    network = umamba_from_plans(PLANS, [8, 16, 16], 2, 3, mamba=mamba)
    outputs = network(torch.randn(1, 2, 8, 16, 16))
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 8, 16, 16), (1, 3, 8, 8, 8), (1, 3, 4, 4, 4)]
    network.deep_supervision = False
    assert network(torch.randn(1, 2, 8, 16, 16)).shape == (1, 3, 8, 16, 16)
    residual = {**{k: v for k, v in PLANS.items() if k != "n_conv_per_stage"}, "n_blocks_per_stage": [1, 3, 4, 6]}
    assert umamba_from_plans(residual, [8, 16, 16], 2, 3, mamba=mamba).num_classes == 3
    with pytest.raises(ValueError, match="have no strides"):
        umamba_from_plans({k: v for k, v in PLANS.items() if k != "strides"}, [8, 16, 16], 2, 3)


def test_a_checkpoint_of_nnunet():
    torch.manual_seed(0)
    network = umamba_from_plans(PLANS, [8, 16, 16], 1, 3)
    theirs = zoo.reference("umamba").to_reference(network.state_dict())
    found = read_checkpoint({"network_weights": {f"module.{k}": v for k, v in theirs.items()}}, network)
    network.load_state_dict(found)
    with pytest.raises(ValueError, match="no network_weights"):
        read_checkpoint({"state": {}}, network)
