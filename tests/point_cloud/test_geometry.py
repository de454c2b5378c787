"""Sampling, neighbours and interpolation against their definitions, with ties and duplicates."""

import numpy as np
import pytest
import torch

from zoo_kernels import paths
from zoo_point_cloud import geometry
from zoo_point_cloud.geometry import (
    farthest_point_sample,
    interpolate,
    nearest_neighbours,
    serialise_each,
    squared_distances,
)


def cloud(kind: str, n: int = 300, batch: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(kind))
    points = torch.rand(batch, n, 3, generator=g) * 2 - 1
    if kind == "grid":  # very many equal distances
        return (points * 3).round() / 3
    if kind == "duplicates":
        return points[:, torch.arange(n) % 40]
    return points


def sample_by_definition(points: torch.Tensor, count: int, skip: bool) -> list[int]:
    chosen, best = [0], np.full(len(points), np.inf, dtype=np.float32)
    for _ in range(count - 1):
        best = np.minimum(best, squared_distances(points[chosen[-1]][None], points)[0].numpy())
        candidates = [i for i in range(len(points)) if not (skip and float((points[i] ** 2).sum()) <= 1e-3)]
        chosen.append(max(candidates, key=lambda i: (best[i], -i)) if candidates else 0)
    return chosen


@pytest.mark.parametrize("kind", ["random", "grid", "duplicates"])
@pytest.mark.parametrize("skip", [False, True])
def test_farthest_points(kind, skip):
    points = cloud(kind, 60)
    if skip:
        points[:, 5:20] *= 0.01
    found = farthest_point_sample(points, 30, skip_origin=skip)
    assert found.tolist() == [sample_by_definition(p, 30, skip) for p in points]
    # The path for other devices gives the same indices.
    assert torch.equal(geometry._sample_batch(points, 30, skip), found)


@pytest.mark.parametrize("kind", ["random", "grid", "duplicates", "far", "same"])
def test_fpsample_gives_the_definition(kind):
    """Ties, duplicates and cancellation: the library's answer is the numpy loop's, index by index."""
    pytest.importorskip("fpsample")
    points = cloud("random", 257) + 1000 if kind == "far" else cloud(kind, 257)
    points = torch.ones_like(points) if kind == "same" else points
    for one in points.numpy():
        for count in (1, 2, 100, 257):
            assert np.array_equal(geometry._sample_cloud(one, count, False), geometry._sample_one(one, count, False))


@pytest.mark.parametrize("missing", [True, False])
def test_answers_do_not_depend_on_installed_libraries(monkeypatch, missing):
    points = cloud("grid", 200)
    expected = farthest_point_sample(points, 50)
    library = None if missing else pytest.importorskip("fpsample")
    monkeypatch.setattr(geometry, "_library", lambda name: library if name == "fpsample" else None)
    assert torch.equal(farthest_point_sample(points, 50), expected)


def test_a_sequence_is_checked_step_by_step(monkeypatch):
    points = cloud("grid", 120)
    index = farthest_point_sample(points, 60)
    for pairs in (1 << 24, 1000):  # all steps at once, and a few at a time
        monkeypatch.setattr(geometry, "_PAIRS", pairs)
        assert geometry.is_farthest_sequence(points, index)
        for step in (0, 1, 30, 59):
            wrong = index.clone()
            wrong[1, step] = (wrong[1, step] + 1) % 120
            assert not geometry.is_farthest_sequence(points, wrong)


@pytest.mark.parametrize("honest", [True, False])
def test_torch_cluster_is_used_where_it_is_right(monkeypatch, honest):
    """On devices other than a CPU: what the library answers is kept where it is the definition's."""
    points = cloud("grid", 100)
    expected = farthest_point_sample(points, 30)
    calls = []

    class Cluster:
        @staticmethod
        def fps(flat, owner, ratio, random_start):
            assert not random_start
            assert np.ceil(ratio * 100) == 30
            assert torch.equal(owner, torch.arange(2).repeat_interleave(100))
            calls.append(flat)
            answer = expected.clone()
            if not honest:
                answer[:, 5] = answer[:, 4]
            return (answer + torch.arange(2)[:, None] * 100).flatten()

    found = geometry._sample_with_cluster(Cluster, points, 30)
    assert geometry.is_farthest_sequence(points, found) == honest
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["random", "grid", "duplicates"])
def test_torch_cluster_itself(kind):
    """The library: on a random cloud it answers as defined, and with ties its answer is kept where it is right."""
    cluster = pytest.importorskip("torch_cluster")
    points = cloud(kind, 200)
    expected = farthest_point_sample(points, 35)
    found = geometry._sample_with_cluster(cluster, points, 35)
    assert geometry.is_farthest_sequence(points, found) == torch.equal(found, expected)
    assert torch.equal(found, expected) or kind != "random"


def neighbours_by_definition(query, points, k):
    distance = squared_distances(query, points)
    index = distance.argsort(dim=-1, stable=True)[..., :k]
    return distance.gather(-1, index), index


@pytest.mark.parametrize("kind", ["random", "grid", "duplicates"])
@pytest.mark.parametrize("n", [100, 400])  # all pairs, and the tree
def test_nearest_neighbours(kind, n):
    points = cloud(kind, n)
    query = points[:, ::3]
    found = nearest_neighbours(query, points, 12)
    expected = neighbours_by_definition(query, points, 12)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_nearest_neighbours_float64_far_from_the_origin():
    points = cloud("random", 400).double() * 1e-3 + 1e4
    assert torch.equal(nearest_neighbours(points, points, 5)[1], neighbours_by_definition(points, points, 5)[1])


def test_pieces_change_nothing(monkeypatch):
    points = cloud("grid", 100)
    whole = geometry._search(points, points, 7)
    monkeypatch.setattr(geometry, "_PAIRS", 1000)
    pieces = geometry._search(points, points, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_interpolation():
    source, target = cloud("random", 30), cloud("random", 50)
    features = torch.randn(2, 30, 4)
    distance = squared_distances(target, source)
    near, index = distance.topk(3, largest=False)
    weight = 1 / (near + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = torch.stack([(features[b][index[b]] * weight[b, ..., None]).sum(1) for b in range(2)])
    torch.testing.assert_close(interpolate(target, source, features), expected)
    torch.testing.assert_close(interpolate(source, source, features), features, atol=1e-4, rtol=1e-4)
    one = interpolate(target, source[:, :1], features[:, :1])
    torch.testing.assert_close(one, features[:, :1].expand_as(one))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: farthest_point_sample(p, 11), "11 points are to be sampled from 10"),
        (lambda p: farthest_point_sample(p[0], 2), r"expected \(batch, points, 3\)"),
        (lambda p: farthest_point_sample(p[:, :0], 1), "empty"),
        (lambda p: nearest_neighbours(p, p, 11), "11 nearest neighbours are asked of 10 points"),
        (lambda p: nearest_neighbours(p.long(), p, 1), "floating"),
        (lambda p: farthest_point_sample(p / 0, 2), "10 have NaN or infinite"),
        (lambda p: nearest_neighbours(p, p * torch.nan, 1), "NaN"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(1, 10, 3))


@pytest.mark.parametrize("order", ["hilbert", "hilbert-trans", "z", "z-trans", "zxy", "zyx-snake", "axis-x"])
def test_orders_of_clouds_do_not_depend_on_their_batch(order):
    clouds = cloud("random", 50, batch=5) * torch.tensor([1.0, 0.1, 3.0, 0.9, 1e-4]).view(-1, 1, 1)
    alone = torch.cat([paths.serialize(one[None], order, grid_size=0.02) for one in clouds])
    assert torch.equal(serialise_each(clouds, order, 0.02), alone)
