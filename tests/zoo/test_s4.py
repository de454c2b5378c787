"""The S4 family: parity with the originals, convolution and recurrence in float64, and the contract of its models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo
import zoo.testing
from zoo.layers import hippo, ssm_kernel
from zoo.layers.conv_kernels import EMAKernel
from zoo.layers.fft_conv import FFTConv, S4Block
from zoo.layers.lru import LRU
from zoo.layers.s4 import STEP_MODES, S4Kernel
from zoo.layers.s4d import S4D, S4DKernel
from zoo.layers.s4nd import S4ND
from zoo.layers.s5 import S5, S5Layer
from zoo.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from zoo.models.s4 import S4SequenceClassifier, SequenceDecoder, SequenceModel
from zoo.models.s5 import S5Classifier
from zoo.reference import read_golden
from zoo.systems.s4 import S4Adapter
from zoo_kernels import long_conv

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "golden").glob("s4__*.safetensors*"))
double = pytest.mark.usefixtures("double_precision")


@pytest.fixture
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- parity with the originals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=bool(read_golden(path).grads))


def test_there_are_golden_files():
    assert len(GOLDEN) == 10


def test_scan_orders_of_the_survey():
    zoo.testing.check_golden(ROOT / "golden" / "survey_visual__scan_orders_8x8_4x4x4.safetensors")
    adapter = zoo.reference("survey_visual")
    orders = adapter.build({"H": 6, "W": 5, "T_H_W": [2, 3, 5], "window": 4}, {})
    found = adapter.run(orders, {})
    assert found["local_w4"].shape == (64,)  # of the padded 8 x 8 grid
    assert found["efficient_step2_4"].shape == (4, 9)
    assert "3d_hilbert" not in found
    with pytest.raises(ValueError, match="no argument 'depth'"):
        adapter.build({"H": 6, "W": 5, "depth": 3}, {})


def test_a_fresh_kernel_transforms_its_c_as_the_original_does():
    golden = read_golden(ROOT / "golden" / "s4__dplr_legs.safetensors")
    prefix = "state_before_first_forward/"
    before = {k.removeprefix(prefix): v for k, v in golden.mids.items() if k.startswith(prefix)}
    model = S4Adapter().build(golden.config, {**golden.state, **before}, source=golden.source)
    x = golden.inputs["x"].transpose(1, 2)
    with torch.no_grad():
        assert torch.allclose(model(x).transpose(1, 2), golden.outputs["y"], atol=1e-5)
        assert int(model.layer.kernel.l_kernel) == 0  # evaluation writes nothing
        assert torch.allclose(model.train()(x).transpose(1, 2), golden.outputs["y"], atol=1e-5)
    assert int(model.layer.kernel.l_kernel) == int(golden.state["layer.kernel.l_kernel"])
    assert torch.allclose(model.layer.kernel.C, golden.state["layer.kernel.C"], atol=1e-5)


@pytest.mark.parametrize("path", [p for p in GOLDEN if "hippo" not in p.stem], ids=lambda p: p.name.split(".")[0])
def test_state_dicts_return_to_the_original(path):
    golden, adapter = read_golden(path), S4Adapter()
    model = adapter.build(golden.config, golden.state, source=golden.source)
    again = adapter.to_reference(model.state_dict(), model=model)
    assert again.keys() == golden.state.keys()
    assert all(torch.equal(again[k], v) for k, v in golden.state.items())
    broken = dict(golden.state)
    broken.pop(next(k for k in broken if not k.endswith("l_kernel")))
    with pytest.raises((zoo.errors.KeysDoNotMatch, ValueError, KeyError)):
        adapter.build(golden.config, broken, source=golden.source)


def test_kernels_lengths_may_be_left_out():
    # The full-size cards leave them out: C is then that of a kernel that never ran in training.
    golden = read_golden(ROOT / "golden" / "s4__dplr_legs.safetensors")
    fresh = {k: torch.zeros_like(v) if k.endswith("l_kernel") else v for k, v in golden.state.items()}
    parameters = {k: v for k, v in golden.state.items() if not k.endswith("l_kernel")}
    whole, short = (S4Adapter().build(golden.config, state, source=golden.source) for state in (fresh, parameters))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, short.state_dict()[key]), key


def test_version_3_checkpoints():
    golden = read_golden(ROOT / "golden" / "s4__sequence_model_ff_pool.safetensors")
    old = {}
    for key, value in golden.state.items():
        if ".layer.layer.kernel." in key:
            head, name = key.split(".layer.layer.kernel.")
            renamed = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag", "l_kernel": "L"}.get(name, name)
            value = value[:, 0] if name == "inv_dt" else -value if name == "A_imag" else value
            old[f"{head}.layer.kernel.kernel.{renamed}"] = value
        elif key.endswith(".layer.layer.D"):
            old[key.replace(".layer.layer.D", ".layer.D")] = value
        else:
            old[key] = value
    model = S4Adapter().build(golden.config, old, source=golden.source)
    with torch.no_grad():
        assert torch.allclose(model(golden.inputs["x"]), golden.outputs["y"], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gate": 4}, "gate=4"),
        ({"bottleneck": 4}, "bottleneck=4"),
        ({"mode": "dense", "disc": "zoh"}, "no argument 'disc'"),
        ({"depth": 3}, "no argument 'depth'"),
        ({"init": "legz"}, "legz"),
        ({"n_ssm": 4}, "divide d_model 6"),
        ({"final_act": "gellu"}, "gellu"),
        ({"dt_transform": "cube"}, "cube"),
    ],
)
def test_arguments_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        S4Adapter().build({"d_model": 6, **config}, {}, source="state-spaces/s4 models/s4/s4.py:S4Block")


# -- convolution and recurrence ---------------------------------------------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "legs": {"mode": "s4", "l_max": 20},
    "legt": {"mode": "dplr", "init": "legt", "rank": 2, "l_max": 21},
    "fout": {"mode": "nplr", "init": "fout", "n_ssm": 2},
    "hippo": {"mode": "dplr", "init": "hippo", "rank": 3},
    "random dplr": {"mode": "dplr", "init": "dplr-lin"},
    "dt per state": {"mode": "dplr", "dt_tie": False, "dt_transform": "softplus"},
    "lin": {"mode": "s4d", "init": "diag-lin"},
    "inv bilinear": {"mode": "diag", "init": "diag-inv", "disc": "bilinear", "n_ssm": 2, "channels": 3},
    "legs diagonal": {"mode": "diag", "init": "diag-legs", "bandlimit": 0.5, "dt_fast": True},
    "real": {"mode": "diag", "init": "diag-real", "is_real": True},
    "glu": {"mode": "diag", "init": "diag-quad", "act": "glu", "real_transform": "softplus"},
    "all": {"mode": "diag", "init": "diag", "n_ssm": 6, "imag_transform": "relu", "final_act": None},
}


@double
@pytest.mark.parametrize("name", LAYERS)
def test_convolution_recurrence_and_pieces_agree(name):
    layer = S4Block(6, d_state=8, **LAYERS[name]).eval()
    kernel, x = layer.layer.kernel, torch.randn(2, 20, 6)
    with torch.no_grad():
        whole = layer(x)
        for mode in STEP_MODES if isinstance(kernel, S4Kernel) else [""]:
            if mode:
                kernel.setup_step(mode)
            state = layer.init_state(2)
            steps = torch.stack([layer.step(x[:, t], state) for t in range(20)], 1)
            assert torch.allclose(steps, whole, rtol=1e-10, atol=1e-10), mode
        if isinstance(kernel, S4Kernel):
            kernel.setup_step("linear")
        ends = layer.init_state(2)
        pieces = [layer(x[:, :7], state=ends), layer(x[:, 7:8], state=ends), layer(x[:, 8:], state=ends)]
        assert torch.allclose(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
        state = layer.init_state(2)
        for t in range(20):
            layer.step(x[:, t], state)
        assert torch.allclose(ends["ssm"], state["ssm"], rtol=1e-10, atol=1e-10)


@double
def test_the_s4_kernel_is_c_a_to_the_l_b():
    kernel = S4Kernel(3, channels=2, d_state=8, init="legs")
    C = torch.view_as_complex(kernel.C.detach().clone())
    with torch.no_grad():
        K, _ = kernel(33)
        dA, dB = kernel.dense()
    row = 2 * torch.cat([C.real, -C.imag], -1)
    state, expected = dB, []
    for _ in range(33):
        expected.append(torch.einsum("chn,hn->ch", row, state))
        state = torch.einsum("hmn,hn->hm", dA, state)
    assert torch.allclose(K, torch.stack(expected, -1), rtol=1e-9, atol=1e-12)
    assert int(kernel.l_kernel) == 33
    with torch.no_grad():
        aside, _ = kernel.eval()(100)
        longer, _ = kernel.train()(100)  # doubles twice
    assert torch.allclose(aside, longer, rtol=1e-8, atol=1e-12)
    assert int(kernel.l_kernel) == 132
    assert torch.allclose(longer[..., :33], K, rtol=1e-8, atol=1e-12)


def test_late_steps_of_a_long_kernel_are_exact():
    torch.manual_seed(0)
    kernel = S4DKernel(2, d_state=16, init="diag-lin", dt_min=0.05, dt_max=0.1)
    with torch.no_grad():
        kernel.A_real.fill_(-9.0)  # decays slowly, so that late steps are not small
        K = kernel(65_537)[0]
        exact = kernel.double()(65_537)[0]
    assert float((K - exact).abs().max() / exact.abs().max()) < 1e-5


@double
def test_gradients_of_both_kernels():
    torch.manual_seed(1)
    for make in (lambda: S4Kernel(2, d_state=4, l_max=6), lambda: S4DKernel(2, d_state=4, init="diag-inv")):
        kernel = make()
        kernel(6)
        names = [n for n, _ in kernel.named_parameters()]

        def run(*values, kernel=kernel, names=names):
            return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (6,))[0]

        assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_() for p in kernel.parameters()))


@double
def test_s5_lru_and_minimal_s4d_step():
    x = torch.randn(2, 17, 6)
    layers = [
        S5(6, 16, 2), S5(6, 8, conj_sym=False, discretization="bilinear", C_init="complex_normal"), LRU(6, 5),
        S5Layer(6, 8, activation="half_glu2", inner_norm=True, clip_eigs=True), S4D(6, 8).eval(),
    ]  # fmt: skip
    for layer in layers:
        with torch.no_grad():
            whole, state, ends = layer(x), layer.init_state(2), layer.init_state(2)
            steps = torch.stack([layer.step(x[:, t], state) for t in range(17)], 1)
            pieces = torch.cat([layer(x[:, :5], state=ends), layer(x[:, 5:], state=ends)], 1)
        assert torch.allclose(steps, whole, atol=1e-12)
        assert torch.allclose(pieces, whole, atol=1e-12)


@double
def test_s5_resets_and_both_directions():
    layer, x = S5(4, 8), torch.randn(2, 9, 4)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 4] = True
    cut = layer(x, resets=resets)
    assert torch.allclose(cut[:, 4:], layer(x[:, 4:]))
    state = layer.init_state(2)
    with torch.no_grad():
        steps = [layer.step(x[:, t], state, reset=resets[:, t]) for t in range(9)]
    assert torch.allclose(torch.stack(steps, 1), cut)
    both = S5(4, 8, bidirectional=True)
    turned = copy.deepcopy(both)
    with torch.no_grad():
        turned.C.copy_(torch.cat([both.C[:, 4:], both.C[:, :4]], 1))
    assert torch.allclose(both(x).flip(1), turned(x.flip(1)))
    with pytest.raises(ValueError, match="cannot step"):
        both.step(x[:, 0], state)


@double
def test_s4nd_of_one_axis_is_a_bidirectional_convolution():
    nd = S4ND(4, 8, dim=1, mode="diag", init="diag-lin")
    conv = FFTConv(4, mode="diag", init="diag-lin", d_state=8, bidirectional=True)
    conv.load_state_dict({"D": nd.D, **{f"kernel.{k}": v for k, v in nd.kernel[0].state_dict().items()}})
    x = torch.randn(2, 11, 4)
    assert torch.allclose(nd(x), conv(x))
    video = S4ND(2, 4, dim=3, mode="diag", init="diag-lin", trank=2, channels=2, linear=False, final_act="glu")
    assert video(torch.randn(1, 3, 4, 5, 2)).shape == (1, 3, 4, 5, 2)
    with pytest.raises(ValueError, match="3 sizes"):
        video(torch.randn(1, 4, 5, 2))


@double
def test_ema_kernel_is_a_moving_average():
    kernel = EMAKernel(3, channels=2, d_state=2)
    K, _ = kernel(9)
    p = torch.sigmoid(kernel.delta)[..., 0]
    q = 1 - p * torch.sigmoid(kernel.alpha)[..., 0]
    weight = p * kernel.beta[..., 0] * kernel.gamma / math.sqrt(2)
    expected = torch.stack([(weight * q**t).sum(1) for t in range(9)], -1).reshape(2, 3, 9)
    assert torch.allclose(K, expected)


def test_what_cannot_step_says_so():
    for layer in (
        S4Block(4, mode="conv", l_max=8),
        S4Block(4, mode="ema"),
        S4Block(4, mode="diag", init="diag-lin", bidirectional=True),
    ):
        with pytest.raises(ValueError, match=r"cannot step|no state"):
            layer.init_state(1)
    dss = S4Block(4, mode="diag", init="diag-legs", disc="dss", real_transform="none")
    with pytest.raises(ValueError, match="softmax"), torch.no_grad():
        dss.step(torch.zeros(1, 4), dss.init_state(1))


def test_kernels_are_remembered_in_eval_mode_until_a_parameter_changes():
    layer = S4Block(4, mode="s4", d_state=8).eval()
    x = torch.randn(1, 12, 4)
    with torch.no_grad():
        first = layer(x)
        kept = list(layer.layer.kernel._kept.values())[-1]
        assert torch.equal(layer(x), first)
        assert list(layer.layer.kernel._kept.values())[-1] is kept
        layer.layer.kernel.inv_dt.add_(0.5)
        assert not torch.allclose(layer(x), first)
        half = copy.deepcopy(layer).to(torch.float64)
        assert half(x.double()).dtype == torch.float64
    assert layer(x).requires_grad


@pytest.mark.parametrize("name", ["legs", "legt", "inv bilinear", "real"])
def test_pieces_build_their_kernels_once(name, monkeypatch):
    torch.manual_seed(0)
    options = {"l_max": 32} | {k: v for k, v in LAYERS[name].items() if k != "l_max"}
    layer = S4Block(6, d_state=8, **options).train()
    x = torch.randn(2, 32, 6)
    with torch.no_grad():
        layer(x)
        layer.eval()
        whole, kernel, state = layer(x), layer.layer.kernel, layer.init_state(2)
        pieces = [layer(x[:, :8], state=state)]

        def again(*args, **kwargs):
            raise AssertionError("made again")

        # S4 needs the system once more for what a state adds; everything of the kernel's own is remembered
        for part in ("dense", "discrete", "_times_powers", "_ahead"):
            if hasattr(kernel, part):
                monkeypatch.setattr(kernel, part, again)
        monkeypatch.setattr(kernel, "forward", again)
        pieces += [layer(x[:, i : i + 8], state=state) for i in (8, 16, 24)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("mode", ["dplr", "diag", "dense"])
def test_what_is_written_through_data_is_seen(mode, at_once, monkeypatch):
    """``at_once``: by all parameters' bytes in one tensor, as on a GPU."""
    if at_once:
        monkeypatch.setattr(ssm_kernel, "_on_cpu", lambda tensors: False)
    torch.manual_seed(0)
    layer = S4Block(4, mode=mode, d_state=8, init="diag-lin" if mode == "diag" else "legs").eval()
    x = torch.randn(1, 12, 4)
    with torch.no_grad():
        before = layer(x)
        layer.step(x[:, 0], layer.init_state(1))
        layer.layer.kernel.C.data.mul_(3.0)  # neither its place nor its version says so
        after = layer(x)
        assert not torch.allclose(after, before, atol=1e-3)
        assert torch.equal(copy.deepcopy(layer)(x), after)
        layer.layer.kernel.C.data.mul_(2.0)
        state = layer.init_state(1)
        steps = torch.stack([layer.step(x[:, t], state) for t in range(12)], 1)
        assert torch.allclose(steps, copy.deepcopy(layer)(x), atol=1e-4)


@double
@pytest.mark.parametrize("name", ["legs", "lin", "inv bilinear"])
def test_pieces_at_another_rate(name):
    options = {k: v for k, v in LAYERS[name].items() if k != "l_max"}
    layer, x = S4Block(6, d_state=8, **options).eval(), torch.randn(2, 20, 6)
    with torch.no_grad():
        whole, state = layer(x, rate=2.0), layer.init_state(2)
        pieces = [layer(x[:, a:b], state=state, rate=2.0) for a, b in ((0, 7), (7, 20))]
    # what makes S4's generating function exact is a power at rate 1, which at other rates nearly fits
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-3 if name == "legs" else 1e-9)


def test_a_piece_longer_than_the_kernel_is_refused():
    layer = S4Block(4, mode="diag", init="diag-lin", l_max=8).eval()
    with pytest.raises(ValueError, match=r"9 positions.*at most 8"):
        layer(torch.randn(1, 9, 4), state=layer.init_state(1))


@pytest.mark.parametrize("mode", ["dplr", "diag", "dense", "ema"])
@pytest.mark.filterwarnings("error")
def test_shapes_alone_are_never_remembered(mode):
    init: dict[str, Any] = {"init": "diag-lin"} if mode == "diag" else {}
    layer = S4Block(4, mode=mode, **init).eval()
    x = torch.randn(2, 12, 4)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x)).shape == x.shape
        assert not layer.layer.kernel._kept
        expected = layer(x)  # remembered numbers meet shapes, and the other way round
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x)).shape == x.shape
        assert torch.equal(layer(x), expected)
        if mode == "dplr":  # the others draw numbers when they are made
            with FakeTensorMode():
                made = S4Block(4, mode=mode).eval()
                assert made(torch.randn(2, 12, 4)).shape == x.shape
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == x.shape


# -- parts of the models -----------------------------------------------------------------------------------------------


def test_hippo_is_normal_up_to_its_low_rank_part():
    for measure, rank in (("legs", 1), ("legt", 2), ("fout", 1)):
        A, B = hippo.transition(measure, 12)
        W, _, Bc, V = hippo.nplr(measure, 12, rank, B_clip=None)
        normal = 2 * (V * W @ V.conj().T).real
        low = hippo.rank_correction(measure, 12, rank)
        assert abs(normal - low.T @ low - A).max() < 1e-9, measure
        assert abs(2 * (V @ Bc).real - B[:, 0]).max() < 1e-9, measure
    with pytest.raises(ValueError, match="even"):
        hippo.nplr("legs", 7)
    with pytest.raises(ValueError, match="rank 2"):
        hippo.rank_correction("legt", 8, 1)
    with pytest.raises(ValueError, match="do not divide"):
        hippo.combination("hippo", 8, 1, 3)


@pytest.mark.parametrize("mode", ["last", "first", "pool", "sum"])
@pytest.mark.parametrize("l_output", [None, 0, 3])
def test_decoder_modes(mode, l_output):
    torch.manual_seed(0)
    x, decoder = torch.randn(2, 7, 4), SequenceDecoder(4, None, l_output, mode)
    count = {None: 7, 0: 1}.get(l_output, l_output)
    each = {"last": x, "first": x, "sum": x.cumsum(1), "pool": x.cumsum(1) / torch.arange(1, 8)[:, None]}[mode]
    expected = each[:, :count] if mode == "first" else each[:, 7 - count :]
    found = decoder(x)
    assert torch.allclose(found, expected[:, 0] if l_output == 0 else expected, atol=1e-6)
    if l_output == 0 and mode != "first":
        short = decoder(x, torch.tensor([4, 7]))
        assert torch.allclose(short[0], decoder(x[:1, :4])[0], atol=1e-6)


def test_adaptive_softmax_is_a_distribution():
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(30, 16, [8, 15], div_val=2)
    for ties in (None, [False, True]):
        softmax = AdaptiveSoftmax(embedding, tie_projs=ties, tie_weights=ties is None)
        nn.init.normal_(softmax.cluster_weight)
        h, targets = torch.randn(3, 5, 16), torch.randint(0, 30, (3, 5))
        every = softmax.log_probabilities(h)
        assert torch.allclose(every.exp().sum(-1), torch.ones(3, 5), atol=1e-5)
        assert torch.allclose(softmax(h, targets), -every.gather(-1, targets[..., None])[..., 0], atol=1e-5)
    assert embedding(torch.tensor([0, 9, 29])).shape == (3, 16)
    with pytest.raises(ValueError, match="must rise"):
        AdaptiveEmbedding(30, 16, [15, 8])


def test_retrieval_heads():
    tokens = torch.randint(0, 9, (4, 12))
    for model in (
        S4SequenceClassifier(
            9, 2, 8, 1, vocab=True, retrieval=True, layer={"mode": "s4d", "init": "diag-lin", "d_state": 4}
        ),
        S5Classifier(9, 2, 8, 8, 1, vocab=True, retrieval=True),
    ):
        assert model(tokens).shape == (2, 2)


def test_a_block_with_two_layers_sees_the_same_input():
    model = SequenceModel(4, 1, {"mode": "s4d", "init": "diag-lin", "d_state": 4}, bidirectional=True).eval()
    block, x = model.layers[0], torch.randn(1, 6, 4)
    with torch.no_grad():
        h = block.norm(x)
        both = torch.cat([block.layer(h), block.reverse_layer(h)], -1)
        assert torch.allclose(block(x), x + block.bidirectional_linear(both))
    with pytest.raises(ValueError, match="cannot step"):
        model.init_state(1)


@double
def test_a_band_limit_is_the_same_however_long_the_kernel_is_made():
    fresh = S4Kernel(3, d_state=8, l_max=12, bandlimit=0.01)
    kept = copy.deepcopy(fresh).train()
    with torch.no_grad():
        kept(12)
        assert int(kept.l_kernel) == 12
        assert torch.allclose(fresh.eval()(12)[0], kept.eval()(12)[0], atol=1e-12)
        dt, A, _, C = kept.system()
        assert torch.equal(C == 0, (dt * A.imag.abs() / (2 * math.pi) >= 0.005).expand(C.shape))
        assert 0 < int((C == 0).sum()) < C.numel()
        # steps follow the convolution unless the original's are asked for
        x = torch.randn(1, 12, 3)
        y = long_conv(x, kept(12)[0][0])[0]
        for limited in (True, False):
            kept.setup_step("dense", limited=limited)
            state = kept.init_state(1)
            steps = torch.stack([kept.step(x[:, t], state)[:, 0] for t in range(12)], 1)
            assert torch.allclose(steps, y, atol=1e-10) == limited


@pytest.mark.parametrize("name", zoo.testing.model_names(plugin="core"))
class TestModels(zoo.testing.ModelTests):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        {"mode": "dplr", "init": "legs"}, {"mode": "s4d", "init": "diag-lin"}, {"mode": "s4d", "init": "diag-inv"},
        {"mode": "s4d", "init": "diag-real"}, {"mode": "s4d", "init": "diag-legs"},
        {"mode": "s4d", "init": "diag-legs", "disc": "dss", "real_transform": "none", "B_init": "random"},
    ],
    ids=["s4", "s4d lin", "s4d inv", "s4d real", "s4d legs", "dss"],
)  # fmt: skip
def test_the_classifier_by_name(layer):
    model = zoo.create(
        "s4_sequence_classifier", d_input=2, num_classes=5, d_model=8, n_layers=2, layer={**layer, "d_state": 8}
    )
    x = torch.randn(3, 19, 2)
    logits = model(x, torch.tensor([19, 7, 12]))
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x, torch.tensor([19, 7, 12]))[1], model(x[1:2, :7])[0], atol=1e-5) or (
            layer.get("disc") == "dss"  # its kernel depends on the length
        )
