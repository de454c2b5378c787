"""SpaceTime's flags, its streams and losses; TSM2's properties. Parity with the originals is in tests/golden."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zoo
import zoo.testing
from zoo_time_series._base import TRANSFORMS, affine_of
from zoo_time_series.spacetime import MLP, ChannelDropout, SpaceTime, rmse, spacetime
from zoo_time_series.tsm2 import TSM2

ROOT = Path(__file__).parents[2]
SMALL = {
    "lag": 24,
    "horizon": 7,
    "model_dim": 16,
    "n_kernels": 4,
    "kernel_dim": 6,
    "max_avg_window": 12,
    "dropout": 0.0,
}
#: A configuration as the original's constructor takes it.
IDENTITY = {"method": "identity", "kwargs": None}
SSM = {"model_dim": 8, "n_kernels": 8, "kernel_dim": 4, "head_dim": 1, "norm_order": 1}
CONFIG = {
    "embedding_config": {"method": "repeat", "kwargs": {"input_dim": 1, "embedding_dim": 8}},
    "encoder_config": {
        "blocks": [
            {
                "input_dim": 8,
                "pre_config": IDENTITY,
                "ssm_config": {"method": "companion", "kwargs": SSM},
                "mlp_config": IDENTITY,
            }
        ]
    },
    "decoder_config": {
        "blocks": [
            {
                "input_dim": 8,
                "pre_config": IDENTITY,
                "ssm_config": {"method": "closed_loop_companion", "kwargs": SSM},
                "mlp_config": IDENTITY,
            }
        ]
    },
    "output_config": {"method": "mlp", "kwargs": {"input_dim": 8, "output_dim": 1}},
    "lag": 12,
    "horizon": 4,
}


def changed(*path, value):
    config = copy.deepcopy(CONFIG)
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return config


@pytest.mark.parametrize("path_value_message", [
    (("embedding_config", "method", "fourier"), "fourier"),
    (("embedding_config", "kwargs", {"input_dim": 3, "embedding_dim": 8}), "multiple of input_dim 3"),
    (("embedding_config", "kwargs", {"input_dim": 1}), "n_heads and n_kernels"),
    (("encoder_config", "blocks", 0, "pre_config", "method", "wavelet"), "wavelet"),
    (("encoder_config", "blocks", 0, "ssm_config", "method", "s4"), "'s4'"),
    (("encoder_config", "blocks", 0, "ssm_config", "method", "closed_loop_shift"), "without closed loop"),
    (("decoder_config", "blocks", 0, "ssm_config", "method", "companion"), "closed_loop_companion"),
    (("encoder_config", "blocks", 0, "ssm_config", "kwargs", {**SSM, "gate": True}), "no argument gate"),
    (("encoder_config", "blocks"), "one block or more"),
    (("lag", 0), "lag is 0"),
    (("data_transform", "log"), "'log'"),
])  # fmt: skip
def test_configurations_that_are_refused(path_value_message):
    path, message = path_value_message
    *keys, value = path if path != ("encoder_config", "blocks") else ("encoder_config", "blocks", [])
    config = changed(*keys, value=value)
    with pytest.raises(ValueError, match=message):
        zoo.reference("spacetime").build(config, {})


def test_the_original_builds_from_its_own_arguments_and_back():
    ours = SpaceTime(**CONFIG)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    adapter = zoo.reference("spacetime")
    again = adapter.build(CONFIG, state)
    assert adapter.to_reference(again.state_dict(), model=again).keys() == state.keys()
    with pytest.raises(zoo.errors.KeysDoNotMatch):
        adapter.build(CONFIG, {k: v for k, v in state.items() if not k.endswith("ssm.k")})


#: Golden files with gradients, and files of other flags that were recorded with the original's code in the same way:
#: shift SSMs with stored a and b, linear embedding, all kinds of preprocessing, several columns, other norms, MLPs.
RECORDED = [
    *(
        ROOT / "tests" / "golden" / f"{n}.safetensors"
        for n in ("spacetime__companion_uni", "mambamixer__tsm2_thirdparty")
    ),
    *sorted((Path(__file__).parent / "recorded").glob("*.safetensors")),
]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_outputs_and_gradients_are_the_originals(path):
    found = zoo.testing.check_golden(path, grad=True)
    assert any(key.startswith("grad/") for key in found)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_go_there_and_back(transform):
    x = torch.randn(2, 10, 3) * 4 + 7
    affine = affine_of(x, transform, 10)
    assert torch.allclose(affine.back(affine(x)), x, atol=1e-5)
    u = affine(x)
    if transform == "last":
        assert torch.equal(u[:, -1], torch.zeros(2, 3))
    if transform in ("mean", "mean_input", "standardize"):
        assert u.mean(1).abs().max() < 1e-5
    if transform == "standardize":
        assert torch.allclose(u.std(1), torch.ones(2, 3), atol=1e-5)  # with n - 1
    # Only the first lag steps are looked at, but for mean_input.
    longer = torch.cat([x, x + 100], dim=1)
    same = torch.allclose(affine_of(longer, transform, 10)(x), u, atol=1e-4)
    assert same == (transform != "mean_input")


@pytest.mark.parametrize("transform", ["mean", "last", "standardize"])
def test_a_forecast_moves_with_its_series(transform):
    """What a transform takes off comes back: a shifted series has a shifted forecast."""
    torch.manual_seed(0)
    model = spacetime(**SMALL, data_transform=transform).eval()
    x = torch.randn(2, 24, 1)
    with torch.no_grad():
        assert torch.allclose(model(x + 50), model(x) + 50, atol=2e-3)
        if transform == "standardize":
            assert torch.allclose(model(x * 9), model(x) * 9, atol=2e-3)


def test_the_horizon_is_no_part_of_the_weights():
    model = spacetime(**SMALL).eval()
    x = torch.randn(2, 24, 1)
    with torch.no_grad():
        longer = model(x, horizon=20)
        assert longer.shape == (2, 20, 1)
        assert torch.allclose(longer[:, :7], model(x), atol=1e-4 * float(longer.abs().max()))
        assert model(x, horizon=1).shape == (2, 1, 1)
    with pytest.raises(ValueError, match="horizon is 0"):
        model(x, horizon=0)


@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 3), (2, 0, 1)])
def test_series_that_are_refused(shape):
    with pytest.raises(ValueError, match="series has shape"):
        spacetime(**SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("more", [
    {"n_blocks": 3}, {"kind": "shift", "n_blocks": 3}, {"preprocessing": "differencing"}, {"embedding": "linear"},
    {"preprocessing": "identity", "norm_order": 2}, {"preprocessing": "ma_residual", "skip": False},
], ids=str)  # fmt: skip
def test_a_stream_is_the_whole_history(more):
    """A history given at once, and its last steps one at a time, are the same state; and the same forecast."""
    torch.manual_seed(3)
    model = spacetime(**SMALL, **more, data_transform="none").eval()
    x = torch.randn(2, 31, 1)
    with torch.no_grad():
        expected = model(x, horizon=9)
        state = model.init_stream(x[:, :20])
        for t in range(20, 31):
            model.observe(x[:, t], state)
        found = model.roll_out(state, 9)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_stream_keeps_its_transform():
    model = spacetime(**SMALL).eval()
    x = torch.randn(1, 24, 1) + 100
    with torch.no_grad():
        state = model.init_stream(x)
        assert torch.allclose(model.roll_out(state), model(x), atol=1e-3)
        model.observe(torch.tensor([[101.0]]), state)
        assert model.roll_out(state, 3).shape == (1, 3, 1)


def test_no_stream_through_an_average_over_time():
    config = changed("encoder_config", "blocks", 0, "mlp_config", value={
        "method": "mlp", "kwargs": {"input_dim": 8, "output_dim": 8, "average_pool": "l"}})  # fmt: skip
    model = SpaceTime(**config)
    with pytest.raises(ValueError, match="average_pool"):
        model.init_stream(torch.randn(1, 12, 1))


def test_loss_by_its_formula():
    torch.manual_seed(4)
    model = spacetime(**SMALL).eval()
    series, target = torch.randn(3, 24, 1), torch.randn(3, 7, 1)
    affine = affine_of(series, "mean", 24)
    made = model.predictions(affine(series))
    y = torch.cat([series, target], 1)
    d = 6
    parts = [
        rmse(affine.back(made.y_closed), target),
        rmse(affine.back(made.y_open)[:, d - 1 :], y[:, d : 24 + 1]),
        rmse(made.z_pred[:, d - 1 : -1], made.z_true[:, d:]),
    ]
    assert torch.allclose(model.loss(series, target), sum(parts))
    assert torch.allclose(model.loss(series, target, (1, 0, 0)), parts[0])
    assert torch.isfinite(model.loss(series[:, :4], target))  # shorter than the kernel: the forecast alone
    only = model.predictions(affine(series), open_loop=False)
    assert only.y_open is None
    assert torch.equal(only.y_closed, made.y_closed)


# -- the MLP's flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "layers"), [
    ({"n_layers": 1, "n_activations": 1, "pre_activation": True}, "GELU Identity Linear"),
    ({"n_layers": 1, "n_activations": 1}, "Linear GELU"),
    ({"n_layers": 1, "n_activations": 2}, "GELU Identity Linear GELU"),
    ({"n_layers": 2, "n_activations": 1}, "Linear GELU Linear"),
    ({"n_layers": 2, "n_activations": 4}, "GELU Identity Linear GELU Linear GELU GELU"),
    ({"n_layers": 3, "n_activations": 0}, "Linear Linear Linear"),
    ({"n_layers": 1, "n_activations": 1, "pre_activation": True, "dropout": 0.2}, "GELU Dropout Linear"),
    ({"n_layers": 1, "n_activations": 1, "pre_activation": True, "dropout": 1.2}, "GELU ChannelDropout Linear"),
])  # fmt: skip
def test_layers_of_an_mlp(arguments, layers):
    found = MLP(4, 4, activation="gelu", **arguments)
    assert " ".join(type(layer).__name__ for layer in found.layers) == layers


def test_widths_of_an_mlp():
    def widths(**arguments):
        return [m.out_features for m in MLP(4, 6, **arguments).layers if hasattr(m, "out_features")]

    assert widths() == [6]
    assert widths(hidden_dim=5) == [5]  # one layer: the hidden width is the output's
    assert widths(n_layers=3) == [4, 4, 6]
    assert widths(n_layers=3, hidden_dim=5) == [5, 5, 6]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swish"])
def test_the_skip_sees_what_ran_in_place(activation):
    mlp = MLP(4, 4, activation=activation, n_activations=1, pre_activation=True, skip_connection=True)
    x = torch.randn(2, 5, 4)
    act = {"gelu": F.gelu, "relu": F.relu}.get(activation, F.silu)
    skipped = x if activation == "gelu" else act(x)
    assert torch.allclose(mlp(x), mlp.layers[2](act(x)) + skipped, atol=1e-6)


def test_norm_shape_and_pool_of_an_mlp():
    mlp = MLP(4, 4, layernorm=True, skip_connection=True, input_shape="bld", average_pool="l")
    x = torch.randn(2, 5, 4)
    normed = mlp.layernorm(x)
    assert torch.allclose(mlp(x), (mlp.layers(normed) + normed).mean(1, keepdim=True), atol=1e-6)
    assert MLP(5, 3, input_shape="bdl")(torch.randn(2, 5, 7)).shape == (2, 7, 3)
    glu = MLP(4, 6, activation="glu", n_activations=1)
    assert glu(x).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="tanh"):
        MLP(4, 4, activation="tanh")


def test_channel_dropout():
    torch.manual_seed(0)
    drop = ChannelDropout(0.5)
    y = drop(torch.ones(4, 9, 16))
    assert torch.equal(y, y[:, :1].expand_as(y))  # one draw for all steps
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(drop.eval()(y), y)
    with pytest.raises(ValueError, match="less than 2"):
        MLP(4, 4, n_activations=1, pre_activation=True, dropout=2.5)


# -- TSM2 --------------------------------------------------------------------------------------------------------------

TINY = {
    "seq_len": 40,
    "pred_len": 6,
    "patch_len": 8,
    "stride": 4,
    "d_model": 16,
    "d_state": 4,
    "num_layers": 2,
    "dropout": 0.0,
}


def test_tsm2_scale_and_variates():
    torch.manual_seed(5)
    model = TSM2(**TINY).eval()
    x = torch.randn(2, 40, 3)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 6, 3)
        scale, shift = torch.tensor([1.0, 10.0, 0.1]), torch.tensor([0.0, -50.0, 3.0])
        assert torch.allclose(model(x * scale + shift), y * scale + shift, atol=2e-3)
        assert model(torch.randn(1, 40, 1)).shape == (1, 6, 1)
        assert model(torch.randn(1, 40, 11)).shape == (1, 6, 11)
        other = x.clone()
        other[:, :, 2] = torch.randn(2, 40)
        assert not torch.allclose(model(other)[..., 0], y[..., 0])  # variates see each other
    for shape in ((2, 39, 3), (2, 40)):
        with pytest.raises(ValueError, match=r"expected \(batch, 40, variates\)"):
            model(torch.zeros(shape))


def test_tsm2_averages_weigh_two_together():
    """With mixers that give 0 every average of the first layer is twice the embedded series."""
    model = TSM2(**TINY).eval()
    for mixer in [*model.token_mixers, *model.channel_mixers_fwd, *model.channel_mixers_bwd]:
        torch.nn.init.zeros_(mixer.out_proj.weight)
    x = torch.randn(1, 40, 2)
    with torch.no_grad():
        found = model.forward_features(x)
        # x -> 2x (token) -> softmax(x, 2x) + x = 2.5x (channel) -> layer 1: mean(1, 2) + mean(1, 2.5) = 3.25 ...
        embedded = found["patch_embedding"] + model.pos_embed
        channel = (1 + 2 + 3.25) / 3 * embedded + (1 + 2.5) / 2 * embedded
        assert torch.allclose(model.norm_2d(channel), found["norm2d"], atol=1e-4)


def test_tsm2_refuses():
    with pytest.raises(ValueError, match="patch_len 50"):
        TSM2(seq_len=40, patch_len=50)
    with pytest.raises(ValueError, match="no argument revin"):
        zoo.reference("mambamixer").build({"num_variates": 3, "revin": False}, {})


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("spacetime_ett_720", "model_dim", 0), ("tsm2_96", "d_model", 0)]
)
def test_sizes_that_are_none(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        zoo.create(name, device="meta", **{argument: value})
