"""Visiting orders: in which order a scan walks the cells of a grid or the points of a cloud.

::

    from zoo_kernels import paths

    paths.get("cross", (14, 14))                      # (4, 196): VMamba's four directions
    paths.get("hilbert + reverse(hilbert)", (14, 14)) # (2, 196)
    paths.get("local(w=7)", (14, 14), device=x.device)
    paths.get("zigma[3]", (16, 16))                   # one direction of a family
    paths.serialize(points, "hilbert-trans")          # (B, N) per-sample orders of point clouds

``order[k, t]`` is the raster index (last axis fastest) of the cell that direction k visits at step t; scans take it
as ``path=``. Names joined with "+" are stacked as directions; names compose ("reverse(hilbert)", "local(hilbert, w=8)",
"height(hilbert)") and take parameters ("shuffle(seed=3)"). :func:`names` lists them, :func:`register` adds to them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import curves, grids
from ._grammar import Node, Paths, parse
from .points import POINT_ORDERS, codes, grid_coordinates, serialize

__all__ = [
    "POINT_ORDERS", "clear_cache", "codes", "direction_codes", "get", "grid_coordinates", "inverse", "names",
    "register", "serialize",
]  # fmt: skip

_CACHE_BYTES = 256 << 20  # the cache keeps at most this much index memory over all devices
_lock = threading.RLock()
_cache: OrderedDict[tuple, Tensor] = OrderedDict()

_ORDERS: dict[str, Callable[..., np.ndarray] | str] = {
    name: getattr(module, name)
    for module, listed in (
        (grids, """raster column reverse snake axes shuffle interleave diagonal antidiagonal wrapped_diagonal
                   wrapped_antidiagonal omnidirectional spiral jpeg bidirectional cross continuous sweep zigma
                   jpeg_zigzag local efficient temporal_first spacetime axis_orders tri_orientated transpose mirror
                   height h2he"""),
        (curves, "hilbert trans_hilbert morton trans_morton quadrant"),
    )
    for name in listed.split()
}  # fmt: skip
_ALIASES = {
    "row": "raster", "h": "raster", "spatial_first": "raster", "v": "column", "zigzag": "snake", "atrous": "efficient",
    "z_order": "morton", "hilbert_trans": "trans_hilbert", "z_order_trans": "trans_morton", "vim": "bidirectional",
    "height_hilbert": "h2he",
}  # fmt: skip


def names() -> list[str]:
    """The names that :func:`get` knows, sorted (aliases are left out)."""
    return sorted(_ORDERS)


def register(name: str, fn: Callable[..., np.ndarray] | str, *, replace: bool = False) -> None:
    """Add an order. ``fn(size, **parameters)`` returns raster indices, (steps,) or (directions, steps).

    ``fn`` may be an import string "module:function", resolved on first use. If ``fn`` takes orders (``fn(size,
    *orders, ...)``), each is a callable ``size -> (directions, steps)``. Raises ValueError when the name is taken by
    another function (unless ``replace``) or is not made of lower-case letters, digits and underscores.
    """
    if not name.replace("_", "a").isalnum() or name != name.lower():
        raise ValueError(f"path name {name!r}: use lower-case letters, digits and underscores")
    with _lock:
        taken = _ORDERS.get(name, _ALIASES.get(name))
        if taken is not None and taken != fn and not replace:
            raise ValueError(f"a path named {name!r} exists already ({taken}); choose another name or replace=True")
        _ORDERS[name] = fn
        for key in [k for k in _cache if name in k[0]]:
            del _cache[key]


def _function(name: str) -> Callable[..., np.ndarray]:
    entry = _ORDERS.get(_ALIASES.get(name, name))
    if entry is None:
        near = difflib.get_close_matches(name, [*_ORDERS, *_ALIASES], 4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names())}"
        raise ValueError(f"unknown path {name!r}; {hint}")
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(importlib.import_module(module), attribute)
        _ORDERS[name] = entry
    return entry


def _build(node: Node, size: tuple[int, ...]) -> np.ndarray:
    function = _function(node.name)
    known = inspect.signature(function).parameters
    variadic = any(p.kind is p.VAR_POSITIONAL for p in known.values())
    options = [k for k, p in known.items() if k != "size" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key, _ in node.params:
        if key not in options and not anything:
            raise ValueError(f"path {node.name!r} has no parameter {key!r}; it has: {', '.join(options) or 'none'}")
    if node.orders and not variadic:
        raise ValueError(f"path {node.name!r} is not applied to other paths; write {node.name} alone or joined by '+'")
    inner = [lambda s, nodes=nodes: _stack(nodes, s) for nodes in node.orders]
    order = np.atleast_2d(np.asarray(function(size, *inner, **dict(node.params)), dtype=np.int64))
    if node.pick is not None:
        if not -len(order) <= node.pick < len(order):
            raise ValueError(f"path {node.name!r} has {len(order)} directions; [{node.pick}] is not one of them")
        order = order[node.pick][None]
    return order


def _stack(nodes: Paths, size: tuple[int, ...]) -> np.ndarray:
    rows = [_build(node, size) for node in nodes]
    if len({r.shape[1] for r in rows}) > 1:
        lengths = ", ".join(f"{n.name} {r.shape[1]}" for n, r in zip(nodes, rows, strict=True))
        raise ValueError(f"paths joined by '+' must have one number of steps; got {lengths} on the grid {size}")
    return np.concatenate(rows)


def _lookup(spec: str, size: tuple[int, ...], device: str) -> Tensor:
    with _lock:
        nodes = parse(spec)
        key = (repr(nodes), size, device)  # spelling does not matter
        found = _cache.get(key)
        if found is None:
            order = np.ascontiguousarray(_stack(nodes, size))
            with torch.inference_mode(False):  # or training could not use what inference cached
                found = torch.from_numpy(order).to(device)
            if type(found) is not Tensor:  # a tracer's stand-in (torch.export): good for this trace alone
                return found
            _cache[key] = found
            while len(_cache) > 1 and sum(t.numel() * 8 for t in _cache.values()) > _CACHE_BYTES:
                _cache.popitem(last=False)
        else:
            _cache.move_to_end(key)
        return found


# A compiled graph holds the order as a constant: it depends on names and sizes alone.
_lookup_constant = torch.compiler.assume_constant_result(_lookup)


def get(spec: str, size: int | Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """The visiting orders that ``spec`` names, on a grid of ``size``: (directions, steps) int64.

    spec: for example "cross", "hilbert + reverse(hilbert)", "local(w=7)", "zigma[3]"; ``reverse`` alone is the
    reversed raster. size: (H, W), (T, H, W) or one length. device: default the CPU. The tensor is cached (by spec,
    size and device, least recently used out first) and shared: do not write into it.

    Raises ValueError for a name that is not known (with the nearest ones), a parameter that the order does not have,
    a size it is not defined on, or a spec that cannot be read.
    """
    dims = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    if not dims or min(dims) < 0:
        raise ValueError(f"size is {size!r}; expected one or more axis lengths, none negative")
    if not isinstance(spec, str):
        raise ValueError(f"the path is {type(spec).__name__}; expected a name such as 'cross' or 'reverse(hilbert)'")
    return _lookup_constant(spec, dims, str(torch.device("cpu" if device is None else device)))


def clear_cache() -> None:
    """Forget the cached orders."""
    with _lock:
        _cache.clear()


def inverse(order: Tensor, length: int | None = None) -> Tensor:
    """The step at which each row is visited: ``inverse(order)[..., order[..., k]] = k``.

    order: (..., steps) int64. length: number of rows, default ``steps``; rows that are not visited give -1.
    Raises ValueError when an index is outside or repeated.
    """
    steps = order.shape[-1]
    rows = steps if length is None else length
    if order.numel() and (int(order.min()) < 0 or int(order.max()) >= rows):
        raise ValueError(
            f"order holds indices from {int(order.min())} to {int(order.max())}; expected 0 to {rows - 1} "
            "(give length= when the order visits a part of the rows)"
        )
    found = torch.full((*order.shape[:-1], rows), -1, dtype=torch.int64, device=order.device)
    found.scatter_(-1, order.long(), torch.arange(steps, device=order.device).expand(order.shape))
    if int((found >= 0).sum()) != order.numel():
        raise ValueError("order visits a row twice; it has no inverse")
    return found


def direction_codes(order: Tensor, size: Sequence[int]) -> Tensor:
    """The move into each step of a continuous 2D order: 0 start, 1 right, 2 left, 3 up, 4 down; same shape as order.

    Source: PlainMamba (arXiv 2403.17695), direction-aware updating. Raises ValueError where a step is not to one of
    the four neighbours.
    """
    if len(size) != 2:
        raise ValueError(f"size is {tuple(size)}; direction codes are defined on (H, W)")
    row, col = order // size[1], order % size[1]
    dr, dc = row.diff(dim=-1), col.diff(dim=-1)
    if int((dr.abs() + dc.abs() != 1).sum()):
        raise ValueError("the order jumps; direction codes need steps to one of the four neighbours (see 'continuous')")
    moves = torch.where(dc == 1, 1, torch.where(dc == -1, 2, torch.where(dr == -1, 3, 4)))
    start = torch.zeros_like(order[..., : min(1, order.shape[-1])])
    return torch.cat([start, moves.to(order.dtype)], dim=-1)
