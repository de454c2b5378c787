"""grouped_mlp: groups of points through a residual network, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import util
from torch import Tensor

import zoo_kernels as zk


def arguments(
    batch: int = 2,
    points: int = 30,
    centres: int = 17,
    k: int = 5,
    channels: int = 24,
    inner: int = 16,
    blocks: int = 2,
) -> list[Tensor]:
    return [
        torch.randn(batch, points, channels),
        torch.randn(batch, centres, channels),
        torch.randint(points, (batch, centres, k)),
        torch.randn(blocks, inner, channels) / channels**0.5,
        torch.randn(blocks, inner),
        torch.randn(blocks, channels, inner) / inner**0.5,
        torch.randn(blocks, channels),
    ]


def exact(given: list[Tensor], anchor: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Point by point, in float64."""
    table, base, index, *weights = (util.double(t) for t in given)
    y = torch.empty(base.shape, dtype=torch.float64)
    for b in range(base.shape[0]):
        for s in range(base.shape[1]):
            rows = []
            for j in index[b, s].tolist():
                x = table[b, j] if anchor is None else table[b, j] - table[b, anchor[b, s]]
                x = (x * (1 if scale is None else scale[b].double()) + base[b, s]).relu()
                for one, one_bias, two, two_bias in zip(*weights, strict=True):
                    x = (two @ (one @ x + one_bias).relu() + two_bias + x).relu()
                rows.append(x)
            y[b, s] = torch.stack(rows).amax(0)
    return y


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"channels": 64, "inner": 64, "blocks": 1},
        {"channels": 5, "inner": 3, "k": 1},  # narrower than a vector
        {"channels": 33, "inner": 70, "k": 13},  # widths that are not whole vectors
        {"centres": 300, "k": 12, "channels": 48, "inner": 48, "blocks": 1},  # several work items, the last one short
        {"blocks": 0},
        {"batch": 1, "points": 1, "centres": 1, "k": 3},
    ],
)
def test_matches_float64(backend: str, sizes: dict) -> None:
    given = arguments(**sizes)
    want = exact(given)
    with zk.backend(backend):
        util.close(zk.grouped_mlp(*given), want)
        util.close(zk.grouped_mlp(*(util.double(t) for t in given)), want)
        halves = [t.bfloat16() if t.is_floating_point() else t for t in given]
        y = zk.grouped_mlp(*halves)
        assert y.dtype == torch.bfloat16
        util.close(y, exact(halves))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_differences_from_an_anchor_and_their_scale(backend: str) -> None:
    given = arguments(channels=33)
    anchor, scale = torch.randint(30, (2, 17)), torch.tensor([0.3, -2.0])
    with zk.backend(backend):
        for some in ({"anchor": anchor}, {"scale": scale}, {"anchor": anchor.to(torch.int32), "scale": scale}):
            util.close(zk.grouped_mlp(*given, **some), exact(given, **some))
        wide = [util.double(t) for t in given]
        util.close(zk.grouped_mlp(*wide, anchor=anchor, scale=scale.double()), exact(given, anchor, scale))


def test_layouts_and_integers() -> None:
    given = arguments()
    want = zk.grouped_mlp(*given)
    for how in (1, 2, 3):
        moved = [util.strided(t, how) if t.is_floating_point() else t for t in given]
        assert torch.equal(zk.grouped_mlp(*moved), want)
    given[2] = given[2].to(torch.int32)
    assert torch.equal(zk.grouped_mlp(*given), want)


def test_same_bits_for_any_number_of_threads(native) -> None:
    given = arguments(centres=200, k=12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = zk.grouped_mlp(*given)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(zk.grouped_mlp(*given), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_not_a_number_is_not_lost_in_the_maximum(backend: str) -> None:
    given = arguments(blocks=1)
    given[2][0, 3], given[2][1] = torch.tensor([4, 7, 9, 7, 2]), 1
    given[0][0, 7, 5] = torch.nan
    with zk.backend(backend):
        y = zk.grouped_mlp(*given)
        assert y[0, 3].isnan().all()  # every output of a row depends on all of its inputs
        assert torch.equal(y.isnan(), exact(given).isnan())
        given[0][0, 7, 5] = torch.inf
        assert torch.equal(zk.grouped_mlp(*given).isnan(), exact(given).isnan())


def test_compiles(native) -> None:
    given = arguments()
    call = torch.compile(zk.grouped_mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(*given), zk.grouped_mlp(*given))


def test_no_centres_and_no_clouds() -> None:
    given = arguments()
    given[1], given[2] = given[1][:, :0], given[2][:, :0]
    assert zk.grouped_mlp(*given).shape == (2, 0, 24)
    assert zk.grouped_mlp(*(t[:0] for t in given[:3]), *given[3:]).shape == (0, 0, 24)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 30), r"table has shape \(2, 30\); it must be \(batch, points, channels\)"),
        (1, torch.zeros(2, 17, 9), r"base has shape \(2, 17, 9\); it must be \(batch 2, centres, channels 24\)"),
        (
            2,
            torch.zeros(2, 16, 5, dtype=torch.int64),
            r"index has shape .*; it must be \(batch 2, centres 17, neighbours\)",
        ),
        (2, torch.zeros(2, 17, 0, dtype=torch.int64), r"index has shape \(2, 17, 0\); a group must have at least one"),
        (2, torch.zeros(2, 17, 5), "index is float32; it must be one of int64"),
        (2, torch.full((2, 17, 5), 30), "index has points 30 to 30; they must be within 0 to 29"),
        (2, torch.full((2, 17, 5), -1), "index has points -1 to -1; they must be within 0 to 29"),
        (5, torch.zeros(2, 24, 17), r"second has shape \(2, 24, 17\); it must be \(blocks 2, channels 24, inner 16\)"),
        (6, torch.zeros(3, 24), r"second_bias has shape \(3, 24\); it must be \(blocks 2, channels 24\)"),
        (3, torch.zeros(2, 16, 24, requires_grad=True), "first needs a gradient, which this operator has not"),
    ],
)
def test_wrong_arguments_are_named(place: int, value: Tensor, message: str) -> None:
    given = arguments()
    given[place] = value
    with pytest.raises(ValueError, match=message):
        zk.grouped_mlp(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"anchor": torch.zeros(2, 16, dtype=torch.int64)},
            r"anchor has shape \(2, 16\); it must be \(batch 2, centres 17\)",
        ),
        ({"anchor": torch.full((2, 17), 31)}, "anchor has points 31 to 31; they must be within 0 to 29"),
        ({"anchor": torch.zeros(2, 17)}, "anchor is float32; it must be one of int64"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\); it must be \(batch 2\)"),
        ({"scale": torch.ones(2, dtype=torch.int64)}, "scale is int64; it must be one of float32"),
    ],
)
def test_wrong_anchors_and_scales_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zk.grouped_mlp(*arguments(), **given)
