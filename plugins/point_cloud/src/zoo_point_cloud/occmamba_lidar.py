"""OccMamba from LiDAR points: voxels, the sparse convolutional encoder, and the occupancy head.

Original: USTCLH/OccMamba @ 7dc5781 (configs/OccMamba/LiDAR-OccMamba-384.py, voxel_encoder/sparse_encoder_hd.py, which
goes back to SECOND, "SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018), MIT. There with spconv, here
with the sparse convolutions of :mod:`zoo_point_cloud.sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Recomputed

from .occmamba import OccMambaHead
from .sparse import SparseVoxels, StridedConv3d, SubmanifoldConv3d, sparse_voxels


def voxelize(
    clouds: Sequence[Tensor], low: Sequence[float], size: float, grid: Sequence[int], most_points: int, most_voxels: int
) -> tuple[Tensor, Tensor]:
    """Clouds (N_i, F), x, y and z first, to mean features (M, F) and voxels (M, 4) int64 (sample, x, y, z).

    As published, the first ``most_points`` points of a voxel count, and of each cloud the first ``most_voxels`` voxels
    in the order of their first points. Points outside of the grid that begins at ``low`` are left out.
    """
    features, coords = [], []
    for sample, cloud in enumerate(clouds):
        cell = torch.floor(
            (cloud[:, :3] - torch.tensor(tuple(low), dtype=cloud.dtype, device=cloud.device)) / size
        ).long()
        inside = ((cell >= 0) & (cell < torch.tensor(tuple(grid), device=cell.device))).all(dim=1)
        cell, points = cell[inside], cloud[inside]
        if not len(cell):
            continue
        key = (cell[:, 0] * grid[1] + cell[:, 1]) * grid[2] + cell[:, 2]
        _, voxel, count = torch.unique(key, return_inverse=True, return_counts=True)
        order = voxel.argsort(stable=True)
        start = count.cumsum(0) - count
        first = order[start]  # the first point of each voxel
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - start[voxel[order]]  # of a point in its voxel
        kept = torch.zeros(len(count), dtype=torch.bool, device=key.device)
        kept[first.argsort()[:most_voxels]] = True
        counted = kept[voxel] & (rank < most_points)
        total = points.new_zeros(len(count), points.shape[1]).index_add(0, voxel[counted], points[counted])
        features.append(total[kept] / count[kept].clamp(max=most_points).unsqueeze(1).to(points.dtype))
        place = cell[first[kept]]
        coords.append(torch.cat([torch.full_like(place[:, :1], sample), place], dim=1))
    if not features:
        high = [a + n * size for a, n in zip(low, grid, strict=True)]
        raise ValueError(f"no point lies in the grid from {tuple(low)} to {tuple(high)}; coordinates are in metres")
    return torch.cat(features), torch.cat(coords)


class SparseConvNormAct(nn.Module):
    """A sparse convolution, a norm over the rows of occupied voxels, ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        voxels = self.conv(voxels)
        return voxels.with_features(self.norm(voxels.features).relu())


class SparseResidual(Recomputed):
    """``relu(norm2(conv2(relu(norm1(conv1(x))))) + x)`` of submanifold convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = SubmanifoldConv3d(channels, channels), nn.GroupNorm(groups, channels)
        self.conv2, self.norm2 = SubmanifoldConv3d(channels, channels), nn.GroupNorm(groups, channels)

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        h = self.conv1(voxels)
        h = self.conv2(h.with_features(self.norm1(h.features).relu()))
        return h.with_features((self.norm2(h.features) + voxels.features).relu())


class LidarEncoder(nn.Module):
    """LiDAR points to voxel features (batch, out_chans, W, H, D) on an eighth of the voxel grid.

    Arguments: ``in_chans`` features a point (x, y, z, intensity, time); ``stages``: channels of each stage's blocks,
    two residual blocks and a convolution of stride 2 (the last stage: residual blocks alone); ``norm_groups`` of the
    group norms (in 16 channels the published 16 groups hold one value each, so that those norms give their bias alone);
    ``low``, ``voxel_size`` and ``grid`` of the voxels; ``most_points`` of a voxel; ``most_voxels`` in training and in
    evaluation. Height has one empty layer more, so that 80 layers become 10.
    """

    def __init__(
        self,
        in_chans: int = 5,
        out_chans: int = 80,
        stages: Sequence[Sequence[int]] = ((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        *,
        norm_groups: int = 16,
        low: Sequence[float] = (-51.2, -51.2, -5.0),
        voxel_size: float = 0.1,
        grid: Sequence[int] = (1024, 1024, 80),
        most_points: int = 10,
        most_voxels: Sequence[int] = (90000, 120000),
    ) -> None:
        super().__init__()
        self.in_chans, self.low, self.voxel_size, self.grid = in_chans, tuple(low), voxel_size, tuple(grid)
        self.most_points, self.most_voxels = most_points, tuple(most_voxels)
        width = stages[0][0]
        self.conv_input = SparseConvNormAct(SubmanifoldConv3d(in_chans, width), nn.BatchNorm1d(width))
        self.stages = nn.ModuleList()
        for i, channels in enumerate(stages):
            blocks: list[nn.Module] = []
            for j, out in enumerate(channels):
                if j == len(channels) - 1 and i < len(stages) - 1:
                    # The third halving does not pad the height: 21 layers become 10.
                    padding = (1, 1, 0) if i == len(stages) - 2 else (1, 1, 1)
                    conv = StridedConv3d(width, out, padding=padding)
                    blocks.append(SparseConvNormAct(conv, nn.GroupNorm(norm_groups, out)))
                elif out != width:
                    raise ValueError(f"stage {i} is {list(channels)}; expected residual blocks of {width} channels")
                else:
                    blocks.append(SparseResidual(out, norm_groups))
                width = out
            self.stages.append(nn.Sequential(*blocks))
        narrowing = []
        while width > 2 * out_chans:
            narrowing.append((width, width // 2))
            width //= 2
        self.narrow = nn.Sequential(
            *(
                SparseConvNormAct(SubmanifoldConv3d(i, o, kernel=1), nn.GroupNorm(norm_groups, o))
                for i, o in [*narrowing, (width, out_chans)]
            )
        )

    def forward(self, clouds: Tensor | Sequence[Tensor]) -> Tensor:
        """Clouds (batch, N, in_chans), or a list of (N_i, in_chans), to voxel features (batch, out_chans, W, H, D)."""
        for cloud in clouds:
            if cloud.dim() != 2 or cloud.shape[1] != self.in_chans:
                raise ValueError(f"a cloud has shape {tuple(cloud.shape)}; expected (points, {self.in_chans})")
        most = self.most_voxels[0 if self.training else 1]
        features, coords = voxelize(list(clouds), self.low, self.voxel_size, self.grid, self.most_points, most)
        features = features.to(self.conv_input.conv.weight.dtype)
        width, height, depth = self.grid
        voxels = sparse_voxels(features, coords, (width, height, depth + 1), len(clouds))
        voxels = self.conv_input(voxels)
        for stage in self.stages:
            voxels = stage(voxels)
        return self.narrow(voxels).dense()


class LidarOccMamba(GradCheckpointing, nn.Module):
    """LiDAR points to semantic occupancy: :class:`LidarEncoder` and :class:`zoo_point_cloud.occmamba.OccMambaHead`.

    ``encoder``: arguments of the encoder; all others are the head's, whose input channels are the encoder's output.
    """

    not_compilable = OccMambaHead.not_compilable
    not_exportable = not_compilable

    def __init__(self, encoder: dict[str, Any] | None = None, **head: Any) -> None:
        super().__init__()
        self.encoder = LidarEncoder(**(encoder or {}))
        width = (encoder or {}).get("out_chans", 80)
        if head.setdefault("in_chans", width) != width:
            raise ValueError(
                f"the head takes {head['in_chans']} channels and the encoder gives {width}; leave in_chans out"
            )
        self.head = OccMambaHead(**head)

    @property
    def in_chans(self) -> int:
        return self.encoder.in_chans

    def forward(self, points: Tensor | Sequence[Tensor]) -> dict[str, Any]:
        """points (batch, N, 5) or a list of (N_i, 5): x, y, z (metres), intensity, time; output of the head."""
        return self.head(self.encoder(points))
