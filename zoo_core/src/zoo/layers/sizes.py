"""How many sizes of products oneDNN is asked for.

oneDNN compiles a kernel for every number of rows that it meets and keeps it: about 0.7 MB each, whatever the weights
(1000 row counts of one layer: 620 MB). A program that reads texts of every length would grow without end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from torch import Tensor

#: Sizes of which kernels are kept: more than a model with inputs of one shape needs.
KEPT = 256

_kept: set[tuple[Hashable, ...]] = set()


def is_kept(rows: int, weight: Tensor, kind: Hashable) -> bool:
    """Whether a product of ``rows`` rows with ``weight`` is one of the first :data:`KEPT` sizes of this program, by
    type and ``kind`` (what is fused)."""
    size = (rows, weight.shape, weight.dtype, kind)
    if size in _kept:
        return True
    if len(_kept) >= KEPT:
        return False
    _kept.add(size)
    return True


def pieces(rows: int, *, at_least: int) -> Iterator[tuple[slice, bool]]:
    """``rows`` cut into pieces: (which, True) of powers of two from ``at_least`` on, and (the rest, False)."""
    start = 0
    while start < rows:
        count = 1 << ((rows - start).bit_length() - 1)
        if count < at_least:
            yield slice(start, rows), False
            return
        yield slice(start, start + count), True
        start += count
