"""Space-filling curves over grids of any size: the cells are sorted by their place on the curve of the enclosing
power-of-two cube, which visits them in the curve's order and skips what lies outside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Size = tuple[int, ...]


def levels(size: Size) -> int:
    """Bits of the longest axis: the side of the enclosing cube is 2 to this power."""
    return max((int(n - 1).bit_length() for n in size), default=0)


def _sorted_by(size: Size, key: Callable[[list[np.ndarray], int], np.ndarray]) -> np.ndarray:
    bits = levels(size)
    if bits * len(size) > 62:
        raise ValueError(f"size {size} needs {bits * len(size)} bits of curve index; at most 62 are supported")
    axes = [a.reshape(-1).astype(np.int64) for a in np.indices(size)]
    return np.argsort(key(axes, bits), kind="stable").astype(np.int64)


def interleave_bits(axes: list[np.ndarray], bits: int) -> np.ndarray:
    """Bit i of the axes side by side, first axis most significant."""
    code = np.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def _hilbert_plane_key(axes: list[np.ndarray], bits: int) -> np.ndarray:
    y, x = axes[0].copy(), axes[1].copy()  # rows, columns
    key = np.zeros_like(x)
    for bit in range(bits - 1, -1, -1):
        rx, ry = (x >> bit) & 1, (y >> bit) & 1
        key += ((3 * rx) ^ ry) << (2 * bit)
        turn = (ry == 0) & (rx == 1)
        x, y = np.where(turn, (1 << bits) - 1 - x, x), np.where(turn, (1 << bits) - 1 - y, y)
        x, y = np.where(ry == 0, y, x), np.where(ry == 0, x, y)
    return key


def skilling_key(axes: list[np.ndarray], bits: int) -> np.ndarray:
    """Hilbert index in any number of dimensions. Source: J. Skilling, "Programming the Hilbert curve", 2004."""
    X = [a.copy() for a in axes]
    for bit in range(bits - 1, 0, -1):
        q = np.int64(1) << bit
        low = q - 1
        for i in range(len(X)):
            set_ = (X[i] & q) != 0
            exchange = np.where(set_, 0, (X[0] ^ X[i]) & low)
            X[0] = np.where(set_, X[0] ^ low, X[0]) ^ exchange
            X[i] = X[i] ^ exchange
    for i in range(1, len(X)):
        X[i] ^= X[i - 1]
    carry = np.zeros_like(X[0])
    for bit in range(bits - 1, 0, -1):
        carry ^= np.where((X[-1] & (np.int64(1) << bit)) != 0, (np.int64(1) << bit) - 1, 0)
    return interleave_bits([x ^ carry for x in X], bits)


def hilbert(size: Size) -> np.ndarray:
    """The Hilbert curve; every step of it goes to a neighbour when all sides are one power of two.

    Two axes: quadrant recursion with rotation (x = column, y = row). Otherwise Skilling's transpose algorithm, the
    slowest axis most significant. Sides that are not powers of two: cells outside the grid are skipped.
    """
    return _sorted_by(size, _hilbert_plane_key if len(size) == 2 else skilling_key)


def trans_hilbert(size: Size) -> np.ndarray:
    """The Hilbert curve with the first two axes exchanged (PointMamba, PCM: "hilbert-trans")."""
    return _first_two_exchanged(size, hilbert, "trans_hilbert")


def morton(size: Size) -> np.ndarray:
    """Z-order: the bits of the coordinates interleaved, the last axis lowest; cells outside the grid skipped."""
    return _sorted_by(size, interleave_bits)


def trans_morton(size: Size) -> np.ndarray:
    """Z-order with the first two axes exchanged (PCM: "z-trans")."""
    return _first_two_exchanged(size, morton, "trans_morton")


def quadrant(size: Size) -> np.ndarray:
    """Quadrants (0,0), (0,1), (1,1), (1,0) at every level, without rotation, so not continuous (OccMamba).

    Pairs are (half of the first axis, half of the second); side = next power of two, cells outside skipped.
    """
    if len(size) != 2:
        raise ValueError(f"path 'quadrant' is defined on a grid of 2 axes, but size is {size}; see height() for three")
    return _sorted_by(size, lambda axes, bits: interleave_bits([axes[0], axes[0] ^ axes[1]], bits))


def _first_two_exchanged(size: Size, curve: Callable[[Size], np.ndarray], name: str) -> np.ndarray:
    if len(size) < 2:
        raise ValueError(f"path {name!r} needs a grid of at least 2 axes, but size is {size}")
    grid = np.swapaxes(np.arange(int(np.prod(size)), dtype=np.int64).reshape(size), 0, 1)
    return grid.reshape(-1)[curve(grid.shape)]
