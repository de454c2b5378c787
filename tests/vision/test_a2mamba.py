"""A2Mamba: parity, neighbourhood attention against its definition, habits."""

from pathlib import Path

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

import zoo
import zoo.testing
from zoo.layers.neighborhood import (
    axis_window,
    neighborhood_attention,
    neighborhood_gather,
    neighborhood_plan,
    neighborhood_replan,
)
from zoo.reference import read_golden
from zoo_vision.a2mamba import a2mamba
from zoo_vision.a2mamba_reference import A2MambaAdapter

TESTS = Path(__file__).parents[1]
GOLDEN = sorted((TESTS / "golden").glob("a2mamba__*.safetensors*"))
TINY = {
    "dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "heads": (2, 2, 4, 4), "windows": (5, 3, 3, 3),
    "mlp_ratios": (2, 2, 2, 2), "projection": 32, "img_size": 96, "num_classes": 7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**config):
    return a2mamba(**{**TINY, **config}).eval()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=True)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_state_dict_goes_back_to_the_original(path):
    assert len(GOLDEN) == 2
    golden, adapter = read_golden(path), A2MambaAdapter()
    model = adapter.build(golden.config, golden.state, source=golden.source)
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == golden.state.keys()
    for key, tensor in golden.state.items():
        assert torch.equal(back[key], tensor), key


# -- neighbourhood attention ------------------------------------------------------------------------------------------


def test_window_is_centred_and_shifted_inward():
    window = axis_window(10, 3, 2)
    assert window[0].tolist() == [0, 2, 4]  # shifted
    assert window[4].tolist() == [2, 4, 6]  # centred
    assert window[9].tolist() == [5, 7, 9]
    assert (window % 2 == (torch.arange(10) % 2)[:, None].numpy()).all()
    with pytest.raises(ValueError, match="at least 12"):
        axis_window(10, 3, 4)
    with pytest.raises(ValueError, match="odd"):
        axis_window(10, 4, 1)


def by_definition(q, k, v, bias, size, kernel, dilation):
    """Gather each query's keys one by one."""
    H, W = size
    rows, columns = (torch.from_numpy(axis_window(*each)) for each in zip(size, kernel, dilation, strict=True))
    keys = (rows[:, None, :, None] * W + columns[None, :, None, :]).reshape(H * W, -1)
    r, c = (
        (w - torch.arange(len(w))[:, None]) // d + k - 1
        for w, k, d in ((rows, kernel[0], dilation[0]), (columns, kernel[1], dilation[1]))
    )
    logits = (q[:, :, :, None] * k[:, :, keys]).sum(-1)
    if bias is not None:
        logits = logits + bias[:, r[:, None, :, None], c[None, :, None, :]].reshape(bias.shape[0], H * W, -1)
    return (logits.softmax(-1)[..., None] * v[:, :, keys]).sum(-2)


@pytest.mark.parametrize(
    ("size", "kernel", "dilation"),
    [
        ((7, 7), (7, 7), (1, 1)), ((24, 32), (7, 7), (1, 1)), ((24, 32), (7, 7), (3, 4)), ((13, 17), (3, 3), (3, 5)),
        ((29, 9), (9, 9), (2, 1)), ((12, 23), (3, 7), (4, 2)), ((9, 14), (5, 1), (1, 3)),
    ],
)  # fmt: skip
def test_tiles_compute_the_definition(size, kernel, dilation):
    q, k, v = torch.randn(3, 2, 2, size[0] * size[1], 4, dtype=torch.float64, requires_grad=True).unbind()
    bias = torch.randn(2, 2 * kernel[0] - 1, 2 * kernel[1] - 1, dtype=torch.float64, requires_grad=True)
    plan = neighborhood_plan(size, kernel, dilation)
    for table in (bias, None):
        found = neighborhood_gather(neighborhood_attention(q, k, plan, table), v, plan)
        expected = by_definition(q, k, v, table, size, kernel, dilation)
        torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.pow(2).sum(), (q, k, v), retain_graph=True) for y in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_a_map_moves_to_another_dilation():
    size, kernel = (14, 14), 5
    q, k, v = torch.randn(3, 1, 2, 196, 4, dtype=torch.float64).unbind()
    wide, near = neighborhood_plan(size, kernel, 2), neighborhood_plan(size, kernel, 1)
    moved = neighborhood_replan(neighborhood_attention(q, k, wide), size, wide, near)
    rows = torch.from_numpy(axis_window(14, kernel, 1))
    keys = (rows[:, None, :, None] * 14 + rows[None, :, None, :]).reshape(196, -1)
    wide_rows = torch.from_numpy(axis_window(14, kernel, 2))
    wide_keys = (wide_rows[:, None, :, None] * 14 + wide_rows[None, :, None, :]).reshape(196, -1)
    weights = (q[:, :, :, None] * k[:, :, wide_keys]).sum(-1).softmax(-1)
    torch.testing.assert_close(neighborhood_gather(moved, v, near), (weights[..., None] * v[:, :, keys]).sum(-2))


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_rpb": False},
        {"use_rpb": True, "window_dilation": [2, 1, 1, 1]},
        {"use_rpb": True, "layerscales": [True] * 4, "resscales": [False, False, True, True]},
        {"use_rpb": True, "return_features": True},
        {"use_rpb": True, "num_classes": 0},
        {"use_rpb": True, "norm_layer": "GroupNorm"},
        {"use_rpb": True, "depths": [1, 0, 1, 0]},
        {"use_rpb": True, "window_size": [[5, 3], 3, [1, 3], 3], "window_dilation": [1, [2, 1], 1, 1]},
    ],
    ids=str,
)
def test_every_flag_builds_and_goes_back(options):
    config = {
        "embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": [5, 3, 3, 3],
        "mlp_ratios": [2, 2, 2, 2], "projection": 32, "image_size": 96, "num_classes": 7, **options,
    }  # fmt: skip
    adapter, x = A2MambaAdapter(), torch.randn(1, 3, 96, 96)
    scales = [
        "res" if r else "layer" if s else None
        for s, r in zip(config.get("layerscales", [0] * 4), config.get("resscales", [0] * 4), strict=True)
    ]
    model = tiny(
        bias=config["use_rpb"], dilations=config.get("window_dilation", (1,) * 4), scales=scales,
        num_classes=config["num_classes"], depths=config["depths"], windows=config["window_size"],
        norm="group" if config.get("norm_layer") == "GroupNorm" else "layer",
    )  # fmt: skip
    state = adapter.to_reference(model.state_dict(), model=model)
    assert ("layers.0.blocks.0.token_mixer.rpb.1" in state) == config["use_rpb"]
    assert {f"layers.{2 * i}.rope.angle" for i in range(4)} <= state.keys()
    outputs = adapter.run(adapter.build(config, state), {"image": x})
    if config.get("return_features"):
        assert [tuple(outputs[f"stage{i}"].shape) for i in range(4)] == [
            (1, 16, 24, 24), (1, 16, 12, 12), (1, 32, 6, 6), (1, 32, 3, 3),
        ]  # fmt: skip
    else:
        torch.testing.assert_close(outputs["logits"], model(x))


def test_without_the_fourth_stage_nothing_attends_globally():
    three = {k: v[:3] if isinstance(v, tuple) else v for k, v in TINY.items()}
    model, adapter = a2mamba(**three, dilations=(1,) * 3, scales=(None,) * 3, scale_init=(1,) * 3), A2MambaAdapter()
    model.eval()
    state = adapter.to_reference(model.state_dict(), model=model)
    assert "layers.4.blocks.0.token_mixer.ssm.Ds" in state
    assert not any(k.startswith("layers.6") for k in state)
    config = {
        "embed_dims": [16, 16, 32], "depths": [1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": [5, 3, 3, 3],
        "mlp_ratios": [2, 2, 2, 2], "projection": 32, "image_size": 96, "num_classes": 7, "use_rpb": True,
    }  # fmt: skip
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(adapter.run(adapter.build(config, state), {"image": x})["logits"], model(x))
    with pytest.raises(ValueError, match="depths is"):
        a2mamba(**{**TINY, "depths": (1,) * 5})


def test_other_sizes_resample_the_global_table_and_small_ones_are_refused():
    model = tiny()
    assert model(torch.randn(1, 3, 128, 96)).shape == (1, 7)
    with pytest.raises(ValueError, match="window of 3"):
        model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="A2Mamba has no argument 'windw_size'"):
        A2MambaAdapter().build({"windw_size": [3] * 4}, {})


def test_pyramid_feeds_an_fpn():
    model = zoo.create("a2mamba_tiny", features_only=True, **TINY).eval()
    maps = model(torch.randn(1, 3, 96, 128))
    merged = FeaturePyramidNetwork(model.feature_info.channels(), 8)({str(i): m for i, m in enumerate(maps)})
    assert [m.shape[-1] for m in merged.values()] == [32, 16, 8, 4]


def test_gradient_checkpointing_changes_no_gradient():
    model, x = tiny(), torch.randn(1, 3, 96, 96)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_channels_last():
    model, x = tiny(), torch.randn(2, 3, 96, 96)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


def test_compiles_and_exports():
    assert zoo.testing.check_compile("a2mamba_tiny")
    assert zoo.testing.check_export("a2mamba_tiny")
