"""The Dynamical Systems Framework: parity, every layer's core as a form, what is read off it, the paper's facts."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zoo.testing
from zoo.analysis import (
    QLSTM,
    CausalAttention,
    Form,
    GatedAttention,
    NormalisedAttention,
    NormAttention,
    core,
    decay,
    distance,
    formulas,
    horizon,
    modulus_shares,
    phase,
    slice_ranks,
)
from zoo.layers import LRU, S4D, Mamba, Mamba2
from zoo.systems.dsf import layer_of

GOLDEN = Path(__file__).parents[1] / "golden"


def test_golden_files_to_their_own_precision():
    zoo.testing.check_golden(GOLDEN / "dsf__formulas.safetensors", tolerance=1e-10)
    zoo.testing.check_golden(GOLDEN / "dsf__modules.safetensors", tolerance=1e-5)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "mamba": lambda: Mamba(6, d_state=3),
    "mamba2": lambda: Mamba2(8, d_state=3, headdim=4, ngroups=2, dt_limit=(0.01, 0.08)),
    "mamba2_hdim": lambda: Mamba2(8, d_state=3, headdim=4, D_has_hdim=True, conv_activation="hardswish"),
    "s4d": lambda: S4D(6, d_state=8),
    "lru": lambda: LRU(6, 5, r_min=0.3, r_max=0.9),
    "linear": lambda: CausalAttention(6, 4, num_heads=2),
    "normalised": lambda: NormalisedAttention(6, 4, num_heads=2),
    "norm": lambda: NormAttention(
        6,
        4,
        num_heads=2,
        norm_fn="softplus",
        offset=True,
        approx_fn="elu",
        dim_conv=3,
        conv_type="partial",
        scale_B=True,
    ),
    "qlstm": lambda: QLSTM(6, reversed=False),
    "qlstm_reversed": lambda: QLSTM(6),
}


def build(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_the_core_of_a_layer_is_its_form(name):
    layer = build(name)
    x = draw(9, 8 if name.startswith("mamba2") else 6)
    found = core(layer, x)
    assert found.error < 1e-6
    assert found.outputs.abs().max() > 1e-3
    phi = found.form.mixing()
    torch.testing.assert_close(torch.einsum("ijod,jd->io", phi, found.inputs), found.outputs, rtol=1e-6, atol=1e-7)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert not phi[future].any()
    assert found.form.state_size == found.form.A.shape[1]
    lags = found.form.lag_profile()
    assert lags[0] == pytest.approx(float(torch.linalg.matrix_norm(phi[range(9), range(9)]).mean()))
    # The eigenvalues alone are those of the form.
    own, alone = decay(layer, x), found.form.A
    flat = own.flatten(1)
    if name in ("linear", "normalised", "norm"):
        n = alone.shape[1] // own.shape[1]
        torch.testing.assert_close(alone[1:], own.repeat_interleave(n, dim=1), rtol=1e-6, atol=1e-9)
    elif name.startswith("mamba2"):
        torch.testing.assert_close(alone, own.repeat_interleave(alone.shape[1] // own.shape[1], dim=1))
    else:
        torch.testing.assert_close(alone, flat.to(alone.dtype))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "s4d", "qlstm"])
def test_a_few_channels_are_exact(name):
    layer = build(name)
    x = draw(7, 8 if name.startswith("mamba2") else 6)
    whole, some = core(layer, x).form.mixing(), core(layer, x, channels=[0, 5]).form.mixing()
    torch.testing.assert_close(some, whole[:, :, [0, 5]][..., [0, 5]])


def test_softmax_attention_by_torch():
    torch.manual_seed(0)
    layer = CausalAttention(6, 4, num_heads=2, lin_att=False).double()
    x = draw(2, 7, 6)
    q, k = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in layer.Wqk(x).chunk(2, dim=-1))
    v = layer.Wv(x).unflatten(-1, (2, 3)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(expected))
    scores = (q @ k.transpose(-1, -2) / 2**0.5).exp().tril().sum(-1)
    torch.testing.assert_close(layer.eigenvalues(x), scores[..., :-1] / scores[..., 1:])
    with torch.no_grad():
        layer.Wqk.bias.fill_(40)  # the sums of exponentials overflow; their ratio does not
    q, k, _ = layer.parts(x)
    assert torch.isinf(torch.einsum("blhn,bmhn->bhlm", q, k).exp()).any()
    assert torch.isfinite(layer.eigenvalues(x)).all()
    with pytest.raises(ValueError, match="no exact finite form"):
        core(layer, x[0])


@pytest.mark.parametrize("kind", [CausalAttention, NormalisedAttention])
def test_dropout_falls_on_the_weights(kind):
    torch.manual_seed(0)
    layer = kind(6, 4, num_heads=2, dropout=1e-9).double()
    x = draw(2, 7, 6)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))  # the way by weights, and the scan
    layer.dropout.p = 0.5
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


def test_normalised_attention_by_hand():
    torch.manual_seed(0)
    layer = NormalisedAttention(6, 4).double()
    x = draw(1, 5, 6)
    q, k = layer.Wqk(x)[0].chunk(2, dim=-1)
    weights = (q @ k.T).tril() / layer.Wn(x)[0].exp()
    torch.testing.assert_close(layer(x)[0], layer.out_proj(weights @ layer.Wv(x)[0]))
    follow = NormAttention(6, 4, norm_fn="elu", offset=True).double()
    with torch.no_grad():
        follow.offset.fill_(0.3)
    v, q, k, n = follow.Wvqkn(x)[0].split([6, 4, 4, 1], dim=-1)
    weights = (q @ k.T).tril() * torch.exp(-F.elu(n + 0.3))
    torch.testing.assert_close(follow(x)[0], follow.out_proj(weights @ v))
    full = NormAttention(6, 4, dim_conv=3, scale_B=True).double()
    vqk = full.Wvqkn(x)[..., :14].transpose(1, 2)
    mixed = F.silu(full.conv1d(F.pad(vqk, (2, 0)))).transpose(1, 2)[0]
    v, q, k = mixed.split([6, 4, 4], dim=-1)
    weights = (q @ k.T / 2).tril() * torch.exp(-torch.exp(full.Wvqkn(x)[0, :, 14:]))
    torch.testing.assert_close(full(x)[0], full.out_proj(weights @ v))


def test_gated_attention_by_hand():
    torch.manual_seed(0)
    layer = GatedAttention(6, 4, num_heads=2).double()
    x = draw(2, 7, 6)
    u, z = layer.in_proj(x).chunk(2, dim=-1)
    u = F.silu(layer.conv1d(F.pad(u.transpose(1, 2), (3, 0)))).transpose(1, 2)
    inner = CausalAttention(6, 4, num_heads=2, bias=False).double()
    inner.load_state_dict({k: v for k, v in layer.state_dict().items() if k in inner.state_dict()})
    torch.testing.assert_close(layer(x), layer.out_proj(inner.mix(u) * F.silu(z)))


def test_the_ssm_decay_is_a_reversed_sigmoid():
    gate, rate = draw(20), 1.7
    torch.testing.assert_close(torch.exp(-rate * F.softplus(gate)), formulas.reversed_sigmoid(gate, rate))
    torch.testing.assert_close(formulas.reversed_sigmoid(gate, rate), torch.sigmoid(-gate) ** rate)


def test_ssd_is_attention_with_a_recursive_normaliser():
    delta, b, c, u = F.softplus(draw(8)), draw(8, 4, seed=1), draw(8, 4, seed=2), draw(8, 3, seed=3)
    rate = torch.tensor(0.6, dtype=torch.float64)
    form = formulas.ssd(delta, rate, b, c, torch.zeros((), dtype=torch.float64), 3)
    eta = formulas.ssd_eta(delta, rate)
    keys = b * (delta * eta)[:, None]
    same = formulas.separable_attention(c, keys, torch.eye(3, dtype=torch.float64), eta)
    torch.testing.assert_close(same.outputs(u), form.outputs(u))
    assert distance(form.mixing(), same.mixing()) < 1e-12


def test_more_features_come_nearer_to_softmax():
    q, k, W = 0.4 * draw(8, 4), 0.4 * draw(8, 4, seed=1), torch.eye(2, dtype=torch.float64)
    softmax = formulas.softmax_weights(q, k)[:, :, None, None] * W
    taylor, linear = (f(q, k, W).mixing() for f in (formulas.taylor_attention, formulas.linear_attention))
    assert distance(softmax, taylor) < 0.1 * distance(softmax, linear)
    eta = torch.ones(8, dtype=torch.float64)
    assert int(slice_ranks(formulas.normalised_attention(q, k, W, eta).mixing())[0, 1]) == 0
    assert int(slice_ranks(softmax)[0, 0]) == 8


def test_spectra_by_hand():
    values = torch.tensor([0.1, 0.5, -0.5, 0.95, 1.2])
    shares = modulus_shares(values, [0.5, 0.9, 1.0])
    assert shares == pytest.approx([60, 40, 20, 20])  # 0.5 lies in two bins
    assert phase(torch.tensor([1j, -1.0, 2.0])).tolist() == [90, 180, 0]
    assert horizon(torch.tensor([[0.5, 0.9, 1.0]] * 12)).tolist() == [2, 10, 12]
    assert horizon(torch.full((12,), 0.5), share=0.3).item() == 2
    rows = torch.zeros(4, 4, 1, 1)
    rows[:, :, 0, 0] = torch.outer(torch.ones(4), torch.arange(1.0, 5))
    assert slice_ranks(rows).tolist() == [[1]]
    assert distance(rows, rows) == 0
    assert distance(rows, 2 * rows) == pytest.approx(1)


def test_a_form_by_hand():
    A = torch.tensor([[9.0], [0.5], [0.25]])
    form = Form(A, torch.ones(3, 1, 1), torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 10.0))
    assert form.outputs(torch.tensor([[1.0], [0.0], [4.0]]))[:, 0].tolist() == [12.0, 1.0, 48.25]
    assert form.mixing()[2, :, 0, 0].tolist() == [0.25, 0.5, 12.0]
    assert form.lag_profile()[2] == pytest.approx(0.25)
    assert math.isclose(float(form.lag_profile()[1]), (1 + 0.5) / 2)


def test_what_is_refused():
    with pytest.raises(ValueError, match="no form is known for a Linear"):
        core(torch.nn.Linear(3, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no eigenvalues are known"):
        decay(torch.nn.Linear(3, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one sequence"):
        core(Mamba(6), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="mixes its channels"):
        core(LRU(6, 5), torch.zeros(4, 6), channels=[0])
    with pytest.raises(ValueError, match="not all among"):
        core(Mamba(6), torch.zeros(4, 6), channels=[12])
    with pytest.raises(ValueError, match="increasing order"):
        modulus_shares(torch.ones(3), [0.9, 0.5])
    with pytest.raises(ValueError, match="norm_fn is 'tanh'"):
        NormAttention(6, 4, norm_fn="tanh")
    with pytest.raises(ValueError, match="belong to no layer"):
        layer_of("x", {}, {"weight"})


def test_the_study_s_arguments_and_keys():
    """Defaults of the originals' constructors, arguments that they read nowhere, and where the offset's key lies."""
    layer = NormAttention(8, num_heads=2, offset=True, approx_fn="none")
    assert layer.sizes == [8, 8, 8, 2]
    with torch.no_grad():
        layer.offset += torch.randn(2)
    own = layer.state_dict()
    theirs = {f"na.{k.replace('offset', 'inner_attn.offset')}": v for k, v in own.items()}
    qlstm = QLSTM(8, 1.5, reversed=False)
    theirs |= {f"ql.{k}": v for k, v in qlstm.state_dict().items()}
    config = {
        "na": {"d_model": 8, "num_heads": 2, "offset": True, "offset_init": "exp", "mode": "attention"},
        "ql": {"d_model": 8, "d_qk": 5, "expansion_factor": 1.5, "reversed": False},
    }
    adapter = zoo.reference("dsf")
    built = adapter.build(config, theirs)
    x = torch.randn(1, 5, 8)
    found = adapter.run(built, {"na.x": x, "ql.x": x})
    torch.testing.assert_close(found["na.y"], layer(x))
    torch.testing.assert_close(found["ql.y"], qlstm(x))
    assert set(adapter.to_reference(built.state_dict(), model=built)) == set(theirs)
