"""Neighbourhood attention on an image, in plain torch: every query attends the K x K keys around it.

The rule is NATTEN's (Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143; dilated: arXiv
2209.15001): on each axis a query of dilation r attends K keys of its own residue class modulo r, centred where
possible and shifted inward at the borders, so that there are always K of them.

No compiled dependency and no (positions x K^2 x channels) tensor: queries are cut into tiles, a tile's keys are one
contiguous block, and both products are batched matrix products over tiles. What falls outside a query's window is
masked. The attention map comes back as a tensor, because some models use it more than once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def axis_window(length: int, kernel: int, dilation: int) -> np.ndarray:
    """(length, kernel): the keys of each query on one axis, ascending. Raises ValueError when they do not fit."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"the window is {kernel}; neighbourhood attention needs an odd one")
    if dilation < 1 or length < kernel * dilation:
        raise ValueError(
            f"a window of {kernel} with dilation {dilation} does not fit into a side of {length}; "
            f"the side must be at least {kernel * max(dilation, 1)}"
        )
    at = np.arange(length)
    members = (length - at % dilation + dilation - 1) // dilation  # size of the query's residue class
    start = np.clip(at // dilation - kernel // 2, 0, members - kernel)
    return at[:, None] % dilation + dilation * (start[:, None] + np.arange(kernel))


#: plans kept at most, the oldest out first
_MOST_PLANS = 64


@dataclass(frozen=True)
class _Axis:
    queries: np.ndarray  # (groups, Tq); a short tile repeats its last query
    keys: np.ndarray  # (groups, Tk)
    offset: np.ndarray  # (groups, Tq, Tk): (key - query) / dilation + kernel - 1, or -1 outside the window


def _axis(length: int, kernel: int, dilation: int) -> _Axis:
    window = axis_window(length, kernel, dilation)
    tiles = []
    for residue in range(dilation):
        members = np.arange(residue, length, dilation)
        count = max(1, round(len(members) / max(kernel * 0.75, 4)))
        tiles += np.array_split(members, count)
    keys = [np.arange(window[t[0], 0], window[t[-1], -1] + 1, dilation) for t in tiles]
    Tq, Tk = max(len(t) for t in tiles), max(len(k) for k in keys)
    queries = np.stack([np.pad(t, (0, Tq - len(t)), mode="edge") for t in tiles])
    padded = np.stack([np.pad(k, (0, Tk - len(k)), constant_values=k[0]) for k in keys])
    real = np.stack([np.arange(Tk) < len(k) for k in keys])
    low, high = window[queries, 0], window[queries, -1]  # (groups, Tq)
    inside = (padded[:, None] >= low[..., None]) & (padded[:, None] <= high[..., None]) & real[:, None]
    offset = (padded[:, None] - queries[..., None]) // dilation + kernel - 1
    return _Axis(queries, padded, np.where(inside, offset, -1))


@dataclass(frozen=True)
class Plan:
    """Where the tiles of one grid are. Row indices are raster (row * W + column).

    kernel (Kh, Kw); queries (G, Tq), keys (G, Tk); bias (G, Tq, Tk) indices into a flattened table of
    ``places`` = (2 Kh - 1) (2 Kw - 1) entries, ``places`` itself outside the window; back (H*W) where each query's
    result is among the G * Tq.
    """

    kernel: tuple[int, int]
    queries: Tensor
    keys: Tensor
    bias: Tensor
    back: Tensor

    @property
    def places(self) -> int:
        return (2 * self.kernel[0] - 1) * (2 * self.kernel[1] - 1)


_plans: dict[tuple, Plan] = {}


def _plan(height: int, width: int, kernel: tuple[int, int], dilation: tuple[int, int], device: str) -> Plan:
    key = (height, width, kernel, dilation, device)
    if key in _plans:
        return _plans[key]
    rows, columns = _axis(height, kernel[0], dilation[0]), _axis(width, kernel[1], dilation[1])
    groups = len(rows.queries) * len(columns.queries)

    def grid(r: np.ndarray, c: np.ndarray) -> np.ndarray:  # (gh, a), (gw, b) -> (gh * gw, a * b)
        both = r[:, None, :, None] * width + c[None, :, None, :]
        return both.reshape(groups, -1)

    queries, keys = grid(rows.queries, columns.queries), grid(rows.keys, columns.keys)
    side, outside = 2 * kernel[1] - 1, (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
    r = rows.offset[:, None, :, None, :, None]
    c = columns.offset[None, :, None, :, None, :]
    index = np.where((r >= 0) & (c >= 0), r * side + c, outside)
    index = index.reshape(groups, queries.shape[1], keys.shape[1])
    _, back = np.unique(queries.reshape(-1), return_index=True)  # sorted rows, first place of each
    with torch.inference_mode(False):  # or training could not use what inference cached
        made = [torch.from_numpy(a.astype(np.int64)).to(device) for a in (queries, keys, index, back)]
    plan = Plan(kernel, *made)
    if type(made[0]) is Tensor:  # not a tracer's stand-in (torch.export), which is good for its trace alone
        if len(_plans) >= _MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan
    return plan


def _parts(
    height: int, width: int, kernel: tuple[int, int], dilation: tuple[int, int], device: str
) -> tuple[Tensor, ...]:
    plan = _plan(height, width, kernel, dilation, device)
    return plan.queries, plan.keys, plan.bias, plan.back


# A compiled or exported graph holds the plan as constants: it depends on sizes alone.
_constant_parts = torch.compiler.assume_constant_result(_parts)


def neighborhood_plan(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    device: torch.device | str = "cpu",
) -> Plan:
    """The tiles for a grid (H, W), an odd window ``kernel`` and a dilation (each one number, or one an axis); cached.

    Raises ValueError when ``kernel * dilation`` is larger than a side.
    """
    window = (kernel, kernel) if isinstance(kernel, int) else (kernel[0], kernel[1])
    pair = (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[1])
    return Plan(window, *_constant_parts(int(size[0]), int(size[1]), window, pair, str(torch.device(device))))


def neighborhood_attention(q: Tensor, k: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """Attention map ``softmax(q k^T + bias)`` over each query's window, as tiles (batch, heads, G, Tq, Tk).

    q (scaled beforehand), k: (batch, heads, H*W, d) in raster order; bias: (heads, 2 Kh - 1, 2 Kw - 1) indexed by
    (key - query) / dilation + K - 1 on each axis. Give the map to :func:`neighborhood_gather`.
    """
    batch, heads, _, d = q.shape
    groups, tq = plan.queries.shape
    queries = q.index_select(2, plan.queries.flatten()).view(batch, heads, groups, tq, d)
    keys = k.index_select(2, plan.keys.flatten()).view(batch, heads, groups, -1, d)
    table = q.new_zeros(1, plan.places) if bias is None else bias.flatten(1).to(q.dtype)
    outside = table.new_full((table.shape[0], 1), float("-inf"))
    mask = torch.cat([table, outside], dim=1).index_select(1, plan.bias.flatten()).view(-1, *plan.bias.shape)
    return (queries @ keys.transpose(-1, -2) + mask).softmax(-1)


def neighborhood_gather(attention: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Weighted sums of ``values`` (batch, heads, H*W, c) by a map of :func:`neighborhood_attention`."""
    batch, heads, _, c = values.shape
    chosen = values.index_select(2, plan.keys.flatten()).view(batch, heads, plan.keys.shape[0], -1, c)
    return (attention @ chosen).flatten(2, 3).index_select(2, plan.back)


def neighborhood_replan(attention: Tensor, size: tuple[int, int], old: Plan, new: Plan) -> Tensor:
    """The same weights laid over the window of another dilation: weight number j of a query goes to its key number j.

    Both plans are for the grid ``size`` and one kernel size.
    """
    slots_old, slots_new = (_slots(p) for p in (old, new))  # (H*W, K*K) places in (G, Tq, Tk)
    weights = attention.flatten(2).index_select(2, slots_old.flatten())
    empty = attention.new_zeros(*attention.shape[:2], new.bias.numel())
    return empty.index_copy(2, slots_new.flatten(), weights).view(*attention.shape[:2], *new.bias.shape)


def _slots(plan: Plan) -> Tensor:
    inside = plan.bias < plan.places
    places = torch.arange(plan.bias.numel(), device=plan.bias.device).view_as(plan.bias)
    by_query = places.flatten(0, 1)[plan.back], inside.flatten(0, 1)[plan.back]
    return by_query[0][by_query[1]].view(len(plan.back), -1)
