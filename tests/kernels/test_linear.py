"""linear: the few-row product against float64, for every weight format."""

from __future__ import annotations

import pytest
import torch
import util

import zoo_kernels as zk


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("features", "out"), [(1, 1), (7, 5), (64, 33), (1537, 11)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8])
def test_matches_float64(backend: str, rows: int, features: int, out: int, kind: torch.dtype) -> None:
    x, weight, bias = torch.randn(rows, features), torch.randn(out, features), torch.randn(out)
    scale = None
    if kind == torch.int8:
        weight, scale = quantise(weight)
        want = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    else:
        weight = weight.to(kind)
        want = x.double() @ weight.double().t() + bias.double()
    with zk.backend(backend):
        util.close(zk.linear(x, weight, bias, scale=scale), want)
        util.close(zk.linear(x.bfloat16(), weight, bias, scale=scale), want, factor=2)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layouts(backend: str) -> None:
    x, weight = torch.randn(2, 3, 2, 20)[..., ::2], torch.randn(30, 10)
    with zk.backend(backend):
        y = zk.linear(x[0, 0], weight[::2])
        assert zk.linear(x, weight).shape == (2, 3, 2, 30)
        assert zk.linear(x[:0], weight).shape == (0, 3, 2, 30)
        util.close(zk.linear(x[0, 0], weight.t().contiguous().t()), x[0, 0].double() @ weight.double().t())
    util.close(y, x[0, 0].double() @ weight[::2].double().t())


def test_gradients_go_through_torch() -> None:
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    zk.linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.detach().expand(5, -1))


def test_compiles_and_keeps_threads_equal(native) -> None:
    x, weight = torch.randn(1, 300), torch.randn(700, 300)  # large enough for the native path
    y = zk.linear(x, weight)
    with zk.backend("native"):
        assert torch.equal(zk.linear(x, weight), y)
    assert torch.equal(torch.compile(lambda x, w: zk.linear(x, w), fullgraph=True, backend="aot_eager")(x, weight), y)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(zk.linear(x, weight), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, r"weight has shape \(3, 5\); it must be \(out, features 4\)"),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.int8)},
            "scale must be given, one factor for each row, where weight is int8",
        ),
        ({"scale": torch.ones(3)}, "scale must be None where weight is float32"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int32)}, "weight is int32; it must be one of float32"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(out 3\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zk.linear(**{"x": torch.zeros(1, 4), "weight": torch.zeros(3, 4), **change})
