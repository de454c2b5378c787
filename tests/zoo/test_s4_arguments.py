"""The S4 family's less used arguments: what the original constructors accept, computed as they compute it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.layers.fft_conv import FFTConv, S4Block, activation
from zoo.layers.s4 import S4Kernel
from zoo.layers.s4d import S4D
from zoo.layers.s4nd import S4ND
from zoo.models.s4 import MeanDecoder, SequenceDecoder, SequenceModel
from zoo.models.s4_parts import Pool, SequenceNorm, make_residual
from zoo.models.s5 import S5Classifier
from zoo.systems.s4 import S4Adapter

SOURCE = "state-spaces/s4@e757cef "


def block(**config):
    return {"d_model": 4, "d_state": 4, "mode": "diag", "init": "diag-lin", **config}


def rebuilt(source: str, config: dict, model: nn.Module):
    """The adapter's model for a state dict that has the original's keys already."""
    return S4Adapter().build(config, model.state_dict(), source=SOURCE + source)


def test_the_dense_state_holds_both_of_each_pair():
    config = {"d_model": 4, "d_state": 8, "init": "legs"}
    layer = FFTConv(4, d_state=8, act="gelu")
    adapter, x = S4Adapter(), torch.randn(2, 4, 5)
    model = rebuilt("models/s4/s4.py:FFTConv", config, layer)
    names = ["step_final_state_dense", "step_final_state_linear"]
    out = adapter.run(model, {"x": x}, wanted=names)
    dense, half = (out[name] for name in names)
    assert dense.shape == (2, 4, 8)
    assert torch.allclose(dense[..., :4], half, atol=1e-5)
    assert torch.equal(dense[..., 4:], dense[..., :4].conj())


def test_real_systems_count_their_default_state_in_pairs():
    config = {"d_model": 4, "mode": "diag", "init": "diag-real", "is_real": True}
    for given, modes in (({}, 32), ({"d_state": 6}, 6)):
        layer = FFTConv(4, mode="diag", init="diag-real", is_real=True, d_state=modes, act="gelu")
        model = rebuilt("models/s4/s4.py:FFTConv", config | given, layer)
        assert model.kernel.A_real.shape == (4, modes)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("length", "taps", "rate"), [(9, 4, 2.0), (5, 8, 1.0), (9, 4, 0.5)])
def test_free_taps_wrap_as_in_the_original(bidirectional, length, taps, rate):
    layer = FFTConv(3, taps, mode="conv", bidirectional=bidirectional).eval()
    x = torch.randn(2, length, 3)
    asked = min(length, round(taps / rate))
    n = asked + length
    k = layer.kernel.kernel
    if bidirectional:
        k, back = k.chunk(2)
        k = nn.functional.pad(k, (0, length)) + nn.functional.pad(back.flip(-1), (length, 0))
    f = torch.fft.rfft(x.transpose(1, 2), n=n) * torch.fft.rfft(k[0], n=n)
    expected = torch.fft.irfft(f, n=n)[..., :length].transpose(1, 2) + x * layer.D
    assert torch.allclose(layer(x, rate=rate), expected, atol=1e-5)
    nd = S4ND(3, l_max=[taps], dim=1, mode="conv", bidirectional=bidirectional).eval()
    nd.load_state_dict({"D": layer.D, "kernel.0.kernel": layer.kernel.kernel})
    assert torch.allclose(nd(x, rate=rate), expected, atol=1e-5)


def test_a_tap_lost_in_rounding_wraps_as_in_the_original():
    """At half the step 17 positions are 8.5 steps, the kernel becomes 8 long, and 16 taps meet 17 positions."""
    torch.manual_seed(0)
    layer = FFTConv(3, d_state=4, bidirectional=True).eval()
    x = torch.randn(1, 17, 3)
    assert not layer.kernel.has_length(17, 0.5)
    with torch.no_grad():
        k, back = layer.kernel(17, 0.5)[0].chunk(2)
        assert k.shape[-1] == 16
        both = nn.functional.pad(k, (0, 17)) + nn.functional.pad(back.flip(-1), (17, 0))
        f = torch.fft.rfft(x.transpose(1, 2), n=34) * torch.fft.rfft(both[0], n=34)
        expected = torch.fft.irfft(f, n=34)[..., :17].transpose(1, 2) + x * layer.D
        assert torch.allclose(layer(x, rate=0.5), expected, atol=1e-5)


def test_s4nd_without_an_activation_has_a_plain_linear_output():
    config = block(linear=False, transposed=False)
    layer = S4ND(4, 4, mode="diag", init="diag-lin", linear=False)
    assert "output_linear.weight" in layer.state_dict()
    x = torch.randn(1, 3, 5, 4)
    model = rebuilt("src/models/sequence/modules/s4nd.py:S4ND", config, layer)
    assert torch.equal(S4Adapter().run(model, {"x": x})["y"], layer.eval()(x))


def test_s4nd_channel_mixing_and_ranks_of_the_general_contraction():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, 4)
    ranks = S4ND(4, 4, mode="diag", init="diag-lin", trank=2, average_ranks=False)
    averaged = S4ND(4, 4, mode="diag", init="diag-lin", trank=2)
    averaged.load_state_dict(ranks.state_dict())
    assert torch.allclose(ranks(x).unflatten(-1, (2, 4)).mean(-2), averaged(x), atol=1e-5)
    config = block(trank=2, contract_version=1, transposed=False)
    model = rebuilt("src/models/sequence/modules/s4nd.py:S4ND", config, ranks)
    assert model(x).shape == (1, 3, 5, 8)
    mixing = S4ND(4, 4, mode="diag", init="diag-lin", out_channels=3, channels=2)
    apart = S4ND(4, 4, mode="diag", init="diag-lin", channels=6)
    apart.load_state_dict({**mixing.state_dict(), "D": torch.zeros(6, 4)})
    expected = apart(x).unflatten(-1, (3, 2, 4)).sum(-1).transpose(-1, -2).flatten(-2)
    assert torch.allclose(mixing(x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="linear=True"):
        S4ND(4, 4, out_channels=2, linear=False)


@pytest.mark.parametrize("mode", ["dense", "real"])
def test_dense_kernels_are_the_structured_ones(mode):
    """The convolution, the steps and a continued state agree, and the dense start is S4's system."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    layer = FFTConv(4, mode=mode, d_state=6, n_ssm=2, channels=2, dt_min=0.05, **double).eval()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, state = layer(x), layer.init_state(2)
        assert torch.allclose(torch.stack([layer.step(x[:, t], state) for t in range(9)], 1), whole)
        again = layer.init_state(2)
        parts = [layer(x[:, :4], state=again), layer(x[:, 4:], state=again)]
        assert torch.allclose(torch.cat(parts, 1), whole)
        assert torch.allclose(again["ssm"], state["ssm"])
        dA = layer.kernel.discrete()[0]
        if mode == "dense":
            s4 = S4Kernel(4, d_state=6, n_ssm=2, **double)
            s4.inv_dt.copy_(layer.kernel.inv_dt)
            eigenvalues = [torch.linalg.eigvals(m[0].to(torch.complex128)) for m in (dA, s4.dense()[0])]
            nearest = (eigenvalues[0][:, None] - eigenvalues[1][None]).abs().amin(1)
            assert nearest.max() < 1e-6
    with pytest.raises(ValueError, match="has no argument 'disc'"):
        rebuilt("src/models/sequence/kernels/fftconv.py:FFTConv", {"d_model": 4, "mode": mode, "disc": "zoh"}, layer)


def test_normalised_output_weights_and_an_input_linear():
    config = block(weight_norm=True, bottleneck=1, transposed=False)
    layer = S4Block(4, mode="diag", init="diag-lin", d_state=4, weight_norm=True, input_linear=True)
    x = torch.randn(1, 5, 4)
    model = rebuilt("src/models/sequence/modules/s4block.py:S4Block", config, layer)
    assert torch.equal(S4Adapter().run(model, {"x": x})["y"], layer.eval()(x))
    linear = layer.output_linear[0]
    linear.weight_v.data.mul_(3.0)  # the length of a direction does not count
    assert torch.allclose(layer(x), model(x), atol=1e-6)
    image = S4ND(4, 4, mode="diag", init="diag-lin", linear=False, weight_norm=True)
    given = block(linear=False, weight_norm=True)
    assert "output_linear.weight_v" in rebuilt("src/modules/s4nd.py:S4ND", given, image).state_dict()
    plain = S4Block(4, mode="diag", init="diag-lin", d_state=4)
    # the standalone class takes the argument and leaves it unread
    assert "output_linear.0.weight" in rebuilt("models/s4/s4.py:S4Block", block(weight_norm=True), plain).state_dict()


def test_activations_of_the_modular_code():
    x = torch.randn(3, 8)
    value, gate = x.chunk(2, -1)
    assert torch.equal(activation("glu-relu")(x), value * gate.relu())
    assert torch.equal(activation("relu2")(x), x.relu() ** 2)
    normal = torch.distributions.Normal(0.707107, 0.282095)
    assert torch.allclose(activation("laplace")(x), normal.cdf(x), atol=1e-6)
    assert FFTConv(4, mode="diag", init="diag-lin", act="glu-gelu")(torch.randn(1, 5, 4)).shape == (1, 5, 4)


def test_residual_functions():
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    assert make_residual(4, 1, None) is None
    assert torch.equal(make_residual(4, 1, "N")(x, y), y)
    assert torch.equal(make_residual(4, 1, {"_name_": "R", "alpha": 0.5, "beta": 2.0})(x, y), 0.5 * x + 2 * y)
    assert torch.allclose(make_residual(4, 4, "D")(x, y), 0.75**0.5 * x + 0.5 * y)
    affine = make_residual(4, 4, {"_name_": "affine", "scalar": False, "gamma": 0.5})
    assert torch.equal(affine.affine, torch.full((4,), 0.5))
    highway = make_residual(4, 1, {"_name_": "H", "elemwise": True})
    gate = torch.sigmoid(highway.Wx(x) + highway.Wy * y)
    assert torch.allclose(highway(x, y), (1 - gate) * x + gate * highway.Wy * y)
    with pytest.raises(ValueError, match="expected None or one of"):
        make_residual(4, 1, "Q")


def test_norms_of_positions_and_channels():
    x = torch.randn(2, 7, 4)
    assert torch.allclose(SequenceNorm(4, "instance")(x).mean(1), torch.zeros(2, 4), atol=1e-5)
    assert torch.allclose(SequenceNorm(4, "group")(x).mean((1, 2)), torch.zeros(2), atol=1e-5)
    plain = SequenceNorm(4, {"_name_": "layer", "scalar": False}, transposed=True)
    assert set(plain.state_dict()) == {"norm.ln.weight", "norm.ln.bias"}
    assert SequenceNorm(4, {"_name_": "batch", "eps": 1e-3}).norm.eps == 1e-3


def test_pools_shorten_and_widen():
    x = torch.randn(2, 8, 3)
    assert torch.equal(Pool(3, "sample", 2, 2)(x)[..., ::2], x[:, ::2])
    assert torch.allclose(Pool(3, "avg", 2)(x), x.unflatten(1, (4, 2)).mean(2))
    constant = torch.ones(1, 8, 3)
    assert torch.allclose(Pool(3, "spectral", 2)(constant), constant[:, :4] / 4)
    model = SequenceModel(3, 2, {"type": "ffn"}, pool={"_name_": "avg", "stride": 2, "expand": 2}, n_repeat=2)
    assert model(x).shape == (2, 2, 12)
    assert "layers.1.pool.linear.weight" in model.state_dict()
    with pytest.raises(ValueError, match="cannot step"):
        model.init_state(1)


def test_decoders_read_lengths_only_when_told():
    adapter, d = S4Adapter(), 4
    x, lengths = torch.randn(2, 6, d), torch.tensor([3, 5])
    for options, expected in (
        ({"l_output": 0}, x[:, -1]),
        ({"l_output": 0, "use_lengths": True}, torch.stack([x[0, 2], x[1, 4]])),
        ({"mode": "ragged"}, x[:, :5]),
        ({"_name_": "nd"}, x.mean(1)),
    ):
        config = {"model": {"d_model": d, "layer": {"_name_": "id"}, "norm": None}, "decoder": options}
        model = adapter.build(config, {}, source=SOURCE + "src/models/sequence/backbones/model.py:SequenceModel")
        assert torch.allclose(adapter.run(model, {"x": x, "lengths": lengths})["y"], expected)
    assert MeanDecoder(d, 2, "full")(x).shape == (2, 6, 2)
    with pytest.raises(ValueError, match="equal lengths"):
        SequenceDecoder(d, 2)(x, lengths)


def test_s5_keeps_the_step_of_its_configuration():
    sizes = {"d_input": 3, "num_classes": 2, "d_model": 4, "ssm_size": 8, "n_layers": 1}
    plain, coarse = S5Classifier(**sizes).eval(), S5Classifier(**sizes, step_rescale=2.0).eval()
    coarse.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 3)
    assert torch.equal(coarse(x), plain(x, step_rescale=2.0))
    assert not torch.allclose(coarse(x), plain(x))


def test_key_tables_follow_from_the_keys_alone():
    adapter = S4Adapter()
    for both in (False, True):
        model = S5Classifier(3, 2, 4, 8, 1, bidirectional=both)
        theirs = adapter.to_reference(model.state_dict(), model=model)
        assert adapter.rules(theirs).to_zoo(theirs).keys() == model.state_dict().keys()
    minimal = S4D(4, d_state=4)
    theirs = adapter.to_reference(minimal.state_dict(), model=minimal)
    assert adapter.rules(theirs).to_zoo(theirs).keys() == minimal.state_dict().keys()


def test_the_prefix_of_parallel_training_is_taken_off():
    config = {"d_model": 4, "d_state": 4}
    layer = FFTConv(4, d_state=4, act="gelu").train()
    layer(torch.randn(1, 6, 4))  # the kernel's length is set
    state = {f"module.{key}": value for key, value in layer.state_dict().items()}
    model = S4Adapter().build(config, state, source=SOURCE + "models/s4/s4.py:FFTConv")
    assert int(model.kernel.l_kernel) == 6
