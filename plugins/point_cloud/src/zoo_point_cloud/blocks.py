"""Scenes of any size in overlapping blocks: each block is a cloud of bounded size, and what several blocks say about a
point is blended.

Memory is that of one block plus one row of class scores a point, whatever the scene's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Block:
    """``index`` (n,) of the scene's points in this block, and how much its answer counts for each (n,): 1 inside,
    falling towards 0 at the edge of the margin."""

    index: np.ndarray
    weight: np.ndarray


#: Sizes that blocks come in. Every size that was not seen before makes oneDNN build and keep kernels for its shapes,
#: 10 MB for a published model, until it holds a thousand of them: the memory of a scene would grow with its blocks.
SIZES = 12


def scene_blocks(points: np.ndarray, most: int, overlap: float = 0.25, least: int = 1) -> Iterator[Block]:
    """Blocks that cover every point of a scene (N, 3), each of ``least`` to ``most`` points (all of them where the
    scene has fewer than ``least``).

    The scene is halved across the longer side in x and y until a part and its margin hold at most ``most`` points; the
    margin is ``overlap`` times the part's own extent on each side, as far as the scene goes. Heights are not divided.
    The nearest points beyond fill a block up to the next of :data:`SIZES` sizes, and count least.
    Parts that cannot be halved any more (many points above one place) are taken in several interleaved passes.
    Raises ValueError unless 0 < least <= most and 0 <= overlap <= 1.
    """
    if not 0 < least <= most:
        raise ValueError(f"blocks of {least} to {most} points are asked for; expected 0 < least <= most")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap}; expected a share of a block from 0 to 1")
    plan = np.ascontiguousarray(points[:, :2])
    stack = [(np.arange(len(plan)), plan.min(axis=0), plan.max(axis=0))]
    while stack:
        core, low, high = stack.pop()
        margin = overlap * (high - low)
        index = _inside(plan, low - margin, high + margin) if len(core) < len(plan) else core
        if len(index) > most:
            axis = int(np.argmax(high - low))
            middle = (low[axis] + high[axis]) / 2
            left = plan[core, axis] < middle
            if 0 < left.sum() < len(core) or (high - low)[axis] > 1e-6 * max(1.0, float(np.abs(plan).max())):
                for part, at in ((core[left], 0), (core[~left], 1)):
                    if len(part):
                        edges = [low.copy(), high.copy()]
                        edges[1 - at][axis] = middle
                        stack.append((part, *edges))
                continue
            passes = -(-len(core) // most)
            for first in range(passes):
                piece = core[first::passes]
                yield Block(piece, np.ones(len(piece), dtype=np.float32))
            continue
        if len(index) < least:
            index = _nearest(plan, (low + high) / 2, min(least, len(plan)), core)
        elif len(index) < min(whole := _size(len(index), most), len(plan)):
            index = _filled(plan, low - margin, high + margin, min(whole, len(plan)))
        yield Block(index, _weights(plan[index], low, high, margin))


def _inside(plan: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    x, y = plan[:, 0], plan[:, 1]
    return np.flatnonzero((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))


def _size(count: int, most: int) -> int:
    """The least of the sizes of blocks that holds ``count`` points."""
    step = -(-most // SIZES)
    return min(-(-count // step) * step, most)


def _filled(plan: np.ndarray, low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """The points inside, at most ``count``, and the nearest outside, ``count`` together, in the scene's order."""
    return np.sort(np.argpartition(_beyond(plan, low, high).max(axis=1), count - 1)[:count])


def _beyond(plan: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How far points lie outside of a part along x and y: (N, 2), 0 inside."""
    return np.maximum(np.maximum(low - plan, plan - high), 0.0)


def _nearest(plan: np.ndarray, centre: np.ndarray, count: int, core: np.ndarray) -> np.ndarray:
    """The points nearest to ``centre``, those of the core first, in the scene's order."""
    distance = ((plan - centre) ** 2).sum(axis=1)
    distance[core] = -1.0
    return np.sort(np.argpartition(distance, count - 1)[:count])


def _weights(plan: np.ndarray, low: np.ndarray, high: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """1 in the core, falling in a straight line to 1 % at the far edge of the margin."""
    share = (_beyond(plan, low, high) / np.maximum(margin, 1e-12)).max(axis=1)
    return np.maximum(1.0 - share, 0.01).astype(np.float32)


def blended(
    points: np.ndarray,
    answer: Callable[[np.ndarray], Tensor],
    most: int,
    overlap: float = 0.25,
    least: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Class probabilities of a whole scene: (classes, N) float32.

    ``answer``: indices of a block's points to their logits (classes, n). Probabilities of overlapping blocks are
    averaged by the blocks' weights. ``progress`` is told the number of points of each block that is done.
    """
    total: Tensor | None = None
    weights = torch.zeros(len(points))
    for block in scene_blocks(points, most, overlap, least):
        index, weight = torch.from_numpy(block.index), torch.from_numpy(block.weight)
        probability = answer(block.index).float().softmax(dim=0).cpu()
        if total is None:
            total = torch.zeros(probability.shape[0], len(points))
        # The indices of a block are distinct, so that rows can be read, added to and written back.
        total[:, index] += probability * weight
        weights[index] += weight
        if progress is not None:
            progress(len(block.index))
    assert total is not None
    return total.div_(weights)
