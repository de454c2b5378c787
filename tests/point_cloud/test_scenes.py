"""Scenes that are too large for the model, in overlapping blocks."""

import numpy as np
import pytest
import torch

import zoo
from zoo_point_cloud import blocks as blocks_module
from zoo_point_cloud.blocks import SIZES, blended, scene_blocks
from zoo_point_cloud.files import Cloud
from zoo_point_cloud.pipelines import first_of_each_voxel


def scene(n=6000, seed=0):
    """Denser on one side, with everything at one place in a corner."""
    r = np.random.default_rng(seed)
    points = r.random((n, 3)).astype(np.float32) ** [2, 1, 1] * [20, 12, 3]
    points[: n // 20] = points[0]
    return points


@pytest.mark.parametrize("overlap", [0.0, 0.125, 1.0])
def test_blocks_cover_every_point_and_are_bounded(overlap):
    points = scene()
    blocks = list(scene_blocks(points, 500, overlap, least=64))
    assert max(len(b.index) for b in blocks) <= 500
    assert min(len(b.index) for b in blocks) >= 64
    seen = np.bincount(np.concatenate([b.index for b in blocks]), minlength=len(points))
    assert seen.min() >= 1
    assert all(len(np.unique(b.index)) == len(b.index) for b in blocks)
    weight = np.zeros(len(points))
    for b in blocks:
        assert (b.weight > 0).all()
        np.maximum.at(weight, b.index, b.weight)
    assert (weight == 1).all()  # every point lies inside of one block, not only in margins
    if overlap:
        assert seen.mean() > 1.2
    else:
        assert seen.mean() < 1.1


def test_few_points_and_equal_points():
    assert [len(b.index) for b in scene_blocks(scene(40), 500, least=64)] == [40]
    assert [len(b.index) for b in scene_blocks(np.zeros((1000, 3)), 300)] == [250] * 4
    with pytest.raises(ValueError, match="0 < least <= most"):
        next(scene_blocks(scene(), 10, least=20))
    with pytest.raises(ValueError, match="overlap is 2"):
        next(scene_blocks(scene(), 10, 2))


def test_blocks_come_in_few_sizes(monkeypatch):
    """So that the number of shapes that a model sees does not grow with a scene; what fills a block up lies next to it
    and counts least."""
    r = np.random.default_rng(0)
    points = np.column_stack([r.random(30_000) * 40, r.beta(1, 3, 30_000) * 25, r.random(30_000)])
    blocks = list(scene_blocks(points, 600, least=100))
    sizes = {len(block.index) for block in blocks}
    assert len(blocks) > 60
    assert sizes <= {50 * (i + 1) for i in range(SIZES)} | {100}
    monkeypatch.setattr(blocks_module, "SIZES", 600)  # any size: what the blocks are without being filled up
    for filled, plain in zip(blocks, scene_blocks(points, 600, least=100), strict=True):
        assert np.isin(plain.index, filled.index).all()
        assert (np.diff(filled.index) > 0).all()
        added = ~np.isin(filled.index, plain.index)
        assert added.sum() < 50
        assert np.array_equal(filled.weight[~added], plain.weight)
        assert (filled.weight[added] == np.float32(0.01)).all()


def test_blending_by_definition():
    points = scene(800)
    answers = {}

    def answer(index):
        answers[len(answers)] = index, torch.randn(4, len(index), generator=torch.Generator().manual_seed(len(answers)))
        return answers[len(answers) - 1][1]

    found = blended(points, answer, 200, 0.3)
    expected, weights = torch.zeros(4, 800), torch.zeros(800)
    for block, (index, logits) in zip(scene_blocks(points, 200, 0.3), answers.values(), strict=True):
        assert np.array_equal(block.index, index)
        for i, point in enumerate(index):
            expected[:, point] += logits[:, i].softmax(0) * block.weight[i]
            weights[point] += block.weight[i]
    torch.testing.assert_close(found, expected / weights)


def test_first_of_each_voxel_by_definition():
    points = scene(500)
    cells = [tuple(c) for c in np.floor((points - points.min(axis=0)) / 2.0).astype(int).tolist()]
    assert first_of_each_voxel(points, 2.0).tolist() == [i for i, c in enumerate(cells) if c not in cells[:i]]
    with pytest.raises(ValueError, match="too many to count"):
        first_of_each_voxel(np.array([[0, 0, 0], [1e9, 1e9, 1e9]], np.float32), 1e-3)


@pytest.fixture(scope="module")
def rooms():
    torch.manual_seed(0)
    return zoo.create("pcm_s3dis", embed_dim=8, decoder_channels=[8, 8, 8, 8], context_dim=8, test_crop=800)


def test_a_scene_goes_through_in_bounded_pieces(rooms, monkeypatch):
    """No forward pass sees more points than a block has, however many the scene has; every point gets a label."""
    points = scene(20_000)
    cloud = Cloud(points, np.random.default_rng(1).random((len(points), 3)).astype(np.float32))
    sizes, whole = [], type(rooms)._whole

    def spy(self, pos, *rest):
        sizes.append(pos.shape[1])
        assert float(pos.amin()) == 0  # every block begins at zero
        return whole(self, pos, *rest)

    monkeypatch.setattr(type(rooms), "_whole", spy)
    result = zoo.pipeline(rooms, block_points=900)(cloud)
    assert max(sizes) <= 900
    assert len(sizes) > 10
    assert len(result.labels) == 20_000
    assert 0 < result.confidence <= 1
    sizes.clear()
    zoo.pipeline(rooms)(cloud)  # 25 tiles would hold more than twice 800 points: blocks without being asked
    assert max(sizes) <= 800
    sizes.clear()
    zoo.pipeline(rooms)(cloud.take(np.arange(3000, 5000)))  # small enough for the authors' tiles
    assert len(sizes) <= 25


def test_blocks_change_nothing_for_a_model_that_looks_at_single_points(rooms, monkeypatch):
    points = scene(2000)
    cloud = Cloud(points, np.random.default_rng(1).random((len(points), 3)).astype(np.float32))
    monkeypatch.setattr(type(rooms), "_whole", lambda self, pos, x, cls, record: torch.cat([x, x, x, x], dim=1)[:, :13])
    whole = zoo.pipeline(rooms, block_points=100_000)(cloud)
    blocks = zoo.pipeline(rooms, block_points=800)(cloud)
    assert np.array_equal(whole.labels, blocks.labels)
    assert whole.confidence == pytest.approx(blocks.confidence, rel=1e-4)


def test_block_options(rooms):
    with pytest.raises(zoo.errors.BadArgument, match="block_points is 10"):
        zoo.pipeline(rooms, block_points=10)
    for wrong in ("many", 1000.5):
        with pytest.raises(zoo.errors.BadArgument, match=f"block_points is '?{wrong}'?; expected (int|a whole)"):
            zoo.pipeline(rooms, block_points=wrong)
    with pytest.raises(zoo.errors.BadArgument, match=r"overlap is 'wide'; expected (float|a share)"):
        zoo.pipeline(rooms, overlap="wide")
    with pytest.raises(zoo.errors.BadArgument, match="overlap is 3"):
        zoo.pipeline(rooms, overlap=3)
    with pytest.raises(zoo.errors.BadArgument, match="invalid is 'maybe'"):
        zoo.pipeline(rooms, invalid="maybe")
