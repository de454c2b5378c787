"""Visiting orders: against the originals' index vectors, and their laws on grids of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.reference import read_golden
from zoo_kernels import paths

GOLDEN = Path(__file__).parents[1] / "golden"
PLANE = [
    "raster", "reverse", "column", "snake", "bidirectional", "cross", "continuous", "sweep", "zigma", "jpeg",
    "jpeg_zigzag", "local(w=3)", "local(w=2, column_first=true)", "local(snake, w=4)", "omnidirectional", "diagonal",
    "antidiagonal", "wrapped_diagonal", "wrapped_antidiagonal", "spiral", "hilbert", "trans_hilbert", "morton",
    "trans_morton", "quadrant", "shuffle(seed=5)", "transpose(hilbert)", "mirror(spiral, axis=0)", "axis_orders",
    "axes(order=cr)", "cross(hilbert)", "temporal_first", "bidirectional(morton)", "interleave", "tri_orientated",
]  # fmt: skip
VOLUME = [
    "raster", "reverse", "column", "snake", "hilbert", "trans_hilbert", "morton", "trans_morton", "spacetime",
    "axis_orders", "tri_orientated", "h2he", "h2he(order=yx, inverse=true)", "height(hilbert)", "height(cross)",
    "local(w=2)", "local(hilbert, w=2)", "shuffle", "axes(order=ctr)", "mirror(axis=1)", "transpose(snake)",
]  # fmt: skip


def visits_every_cell_once(order: torch.Tensor, cells: int) -> bool:
    return torch.equal(order.sort(-1).values, torch.arange(cells).expand(order.shape))


def steps_between_neighbours(order: torch.Tensor, size: tuple[int, ...]) -> bool:
    where = np.stack(np.unravel_index(order.numpy(), size))
    return bool((np.abs(np.diff(where, axis=-1)).sum(0) == 1).all())


@pytest.mark.parametrize("spec", PLANE)
@settings(max_examples=12, deadline=None)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_plane_orders_are_permutations(spec, size):
    order = paths.get(spec, size)
    assert order.dtype == torch.int64
    assert visits_every_cell_once(order, size[0] * size[1])
    inverse = paths.inverse(order)
    assert torch.equal(order.gather(1, inverse), torch.arange(order.shape[1]).expand(order.shape))


@pytest.mark.parametrize("spec", VOLUME)
@pytest.mark.parametrize("size", [(4, 4, 4), (3, 5, 2), (1, 1, 1), (2, 7, 3)])
def test_volume_orders_are_permutations(spec, size):
    assert visits_every_cell_once(paths.get(spec, size), int(np.prod(size)))


@pytest.mark.parametrize("spec", ["raster", "reverse", "cross", "hilbert", "morton", "snake", "spiral", "continuous"])
def test_empty_grids(spec):
    assert paths.get(spec, (0, 3)).shape[1] == 0


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("continuous[0]", "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12"),
        ("continuous[2]", "0 4 8 12 13 9 5 1 2 6 10 14 15 11 7 3"),
        ("local(w=2)", "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15"),
        ("local(w=2, column_first=true)", "0 4 1 5 8 12 9 13 2 6 3 7 10 14 11 15"),
        ("wrapped_diagonal", "0 5 10 15 1 6 11 12 2 7 8 13 3 4 9 14"),
        ("wrapped_antidiagonal", "0 7 10 13 1 4 11 14 2 5 8 15 3 6 9 12"),
        ("jpeg", "0 1 4 8 5 2 3 6 9 12 13 10 7 11 14 15"),
        ("hilbert", "0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3"),
        ("morton", "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15"),
        ("quadrant", "0 1 5 4 2 3 7 6 10 11 15 14 8 9 13 12"),
        ("efficient[1]", "4 12 6 14"),
    ],
)
def test_four_by_four(spec, expected):
    assert paths.get(spec, (4, 4))[0].tolist() == [int(x) for x in expected.split()]


GOLDEN_PLANE = {
    "h": "raster", "h_flip": "reverse", "v": "column", "v_flip": "reverse(column)", "bidirectional_2": "bidirectional",
    "cross_scan_4": "cross", "continuous_2d_4": "continuous", "sweep_8": "sweep", "zigma_8": "zigma",
    "jpeg_zigzag_8": "jpeg_zigzag", "local_w4": "local(w=4)", "local_w4_flip": "reverse(local(w=4))",
    "local_w4_column_first": "local(w=4, column_first=true)", "efficient_step2_4": "efficient",
    "omnidirectional_8_cyclic": "omnidirectional", "diagonal_true": "diagonal", "antidiagonal_true": "antidiagonal",
    "hilbert": "hilbert", "morton_z_order": "morton", "spiral": "spiral", "occmamba_quadrant_u_order_2d": "quadrant",
}  # fmt: skip
GOLDEN_VOLUME = {
    "3d_spatial_first": "raster", "3d_temporal_first": "temporal_first", "3d_axis_orders_6": "axis_orders",
    "3d_bidirectional_spatiotemporal_4": "spacetime", "3d_tri_orientated_3": "tri_orientated", "3d_snake": "snake",
    "3d_hilbert": "hilbert",
}  # fmt: skip


def test_survey_orders_equal_the_originals():
    golden = read_golden(GOLDEN / "survey_visual__scan_orders_8x8_4x4x4.safetensors")
    ours = {name: paths.get(spec, (8, 8)) for name, spec in GOLDEN_PLANE.items()}
    ours |= {name: paths.get(spec, (4, 4, 4)) for name, spec in GOLDEN_VOLUME.items()}
    ours["continuous_2d_4_direction_codes"] = paths.direction_codes(paths.get("continuous", (8, 8)), (8, 8))
    ours["occmamba_height_expanded_z3"] = paths.get("height", (8, 8, 3))
    assert ours.keys() == golden.outputs.keys()
    for name, expected in golden.outputs.items():
        assert torch.equal(ours[name], torch.atleast_2d(expected).long()), name


def test_occmamba_indices():
    golden = read_golden(GOLDEN / "occmamba__h2he.safetensors")
    for i, c in enumerate(golden.config):
        spec = f"h2he(order={c['coor_order']}, inverse={c['inverse']})"
        found = paths.get(spec, (c["max_x"], c["max_y"], c["max_z"]))[0]
        assert torch.equal(found, golden.outputs[f"{i}/indices"])


def test_point_serialization_equals_the_original():
    golden = read_golden(GOLDEN / "pcm__serialization.safetensors")
    assert len(golden.outputs) == 60
    for name, expected in golden.outputs.items():
        cloud, order, kind = name.split("/")
        points, side = golden.inputs[f"{cloud}/pos"], golden.config[cloud]["grid_size"]
        if kind == "code":
            found = paths.codes(points, order, grid_size=side, batched=True).reshape(-1)
        else:
            found = paths.serialize(points, order, grid_size=side, across_batch=True)
        assert torch.equal(found, expected), name
    for cloud in ("cube", "two_spheres", "coarse"):
        grid = paths.grid_coordinates(golden.inputs[f"{cloud}/pos"], golden.config[cloud]["grid_size"])
        assert torch.equal(grid, golden.mids[f"{cloud}/grid_coord"])


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_curves_go_to_neighbours(side):
    for spec, size in [
        ("hilbert", (side, side)), ("hilbert", (side,) * 3), ("trans_hilbert", (side,) * 3),
        ("snake", (side, side + 1)), ("snake", (3, side, side + 1)), ("spiral", (side, side + 1)),
    ]:  # fmt: skip
        assert steps_between_neighbours(paths.get(spec, size)[0], size), (spec, size)


def test_masked_curves_keep_the_order_of_the_whole_curve():
    whole = paths.get("hilbert", (8, 8))[0]
    inside = (whole // 8 < 5) & (whole % 8 < 7)
    assert torch.equal(paths.get("hilbert", (5, 7))[0], (whole // 8 * 7 + whole % 8)[inside])


def test_padding_indexes_the_padded_grid():
    padded = paths.get("local(w=4, pad=true)", (5, 6))
    assert visits_every_cell_once(padded, 8 * 8)
    assert torch.equal(padded, paths.get("local(w=4)", (8, 8)))
    assert paths.get("efficient(pad=true)", (5, 6)).shape == (4, 9)
    with pytest.raises(ValueError, match=r"pad=true"):
        paths.get("efficient", (5, 6))


def test_efficient_directions_share_the_grid():
    order = paths.get("efficient(step=3)", (6, 9))
    assert order.shape == (9, 6)
    assert sorted(order.reshape(-1).tolist()) == list(range(54))
    inverse = paths.inverse(order, 54)
    assert ((inverse >= 0).sum(0) == 1).all()


def test_composition():
    size = (4, 6)
    stacked = paths.get("hilbert + reverse(hilbert) + cross", size)
    assert stacked.shape == (6, 24)
    assert torch.equal(stacked[1], stacked[0].flip(0))
    assert torch.equal(paths.get("reverse(cross)", size), paths.get("cross", size).flip(1))
    assert torch.equal(paths.get("reverse(hilbert+column)[1]", size)[0], paths.get("column", size)[0].flip(0))
    assert torch.equal(paths.get("sweep[2]", size), paths.get("mirror(raster, axis=1)", size))
    assert torch.equal(paths.get("local(hilbert, w=2)", (2, 2)), paths.get("hilbert", (2, 2)))
    assert torch.equal(paths.get("reverse", 5), torch.tensor([[4, 3, 2, 1, 0]]))


def test_shuffles_depend_on_the_seed_alone():
    first = paths.get("shuffle(seed=1)", 50).clone()
    paths.clear_cache()
    assert torch.equal(paths.get("shuffle(seed=1)", (5, 10)), first)
    assert not torch.equal(paths.get("shuffle(seed=2)", 50), first)


def test_cached_by_meaning_and_bounded(monkeypatch):
    paths.clear_cache()
    first = paths.get("local(w=2)+raster", (6, 6))
    assert paths.get(" local( w = 2 ) + raster ", (6, 6)).data_ptr() == first.data_ptr()
    monkeypatch.setattr(paths, "_CACHE_BYTES", 3 * 800)
    for n in range(90, 100):
        paths.get("raster", n)
    assert sum(t.numel() * 8 for t in paths._cache.values()) <= 3 * 800


def test_register(monkeypatch):
    monkeypatch.setattr(paths, "_ORDERS", dict(paths._ORDERS))
    paths.register("every_other", lambda size, *, start=0: np.arange(start, int(np.prod(size)), 2))
    assert paths.get("every_other(start=1)", 7).tolist() == [[1, 3, 5]]
    assert "every_other" in paths.names()
    paths.register("imported", "zoo_kernels.paths.curves:morton")
    assert torch.equal(paths.get("imported", (3, 3)), paths.get("morton", (3, 3)))
    with pytest.raises(ValueError, match="exists already"):
        paths.register("cross", lambda size: np.arange(3))
    with pytest.raises(ValueError, match="lower-case"):
        paths.register("My path", lambda size: np.arange(3))


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("hilbrt", (4, 4), "did you mean hilbert"),
        ("local(w=)", (4, 4), r"expected a value at position 8"),
        ("local(v=3)", (4, 4), "no parameter 'v'; it has: w"),
        ("cross[4]", (4, 4), "4 directions"),
        ("cross(", (4, 4), "expected"),
        ("", (4, 4), "expected the name of an order"),
        ("raster raster", (4, 4), r"expected '\+' or the end"),
        ("raster ; raster", (4, 4), "position"),
        ("spiral(raster)", (4, 4), "not applied to other paths"),
        ("spiral", (4, 4, 4), "2 axes"),
        ("h2he", (4, 4), "3 axes"),
        ("h2he(order=zz)", (4, 4, 4), "expected xy or yx"),
        ("local(w=0)", (4, 4), "at least 1"),
        ("axes(order=rr)", (4, 4), "every axis"),
        ("raster + efficient", (4, 4), "one number of steps"),
        ("column", 4, "at least 2 axes"),
        ("raster", (4, -1), "none negative"),
        ("raster", (), "one or more axis lengths"),
        ("interleave(slices=5)", (4, 4), "equal slices"),
    ],
)
def test_errors_say_what_to_do(spec, size, message):
    with pytest.raises(ValueError, match=message):
        paths.get(spec, size)


def test_inverse_refuses_what_has_none():
    with pytest.raises(ValueError, match="twice"):
        paths.inverse(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="length="):
        paths.inverse(torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="jumps"):
        paths.direction_codes(paths.get("raster", (3, 3)), (3, 3))


@pytest.mark.parametrize("order", paths.POINT_ORDERS)
@pytest.mark.parametrize("shape", [(2, 33), (1, 1), (3, 0)])
def test_point_orders_are_permutations(order, shape):
    points = torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    found = paths.serialize(points, order)
    assert found.shape == shape
    assert visits_every_cell_once(found, shape[1])


def test_point_hilbert_is_the_grid_curve():
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)[None]
    assert torch.equal(paths.serialize(grid, "hilbert", grid_size=1.0), paths.get("hilbert", (4, 4, 4)))
    assert torch.equal(paths.serialize(grid, "hilbert-trans", grid_size=1.0), paths.get("trans_hilbert", (4, 4, 4)))
    assert torch.equal(paths.serialize(grid, "z-trans", grid_size=1.0), paths.get("trans_morton", (4, 4, 4)))


def test_snake_traverse_walks_odd_rows_and_planes_back():
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.arange(3.0))[None]
    for order in ("xyz", "zxy"):
        c1, c2, c3 = (grid[0, :, "xyz".index(a)].long() for a in order)
        M1, M2 = int(c1.max()), int(c2.max())
        expected = []
        for a, b, c in zip(c1.tolist(), c2.tolist(), c3.tolist(), strict=True):
            k = (b + 1) * M1 - a if b % 2 else b * M1 + a
            expected.append((c + 1) * M1 * M2 - k if c % 2 else c * M1 * M2 + k)
        assert paths.codes(grid, f"{order}-snake", grid_size=1.0)[0].tolist() == expected


def test_points_errors():
    points = torch.rand(1, 5, 3)
    with pytest.raises(ValueError, match="did you mean hilbert"):
        paths.serialize(points, "hilbrt")
    with pytest.raises(ValueError, match=r"\(batch, points, 3\)"):
        paths.serialize(points[0])
    with pytest.raises(ValueError, match="larger grid_size"):
        paths.serialize(points, grid_size=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        paths.serialize(points * torch.nan)
    with pytest.raises(ValueError, match="positive"):
        paths.serialize(points, grid_size=0)
    with pytest.raises(ValueError, match="floating"):
        paths.serialize(points.long())
    fixed = paths.serialize(torch.cat([points, points * 0.5]), depth=8)
    assert torch.equal(fixed[:1], paths.serialize(points, depth=8))


def test_compiles_without_graph_breaks():
    def flip(x):
        return x[:, paths.get("cross", (3, 4))[3]]

    x = torch.randn(2, 12)
    assert torch.equal(torch.compile(flip, fullgraph=True, backend="eager")(x), flip(x))
