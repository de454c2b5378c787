"""``zoo.layers.Linear``: torch's numbers from whichever library is faster, and torch itself where it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo_kernels
from zoo.layers import linear as module
from zoo.layers import sizes
from zoo.layers.linear import ACTIVATIONS, Linear, call, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(sizes, "_kept", set())  # other tests' sizes do not count here


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


@needs_onednn
@pytest.mark.parametrize("extra", [{}, {"act": "silu"}, {"act": "gelu_tanh"}, {"add": True}])
def test_many_sizes_do_not_need_a_kernel_each(extra, monkeypatch) -> None:
    """Texts of every length, read by one layer: from some size on, products come in pieces of few sizes."""
    monkeypatch.setattr(sizes, "KEPT", 5)
    monkeypatch.setattr(sizes, "_kept", set())
    asked: set[int] = set()
    at_once = module._at_once
    monkeypatch.setattr(module, "_at_once", lambda x, *a: asked.add(x.shape[:-1].numel()) or at_once(x, *a))
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 256), torch.randn(300)
    with torch.no_grad():
        for rows in range(60, 400, 7):
            x = torch.randn(2, rows // 2, 256)
            more = extra | ({"add": torch.randn(2, rows // 2, 300)} if "add" in extra else {})
            want = F.linear(x, weight, bias)
            want = want + more["add"] if "add" in more else ACTIVATIONS[more["act"]][2](want) if more else want
            torch.testing.assert_close(linear(x, weight, bias, **more), want, rtol=1e-4, atol=1e-4)
    assert len(asked) <= 5 + 9, sorted(asked)
    assert asked - {32, 64, 128, 256} == {60, 66, 74, 80, 88}, "the first sizes in one call each"


def test_pieces_cover_every_row_once() -> None:
    for rows in (1, 31, 32, 33, 1000, 4096):
        found = list(sizes.pieces(rows, at_least=32))
        assert [i for part, _ in found for i in range(rows)[part]] == list(range(rows))
        assert all((part.stop - part.start).bit_count() == 1 for part, even in found if even)
        assert sum(part.stop - part.start for part, even in found if not even) < 32


@needs_onednn
def test_training_with_many_sizes_takes_torchs_products(monkeypatch) -> None:
    monkeypatch.setattr(sizes, "KEPT", 1)
    monkeypatch.setattr(sizes, "_kept", set())
    layer, taken = Linear(256, 300), []
    product = module.linear_training.product
    monkeypatch.setattr(module.linear_training, "product", lambda *a: taken.append(len(a[0])) or product(*a))
    for rows in (100, 120, 100):
        layer(torch.randn(rows, 256)).sum().backward()
    assert taken == [100, 100]
