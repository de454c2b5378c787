"""``zoo.layers.Linear``: torch's numbers from whichever library is faster, and torch itself where it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo_kernels
from zoo.layers import linear as module
from zoo.layers.linear import ACTIVATIONS, Linear, call, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """An entry for each call that oneDNN served."""
    seen: list[bool] = []
    fused = module._fused
    monkeypatch.setattr(module, "_fused", lambda *a: seen.append(True) or fused(*a))
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(40, 256), (3, 50, 256), (2, 3, 7, 256), (0, 9, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_are_torchs(shape, bias: bool, taken) -> None:
    torch.manual_seed(0)
    layer = Linear(256, 300, bias=bias)
    x = torch.randn(shape)
    half = torch.randn(*shape[:-1], 512)[..., :256]  # a slice of a projection
    with torch.no_grad():
        for value in (x, half, x.transpose(0, -2)):
            found, want = layer(value), F.linear(value, layer.weight, layer.bias)
            assert found.shape == want.shape
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert len(taken) == (3 if x.numel() else 0)


@needs_onednn
def test_torch_serves_where_more_is_wanted(taken) -> None:
    layer = Linear(256, 300)
    x = torch.randn(40, 256)
    y = layer(x)  # gradients
    y.sum().backward()
    assert layer.weight.grad is not None
    layer(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        batched = torch.vmap(lambda v: linear(v, layer.weight, layer.bias))(torch.randn(3, 40, 256))
        assert batched.shape == (3, 40, 300)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 40 * 256 * 300
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()(x[:2])  # few rows
        with zoo_kernels.backend("reference"):
            layer(x)
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), F.linear(x, layer.weight, layer.bias))
    assert not taken


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_and_residual_are_fused(act: str, dtype, taken) -> None:
    torch.manual_seed(0)
    layer = Linear(256, 300).to(dtype)
    x, add = torch.randn(2, 30, 256, dtype=dtype), torch.randn(2, 30, 600, dtype=dtype)[..., 300:]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        plain = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(linear(x, layer.weight, layer.bias, act=act), ACTIVATIONS[act][2](plain), **close)
        torch.testing.assert_close(linear(x, layer.weight, layer.bias, add=add), plain + add, **close)
        torch.testing.assert_close(call(layer, x, add=add), plain + add, **close)
    assert len(taken) == (3 if dtype == torch.float32 or module.onednn_has_bfloat16() else 0)


def test_wrong_requests_are_named() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"act is 'mish'; expected one of gelu, .* or None"):
        linear(x, weight, act="mish")
    with pytest.raises(ValueError, match="act and add are both given"):
        linear(x, weight, act="gelu", add=torch.zeros(2, 3))


class Doubled(nn.Linear):
    """What an adapter puts in a layer's place."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Softplus()])
def test_call_takes_any_module_and_lets_hooks_see_it(act: nn.Module) -> None:
    torch.manual_seed(0)
    layer, doubled, x = nn.Linear(256, 300), Doubled(256, 300), torch.randn(40, 256)
    seen: list[torch.Size] = []
    with torch.no_grad():
        torch.testing.assert_close(call(layer, x, act=act), act(layer(x)))
        torch.testing.assert_close(call(doubled, x, act=act), act(doubled(x)))
        for watched in (layer, act):
            handle = watched.register_forward_hook(lambda module, args, output: seen.append(output.shape))
            call(layer, x, act=act)
            handle.remove()
    assert seen == [(40, 300), (40, 300)]
    call(layer, x, act=act).sum().backward()
    assert layer.weight.grad is not None
