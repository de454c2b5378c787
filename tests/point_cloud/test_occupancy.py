"""OccMamba beyond its head, against definitions: sparse convolutions, voxels, local context, losses, the pipeline."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo_point_cloud.files import read_cloud
from zoo_point_cloud.occmamba import LocalContext, unwindow, windows
from zoo_point_cloud.occmamba_lidar import LidarEncoder, voxelize
from zoo_point_cloud.occmamba_losses import (
    NUSCENES_FREQUENCIES,
    class_affinity,
    class_weights,
    coarse_labels,
    geometric_affinity,
    lovasz_softmax,
    occupancy_losses,
)
from zoo_point_cloud.sparse import StridedConv3d, SubmanifoldConv3d, sparse_voxels

GRID = (9, 7, 6)


@pytest.fixture
def voxels():
    g = torch.Generator().manual_seed(0)
    coords = (torch.rand(2, *GRID, generator=g) < 0.15).nonzero()
    coords = coords[torch.randperm(len(coords), generator=g)]
    return sparse_voxels(torch.randn(len(coords), 4, generator=g), coords, GRID, 2)


def occupied(voxels):
    return voxels.with_features(torch.ones(len(voxels.features), 1)).dense()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_submanifold_convolution_is_the_dense_one_at_the_occupied_voxels(voxels, kernel):
    conv = SubmanifoldConv3d(4, 5, kernel)
    dense = F.conv3d(voxels.dense(), conv.weight, padding=kernel // 2) * occupied(voxels)
    torch.testing.assert_close(conv(voxels).dense(), dense)
    found, expected = (torch.autograd.grad(t.pow(2).sum(), conv.weight)[0] for t in (conv(voxels).dense(), dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [(1, 1, 1), (1, 1, 0), (0, 0, 0)])
def test_strided_convolution_is_the_dense_one(voxels, padding):
    conv = StridedConv3d(4, 5, padding=padding)
    dense = F.conv3d(voxels.dense(), conv.weight, padding=padding, stride=2)
    found = conv(voxels)
    torch.testing.assert_close(found.dense(), dense)
    reached = F.conv3d(occupied(voxels), torch.ones(1, 1, 3, 3, 3), padding=padding, stride=2)[:, 0] > 0
    assert torch.equal(reached.nonzero(), found.coords)  # no output is left out, and none is made up


def test_what_sparse_voxels_refuse():
    with pytest.raises(ValueError, match="given twice"):
        sparse_voxels(torch.zeros(2, 1), torch.zeros(2, 4, dtype=torch.long), GRID, 1)
    with pytest.raises(ValueError, match="outside"):
        sparse_voxels(torch.zeros(1, 1), torch.tensor([[0, 9, 0, 0]]), GRID, 1)
    with pytest.raises(ValueError, match="no voxel is occupied"):
        sparse_voxels(torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.long), GRID, 1)
    with pytest.raises(ValueError, match="odd"):
        SubmanifoldConv3d(1, 1, 2)


def test_voxels_by_definition():
    r = np.random.default_rng(0)
    clouds = [torch.from_numpy(r.uniform(-1.5, 1.5, (200, 4)).astype(np.float32)) for _ in range(2)]
    low, size, grid, most_points, most_voxels = (-1, -1, -1), 0.5, (4, 4, 4), 2, 40
    features, coords = voxelize(clouds, low, size, grid, most_points, most_voxels)
    expected = {}
    for sample, cloud in enumerate(clouds):
        found = {}
        for point in cloud:
            cell = tuple(math.floor((float(v) + 1) / size) for v in point[:3])
            if all(0 <= c < n for c, n in zip(cell, grid, strict=True)):
                if cell not in found and len(found) == most_voxels:
                    continue
                found.setdefault(cell, []).append(point)
        expected |= {(sample, *c): torch.stack(p[:most_points]).mean(0) for c, p in found.items()}
    assert sorted(expected) == sorted(map(tuple, coords.tolist()))
    for feature, place in zip(features, coords.tolist(), strict=True):
        torch.testing.assert_close(feature, expected[tuple(place)])
    with pytest.raises(ValueError, match="no point lies in the grid"):
        voxelize([clouds[0] + 100], low, size, grid, most_points, most_voxels)


def test_encoder_is_the_dense_network_read_off_at_the_occupied_voxels():
    torch.manual_seed(0)
    stages = ((8, 8), (8, 8), (8, 16), (16,))
    encoder = LidarEncoder(3, 6, stages, norm_groups=2, low=(0, 0, 0), voxel_size=1.0, grid=(16, 16, 16)).eval()
    points = torch.rand(60, 3) * 16
    found = encoder([points])
    assert found.shape == (1, 6, 2, 2, 2)  # 17 layers high: 9, 5, and without padding 2
    features, coords = voxelize([points], (0, 0, 0), 1.0, (16, 16, 16), 10, 1000)
    x = torch.zeros(1, 3, 16, 16, 17)
    x[0, :, coords[:, 1], coords[:, 2], coords[:, 3]] = features.t()
    on = (x != 0).any(1, keepdim=True).float()

    def normed(norm, h):  # over the channels of each voxel alone
        rows = h.movedim(1, -1)
        return norm(rows.flatten(0, -2)).view(rows.shape).movedim(-1, 1)

    def layer(block, h, on):
        padding = getattr(block.conv, "padding", block.conv.kernel // 2)
        stride = getattr(block.conv, "stride", 1)
        h = F.conv3d(h, block.conv.weight, stride=stride, padding=padding)
        if stride == 2:
            on = (F.conv3d(on, torch.ones(1, 1, 3, 3, 3), stride=2, padding=padding) > 0).float()
        return normed(block.norm, h).relu() * on, on

    x, on = layer(encoder.conv_input, x, on)
    for stage in encoder.stages:
        for block in stage:
            if hasattr(block, "conv"):
                x, on = layer(block, x, on)
                continue
            h = (normed(block.norm1, F.conv3d(x, block.conv1.weight, padding=1)).relu()) * on
            x = (normed(block.norm2, F.conv3d(h, block.conv2.weight, padding=1)) + x).relu() * on
    for block in encoder.narrow:
        x, on = layer(block, x, on)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "shift"), [(3, 0), (3, 1), (4, 2)])
def test_windows_by_definition(size, shift):
    x = torch.randn(2, 3, 7, 6, 4)
    found = windows(x, size, shift)
    assert torch.equal(unwindow(found, x.shape[2:], size, shift), x)
    rows = -(-(6 + shift) // size)
    for column, row in itertools.product(range(-(-(7 + shift) // size)), range(rows)):
        for step, (z, i, j) in enumerate(itertools.product(range(4), range(size), range(size))):
            a, b = column * size + i - shift, row * size + j - shift
            inside = 0 <= a < 7 and 0 <= b < 6
            expected = x[:, :, a, b, z] if inside else torch.zeros(2, 3)
            assert torch.equal(found[:, column * rows + row, step], expected)


def test_local_context():
    torch.manual_seed(0)
    local = LocalContext(8, (2, 3), (1, 3), 4, 1, 0.0, torch.nn.BatchNorm3d(8)).eval()
    assert local.out[0].in_channels == 4 * 3  # two layouts of the first size, one of the second
    x = torch.randn(1, 8, 6, 6, 2)
    y = local(x)
    assert y.shape == x.shape
    moved = x.clone()
    moved[..., 5, 5, :] += 1
    changed = (local(moved) != y).any(1)[0].any(-1)
    assert changed[3:, 3:].any()
    assert not changed[:3, :3].any()  # another window at every size: local
    with pytest.raises(ValueError, match="no multiples"):
        LocalContext(8, (5, 5), (2, 2), 4, 1, 0.0, torch.nn.BatchNorm3d(8))
    with pytest.raises(ValueError, match="0 < stride <= size"):
        LocalContext(8, (3,), (4,), 4, 1, 0.0, torch.nn.BatchNorm3d(8))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_coarse_labels_by_definition():
    labels = torch.tensor(np.random.default_rng(0).choice([0, 0, 0, 1, 2, 255], (2, 4, 6, 4)))
    labels[0, :2, :2, :2] = 0
    found = coarse_labels(labels, 2)
    for b, x, y, z in itertools.product(range(2), range(2), range(3), range(2)):
        block = labels[b, 2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].flatten().tolist()
        present = [v for v in block if v]
        if not present:
            expected = 0
        else:
            commonest = max(present.count(v) for v in present)
            expected = min(v for v in present if present.count(v) == commonest)
            if commonest == 1 and 0 in block:
                expected = 255
        assert found[b, x, y, z] == expected
    with pytest.raises(ValueError, match="multiples of 3"):
        coarse_labels(labels, 3)


@pytest.fixture
def answers():
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    labels[:5] = 255
    return logits, labels


def test_lovasz_by_definition(answers):
    """The extension of 1 - IoU as a set function: errors in falling order times what each mistake adds."""
    logits, labels = answers
    p, labels = logits[5:].softmax(-1), labels[5:]
    losses = []
    for k in (0, 1, 2):  # class 3 does not occur
        truth = labels == k
        error = torch.where(truth, 1 - p[:, k], p[:, k])
        wrong, before, total = torch.zeros(35, dtype=torch.bool), 0.0, 0.0
        for i in error.argsort(descending=True):
            wrong[i] = True
            iou = float((truth & ~wrong).sum() / (truth | wrong).sum())
            total += float(error[i]) * ((1 - iou) - before)
            before = 1 - iou
        losses.append(total)
    assert lovasz_softmax(*answers).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_affinities_by_definition(answers):
    p, labels = answers[0][5:].softmax(-1).double(), answers[1][5:]
    terms = []
    for k in (0, 1, 2):
        t = (labels == k).double()
        hit = (p[:, k] * t).sum()
        specificity = ((1 - p[:, k]) * (1 - t)).sum() / (1 - t).sum()
        terms.append(-(hit / p[:, k].sum()).log() - (hit / t.sum()).log() - specificity.log())
    assert class_affinity(*answers).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    t, full = (labels != 0).double(), 1 - p[:, 0]
    hit = (full * t).sum()
    expected = -(hit / full.sum()).log() - (hit / t.sum()).log() - ((p[:, 0] * (1 - t)).sum() / (1 - t).sum()).log()
    assert geometric_affinity(*answers).item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_empty_voxels_the_specificity_counts_as_none(answers):
    logits, labels = answers
    assert geometric_affinity(logits, labels.clamp(min=1)).item() > 100


def test_losses_of_the_head():
    torch.manual_seed(0)
    tiny = {
        "in_chans": 3,
        "num_classes": 3,
        "embed_dim": 16,
        "down_blocks": [1, 1],
        "up_blocks": [1, 1],
        "fine_dim": 16,
    }
    head = zoo.create("multimodal_occmamba_128", **tiny, cascade_ratio=2, final_size=[8, 8, 4])
    labels = torch.zeros(2, 8, 8, 4, dtype=torch.long)  # two kinds of ground below, nothing above
    labels[:, :4, :, :2], labels[:, 4:, :, :2] = 1, 2
    weights = class_weights([1000, 10, 100])
    voxels = torch.randn(2, 3, 4, 4, 2)
    found = occupancy_losses(head(voxels), labels, weights)
    assert sorted(found) == sorted(
        f"{a}_{b}" for a in ("coarse", "fine") for b in ("ce", "sem_scal", "geo_scal", "lovasz")
    )
    rate = torch.optim.Adam(head.parameters(), lr=0.03)
    first = {k: v.item() for k, v in found.items()}
    for _ in range(12):
        rate.zero_grad()
        found = occupancy_losses(head(voxels), labels, weights)
        sum(found.values()).backward()
        rate.step()
    assert all(found[k].item() < 0.5 * v for k, v in first.items() if k != "fine_geo_scal")
    perfect = {"coarse": 50.0 * F.one_hot(coarse_labels(labels, 2) % 255, 3).movedim(-1, 1).float()}
    assert sum(occupancy_losses(perfect, labels).values()).item() < 1e-3
    with pytest.raises(ValueError, match=r"weights have shape .17,.; the answer has 3 classes"):
        occupancy_losses(perfect, labels, class_weights())
    with pytest.raises(ValueError, match="a multiple of the coarse answer's grid"):
        occupancy_losses(perfect, labels[:, :6])


def test_class_weights():
    weights = class_weights()
    assert weights.shape == (17,)
    assert weights[5].item() == pytest.approx(1 / math.log(NUSCENES_FREQUENCIES[5] + 0.001))
    assert weights[0] == weights.min()  # empty space counts least


# -- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lidar():
    from zoo_registry import resolve

    torch.manual_seed(3)
    return zoo.create("occmamba_lidar", **{**resolve("occmamba_lidar").card.tiny, "num_classes": 17})


def test_points_to_a_map(tmp_path, lidar):
    points = np.random.default_rng(0).uniform(-4, 4, (500, 5)).astype(np.float32)
    points.tofile(tmp_path / "sweep.bin")
    np.save(tmp_path / "sweep.npy", points)
    pipe = zoo.pipeline(lidar)
    result, again = pipe([str(tmp_path / "sweep.bin"), str(tmp_path / "sweep.npy")])
    assert result.grid.shape == (16, 16, 12)
    assert result.grid.dtype == np.uint8
    assert np.array_equal(result.grid, again.grid)
    assert result.occupied == int((result.grid != 0).sum()) == sum(result.counts.values())
    assert f"{result.occupied} of 3072 voxels occupied" in result.summary()
    assert set(result.counts) <= set(pipe.names)
    assert "driveable surface" in pipe.names
    assert result.save_picture(tmp_path / "map.png").stat().st_size > 1000
    assert np.array_equal(np.load(result.save_labels(tmp_path / "map.npy")), result.grid)
    written = read_cloud(result.save_labels(tmp_path / "map.ply"))
    assert len(written) == result.occupied
    assert np.abs(written.points).max() < 16  # metres, inside of the grid
    text = "\n".join(" ".join(str(v) for v in row[:3]) for row in points)
    (tmp_path / "sweep.xyz").write_text(text)  # without intensity and time
    assert pipe(str(tmp_path / "sweep.xyz")).grid.shape == (16, 16, 12)


def test_values_that_are_no_numbers(lidar):
    """A point without a place is left out, an intensity that is none counts as missing: no other voxel hears of it."""
    points = np.random.default_rng(0).uniform(-4, 4, (500, 5)).astype(np.float32)
    points[7, 3] = 0
    clean = zoo.pipeline(lidar)(points).grid
    holes = np.concatenate([points, np.full((3, 5), np.nan, np.float32)])
    holes[7, 3] = np.nan
    assert np.array_equal(zoo.pipeline(lidar)(holes).grid, clean)
    assert len(np.unique(clean)) > 1


def test_voxel_features_to_a_map(tmp_path):
    torch.manual_seed(0)
    tiny = {"in_chans": 3, "num_classes": 5, "embed_dim": 16, "down_blocks": [1], "up_blocks": [1], "fine_dim": 16}
    head = zoo.create("lidar_occmamba_384", **tiny, cascade_ratio=2, final_size=[8, 8, 4])
    np.save(tmp_path / "voxels.npy", np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32))
    result = zoo.pipeline(head)(str(tmp_path / "voxels.npy"))
    assert result.grid.shape == (8, 8, 4)
    assert "class" in result.summary() or result.occupied == 0
    with pytest.raises(ValueError, match=r"takes \(3, W, H, D\)"):
        zoo.pipeline(head)(np.zeros((4, 4, 4, 2), np.float32))


def test_what_the_pipeline_refuses(tmp_path, lidar):
    (tmp_path / "a.bin").write_bytes(np.zeros(8, np.float32).tobytes())
    with pytest.raises(ValueError, match="columns=4"):
        zoo.pipeline(lidar)(str(tmp_path / "a.bin"))
    for wrong in (0, "many"):
        with pytest.raises(zoo.errors.BadArgument, match=f"columns is '?{wrong}'?; expected (int|a whole)"):
            zoo.pipeline(lidar, columns=wrong)
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is no \.npz or \.npy file"):
        zoo.pipeline(lidar)(str(tmp_path / "a.npy"))
    with pytest.raises(ValueError, match=r"expected \(N, 3 to 5\)"):
        zoo.pipeline(lidar)(np.zeros((0, 5), np.float32))
    with pytest.raises(ValueError, match="no point lies in the grid"):
        zoo.pipeline(lidar)(np.full((10, 5), 1e4, np.float32))
    with pytest.raises(ValueError, match="leave in_chans out"):
        zoo.create("occmamba_lidar", in_chans=3)


def sweep(columns, seed=0):
    """Points as a turning scanner gives them: neighbours in the file are neighbours in space."""
    r, angle = np.random.default_rng(seed), np.linspace(0, 60, 2000)
    away = 3 + np.cos(angle / 7) + r.normal(0, 0.01, 2000)
    rows = [away * np.cos(angle), away * np.sin(angle), 0.1 * np.sin(angle), r.uniform(0, 0.2, 2000)]
    return np.stack([*rows, np.arange(2000) % 2][:columns], axis=1).astype(np.float32)


@pytest.mark.parametrize(("columns", "said"), [(4, 5), (5, 4), (3, 4)])
def test_sweeps_of_another_width(tmp_path, lidar, columns, said):
    """As many values as points of another width have: read so, every value would stand in a wrong column."""
    sweep(columns).tofile(tmp_path / "a.bin")
    with pytest.raises(zoo.errors.BadFile, match=f"points of {columns} values, it seems, and not of {said}"):
        zoo.pipeline(lidar, columns=said)(str(tmp_path / "a.bin"))
    zoo.pipeline(lidar, columns=columns)(str(tmp_path / "a.bin"))


def test_the_number_of_a_laser_is_no_time(tmp_path, lidar):
    points = sweep(5)
    points.tofile(tmp_path / "sweep.bin")
    pipe = zoo.pipeline(lidar)
    assert np.array_equal(pipe.read(tmp_path / "sweep.bin"), points * [1, 1, 1, 1, 0])
    points[:, 4] *= 0.05
    points.tofile(tmp_path / "sweeps.bin")
    assert np.array_equal(pipe.read(tmp_path / "sweeps.bin"), points)  # times of several sweeps


def test_more_that_the_pipeline_refuses(tmp_path, lidar):
    pipe = zoo.pipeline(lidar)
    (tmp_path / "a.bin").write_bytes(sweep(5).tobytes() + b"ab")
    (tmp_path / "b.bin").mkdir()
    for source, message in (
        (tmp_path / "a.bin", "40002 bytes are no whole number of points"),
        (tmp_path / "b.bin", "is a folder"),
        (np.zeros((9, 6)), r"shape \(9, 6\); expected \(N, 3 to 5\)"),  # colours are no intensity and time
        (np.zeros((9, 5), complex), "dtype complex128"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(source)
    near, far = sweep(3), sweep(3) + 1e4
    with pytest.raises(
        ValueError, match=r"no point lies in the grid from \(-16.0, -16.0, -12.0\) to \(16.0, 16.0, 12.0\)"
    ):
        pipe([near, far], batch_size=2)


def test_a_grid_goes_where_it_is_said(tmp_path, lidar):
    result = zoo.pipeline(lidar)(sweep(3))
    for name in ("a.NPY", "b.npy"):
        assert result.save_labels(tmp_path / "new" / name) == tmp_path / "new" / name
        assert np.array_equal(np.load(tmp_path / "new" / name), result.grid)
