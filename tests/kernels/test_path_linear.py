"""path_linear: each path's rows times its own matrix, against float64."""

from __future__ import annotations

import pytest
import torch
import util

import zoo_kernels as zk


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, :, k].double() @ weight[k].double().t() for k in range(x.shape[2])], dim=2)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("batch", "length", "paths", "features", "out"),
    [
        (2, 7, 2, 40, 44),
        (1, 1, 1, 1, 1),
        (3, 200, 2, 24, 5),  # several blocks of rows in each sequence
        (2, 97, 3, 17, 64),  # whole vectors
        (1, 100, 2, 8, 600),  # several groups of columns, the last one short
        (2, 0, 2, 8, 6),
        (2, 5, 2, 8, 0),
        (2, 5, 2, 0, 6),
    ],
)
def test_matches_float64(backend, batch, length, paths, features, out) -> None:
    x, weight = torch.randn(batch, length, paths, features), torch.randn(paths, out, features)
    with zk.backend(backend):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            a, b = x.to(dtype), weight.to(dtype)
            y = zk.path_linear(a, b)
            assert y.dtype == dtype
            assert y.is_contiguous()  # as compiled code expects of every back end
            util.close(y, exact(a, b))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layouts(backend) -> None:
    x, weight = torch.randn(2, 130, 3, 20), torch.randn(3, 37, 20)
    want = exact(x, weight)
    with zk.backend(backend):
        for how in (1, 2, 3):
            util.close(zk.path_linear(util.strided(x, how), util.strided(weight, how)), want)
        util.close(zk.path_linear(x[:, :, :1].expand(-1, -1, 3, -1), weight), exact(x[:, :, :1].expand_as(x), weight))
        util.close(zk.path_linear(x[:, 5:99:2], weight), want[:, 5:99:2])


def test_same_bits_for_any_number_of_threads_and_where_it_is_compiled(native) -> None:
    x, weight = torch.randn(2, 300, 2, 48), torch.randn(2, 44, 48)
    before = torch.get_num_threads()
    want = zk.path_linear(x, weight)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(zk.path_linear(x, weight), want)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.compile(zk.path_linear, fullgraph=True, backend="aot_eager")(x, weight), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\); it must be \(batch, length, paths, features\)"),
        ({"x": torch.zeros(2, 3, 2, 4, dtype=torch.int64)}, "x is int64; it must be one of float32"),
        ({"weight": torch.zeros(3, 5, 4)}, r"weight has shape \(3, 5, 4\); it must be \(paths 2, out, features 4\)"),
        ({"weight": torch.zeros(2, 5, 4).double()}, "weight is float64; it must be one of float32"),
        ({"weight": torch.zeros(2, 5, 4, requires_grad=True)}, "weight needs a gradient, which this operator has not"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        zk.path_linear(**{"x": torch.zeros(2, 3, 2, 4), "weight": torch.zeros(2, 5, 4), **change})
