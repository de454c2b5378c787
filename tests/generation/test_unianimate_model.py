"""UniAnimate's network: what was recorded with the original, and what follows from its definition."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zoo
import zoo.testing
from zoo.testing import assert_close
from zoo_generation.unianimate import layers
from zoo_generation.unianimate.unet import ConditionDropout, UNet, sinusoidal

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("unianimate__*"))
SMALL = {
    "dim": 32, "dim_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2, "head_dim": 16, "attn_scales": (1.0,),
    "context_dim": 16, "decoder_context_dim": 16, "num_tokens": 2, "concat_dim": 4, "resolution": (32, 48), "groups": 8,
    "zero_init": False,
}  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes}).eval()


def inputs(batch=1, frames=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    found = {
        "image": torch.randn(batch, 1, 16, generator=g),
        "local_image": torch.rand(batch, 3, frames, 48, 32, generator=g),
        "dwpose": torch.rand(batch, 3, frames + 1, 48, 32, generator=g),
        "randomref": torch.randn(batch, 4, frames, 6, 4, generator=g),
        "zero_y": torch.randn(1, 5, 16, generator=g),
    }
    return torch.randn(batch, 4, frames, 6, 4, generator=g), torch.tensor([500] * batch), found


def test_there_are_golden_files():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_gradients(path):
    zoo.testing.check_golden(path, grad=True)


@pytest.mark.parametrize("temporal", ["transformer", "mamba"])
def test_pieces_change_nothing(temporal, monkeypatch):
    model = small(temporal=temporal)
    x, t, given = inputs(batch=2)
    with torch.no_grad():
        whole = model(x, t, **given)
        monkeypatch.setitem(layers.PIECE, "cpu", 900)
        assert_close(model(x, t, **given), whole, tolerance=1e-5)


def test_encoding_once_is_the_same():
    model = small()
    x, t, given = inputs()
    with torch.no_grad():
        conditions = model.encode(x.shape, **given)
        assert torch.equal(model(x, t, conditions=conditions), model(x, t, **given))


def test_the_reference_is_a_frame_in_front():
    model = small()
    x, t, given = inputs()
    with torch.no_grad():
        unified = model.unified(x, model.encode(x.shape, **given))
        assert unified.shape == (4, 8, 6, 4)
        assert torch.equal(unified[1:, :4], x[0].transpose(0, 1))
        # without its latent the reference's pose is dropped, and the frame in front is zero
        alone = model.encode(x.shape, dwpose=given["dwpose"])
        assert not alone.reference.any()
        moved = given["dwpose"].clone()
        moved[:, :, 0] = 0
        assert torch.equal(model(x, t, dwpose=moved), model(x, t, dwpose=given["dwpose"]))
        both = {"dwpose": given["dwpose"], "randomref": given["randomref"]}
        assert not torch.equal(model(x, t, **both), model(x, t, **{**both, "dwpose": moved}))


def test_frames_know_their_order_by_the_convolutions_alone():
    """Without the convolutions over frames the transformer's network does not see the order of the frames."""
    model = small(temporal="transformer")
    x, t, given = inputs()
    given = {k: given[k] for k in ("image", "zero_y")}
    with torch.no_grad():
        turned = model(x.flip(2), t, **given).flip(2)
        assert (turned - model(x, t, **given)).abs().max() > 1e-3
        for module in model.modules():
            if isinstance(module, layers.TemporalConv):
                module.get_submodule("conv4")["3"].weight.zero_()
        assert_close(model(x.flip(2), t, **given).flip(2), model(x, t, **given), tolerance=1e-5)


def test_temporal_mamba_both_ways():
    """The definition, written with flips; and its backward mixer alone walks from the last frame."""
    torch.manual_seed(0)
    layer = layers.TemporalMamba(32, 32, d_state=4, groups=8, zero_init=False).eval()
    x = torch.randn(5, 32, 2, 3)  # one video of five frames
    with torch.no_grad():
        z = F.group_norm(x.transpose(0, 1)[None], 8, layer.norm.weight, layer.norm.bias, 1e-6)[0]
        z = layer.proj_in(z.permute(2, 3, 0, 1).flatten(0, 1)).transpose(1, 2)
        u = layer.norm1(z)
        z = z + layer.mamba_fwd(u) + layer.mamba_bwd(u.flip(1)).flip(1)
        expected = x + layer.proj_out(z.transpose(1, 2)).unflatten(0, (2, 3)).permute(3, 2, 0, 1)
        assert_close(layer(x, 5), expected, tolerance=1e-5)


def test_norms_keep_their_digits():
    """Groups far from zero: torch's kernel for channels-last layouts alone is three digits worse."""
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last) + 300
    norm = torch.nn.GroupNorm(4, 8)
    exact = copy.deepcopy(norm).double()(x.double())
    assert_close(layers.group_norm(x, norm), exact.float(), tolerance=2e-4)
    a, b = (x.double().requires_grad_() for _ in range(2))
    weight = torch.randn(x.shape, dtype=torch.float64)
    layers.group_norm(a, norm.double()).mul(weight).sum().backward()
    norm(b).mul(weight).sum().backward()
    assert_close(a.grad, b.grad, tolerance=1e-7)


def test_time_embedding():
    e = sinusoidal(torch.tensor([0, 7]), 6)
    rates = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    expected = torch.tensor([7 * r for r in rates])
    assert_close(e[1], torch.cat([expected.cos(), expected.sin()]), tolerance=1e-6)
    assert e[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert sinusoidal(torch.tensor([1]), 7).shape == (1, 7)


def test_frames_a_second():
    model = small(use_fps_condition=True)
    x, t, given = inputs()
    with torch.no_grad():
        slow, fast = (model(x, t, **given, fps=torch.tensor([f])) for f in (4, 24))
    assert (slow - fast).abs().max() > 1e-4
    assert not UNet(**{**SMALL, "use_fps_condition": True, "zero_init": True}).fps_embedding["2"].weight.any()


def test_dropped_conditions():
    torch.manual_seed(0)
    drop, x = ConditionDropout(0.5).train(), torch.ones(4000, 1, 1)
    none = torch.zeros(4000, dtype=torch.bool)
    assert drop(x, none, none).mean() == pytest.approx(0.5, abs=0.03)
    first = none.clone()
    first[:100] = True
    dropped = drop(x, first, none)
    assert not dropped[:100].any()
    assert drop(x, none, first)[:100].all()
    assert torch.equal(drop.eval()(x, first, none), x)


def test_training_loses_conditions():
    model = small(misc_dropout=0.0, p_all_zero=1.0, p_all_keep=0.0, dropout=0.0, temporal_dropout=0.0).train()
    x, t, given = inputs()
    reference = given.pop("randomref")
    with torch.no_grad():
        lost = model(x, t, **given)
        assert_close(lost, model(x, t, zero_y=given["zero_y"]), tolerance=1e-5)
        kept = model(x, t, **given, randomref=reference)  # the frame in front stays, as in the original
    assert (kept - lost).abs().max() > 1e-4


def test_the_originals_file(tmp_path):
    """A dictionary with state_dict and step, as published, under the original's keys and their spelling."""
    sizes = {k: v for k, v in SMALL.items() if k not in ("groups", "zero_init")} | {"dim_mult": [1], "dim": 32}
    first = zoo.create("unianimate_unet", **sizes)
    state = zoo.reference("unianimate").to_reference(first.state_dict())
    assert any(".temopral_conv." in key for key in state)
    torch.save({"state_dict": state, "step": 223000}, tmp_path / "unianimate.pth")
    again = zoo.load("unianimate_unet", checkpoint=tmp_path / "unianimate.pth", **sizes)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_arguments_of_the_original():
    adapter = zoo.reference("unianimate")
    own = {"resolution": [32, 48], "video_compositions": ["dwpose"]}
    assert adapter.arguments({"config": own})["dim"] == 512  # the original's default, not the released model's
    with pytest.raises(ValueError, match="use_temporal_transformer is False"):
        adapter.arguments({**own, "use_temporal_transformer": False})
    with pytest.raises(ValueError, match="no argument 'colour'"):
        adapter.arguments({**own, "colour": 1})
    with pytest.raises(ValueError, match="no 'resolution'"):
        adapter.arguments({"video_compositions": []})


def test_refusals():
    with pytest.raises(ValueError, match="expected multiples of 32 groups"):
        UNet(dim=40)
    with pytest.raises(ValueError, match="temporal is 'rnn'"):
        small(temporal="rnn")
    with pytest.raises(ValueError, match="holds 'depth'"):
        small(video_compositions=["depth"])
    with pytest.raises(ValueError, match="heads hold 2 x 12"):
        small(head_dim=12)
    model, (x, t, given) = small(), inputs()
    with pytest.raises(ValueError, match="randomref is given without dwpose"):
        model(x, t, randomref=given["randomref"])
    with pytest.raises(ValueError, match="dwpose has 1 samples of 3 frames with 3 channels; expected 1 of 4"):
        model(x, t, dwpose=given["dwpose"][:, :, 1:])
    with pytest.raises(ValueError, match="multiples of 2"):
        model(x[..., :3], t)
    with pytest.raises(ValueError, match="set resolution="):
        model(torch.randn(1, 4, 3, 8, 8), t, dwpose=given["dwpose"])
    with pytest.raises(ValueError, match="no such condition"):
        small(video_compositions=["dwpose"])(x, t, image=given["image"])
