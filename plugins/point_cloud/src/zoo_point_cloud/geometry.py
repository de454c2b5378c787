"""Farthest point sampling, nearest neighbours and interpolation: exact, and the same on every device.

Distances are ``((dx*dx + dy*dy) + dz*dz)`` in float32 (float64 for float64 points), squared. Among equal distances the
lower index wins, everywhere. That makes results a function of the points alone, whatever computes them: numpy's loop,
fpsample (where installed) or scipy's k-d tree on a CPU; torch, or torch_cluster (where installed), on other devices.
A library's answer is used where it is the definition's: fpsample's because its arithmetic is the same and its ties can
be turned round, torch_cluster's after a check of every step.
"""

from __future__ import annotations

import functools
import importlib
import platform
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo_kernels import paths
from zoo_kernels.runtime import on_threads

#: Most pairs of points whose distances are held at once.
_PAIRS = 1 << 24
#: From this many candidates a k-d tree beats comparing all pairs on a CPU.
_TREE_FROM = 256
#: Up to this many points fpsample's loop is faster than numpy's.
_FPSAMPLE_UP_TO = 8192


@functools.cache
def _library(name: str) -> ModuleType | None:
    """An optional library, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def check_points(points: Tensor, what: str = "points") -> None:
    """Raises ValueError unless ``points`` is a floating (batch, N, 3) tensor, not empty, with finite coordinates."""
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"{what} have shape {tuple(points.shape)}; expected (batch, points, 3)")
    if not points.is_floating_point():
        raise ValueError(f"{what} have dtype {points.dtype}; expected a floating dtype")
    if 0 in points.shape:
        raise ValueError(f"{what} are empty: shape {tuple(points.shape)}; expected a cloud or more, of a point or more")
    # Cloud by cloud: for so few numbers torch wakes none of its threads, which would go on spinning beside ours.
    if not all(bool(torch.isfinite(cloud).all()) for cloud in points):
        bad = int((~torch.isfinite(points)).any(dim=-1).sum())
        raise ValueError(f"{what}: {bad} have NaN or infinite coordinates; remove or replace them first")


def _exact(points: Tensor) -> Tensor:
    """Coordinates in the precision that distances are computed in."""
    return points if points.dtype == torch.float64 else points.float()


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows by index in each cloud: values (batch, N, C), index (batch, ...) -> (batch, ..., C)."""
    batch, n, channels = values.shape
    start = torch.arange(0, batch * n, n, device=index.device).view(-1, *(1,) * (index.dim() - 1))
    # Whole rows of one table: many times faster than Tensor.gather, which reads an index for every number.
    return values.reshape(-1, channels).index_select(0, (index + start).flatten()).view(*index.shape, channels)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """a (..., M, 3), b (..., N, 3) to (..., M, N). Differences are squared: no cancellation of large products."""
    dx, dy, dz = ((a[..., :, None, i] - b[..., None, :, i]) for i in range(3))
    return (dx * dx + dy * dy) + dz * dz


def centred(points: np.ndarray) -> np.ndarray:
    """Points (N, 3) float32 less their mean, which is summed in double precision: a million rows in single precision
    add up to something else."""
    return points - points.mean(axis=0, dtype=np.float64).astype(np.float32)


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Points (N, 3) float32 less their mean, over the largest distance from it. Points at one place are all zero."""
    points = centred(points)
    return points / np.float32(np.sqrt((points.astype(np.float64) ** 2).sum(axis=1)).max() or 1.0)


# -- farthest point sampling ------------------------------------------------------------------------------------------


def farthest_point_sample(points: Tensor, count: int, *, skip_origin: bool = False) -> Tensor:
    """Indices of ``count`` points, each the farthest from those before it: (batch, N, 3) to (batch, count) int64.

    Starts at index 0; the first maximum wins. ``skip_origin``: points with squared norm <= 1e-3 are never chosen (but
    index 0), as in the CUDA kernel of pointnet2_ops. When only duplicates are left, index 0 is repeated.
    No gradient. Raises ValueError for another shape or unless 0 < count <= N.
    Source: Eldar et al. 1997; Qi et al., "PointNet++", arXiv 1706.02413, section 3.2.
    """
    check_points(points)
    if not 0 < count <= points.shape[1]:
        raise ValueError(f"{count} points are to be sampled from {points.shape[1]}; expected 1 to {points.shape[1]}")
    xyz = _exact(points.detach())
    if xyz.device.type == "cpu":
        return torch.from_numpy(np.stack([_sample_cloud(cloud.numpy(), count, skip_origin) for cloud in xyz]))
    if not skip_origin and (library := _library("torch_cluster")) is not None:
        found = _sample_with_cluster(library, xyz, count)
        if is_farthest_sequence(xyz, found):
            return found
    return _sample_batch(xyz, count, skip_origin)


def _sample_cloud(cloud: np.ndarray, count: int, skip_origin: bool) -> np.ndarray:
    """One cloud on the CPU, with fpsample where it is installed and faster."""
    library = _library("fpsample")
    if (
        library is None
        or cloud.dtype != np.float32
        or len(cloud) > _FPSAMPLE_UP_TO
        or platform.machine().lower() not in ("x86_64", "amd64")  # elsewhere compilers may fuse multiply and add
        or not np.isfinite(cloud).all()
    ):
        return _sample_one(cloud, count, skip_origin)
    allowed = None
    if skip_origin:  # a point that is never chosen changes no distance: it can be left out
        far = _squared_norms(cloud) > 1e-3
        if not far[0] or far.sum() < count:
            return _sample_one(cloud, count, skip_origin)
        allowed = far.nonzero()[0]
        cloud = cloud[allowed]
    # Of equal distances fpsample takes the last: it walks the cloud from its end, so that the first is taken.
    last = len(cloud) - 1
    found = last - library.fps_sampling(np.ascontiguousarray(cloud[::-1]), count, start_idx=last).astype(np.int64)
    return found if allowed is None else allowed[found]


def _squared_norms(cloud: np.ndarray) -> np.ndarray:
    x, y, z = (np.ascontiguousarray(cloud[:, i]) for i in range(3))
    return (x * x + y * y) + z * z


def _sample_one(cloud: np.ndarray, count: int, skip_origin: bool) -> np.ndarray:
    """One cloud on the CPU. The loop is sequential by nature; every step reuses the same four buffers."""
    x, y, z = (np.ascontiguousarray(cloud[:, i]) for i in range(3))
    nearest = np.full(len(x), np.inf, dtype=x.dtype)
    if skip_origin:
        nearest[_squared_norms(cloud) <= 1e-3] = -1.0
    total, part = np.empty_like(x), np.empty_like(x)
    chosen = np.zeros(count, dtype=np.int64)
    last = 0
    for k in range(1, count):
        np.subtract(x, x[last], out=total)
        np.multiply(total, total, out=total)
        np.subtract(y, y[last], out=part)
        np.multiply(part, part, out=part)
        np.add(total, part, out=total)
        np.subtract(z, z[last], out=part)
        np.multiply(part, part, out=part)
        np.add(total, part, out=total)
        np.minimum(nearest, total, out=nearest)
        last = int(nearest.argmax())
        chosen[k] = last
    return chosen


def _sample_batch(xyz: Tensor, count: int, skip_origin: bool) -> Tensor:
    """The same steps in torch, for all clouds at once."""
    batch, n, _ = xyz.shape
    x, y, z = (xyz[..., i].contiguous() for i in range(3))
    nearest = torch.full_like(x, torch.inf)
    if skip_origin:
        nearest = torch.where((x * x + y * y) + z * z <= 1e-3, torch.full_like(x, -1.0), nearest)
    chosen = torch.zeros(batch, count, dtype=torch.int64, device=xyz.device)
    # argmax may return any of several maxima on some devices; the lowest index among them is asked for.
    number = torch.arange(n, device=xyz.device).expand(batch, n)
    last = chosen[:, :1]
    for k in range(1, count):
        dx, dy, dz = (a - a.gather(1, last) for a in (x, y, z))
        nearest = torch.minimum(nearest, (dx * dx + dy * dy) + dz * dz)
        best = nearest.amax(dim=1, keepdim=True)
        last = torch.where(nearest == best, number, n).amin(dim=1, keepdim=True)
        chosen[:, k : k + 1] = last
    return chosen


def _sample_with_cluster(library: Any, xyz: Tensor, count: int) -> Tensor:
    """torch_cluster's sampling, from index 0: it may break ties otherwise and fuse multiply and add."""
    batch, n, _ = xyz.shape
    owner = torch.arange(batch, device=xyz.device).repeat_interleave(n)
    # It takes ceil(ratio * n) points of each cloud.
    flat = library.fps(xyz.reshape(-1, 3), owner, ratio=(count - 0.5) / n, random_start=False)
    return flat.view(batch, count) - torch.arange(batch, device=xyz.device)[:, None] * n


def is_farthest_sequence(xyz: Tensor, index: Tensor) -> bool:
    """Whether ``index`` (batch, count) is what :func:`farthest_point_sample` is defined to give for ``xyz`` (batch, N,
    3): every step is compared, many at a time, which on a GPU costs far less than the steps themselves."""
    batch, n, _ = xyz.shape
    number = torch.arange(n, device=xyz.device)
    nearest = torch.full((batch, 1, n), torch.inf, dtype=xyz.dtype, device=xyz.device)
    if bool((index[:, 0] != 0).any()):
        return False
    for start in range(0, index.shape[1] - 1, step := max(1, _PAIRS // (batch * n))):
        end = min(start + step, index.shape[1] - 1)
        distance = squared_distances(gather(xyz, index[:, start:end]), xyz)
        running = torch.cat([nearest, distance], dim=1).cummin(dim=1).values[:, 1:]
        nearest = running[:, -1:]
        first = torch.where(running == running.amax(dim=2, keepdim=True), number, n).amin(dim=2)
        if not torch.equal(first, index[:, start + 1 : end + 1]):
            return False
    return True


# -- orders -----------------------------------------------------------------------------------------------------------


def serialise_each(points: Tensor, order: str, grid_size: float) -> Tensor:
    """Every cloud's visiting order as if it were alone: (batch, N, 3) to (batch, N) int64.

    ``order``: one of ``zoo_kernels.paths.POINT_ORDERS``. Clouds whose curves have one number of bits go together.
    """
    if not order.startswith(("hilbert", "z")) or order.removesuffix("-snake") in paths.points.TRAVERSES:
        return torch.cat([paths.serialize(cloud[None], order, grid_size=grid_size) for cloud in points])
    found = torch.empty(points.shape[:2], dtype=torch.int64, device=points.device)
    widest = paths.grid_coordinates(points, grid_size).amax(dim=(1, 2)).tolist()
    bits = torch.tensor([width.bit_length() for width in widest], device=points.device)
    for depth in sorted({width.bit_length() for width in widest}):
        some = bits == depth
        found[some] = paths.serialize(points[some], order, grid_size=grid_size, depth=depth)
    return found


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def nearest_neighbours(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of ``points`` (batch, N, 3) to each of ``query`` (batch, M, 3), nearest first.

    Returns squared distances and indices, (batch, M, k) each; equal distances by index. No gradient.
    Raises ValueError for another shape or unless 0 < k <= N.
    """
    check_points(query, "query points")
    check_points(points)
    if not 0 < k <= points.shape[1]:
        raise ValueError(
            f"{k} nearest neighbours are asked of {points.shape[1]} points; expected 1 to {points.shape[1]}: "
            "give a larger cloud or a model with fewer neighbours"
        )
    a, b = _exact(query.detach()), _exact(points.detach())
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    if b.device.type == "cpu" and b.shape[1] >= _TREE_FROM and k + 8 <= b.shape[1] // 4:
        return _tree_search(a, b, k)
    return _search(a, b, k)


def _search(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All pairs, in pieces of the queries that bound memory."""
    step = max(1, _PAIRS // max(1, a.shape[0] * b.shape[1]))
    parts = [_smallest(squared_distances(piece, b), k) for piece in a.split(step, dim=1)]
    return torch.cat([d for d, _ in parts], dim=1), torch.cat([i for _, i in parts], dim=1)


def _smallest(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ties by index."""
    if distance.dtype == torch.float32:
        # Floats that are not negative order like their bits: (distance, index) packs into one integer without ties.
        bits = distance.contiguous().view(torch.int32).long() << 32
        index = torch.arange(distance.shape[-1], device=distance.device)
        found = (bits | index).topk(k, dim=-1, largest=False).values & 0xFFFFFFFF
    else:
        found = distance.argsort(dim=-1, stable=True)[..., :k]
    return distance.gather(-1, found), found


def _tree_search(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """With scipy's k-d tree, one a cloud, the clouds on torch's number of threads.

    The tree finds one neighbour more than needed, in double precision. Where their distances lie clearly apart, their
    order is the definition's. Elsewhere (equal distances, duplicate points) it is asked for more, and where that does
    not settle which are the nearest, all points are compared.
    """
    from scipy.spatial import cKDTree

    queries, clouds = [cloud.numpy() for cloud in query], [cloud.numpy() for cloud in points]
    workers = torch.get_num_threads() if len(clouds) == 1 else 1

    def ask(cloud: int) -> tuple[Any, np.ndarray, np.ndarray]:
        tree = cKDTree(clouds[cloud])
        wide, index = tree.query(queries[cloud], k=k + 1, workers=workers)
        return tree, index[:, :k], (wide[:, 1:] <= wide[:, :-1] * (1 + 1e-6)).any(axis=1)

    answers = on_threads(ask, len(clouds))
    index = torch.from_numpy(np.stack([found for _, found, _ in answers]).astype(np.int64, copy=False))
    for cloud, (tree, _, unclear) in enumerate(answers):
        if unclear.any():
            rows = torch.from_numpy(unclear.nonzero()[0])
            index[cloud, rows] = _settle(tree, query[cloud][rows], points[cloud], k)
    d = query[:, :, None, :] - gather(points, index)
    d = d * d
    return (d[..., 0] + d[..., 1]) + d[..., 2], index


def _settle(tree: Any, query: Tensor, points: Tensor, k: int) -> Tensor:
    """The k nearest of each of one cloud's queries (M, 3) by the definition, out of a few more that the tree names, or
    of all where the k-th is about as far as the farthest of these."""
    more = min(k + 24, len(points))
    wide, candidates = tree.query(query.numpy(), k=more)
    # Ascending indices, so that of equal distances the lower index comes first.
    index = torch.from_numpy(np.sort(candidates.astype(np.int64, copy=False), axis=-1))
    d = query[:, None, :] - points[index]
    d = d * d
    distance, order = _smallest((d[..., 0] + d[..., 1]) + d[..., 2], k)
    index = index.gather(-1, order)
    if more < len(points):
        open_ = distance[:, -1].double() * (1 + 1e-5) >= torch.from_numpy(wide[:, -1] ** 2)
        if bool(open_.any()):
            index[open_] = _search(query[open_][None], points[None], k)[1][0]
    return index


def interpolate(target: Tensor, source: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Features of ``source`` points (batch, S, C) at ``target`` points: (batch, T, C).

    The k nearest, weighted by ``1 / (squared distance + 1e-8)``; a single source point is repeated.
    Source: PointNet++, arXiv 1706.02413, equation 2.
    """
    distance, index = nearest_neighbours(target, source, min(k, source.shape[1]))
    weight = 1.0 / (distance + 1e-8)
    weight = (weight / weight.sum(dim=-1, keepdim=True)).to(features.dtype)
    total: Any = 0
    for j in range(index.shape[-1]):  # one neighbour at a time: no (batch, T, k, C) tensor
        total = total + gather(features, index[..., j]) * weight[..., j : j + 1]
    return total
