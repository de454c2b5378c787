"""Sparse 3D convolutions in plain torch, for grids that are mostly empty: on any device, without an extension.

The values are those of the dense convolution, read off at the places that a sparse one keeps: a submanifold convolution
at the occupied voxels, a strided one at every output voxel whose window holds an occupied one. For each of a kernel's
cells the pairs of input and output rows are looked up by binary search, and one matrix product is added.
Source: Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", arXiv 1711.10275.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Rows of the inputs and of the outputs that one cell of a kernel joins.
Pairs = list[tuple[Tensor, Tensor]]


class SparseVoxels:
    """Features (M, C) at distinct voxels ``coords`` (M, 4) int64 (sample, x, y, z) of a grid ``size`` (W, H, D).

    Rows are in ascending order of their coordinates (:func:`sparse_voxels` sorts them). Raises ValueError for voxels
    outside of the grid.
    """

    def __init__(self, features: Tensor, coords: Tensor, size: Sequence[int], batch: int, pairs: dict | None = None):
        self.features, self.coords, self.size, self.batch = features, coords, tuple(size), batch
        self._pairs = {} if pairs is None else pairs  #: of the kernels used so far; shared as long as the voxels are

    def with_features(self, features: Tensor) -> SparseVoxels:
        """Other features at the same voxels."""
        return SparseVoxels(features, self.coords, self.size, self.batch, self._pairs)

    def dense(self) -> Tensor:
        """(batch, C, W, H, D), zero at the voxels that are not occupied."""
        width, height, depth = self.size
        flat = self.features.new_zeros(self.batch * width * height * depth, self.features.shape[1])
        flat = flat.index_copy(0, keys(self.coords, self.size), self.features)
        return flat.view(self.batch, width, height, depth, -1).permute(0, 4, 1, 2, 3)

    def submanifold_pairs(self, kernel: int) -> Pairs:
        """For every cell of the kernel (x outermost): the rows whose neighbour at that cell is occupied."""
        if kernel not in self._pairs:
            own = keys(self.coords, self.size)
            span = range(-(kernel // 2), kernel // 2 + 1)
            found = []
            for shift in itertools.product(span, repeat=3):
                wanted = self.coords[:, 1:] + torch.tensor(shift, device=own.device)
                inside = _inside(wanted, self.size)
                target = inside.nonzero().squeeze(1)
                key = keys(torch.cat([self.coords[target, :1], wanted[target]], dim=1), self.size)
                place = torch.searchsorted(own, key).clamp_(max=len(own) - 1)
                there = own[place] == key
                found.append((place[there], target[there]))
            self._pairs[kernel] = found
        return self._pairs[kernel]


def sparse_voxels(features: Tensor, coords: Tensor, size: Sequence[int], batch: int) -> SparseVoxels:
    """Distinct voxels in any order, sorted and checked."""
    if coords.dim() != 2 or coords.shape[1] != 4 or len(coords) != len(features):
        raise ValueError(
            f"coords have shape {tuple(coords.shape)}; expected ({len(features)}, 4): sample, x, y and z of each voxel"
        )
    if len(coords) == 0:
        raise ValueError("no voxel is occupied; give points inside the grid")
    if not bool(_inside(coords[:, 1:], size).all()) or not bool(((coords[:, 0] >= 0) & (coords[:, 0] < batch)).all()):
        raise ValueError(f"voxels lie outside of the grid {tuple(size)} or of the {batch} samples")
    key, order = keys(coords.long(), size).sort()
    if bool((key[1:] == key[:-1]).any()):
        raise ValueError("a voxel is given twice; reduce its points to one row first")
    return SparseVoxels(features[order], coords.long()[order], size, batch)


def keys(coords: Tensor, size: Sequence[int]) -> Tensor:
    """One number for each voxel, in the order of (sample, x, y, z)."""
    width, height, depth = size
    return ((coords[:, 0] * width + coords[:, 1]) * height + coords[:, 2]) * depth + coords[:, 3]


def _inside(xyz: Tensor, size: Sequence[int]) -> Tensor:
    return ((xyz >= 0) & (xyz < torch.tensor(tuple(size), device=xyz.device))).all(dim=1)


def _apply(x: Tensor, weight: Tensor, pairs: Pairs, rows: int) -> Tensor:
    """The products of all cells: x (M, in), weight (out, in, k, k, k), to (rows, out)."""
    cells = weight.flatten(2).permute(2, 1, 0)
    out = x.new_zeros(rows, weight.shape[0])
    for cell, (source, target) in zip(cells, pairs, strict=True):
        if len(source):
            out = out.index_add(0, target, (x[source] @ cell).to(out.dtype))  # autocast multiplies in half precision
    return out


class _Conv(nn.Module):
    """``weight`` (out, in, k, k, k) over x, y, z, as of a dense ``Conv3d``; no bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class SubmanifoldConv3d(_Conv):
    """A convolution whose outputs are at the occupied voxels alone; ``kernel`` is odd."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; a submanifold convolution has a middle, so expected an odd number")
        super().__init__(in_channels, out_channels, kernel)

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        pairs = voxels.submanifold_pairs(self.kernel)
        return voxels.with_features(_apply(voxels.features, self.weight, pairs, len(voxels.features)))


class StridedConv3d(_Conv):
    """A convolution with a stride, whose outputs are at all voxels that an occupied one reaches."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 2, padding: Sequence[int] = (1, 1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.stride, self.padding = stride, tuple(padding)

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        size = [(n + 2 * p - self.kernel) // self.stride + 1 for n, p in zip(voxels.size, self.padding, strict=True)]
        if min(size) < 1:
            raise ValueError(f"a grid of {voxels.size} is too small for a kernel of {self.kernel}")
        padded = voxels.coords[:, 1:] + torch.tensor(self.padding, device=voxels.coords.device)
        sources, reached = [], []
        for cell in itertools.product(range(self.kernel), repeat=3):
            scaled = padded - torch.tensor(cell, device=padded.device)
            place = torch.div(scaled, self.stride, rounding_mode="floor")
            hit = ((scaled % self.stride == 0).all(dim=1) & _inside(place, size)).nonzero().squeeze(1)
            sources.append(hit)
            reached.append(keys(torch.cat([voxels.coords[hit, :1], place[hit]], dim=1), size))
        key, row = torch.unique(torch.cat(reached), return_inverse=True)
        pairs = list(zip(sources, row.split([len(hit) for hit in sources]), strict=True))
        features = _apply(voxels.features, self.weight, pairs, len(key))
        width, height, depth = size
        coords = torch.stack(
            [key // (width * height * depth), key // (height * depth) % width, key // depth % height, key % depth],
            dim=1,
        )
        return SparseVoxels(features, coords, size, voxels.batch)
