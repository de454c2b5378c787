"""What Serpent's paper states, and every switch of this reading of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.layers.path_scan as path_scan
from zoo_restoration.serpent import PatchExpanding, Serpent
from zoo_restoration.sizes import mirrored, pad_to_multiple

SMALL = {"dims": [8, 12, 16], "depths": [1, 1, 1], "state": 4}


def make(**arguments):
    torch.manual_seed(0)
    return Serpent(**{**SMALL, **arguments}).eval()


def test_every_pixel_reaches_the_centre():
    model = make().double()
    x = torch.rand(1, 3, 24, 40, dtype=torch.float64, requires_grad=True)
    model(x)[0, :, 12, 20].sum().backward()
    assert bool((x.grad[0].abs().amax(0) > 0).all())


def test_the_cost_is_linear_in_the_pixels(monkeypatch):
    """Products and convolutions are counted by torch; a scan's by its steps (length times paths)."""
    model = make()
    steps = []
    scan = path_scan.selective_scan

    def counted(u, *args, **kwargs):
        steps.append(u.shape[1] * kwargs["path"].shape[-2])
        return scan(u, *args, **kwargs)

    monkeypatch.setattr(path_scan, "selective_scan", counted)
    found = []
    for side in (16, 32, 64):
        steps.clear()
        x = torch.rand(1, 3, side, side, requires_grad=True)  # the operators that are counted, not the fused ones
        with FlopCounterMode(display=False) as flops:
            model(x)
        found.append((flops.get_total_flops() / side**2, sum(steps) / side**2))
    assert found[0] == found[1] == found[2]
    # five blocks, four paths, levels of 1/4, 1/16 and 1/64 of the pixels
    assert found[0][1] == pytest.approx(4 * (2 / 4 + 2 / 16 + 1 / 64))


@pytest.mark.parametrize("size", [(12, 20), (13, 7), (1, 1), (3, 30)])
def test_any_size(size):
    x = torch.rand(2, 3, *size)
    assert make()(x).shape == x.shape


def test_a_padded_image_is_the_mirrored_one():
    model = make()
    x = torch.rand(1, 3, 13, 18)
    y = model(pad_to_multiple(x, model.multiple))
    assert y.shape[2:] == (16, 24)
    torch.testing.assert_close(model(x), y[..., :13, :18])


def test_mirrored_goes_on_for_ever():
    assert mirrored(3, 9, torch.device("cpu")).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert mirrored(1, 3, torch.device("cpu")).tolist() == [0, 0, 0]
    x = torch.rand(1, 1, 5, 6)
    wanted = torch.nn.functional.pad(x, (0, 2, 0, 3), mode="reflect")
    torch.testing.assert_close(pad_to_multiple(x, 8), wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch_size": 1},
        {"patch_size": 4, "patch_overlap": True},
        {"gate": False},
        {"mlp_ratio": 2.0},
        {"norm": "bn", "embed_norm": True, "final_norm": True},
        {"norm": "none"},
        {"down": "conv", "up": "conv", "skip": "add"},
        {"head_dim": 4},
        {"residual": False, "out_chans": 1},
        {"depths_decoder": [2, 3]},
        {"expand": 1.0, "dt_rank": 2, "conv": 1, "act": "gelu", "paths": "hilbert+reverse(hilbert)"},
        {"dims": [8], "depths": [2]},
    ],
    ids=str,
)
def test_every_switch(arguments):
    model = make(**arguments).train()
    x = torch.rand(2, 3, 16, 24)
    y = model(x)
    assert y.shape == (2, model.out_chans, 16, 24)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_depths_of_the_decoder_lie_where_they_are_named():
    model = make(depths=[1, 2, 3], depths_decoder=[4, 5])
    assert [len(level) for level in model.encoder] == [1, 2, 3]
    assert [len(level) for level in model.decoder] == [4, 5]


def test_without_its_residual_the_network_is_what_it_added():
    x = torch.rand(1, 3, 16, 16)
    with_it, without = make(), make(residual=False)
    without.load_state_dict(with_it.state_dict())
    torch.testing.assert_close(with_it(x), x + without(x))


def test_it_begins_near_its_input():
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert float((make()(x) - x).abs().max()) < 0.3 * float(make(residual=False)(x).abs().max())


def test_patch_expanding_lays_channels_out_row_by_row():
    layer = PatchExpanding(3, 2, 2, "none")
    x = torch.rand(1, 2, 2, 3)
    y = layer(x)
    for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = layer.expand.weight[(2 * p + q) * 2 : (2 * p + q) * 2 + 2]
        torch.testing.assert_close(y[:, p::2, q::2], x @ rows.T)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"down": "pool"}, "'merge', 'conv'"),
        ({"skip": "none"}, "'concat', 'add'"),
        ({"depths": [1, 1]}, "as many depths as dims"),
        ({"depths_decoder": [1, 1, 1]}, "one fewer in the decoder"),
        ({"out_chans": 1}, "residual=False"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        make(**arguments)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="3 channels"):
        make()(torch.rand(1, 4, 16, 16))
    with pytest.raises(ValueError, match="batch"):
        make()(torch.rand(3, 16, 16))


def test_other_channels(tmp_path):
    model = zoo.create("serpent_micro")
    zoo.save(model, tmp_path / "m")
    grey = zoo.load(tmp_path / "m", in_chans=1)
    assert grey(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)
    torch.testing.assert_close(grey.encoder.state_dict(), model.encoder.state_dict())


def test_the_authors_weights_are_not_promised():
    info = zoo.info("serpent.authors").weights
    assert info.repo_id is None
    assert "not load" in info.where
