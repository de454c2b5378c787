"""Visiting orders of grids, as numpy index vectors.

A generator takes ``size`` (a tuple of axis lengths, slowest axis first: (H, W) or (T, H, W)) and returns the raster
index of the cell visited at each step, shape (steps,), or one row per direction, shape (directions, steps). Combinators
take other orders first, as callables ``size -> (directions, steps)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from . import curves

Size = tuple[int, ...]
Order = Callable[[Size], np.ndarray]


def need_axes(size: Size, count: int, name: str) -> None:
    """Refuse a size that does not have ``count`` axes."""
    if len(size) != count:
        raise ValueError(
            f"path {name!r} is defined on a grid of {count} axes, but size is {size}; "
            f"give {count} lengths ({'H, W' if count == 2 else 'T, H, W'})"
        )


def cells(size: Size) -> np.ndarray:
    """The raster index of every cell, in the shape of the grid."""
    return np.arange(int(np.prod(size)), dtype=np.int64).reshape(size)


def plane(size: Size, name: str) -> np.ndarray:
    need_axes(size, 2, name)
    return cells(size)


# --------------------------------------------------------------------------------------------- plain orders


def raster(size: Size) -> np.ndarray:
    """Row-major: the last axis fastest."""
    return cells(size).reshape(-1)


def column(size: Size) -> np.ndarray:
    """Column-major within each plane: the last two axes exchanged."""
    if len(size) < 2:
        raise ValueError(f"path 'column' needs a grid of at least 2 axes, but size is {size}")
    return np.moveaxis(cells(size), -1, -2).reshape(-1)


def reverse(size: Size, *orders: Order) -> np.ndarray:
    """The order (default raster) from its end. Of a family, every direction from its end."""
    if not orders:
        return raster(size)[::-1]
    return np.concatenate([order(size)[:, ::-1] for order in orders])


def _snake(grid: np.ndarray) -> np.ndarray:
    if grid.ndim == 1:
        return grid
    return np.concatenate([_snake(part)[:: -1 if i % 2 else 1] for i, part in enumerate(grid)] or [grid.reshape(-1)])


def snake(size: Size) -> np.ndarray:
    """Raster with every odd line walked back, so that each step goes to a neighbour; any number of axes.

    Source: PlainMamba (``get_permute_order``), its first direction; three axes: even frames by the snake, odd frames
    by the reversed snake.
    """
    return _snake(cells(size))


def axes(size: Size, order: str | int = "") -> np.ndarray:
    """Raster after permuting the axes: ``axes(order=rtc)`` walks r slowest, c fastest.

    Letters name the axes (t, r, c; of two axes r, c); digits count them from the slowest.
    """
    letters = {1: "c", 2: "rc", 3: "trc"}.get(len(size), "")
    text = str(order)
    digits = [letters.find(x) if x in letters else int(x) if x.isdigit() else -1 for x in text]
    if sorted(digits) != list(range(len(size))):
        raise ValueError(f"axes(order={text}): expected every axis of {size} once, as letters of {letters!r} or digits")
    return cells(size).transpose(digits).reshape(-1)


def shuffle(size: Size, seed: int = 0) -> np.ndarray:
    """A random permutation, the same for the same seed on every platform (numpy's PCG64 bit stream)."""
    keys = np.random.PCG64(seed).random_raw(int(np.prod(size)))
    return np.argsort(np.atleast_1d(keys), kind="stable").astype(np.int64)


def interleave(size: Size, slices: int | None = None) -> np.ndarray:
    """The p-th cell of every one of ``slices`` equal chunks, then p + 1 (default: one chunk per slowest-axis slice).

    Source: SegMamba, inter-slice direction (``nslices``).
    """
    total = int(np.prod(size))
    count = size[0] if slices is None else slices
    if count < 1 or total % count:
        raise ValueError(f"interleave(slices={count}): {total} cells of {size} do not divide into {count} equal slices")
    return np.arange(total, dtype=np.int64).reshape(count, -1).T.reshape(-1)


# ------------------------------------------------------------------------------------- diagonals, spiral


def diagonal(size: Size) -> np.ndarray:
    """Diagonals that end at the border: c - r ascending, r ascending within one."""
    grid = plane(size, "diagonal")
    r, c = np.indices(size)
    return grid.reshape(-1)[np.lexsort((r.reshape(-1), (c - r).reshape(-1)))]


def antidiagonal(size: Size) -> np.ndarray:
    """Antidiagonals that end at the border: r + c ascending, r ascending within one."""
    grid = plane(size, "antidiagonal")
    r, c = np.indices(size)
    return grid.reshape(-1)[np.lexsort((r.reshape(-1), (c + r).reshape(-1)))]


def _wrapped(size: Size, sign: int, name: str) -> np.ndarray:
    plane(size, name)
    H, W = size
    start, r = np.meshgrid(np.arange(W), np.arange(H), indexing="ij")
    return (r * W + (start + sign * r) % max(W, 1)).reshape(-1)


def wrapped_diagonal(size: Size) -> np.ndarray:
    """Diagonals that wrap around the right border. Source: RS-Mamba, omnidirectional scan."""
    return _wrapped(size, 1, "wrapped_diagonal")


def wrapped_antidiagonal(size: Size) -> np.ndarray:
    """Antidiagonals that wrap around the left border. Source: RS-Mamba, omnidirectional scan."""
    return _wrapped(size, -1, "wrapped_antidiagonal")


def omnidirectional(size: Size) -> np.ndarray:
    """Eight directions: rows, columns, their reverses, both wrapped diagonals, their reverses. Source: RS-Mamba."""
    first = np.stack([raster(size), column(size)])
    second = np.stack([wrapped_diagonal(size), wrapped_antidiagonal(size)])
    return np.concatenate([first, first[:, ::-1], second, second[:, ::-1]])


def spiral(size: Size) -> np.ndarray:
    """Clockwise from the first cell inwards."""
    grid = plane(size, "spiral")
    rings = []
    while grid.size:
        rings.append(grid[0])
        grid = grid[1:].T[::-1]  # drop the row just walked, turn the rest a quarter
    return np.concatenate(rings) if rings else np.zeros(0, np.int64)


def _jpeg(grid: np.ndarray) -> np.ndarray:
    r, c = np.indices(grid.shape)
    s = r + c
    return grid.reshape(-1)[np.lexsort((np.where(s % 2, r, -r).reshape(-1), s.reshape(-1)))]


def jpeg(size: Size) -> np.ndarray:
    """JPEG zigzag: antidiagonals, even ones upwards, odd ones downwards; first move to the right."""
    return _jpeg(plane(size, "jpeg"))


# ------------------------------------------------------------------------------- families of directions


def bidirectional(size: Size, *orders: Order) -> np.ndarray:
    """An order (default raster) and its reverse. Source: Vim."""
    base = np.concatenate([order(size) for order in orders]) if orders else raster(size)[None]
    return np.concatenate([base, base[:, ::-1]])


def cross(size: Size, *orders: Order) -> np.ndarray:
    """Rows, columns, rows reversed, columns reversed, in this order (VMamba CrossScan; the K axis of its weights).

    ``cross(x)``: x, x of the transposed grid, and both reversed.
    """
    if len(orders) > 1:
        raise ValueError(f"cross() takes one order, got {len(orders)}")
    base = np.concatenate([orders[0](size), transpose(size, orders[0])]) if orders else None
    if base is None:
        base = np.stack([raster(size), column(size)])
    return np.concatenate([base, base[:, ::-1]])


def continuous(size: Size) -> np.ndarray:
    """The snake over rows, reversed, over columns, reversed. Source: PlainMamba."""
    grid = plane(size, "continuous")
    rows, columns = _snake(grid), _snake(grid.T)
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


def _corners(size: Size, name: str, walk: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``walk`` by rows and by columns, from each corner: none, columns, rows, both mirrored."""
    grid = plane(size, name)
    mirrored = [grid, grid[:, ::-1], grid[::-1], grid[::-1, ::-1]]
    return np.stack([walk(g) for m in mirrored for g in (m, m.T)])


def sweep(size: Size) -> np.ndarray:
    """Eight directions: row-major and column-major from each corner. Source: DiMSUM, ZigMa ("sweep")."""
    return _corners(size, "sweep", lambda g: g.reshape(-1))


def zigma(size: Size) -> np.ndarray:
    """Eight directions: the snake over rows and over columns from each corner. Source: ZigMa."""
    return _corners(size, "zigma", _snake)


def jpeg_zigzag(size: Size) -> np.ndarray:
    """Eight directions: the JPEG zigzag and its transpose from each corner. Source: DiMSUM."""
    return _corners(size, "jpeg_zigzag", _jpeg)


# --------------------------------------------------------------------------------- windows and strides


def _padded(size: Size, step: int) -> Size:
    return tuple(-(-n // step) * step for n in size)


def local(size: Size, *orders: Order, w: int = 7, column_first: bool = False, pad: bool = False) -> np.ndarray:
    """Windows of side ``w`` in row-major order, row-major inside each; ``column_first``: both column-major.

    ``local(x, w=8)`` walks the inside of each window by the order x. Where w does not divide a side: by default the
    cells outside the grid are skipped; ``pad=true`` keeps them, with indices into the grid padded at the bottom and
    right (what the originals do: zero-pad before, crop after). Source: LocalMamba (w 2 and 7), DiMSUM.
    """
    if w < 1:
        raise ValueError(f"local(w={w}): the window's side must be at least 1")
    if len(orders) > 1:
        raise ValueError(f"local() takes one order for the inside of a window, got {len(orders)}")
    full = _padded(size, w)
    count = len(size)
    grid = cells(full).reshape([n for side in full for n in (side // w, w)])
    outer, inner = list(range(0, 2 * count, 2)), list(range(1, 2 * count, 2))
    if column_first:
        outer, inner = outer[::-1], inner[::-1]
    walk = grid.transpose(outer + inner).reshape(-1, w**count)
    if orders:
        walk = np.stack([walk[:, row].reshape(-1) for row in orders[0]((w,) * count)])
    else:
        walk = walk.reshape(1, -1)
    return walk if pad else _crop(walk, full, size)


def _crop(walk: np.ndarray, full: Size, size: Size) -> np.ndarray:
    """Skip the cells of the padded grid ``full`` that lie outside ``size``, and index the rest in ``size``."""
    if full == size:
        return walk
    where = np.stack(np.unravel_index(walk, full))
    inside = np.all(where < np.asarray(size)[:, None, None], axis=0)
    kept = [np.ravel_multi_index(tuple(w[inside[k]] for w in where[:, k]), size) for k in range(len(walk))]
    return np.stack(kept).astype(np.int64)


def efficient(size: Size, step: int = 2, pad: bool = False) -> np.ndarray:
    """Atrous skip sampling: step x step interleaved sub-grids, each a direction of 1/step^2 of the length.

    Sub-grid (i, j) is number j * step + i, row-major for even i and column-major for odd i. Sides that ``step`` does
    not divide need ``pad=true`` (indices of the grid padded at the bottom and right). Source: EfficientVMamba ES2D.
    """
    need_axes(size, 2, "efficient")
    if step < 1:
        raise ValueError(f"efficient(step={step}): the stride must be at least 1")
    full = _padded(size, step)
    if full != size and not pad:
        raise ValueError(
            f"efficient(step={step}): {size} does not divide by {step}, so the directions would differ in length; "
            f"pad the grid to {full} and say efficient(pad=true)"
        )
    grid = cells(full)
    parts = [(i, grid[i::step, j::step]) for j in range(step) for i in range(step)]
    return np.stack([(g.T if i % 2 else g).reshape(-1) for i, g in parts])


# ------------------------------------------------------------------------------------------ space and time


def temporal_first(size: Size) -> np.ndarray:
    """For every place, all times: the slowest axis of the grid walked fastest."""
    return np.moveaxis(cells(size), 0, -1).reshape(-1)


def spacetime(size: Size) -> np.ndarray:
    """Bidirectional in space and time: frame by frame, its reverse, place by place, its reverse."""
    return np.stack([raster(size), raster(size)[::-1], temporal_first(size), temporal_first(size)[::-1]])


def axis_orders(size: Size) -> np.ndarray:
    """Raster after every permutation of the axes, in lexicographic order (six of three axes)."""
    return np.stack([cells(size).transpose(p).reshape(-1) for p in itertools.permutations(range(len(size)))])


def tri_orientated(size: Size, slices: int | None = None) -> np.ndarray:
    """Forward, reverse, and across slices (:func:`interleave`). Source: SegMamba ToM."""
    return np.stack([raster(size), raster(size)[::-1], interleave(size, slices)])


# ------------------------------------------------------------------------------------------- combinators


def transpose(size: Size, *orders: Order) -> np.ndarray:
    """An order of the grid with its last two axes exchanged (default raster, which gives the columns)."""
    if len(size) < 2:
        raise ValueError(f"transpose() needs a grid of at least 2 axes, but size is {size}")
    grid = np.moveaxis(cells(size), -1, -2)
    return _through(grid, orders)


def mirror(size: Size, *orders: Order, axis: int = -1) -> np.ndarray:
    """An order of the mirrored grid (default raster); ``axis`` is the axis that is mirrored."""
    if not -len(size) <= axis < len(size):
        raise ValueError(f"mirror(axis={axis}): the grid {size} has axes 0 to {len(size) - 1}")
    return _through(np.flip(cells(size), axis), orders)


def _through(grid: np.ndarray, orders: tuple[Order, ...]) -> np.ndarray:
    flat = grid.reshape(-1)
    if not orders:
        return flat
    return flat[np.concatenate([order(grid.shape) for order in orders])]


def height(size: Size, *orders: Order) -> np.ndarray:
    """A two-axis order (default quadrant) of the first two axes, with the whole column of the third at each cell.

    Source: OccMamba, height-prioritised 2D Hilbert expansion (its "Hilbert" is :func:`quadrant`).
    """
    need_axes(size, 3, "height")
    X, Y, Z = size
    base = np.concatenate([order((X, Y)) for order in orders]) if orders else curves.quadrant((X, Y))[None]
    walk = base[..., None] * Z + np.arange(Z)
    return walk.reshape(len(base), -1)


def h2he(size: Size, order: str = "xy", inverse: bool = False) -> np.ndarray:
    """OccMamba's ``H2HE_order_index_within_range``: ``order`` xy or yx, ``inverse`` from the far corner."""
    if order not in ("xy", "yx"):
        raise ValueError(f"h2he(order={order}): expected xy or yx")
    need_axes(size, 3, "h2he")

    def base(flat: Size) -> np.ndarray:
        walk = curves.quadrant(flat) if order == "xy" else _through(cells(flat).T, (_as_order(curves.quadrant),))[0]
        return (flat[0] * flat[1] - 1 - walk if inverse else walk)[None]

    return height(size, base)


def _as_order(function: Callable[[Size], np.ndarray]) -> Order:
    return lambda size: np.atleast_2d(function(size))
