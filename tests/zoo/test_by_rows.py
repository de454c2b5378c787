"""Chains of layers by blocks of rows: the numbers of one call, and blocks in inference alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo_kernels
from zoo.layers import VSSBlock
from zoo.layers.inference import BLOCK, by_rows, results_only
from zoo.layers.vss import Mlp


class Counted(nn.Module):
    """A layer that knows how many rows each of its calls had."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(8, 5), []

    def forward(self, x, add=None):
        self.rows.append(x.shape[:-1].numel())
        return self.linear(x) if add is None else self.linear(x) + add


@pytest.mark.parametrize("shape", [(2 * BLOCK, 8), (3, BLOCK - 7, 8), (2, 40, 41, 8), (1, 2 * BLOCK, 3, 8)])
def test_blocks_give_the_numbers_of_one_call(shape) -> None:
    torch.manual_seed(0)
    layer, x, add = Counted(), torch.randn(shape), torch.randn(*shape[:-1], 5)
    with torch.inference_mode():
        want = layer.linear(x) + add
        torch.testing.assert_close(by_rows(layer, x, add), want)
        assert len(layer.rows) > 1
        assert max(layer.rows) == BLOCK
        assert sum(layer.rows) == x.numel() // 8
        slices = torch.stack([x, x], -1)[..., 0], add.transpose(0, -2).contiguous().transpose(0, -2)
        torch.testing.assert_close(by_rows(layer, *slices), want)
        for out in (torch.empty_like(add), torch.empty(*shape[:-1], 9)[..., :5], add):  # add: in place
            assert by_rows(layer, x, add, out=out) is out or out.is_contiguous()
            torch.testing.assert_close(out, want)
        torch.testing.assert_close(by_rows(layer, x, None), layer.linear(x))


def test_one_call_where_more_than_the_result_is_wanted() -> None:
    layer, x = Counted(), torch.randn(2 * BLOCK, 8)
    by_rows(layer, x).sum().backward()
    assert layer.linear.weight.grad is not None
    with torch.no_grad():
        by_rows(layer, x[: BLOCK + 1])  # few rows
        with zoo_kernels.backend("reference"):
            by_rows(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            by_rows(layer, x)
        torch.vmap(lambda v: by_rows(layer, v))(x[None])
        torch.compile(lambda v: by_rows(layer, v), backend="eager", fullgraph=True)(x)
        seen: list[int] = []
        handle = layer.linear.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        by_rows(layer, x, module=layer.eval())
        handle.remove()
    assert seen == [2 * BLOCK]
    assert BLOCK not in layer.rows


def test_forced_backends() -> None:
    with torch.no_grad():
        for name, expected in (("native", True), ("reference", False), ("export", False), ("auto", True)):
            with zoo_kernels.backend(name):
                assert results_only(torch.zeros(1)) is expected


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mlp(gated: bool, dtype) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(24, 96, gated=gated).to(dtype).eval(), torch.randn(2, 50, 60, 24, dtype=dtype)
    want = mlp(x)  # gradients: torch's own layers
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), want.detach(), **close)


@pytest.mark.parametrize("norm", ["ln", "bn", "none"])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("out_norm", ["norm", "none", "conv", "norm_conv", "softmax", "sigmoid"])
def test_vss_block(norm: str, post_norm: bool, gate: bool, out_norm: str) -> None:
    torch.manual_seed(0)
    mixer = {"state": 2, "gate": gate, "out_norm": out_norm, "out_act": gate}
    block = VSSBlock(8, mixer, norm=norm, post_norm=post_norm).eval()
    bare = VSSBlock(8, None, norm=norm, post_norm=post_norm).eval()
    x = torch.randn(2, 33, 35, 8)
    want, bare_want = block(x).detach(), bare(x).detach()
    before = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bare(x), bare_want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x, before)


def test_hooks_inside_a_block_see_whole_maps() -> None:
    block, x = VSSBlock(8, {"state": 2}).eval(), torch.randn(2, 33, 35, 8)
    seen: dict[str, torch.Size] = {}
    for name in ("op", "norm2", "mlp.fc1"):
        block.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.shape}))
    with torch.no_grad():
        block(x)
    assert {name: shape[:3] for name, shape in seen.items()} == dict.fromkeys(("op", "norm2", "mlp.fc1"), (2, 33, 35))


def test_block_compiles_and_exports() -> None:
    block, x = VSSBlock(8, {"state": 2}).eval(), torch.randn(2, 33, 35, 8)
    with torch.no_grad():
        want = block(x)
        torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), want, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), want, rtol=1e-4, atol=1e-5)
