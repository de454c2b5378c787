"""``zoo.layers.Linear``: torch's numbers from whichever library is faster, and torch itself where it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.layers import linear as module
from zoo.layers.linear import Linear, linear

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
    """For each call whether oneDNN served."""
    seen: list[bool] = []
    plain = module._plain
    monkeypatch.setattr(module, "_plain", lambda *a: seen.append(plain(*a)) or seen[-1])
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(8, 256), (3, 50, 256), (2, 3, 7, 256), (0, 9, 256)])
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
    assert taken == [x.numel() > 0] * 3


@needs_onednn
def test_torch_serves_where_more_is_wanted(taken) -> None:
    layer = Linear(256, 300)
    x = torch.randn(16, 256)
    y = layer(x)  # gradients
    y.sum().backward()
    assert layer.weight.grad is not None
    layer(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        batched = torch.vmap(lambda v: linear(v, layer.weight, layer.bias))(torch.randn(3, 16, 256))
        assert batched.shape == (3, 16, 300)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 16 * 256 * 300
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        layer.float()(x[:2])  # few rows
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), F.linear(x, layer.weight, layer.bias))
    assert not any(taken)
