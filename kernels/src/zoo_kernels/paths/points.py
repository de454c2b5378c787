"""Visiting orders of point clouds, computed from coordinates on the points' device.

The serialization of PointMamba (``models/serialization.py``) and Point Cloud Mamba (``PCM/PCM_utils.py``):
coordinates are put on an integer grid, a code is computed for each cell, and points are sorted by it (stable, so the
order that came in decides between points of one cell).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

TRAVERSES = tuple("".join(p) for p in itertools.permutations("xyz"))
POINT_ORDERS = (
    "hilbert", "hilbert-trans", "z", "z-trans", *TRAVERSES, *(f"{t}-snake" for t in TRAVERSES),
    "axis-x", "axis-y", "axis-z",
)  # fmt: skip
MAX_DEPTH = 16  # bits per axis of a curve code, as in the originals (48 bits and the batch index fit 63)


def _unknown(order: str) -> ValueError:
    import difflib

    near = difflib.get_close_matches(order, POINT_ORDERS, 3)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(POINT_ORDERS)}"
    return ValueError(f"unknown point order {order!r}{hint}")


def grid_coordinates(points: Tensor, grid_size: float = 0.02) -> Tensor:
    """``floor(points / grid_size)`` minus the minimum of each cloud: (B, N, 3) int64, not negative."""
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"points have shape {tuple(points.shape)}; expected (batch, points, 3)")
    if not points.is_floating_point():
        raise ValueError(f"points have dtype {points.dtype}; expected a floating dtype")
    if not grid_size > 0:
        raise ValueError(f"grid_size is {grid_size}; expected a positive length in the units of the points")
    if not torch.isfinite(points).all():
        raise ValueError("points hold NaN or infinite coordinates; remove or replace them first")
    grid = torch.floor(points / grid_size).long()
    return grid - grid.amin(dim=1, keepdim=True) if points.shape[1] else grid


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    code = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def _skilling(axes: list[Tensor], bits: int) -> Tensor:
    """Hilbert index (Skilling 2004); see :func:`zoo_kernels.paths.curves.skilling_key` for the same in numpy."""
    X = list(axes)
    zero = torch.zeros_like(X[0])
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(X)):
            set_ = ((X[i] >> bit) & 1).bool()
            exchange = torch.where(set_, zero, (X[0] ^ X[i]) & low)
            X[0] = torch.where(set_, X[0] ^ low, X[0]) ^ exchange
            X[i] = X[i] ^ exchange
    for i in range(1, len(X)):
        X[i] = X[i] ^ X[i - 1]
    carry = zero
    for bit in range(bits - 1, 0, -1):
        carry = torch.where(((X[-1] >> bit) & 1).bool(), carry ^ ((1 << bit) - 1), carry)
    return _interleave([x ^ carry for x in X], bits)


def _traverse(axes: list[Tensor], snake: bool) -> tuple[Tensor, int]:
    """Consistent traverse along the named axes; returns the codes and the step between clouds."""
    M = [int(a.max()) if a.numel() else 0 for a in axes]

    def fold(k: Tensor, other: Tensor | int, step: int) -> Tensor:
        odd = other % 2  # rows (planes) of odd number are walked back
        return (other + odd) * step + (1 - 2 * odd) * k

    if snake:
        k = fold(axes[0], axes[1], M[0])
        k = fold(k, axes[2], M[0] * M[1])
    else:
        k = fold(axes[0], M[1], M[0])
        k = fold(k, M[2], M[0] * M[1])
    return k, M[0] * M[1] * M[2]


def codes(
    points: Tensor, order: str = "hilbert", *, grid_size: float = 0.02, depth: int | None = None, batched: bool = False
) -> Tensor:
    """The sorting key of each point, (B, N) int64; ``batched`` adds each cloud's prefix as the originals do.

    ``depth`` is the number of bits per axis of the curves; by default the bits of the largest grid coordinate of the
    whole batch, as in the originals (so a cloud's curve depends on its batch; give ``depth`` to avoid that).
    ``axis-x`` and kin return order-preserving integers of the coordinate itself (no grid).
    Orders: see :func:`serialize`. Raises ValueError for an unknown order and for a depth above 16.
    """
    if order not in POINT_ORDERS:
        raise _unknown(order)
    grid = grid_coordinates(points, grid_size)
    cloud = torch.arange(points.shape[0], device=points.device)[:, None]
    if order.startswith("axis-"):
        rank = points[..., "xyz".index(order[-1])].argsort(dim=1, stable=True).argsort(dim=1)
        return rank + cloud * points.shape[1] if batched else rank
    named = dict(zip("xyz", grid.unbind(-1), strict=True))
    if order.removesuffix("-snake") in TRAVERSES:
        key, step = _traverse([named[a] for a in order[:3]], order.endswith("-snake"))
        return key + cloud * step if batched else key
    bits = max(int(grid.max()).bit_length() if grid.numel() else 0, 0) if depth is None else depth
    if not 0 <= bits <= MAX_DEPTH:
        raise ValueError(
            f"the grid needs {bits} bits per axis, more than {MAX_DEPTH}: the cloud is {int(grid.max())} cells wide; "
            f"use a larger grid_size than {grid_size}"
        )
    if depth is not None and grid.numel() and int(grid.max()) >> depth:
        raise ValueError(f"depth is {depth}, but the largest grid coordinate {int(grid.max())} needs more bits")
    axes = [named[a] for a in ("yxz" if order.endswith("-trans") else "xyz")]
    key = _skilling(axes, bits) if order.startswith("hilbert") else _interleave(axes, bits)
    return (cloud << (3 * bits)) | key if batched else key


def serialize(
    points: Tensor,
    order: str = "hilbert",
    *,
    grid_size: float = 0.02,
    depth: int | None = None,
    across_batch: bool = False,
) -> Tensor:
    """The visiting order of each cloud: (B, N) int64, ``order[b, k]`` is the point visited at step k.

    points: (B, N, 3) floating; grid_size: side of a cell, in the units of the points (0.02 in both systems).

    Orders: ``hilbert``, ``hilbert-trans`` (x and y exchanged), ``z``, ``z-trans``; ``xyz`` ... ``zyx``, the six
    consistent traverses as Point Cloud Mamba's code has them (its loop uses maxima where the paper has coordinates, so
    the first axis decides and points of one slice keep the order they came in); ``xyz-snake`` ... ``zyx-snake``, the
    traverses as the paper describes them; ``axis-x``, ``axis-y``, ``axis-z``, plain sorting by one coordinate.

    ``across_batch=True`` sorts the flattened batch by keys with a cloud prefix, as the originals do, and returns
    (B * N,) indices into it: with a consistent traverse, points can change cloud there.

    Raises ValueError for another shape or dtype, non-finite coordinates, an unknown order, or a grid above 16 bits.
    Source: PointMamba (arXiv 2402.10739), Point Cloud Mamba (arXiv 2403.00762).
    """
    key = codes(points, order, grid_size=grid_size, depth=depth, batched=across_batch)
    if across_batch:
        return key.reshape(-1).argsort(stable=True)
    return key.argsort(dim=1, stable=True)
