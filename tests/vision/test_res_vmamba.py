"""Res-VMamba: parity given the original's random convolutions, and what each way of having them means."""

from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.reference import read_golden
from zoo_vision.res_vmamba import ResVMambaAdapter, res_vmamba
from zoo_vision.vmamba import vmamba

TESTS = Path(__file__).parents[1]
GOLDEN = sorted((TESTS / "golden").glob("res_vmamba__*.safetensors*"))
TINY = {
    "depths": (1, 1, 1, 1), "dims": 8, "num_classes": 7, "state": 2, "patch_overlap": False, "downsample": "merge",
    "gate": True, "mlp_ratio": 0.0,
}  # fmt: skip


def tiny(**config):
    torch.manual_seed(0)
    return res_vmamba(**{**TINY, **config}).eval()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=True)


def test_state_dict_is_the_vanilla_one_and_goes_back():
    assert len(GOLDEN) == 1
    golden, adapter = read_golden(GOLDEN[0]), ResVMambaAdapter()
    model = adapter.build(golden.config, golden.state, source=golden.source)
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == golden.state.keys()
    assert all(torch.equal(back[k], v) for k, v in golden.state.items())


def test_without_fusion_it_is_vmamba():
    model, x = tiny(fusion="none"), torch.randn(2, 3, 64, 96)
    plain = vmamba(**TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    model.given_fusion = [(torch.zeros(b, a, 1, 1), torch.zeros(b)) for a, b in ((8, 16), (16, 32), (32, 64))]
    torch.testing.assert_close(model(x), plain(x))


def test_fixed_repeats_random_does_not():
    x = torch.randn(1, 3, 64, 64)
    fixed = tiny(fusion="fixed")
    assert torch.equal(fixed(x), fixed(x))
    assert torch.equal(tiny(fusion="fixed")(x), fixed(x))
    assert not torch.equal(tiny(fusion="fixed", fusion_seed=1)(x), fixed(x))
    assert fixed.fuse1_weight.abs().max() <= 16**-0.5
    fresh = tiny(fusion="random")
    assert not torch.equal(fresh(x), fresh(x))
    assert fresh.state_dict().keys() == fixed.state_dict().keys()


def test_fixed_survives_saving_and_learned_trains(tmp_path):
    x = torch.randn(1, 3, 64, 64)
    model = zoo.create("res_vmamba_small", **TINY, fusion_seed=5).eval()
    zoo.save(model, tmp_path / "m")
    again = zoo.load(tmp_path / "m")
    assert torch.equal(again.fuse2_weight, model.fuse2_weight)
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
    learned = tiny(fusion="learned").train()
    learned(x).sum().backward()
    assert learned.fuse2_weight.grad.abs().sum() > 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="multiples of 32"):
        tiny()(torch.randn(1, 3, 60, 64))
    with pytest.raises(ValueError, match="fusion is 'often'"):
        tiny(fusion="often")
    with pytest.raises(ValueError, match="softmax_version"):
        ResVMambaAdapter().build({"softmax_version": True}, {})
    with pytest.raises(ValueError, match="d_stat"):
        ResVMambaAdapter().build({"d_stat": 4}, {})


CONFIG = {"depths": [1, 1, 1, 1], "dims": 8, "mlp_ratio": 0.0, "num_classes": 7, "d_state": 2}
OURS = {"conv_bias": True, "expand": 2.0}  # what the original's class fixes, or has by default


@pytest.mark.parametrize(("version", "size"), [("v2", (60, 52)), ("v2", (75, 90)), ("v1", (66, 99))])
def test_sizes_that_halve_as_the_pooling_does_are_taken(version, size):
    """2x2 convolutions round down as the pooling does; of an image the patches see multiples of 4 alone."""
    adapter, x = ResVMambaAdapter(), torch.randn(1, 3, *size)
    down = "conv2" if version == "v2" else "merge"
    model = tiny(**OURS, downsample=down)
    state = adapter.to_reference(model.state_dict(), model=model)
    again = adapter.build({**CONFIG, "downsample_version": version}, state)
    torch.testing.assert_close(again(x), model(x))
    buffers = dict(model.named_buffers())
    fuse = {f"fuse{i}_{n}": torch.zeros_like(buffers[f"fuse{i}_{n}"]) for i in range(3) for n in ("weight", "bias")}
    plain = tiny(**OURS, downsample=down, fusion="none")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(adapter.run(again, {"image": x, **fuse})["logits"], plain(x))


def test_automatic_state_and_a_fifth_stage():
    config = {**CONFIG, "depths": [1] * 5, "d_state": "auto", "downsample_version": "v2"}
    model = tiny(**OURS, depths=[1] * 5, state=None, downsample="conv2")
    assert [s.blocks[0].op.scan.state for s in model.stages] == [2, 3, 6, 11, 22]  # a sixth of the width, rounded up
    assert hasattr(model, "fuse2_weight")
    assert not hasattr(model, "fuse3_weight")  # only the first three stages have a residual
    adapter, x = ResVMambaAdapter(), torch.randn(1, 3, 64, 80)
    again = adapter.build(config, adapter.to_reference(model.state_dict(), model=model))
    torch.testing.assert_close(again(x), model(x))


def test_a_backbone_of_the_first_stages_ignores_the_later_ones():
    golden, adapter = read_golden(GOLDEN[0]), ResVMambaAdapter()
    state = {k: v for k, v in golden.state.items() if not k.startswith("classifier.")}
    state |= {"outnorm0.weight": torch.ones(8), "outnorm0.bias": torch.zeros(8)}
    model = adapter.build({**golden.config, "out_indices": [0]}, state, source="x:Backbone_VSSM")
    found = adapter.run(model, golden.inputs)
    assert [name for name in found if not name.startswith("mid/")] == ["stage0"]
    torch.testing.assert_close(found["mid/stage0_block0_op"], golden.mids["stage0_block0_op"], rtol=1e-4, atol=1e-4)


def test_pyramid_keeps_the_residual():
    model = tiny()
    pyramid = tiny(features_only=True, pyramid_norm=False)
    pyramid.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    for found, expected in zip(pyramid(x), maps, strict=True):
        torch.testing.assert_close(found, expected)
