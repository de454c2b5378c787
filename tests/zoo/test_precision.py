"""Autocast rounds matrix products; it must not reach the recurrences, their states and the kernels that are kept."""

import pytest
import torch

from zoo.layers import LRU, S4D, S5, FFTConv
from zoo.layers.ssm_kernel import Kept

LAYERS = {
    "S4": lambda: FFTConv(6, l_max=16, mode="nplr"),
    "S4D": lambda: FFTConv(6, l_max=16, mode="diag"),
    "real S4D": lambda: FFTConv(6, l_max=16, mode="diag", is_real=True, init="diag-real"),
    "dropped kernels": lambda: FFTConv(6, l_max=16, mode="diag", drop_kernel=0.1),
    "ema": lambda: FFTConv(6, l_max=16, mode="ema"),
    "S5": lambda: S5(6, 8),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_is_not_rounded(layer, training):
    layer.train(training)
    x, found = torch.randn(2, 16, 6), []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.set_grad_enabled(training):
            found.append(layer(x))
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("make", [LAYERS["S4"], LAYERS["S4D"], LAYERS["real S4D"], LAYERS["S5"]])
def test_states_are_not_rounded(make):
    torch.manual_seed(0)
    layer, x, found = make().eval(), torch.randn(2, 8, 6), []
    with torch.no_grad():
        for enabled in (True, False):
            state = layer.init_state(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append([layer(x, state=state), layer(x, state=state), layer.step(x[:, 0], state), state["ssm"]])
    for name, rough, exact in zip(("first", "second", "step", "state"), *found, strict=True):
        assert torch.equal(rough, exact), name


@pytest.mark.parametrize("make", [lambda: S4D(6, 8), lambda: LRU(6, 8)])
def test_inputs_in_half_precision_are_taken(make):
    layer, x = make(), torch.randn(2, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


def test_what_is_kept_is_made_outside_autocast():
    class Squared(Kept):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4))

        def forward(self):
            return self.kept("square", lambda: self.weight @ self.weight)

    module = Squared().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module()
    with torch.no_grad():
        assert torch.equal(module(), module.weight @ module.weight)
