"""Arguments of the originals' constructors that no golden file sets, and state dicts as training loops leave them."""

import pytest
import torch

import zoo
from zoo.layers import Mamba
from zoo_medical.mambamim import Hybird, Visible
from zoo_medical.mambamim_pretrain import MambaMIM
from zoo_medical.segmamba import TriMamba
from zoo_medical.swin_umamba import SwinUMambaD
from zoo_medical.umamba import UMamba
from zoo_medical.vm_unet import VMUNet


def again(system, model, config, prefix=""):
    """The model, read from its state dict in the original's format and the original's arguments."""
    adapter = zoo.reference(system)
    state = adapter.to_reference(model.state_dict(), model=model)
    return adapter.build(config, {prefix + k: v for k, v in state.items()})


PLAN = {"input_channels": 1, "n_stages": 3, "kernel_sizes": [[3, 3]] * 3, "num_classes": 2, "conv_op": "Conv2d",
        "norm_op": "InstanceNorm2d", "norm_op_kwargs": {"eps": 1e-3, "momentum": 0.2}, "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nonlin", ["LeakyReLU(0.01)", "ReLU"])
def test_umamba_numbers_for_all_stages_and_defaults_are_the_originals(prefix, nonlin):
    """One number is repeated, not doubled; the first stage shrinks too; ``conv_bias`` is off unless it is given."""
    torch.manual_seed(0)
    model = UMamba(
        dims=2, features=[4] * 3, strides=[2] * 3, conv_bias=False, norm_eps=1e-3, norm_affine=False,
        slope=0.0 if nonlin == "ReLU" else 0.01,
    ).eval()  # fmt: skip
    found = again("umamba", model, {**PLAN, "features_per_stage": 4, "strides": 2, "nonlin": nonlin}, prefix)
    image = torch.randn(2, 1, 24, 16)
    with torch.no_grad():
        assert found(image).shape == (2, 2, 12, 8)
        torch.testing.assert_close(found(image), model(image))


def test_umamba_says_what_is_missing():
    with pytest.raises(ValueError, match="needs strides"):
        again("umamba", UMamba(dims=2, features=[4] * 3, strides=[1, 2, 2]), {**PLAN, "features_per_stage": 4})
    with pytest.raises(ValueError, match="none of U-Mamba's"):
        zoo.reference("umamba").build({**PLAN, "features_per_stage": 4, "strides": 2}, {"a": torch.ones(1)})


@pytest.mark.parametrize("options", [{}, {"dt_rank": 3}, {"conv_bias": False}, {"bias": True}])
def test_the_tri_orientated_mixer_is_three_mambas(options):
    torch.manual_seed(0)
    tri = TriMamba(6, 4, slices=3, **options)
    for p in tri.parameters():
        torch.nn.init.normal_(p, std=0.4)
    mixers = [Mamba(6, 4, **options) for _ in range(3)]
    for k, mixer in enumerate(mixers):
        mixer.in_proj, mixer.out_proj = tri.in_proj, tri.out_proj
        with torch.no_grad():
            mixer.conv1d.weight.copy_(tri.conv_weight[k].unsqueeze(1))
            if tri.conv_bias is not None:
                mixer.conv1d.bias.copy_(tri.conv_bias[k])
            mixer.x_proj.weight.copy_(tri.scan.x_proj[k])
            mixer.dt_proj.weight.copy_(tri.scan.dt_proj[k])
            mixer.dt_proj.bias.copy_(tri.scan.dt_bias[k])
            mixer.A_log.copy_(tri.scan.A_log[k])
            mixer.D.copy_(tri.scan.D[k])
    u = torch.randn(2, 12, 6)
    across = torch.arange(12).view(3, 4).t().flatten()
    back = across.argsort()
    expected = mixers[0](u) + mixers[1](u.flip(1)).flip(1) + mixers[2](u[:, across])[:, back]
    if tri.out_proj.bias is not None:
        expected = expected - 2 * tri.out_proj.bias  # added once, not by each order
    torch.testing.assert_close(tri(u), expected)
    with torch.no_grad():
        torch.testing.assert_close(tri.lean(u, torch.nn.Identity()), expected)
    config = {"d_model": 6, "d_state": 4, "nslices": 3, "bimamba_type": "v3", "dt_rank": "auto", **options}
    torch.testing.assert_close(again("segmamba", tri, config)(u), expected)


def test_states_that_follow_the_width_and_other_numbers_of_stages():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 16)
    model = VMUNet(dims=8, dims_decoder=[32, 16, 8], depths=[1, 1, 1], depths_decoder=[1, 1, 1], state=None).eval()
    assert model.layers[0].blocks[0].op.scan.state == 2  # 8 / 6, rounded up
    config = {"dims": 8, "dims_decoder": [32, 16, 8], "depths": [1, 1, 1], "depths_decoder": [1, 1, 1], "d_state": None}
    torch.testing.assert_close(again("vm_unet", model, config)(image), model(image))
    model = SwinUMambaD(
        num_classes=2, dims=8, depths=[1, 1, 1], state=None, decoder_state=None, patch_size=2, patch_norm=False
    ).eval()
    assert [stage.blocks[0].op.scan.state for stage in model.decoder.stages] == [6, 3]  # 16 / 3 and 8 / 3, rounded up
    config = {
        "vss_args": {"dims": 8, "depths": [1, 1, 1], "d_state": None, "patch_size": 2, "patch_norm": False,
                     "drop_rate": 0.1, "attn_drop_rate": 0.1, "use_checkpoint": False},
        "decoder_args": {"num_classes": 2, "deep_supervision": False, "features_per_stage": [8, 16, 32],
                         "d_state": None},
    }  # fmt: skip
    found = again("swin_umamba", model, config)
    torch.testing.assert_close(found(image), model(image))
    assert found(image).shape == (1, 2, 64, 32)  # patches of 2: twice the image's sides
    assert found.train().vssm_encoder.drop.p == 0.1


def test_mambamim_defaults_are_the_originals():
    """Of the class, and of ``build_hybird``, which has three arguments only."""
    model = Hybird(3, 3, 32, (32, 64, 96, 128, 192), (1, 1, 3, 3, 1), (3,) * 5, (2, 4, 4, 4, 2), 3)
    found = again("mambamim", model, {"img_size": 32}, "module.")
    assert found.state_dict().keys() == model.state_dict().keys()
    model = Hybird(img_size=32)
    for source in ("", "models/network/hymamba.py:build_hybird"):
        state = model.state_dict()
        found = zoo.reference("mambamim").build(
            {"in_channel": 1, "n_classes": 14, "img_size": 32}, state, source=source
        )
        assert found.state_dict().keys() == model.state_dict().keys()


SMALL = {"img_size": 32, "channels": [2, 3, 4, 5, 6], "depths": [1] * 5, "depth": 1}


def test_a_dense_encoder_in_pretraining():
    """``sparse`` False: norms leave their bias in hidden cells, and all tokens are walked."""
    torch.manual_seed(0)
    model = MambaMIM(**SMALL, decoder_width=24, sparse=False).eval()
    config = {"encoder": {**SMALL, "sparse": False}, "input_size": 32, "decoder_width": 24, "densify_norm": "ln"}
    found = again("mambamim", model, config)
    image, active = torch.randn(1, 1, 32, 32, 32), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    active[0, 0, 0, 1, 1] = True
    torch.testing.assert_close(found(image, active), model(image, active))
    parts: dict = {}
    model.reconstruct(image, active, parts=parts)
    assert "n_kept" not in parts
    embeddings = model.sparse_encoder.embeddings
    with torch.no_grad():
        embeddings.encoder4.norm2.bias.fill_(0.5)
        for dense in (True, False):
            _, skips = embeddings(image, Visible(active, norms=not dense))
            hidden = skips[-1][:, :, :2, :2, :2]
            assert bool(hidden.any()) is dense
