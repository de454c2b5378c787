"""Sums, means, maxima and orders over the segments of one long list: what replaces padding graphs to one size.

A batch of graphs is one list of nodes, graph after graph. ``graph`` (nodes,) int64 says which graph each node is in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo_kernels.runtime import exporting


def graph_of(sizes: Tensor, nodes: int) -> Tensor:
    """(graphs,) nodes of each graph to (nodes,) graph of each node."""
    numbers = torch.arange(sizes.shape[0], device=sizes.device)
    return torch.repeat_interleave(numbers, sizes, output_size=nodes)


def segment_sum(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """(items, ...) summed over the items of each of ``count`` segments."""
    if exporting():  # as a product: onnxruntime loses some of the additions to one row that its threads make at once
        inside = _members(segment, count).to(values.dtype)
        return (inside @ values.reshape(values.shape[0], -1)).view(count, *values.shape[1:])
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """(items, ...) averaged over the items of each segment; segments without items give 0."""
    ones = torch.ones(values.shape[0], dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    size = segment_sum(ones, segment, count).clamp(min=1).view(-1, *(1,) * (values.dim() - 1))
    return (segment_sum(values, segment, count) / size).to(values.dtype)


def segment_max(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """(items, channels), the largest of each segment; segments without items give 0."""
    found = values.new_full((count, *values.shape[1:]), -torch.inf)
    if exporting():
        found = torch.where(_members(segment, count)[..., None], values, found[:, None]).amax(1)
    else:
        index = segment.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
        found = found.scatter_reduce(0, index, values, "amax")
    return torch.where(torch.isinf(found), torch.zeros((), dtype=values.dtype, device=values.device), found)


def _members(segment: Tensor, count: int) -> Tensor:
    """(segments, items) bool: which items each segment has."""
    return segment == torch.arange(count, device=segment.device)[:, None]


def degree(edge_index: Tensor, nodes: int) -> Tensor:
    """Edges that leave each node, (nodes,) float32: counts of ``edge_index[0]``."""
    ones = torch.ones(edge_index.shape[1], device=edge_index.device)
    return segment_sum(ones, edge_index[0], nodes)


def lexsort(keys: Sequence[Tensor]) -> Tensor:
    """The order by several keys (..., nodes), the last one first in weight; equal nodes stay as they are."""
    order = keys[0].argsort(dim=-1, stable=True)
    for key in keys[1:]:
        key = key.expand_as(order)
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order


def starts(order: Tensor, *labels: Tensor, reverse: bool = False) -> Tensor:
    """Where a walk along ``order`` (..., nodes) enters another segment: (..., nodes) bool by node, for ``resets=``.

    A segment is a run of nodes with equal ``labels`` (each (nodes,) or like ``order``). ``reverse``: the walk comes
    from the end.
    """
    new = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    first = 0 if not reverse else -1
    new[..., first] = True
    for label in labels:
        seen = label.expand_as(order).gather(-1, order)
        changes = seen[..., 1:] != seen[..., :-1]
        if reverse:
            new[..., :-1] |= changes
        else:
            new[..., 1:] |= changes
    return torch.zeros_like(new).scatter(-1, order, new)
