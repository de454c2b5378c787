"""The products of training by oneDNN against torch's own: values, gradients, and everything that they must step aside
for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import zoo_kernels
from zoo.layers import linear as linear_module
from zoo.layers import linear_training as module
from zoo.layers import sizes
from zoo.layers.linear import Linear, linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a processor where oneDNN is faster, for small products too."""
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "PRODUCTS", 1)
    monkeypatch.setattr(sizes, "_kept", set())  # other tests' sizes do not count here


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Which products oneDNN served."""
    seen: list[str] = []
    onednn = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *a: seen.append("oneDNN") or onednn(*a))
    return seen


def gradients(call, *inputs, weight=None):
    inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
    y = call(*inputs)
    torch.manual_seed(1)
    wanted = [x for x in inputs if x.requires_grad]
    return y.detach(), torch.autograd.grad((y * (torch.randn(y.shape) if weight is None else weight)).sum(), wanted)


@pytest.mark.parametrize("shape", [(40, 12), (5, 8, 12), (2, 3, 4, 12)], ids=str)
@pytest.mark.parametrize("out", [7, 30])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learns", [(True, True), (False, True), (True, False)], ids=str)
def test_values_and_gradients(shape, out, bias, learns, taken):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).requires_grad_(learns[0]), torch.randn(out, 12).requires_grad_(learns[1])
    given = (x, weight, torch.randn(out, requires_grad=True)) if bias else (x, weight)
    (y, found), (want_y, want) = gradients(linear, *given), gradients(F.linear, *given)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert len(taken) == 1 + sum(learns)


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded gradient"])
def test_inputs_and_gradients_of_any_layout(layout):
    torch.manual_seed(0)
    x = torch.randn(6, 9, 24)
    x = {"slice": x[..., 5:17], "transposed": x[..., :12].transpose(0, 1)}.get(layout, x[..., :12].contiguous())
    weight = torch.ones(()) if layout == "expanded gradient" else None
    given = (x.requires_grad_(), torch.randn(7, 12, requires_grad=True))
    found, want = (gradients(call, *given, weight=weight)[1] for call in (linear, F.linear))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_differences(taken):
    """Against finite differences, which float32 gives to about three digits."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)
    given = [t.requires_grad_() for t in (x, weight, bias)]
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(linear, given, eps=1e-2, atol=1e-2, rtol=1e-3, nondet_tol=0.0)
    assert taken


def test_second_derivatives():
    torch.manual_seed(0)
    given = [t.requires_grad_() for t in (torch.randn(6, 5), torch.randn(4, 5), torch.randn(4))]

    def second(call):
        y = call(*given).tanh().sum()
        first = torch.autograd.grad(y, given, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), given)

    for one, other in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_batch_of_gradients():
    torch.manual_seed(0)
    given = [t.requires_grad_() for t in (torch.randn(6, 5), torch.randn(4, 5), torch.randn(4))]
    several = torch.randn(3, 6, 4)
    found, want = (
        torch.autograd.grad(call(*given), given, several, is_grads_batched=True) for call in (linear, F.linear)
    )
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_checkpointing_and_accumulation(taken):
    torch.manual_seed(0)
    layer, x = Linear(12, 7), torch.randn(8, 12, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)
    assert len(taken) == 7


def test_a_changed_weight_is_noticed():
    layer, x = Linear(12, 7), torch.randn(8, 12, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_torch_serves_where_more_is_wanted(taken):
    torch.manual_seed(0)
    layer, x = Linear(12, 7), torch.randn(8, 12, requires_grad=True)
    weight, bias = layer.weight, layer.bias
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(
        torch.func.grad(lambda w: linear(x, w, bias).pow(2).sum())(weight),
        torch.autograd.grad(want.pow(2).sum(), weight)[0],
    )
    assert torch.func.vmap(lambda v: linear(v, weight, bias))(torch.randn(3, 8, 12)).shape == (3, 8, 7)
    _, tangent = torch.func.jvp(lambda v: linear(v, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent[0], weight.sum(1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(tangent[0], weight.sum(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 8 * 12 * 7
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), want)
    assert Linear(12, 7).double()(x.double()).dtype == torch.float64
    assert layer(x[0]).shape == (7,)
    with zoo_kernels.backend("reference"):
        layer(x)
    assert not taken


def test_parameters_may_be_computed(taken):
    """A weight under a parametrisation is a plain tensor with a history of its own."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(Linear(12, 7))
    layer(torch.randn(8, 12)).pow(2).sum().backward()
    assert layer.parametrizations.weight.original1.grad is not None
    assert taken
