"""Voxel features or LiDAR points in; a semantic occupancy map out."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.files import existing, refused, whole
from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .files import EXTENSIONS, Cloud, load_array, read_cloud, real_array, write_labels
from .occmamba import OccMambaHead, occupancy
from .occmamba_lidar import LidarOccMamba
from .pictures import palette, three_views
from .pipelines import number

#: Corner and cell of the published fine grid (512, 512, 40), in metres.
LOW, CELL = (-51.2, -51.2, -5.0), 0.2


@dataclass(kw_only=True)
class OccupancyMap(Result):
    """A class for every voxel of a grid: ``grid`` (W, H, D) uint8, voxel (0, 0, 0) at ``low``, ``cell`` metres wide."""

    occupied: int
    counts: dict[str, int]
    names: list[str] = field(repr=False)
    grid: np.ndarray = field(repr=False)
    empty: int = field(default=0, repr=False)
    low: tuple[float, ...] = field(default=LOW, repr=False)
    cell: float = field(default=CELL, repr=False)

    def summary(self) -> str:
        parts = ", ".join(
            f"{name} {count / max(1, self.occupied):.0%}" for name, count in list(self.counts.items())[:4]
        )
        return f"{self.occupied} of {self.grid.size} voxels occupied" + (f": {parts}" if parts else "")

    def cloud(self) -> tuple[Cloud, np.ndarray]:
        """The middles of the occupied voxels, and their classes."""
        places = np.argwhere(self.grid != self.empty)
        points = (places + 0.5) * self.cell + np.asarray(self.low)
        return Cloud(points.astype(np.float32)), self.grid[tuple(places.T)].astype(np.int64)

    def save_labels(self, path: str | Path) -> Path:
        """The grid as .npy, or the occupied voxels as points with labels and colours: .ply, .las, .laz."""
        path = Path(path)
        if path.suffix.lower() == ".npy":
            with whole(path) as work, work.open("wb") as file:
                np.save(file, self.grid)
            return path
        cloud, labels = self.cloud()
        return write_labels(path, cloud, labels, palette(len(self.names))[labels], self.names)

    def picture(self) -> Any:
        cloud, labels = self.cloud()
        shades = palette(len(self.names))
        legend = [(name, shades[self.names.index(name)]) for name in self.counts]
        return three_views(cloud.points, shades[labels], title=Path(self.source).name, legend=legend)


class OccupancyPrediction(Pipeline):
    """OccMamba on files.

    Models of the head alone take voxel features: .npy files or arrays (channels, W, H, D). Models with the LiDAR
    encoder take points in metres around the vehicle: .bin files of float32 with ``columns`` values a point (nuScenes:
    5, KITTI: 4), .npy files or arrays (N, 3 to 5) of x, y, z, intensity and time, or any point-cloud file; values that
    are missing or no numbers (intensity, time) are 0. Points beyond the grid are left out, those with NaN or infinite
    coordinates too.

    The fifth value in nuScenes' own files is the number of the laser, in whose place the model has read the time since
    the sweep (mmdetection3d's LoadPointsFromMultiSweeps): it is 0 for files of one sweep.
    """

    task = "occupancy-prediction"
    extensions = (*EXTENSIONS, ".bin")

    def __init__(self, model: nn.Module, columns: int = 5) -> None:
        super().__init__(model)
        if not isinstance(model, (OccMambaHead, LidarOccMamba)):
            raise errors.BadArgument(
                f"{type(model).__name__} does not answer {self.task}; expected OccMambaHead or LidarOccMamba",
                argument="model",
                accepted=[],
            )
        self.columns = number(columns, "columns", int, 3, inf, "a whole number of values a point, 3 or more")
        self.head: OccMambaHead = model.head if isinstance(model, LidarOccMamba) else model
        names = self.labels()
        if names is None and self.head.num_classes == 17:  # nuScenes-Occupancy, what all published models answer
            text = (Path(__file__).parent / "labels" / "nuscenes_occupancy.txt").read_text(encoding="utf-8")
            names = text.splitlines()
        self.names = names or [f"class {i}" for i in range(self.head.num_classes)]

    def read(self, source: Any) -> np.ndarray:
        if isinstance(source, (str, Path)):
            path = Path(source)
            if path.suffix.lower() == ".bin":
                with refused(path):
                    table = self._sweep(existing(path, "a file of points"))
            elif path.suffix.lower() == ".npy":
                table = load_array(path)
            else:
                table = read_cloud(path, invalid="drop").world()
        else:
            cloud = isinstance(source, Cloud)
            table = read_cloud(source, invalid="drop").world() if cloud else real_array(source, "the given array")
        return self._points(table) if isinstance(self.model, LidarOccMamba) else self._voxels(table)

    def _sweep(self, path: Path) -> np.ndarray:
        content = path.read_bytes()
        if not content or len(content) % (4 * self.columns):
            raise ValueError(
                f"{path}: {len(content)} bytes are no whole number of points of {self.columns} float32 values; say how "
                "many there are: columns=4 (-o columns=4)"
            )
        values = np.frombuffer(content, "<f4")
        own = _step(values, self.columns)
        for other in (3, 4, 5, 6):
            if len(values) % other == 0 and _step(values, other) < own / 2:
                raise ValueError(
                    f"{path} holds points of {other} values, it seems, and not of {self.columns}: say so by "
                    f"columns={other} (-o columns={other})"
                )
        table = values.reshape(-1, self.columns)[:, : self.model.in_chans].copy()
        if table.shape[1] == 5 and (table[:, 4] == np.floor(table[:, 4])).all():  # numbers of lasers
            table[:, 4] = 0
        return table

    def _voxels(self, table: np.ndarray) -> np.ndarray:
        if table.ndim != 4 or table.shape[0] != self.head.in_chans or not table.size:
            raise ValueError(
                f"voxel features have shape {table.shape}; {self.name} takes ({self.head.in_chans}, W, H, D). Models "
                "with the LiDAR encoder (occmamba_lidar) take points"
            )
        if not np.isfinite(table).all():
            raise ValueError("voxel features hold NaN or infinite values")
        return table.astype(np.float32)

    def _points(self, table: np.ndarray) -> np.ndarray:
        width = self.model.in_chans
        if table.ndim != 2 or not 3 <= table.shape[1] <= width or not len(table):
            raise ValueError(
                f"the points have shape {table.shape}; expected (N, 3 to {width}), N > 0: x, y, z, intensity, time"
            )
        table = table.astype(np.float32)
        table = table[np.isfinite(table[:, :3]).all(axis=1)]
        table[:, 3:][~np.isfinite(table[:, 3:])] = 0
        encoder = self.model.encoder
        high = np.round(np.add(encoder.low, encoder.voxel_size * np.array(encoder.grid)), 6).tolist()
        if not ((table[:, :3] >= encoder.low) & (table[:, :3] < high)).all(axis=1).any():
            raise ValueError(
                f"no point lies in the grid from {encoder.low} to {tuple(high)}; coordinates are in metres"
            )
        return np.pad(table, ((0, 0), (0, width - table.shape[1])))

    def prepare(self, sample: np.ndarray) -> Tensor:
        return torch.from_numpy(sample)

    def _to_model(self, tensor: Tensor) -> Tensor:
        if isinstance(self.model, LidarOccMamba):
            return tensor.to(self.device)  # coordinates stay float32; the encoder casts what goes into its layers
        return super()._to_model(tensor)

    def split(self, output: dict[str, Any], count: int) -> list[dict[str, Any]]:
        fine = output.get("fine")
        return [
            {"coarse": output["coarse"][i : i + 1]} | ({} if fine is None else {"fine": fine[i : i + 1]})
            for i in range(count)
        ]

    def finish(self, output: dict[str, Any], sample: np.ndarray) -> OccupancyMap:
        grid = occupancy(output, 0, self.head.cascade_ratio).numpy().astype(np.uint8)
        counts = np.bincount(grid.reshape(-1), minlength=len(self.names))
        occupied = int(grid.size - counts[self.head.empty_idx])
        counts[self.head.empty_idx] = 0
        order = np.argsort(-counts, kind="stable")
        low: tuple[float, ...] = LOW
        cell = CELL
        if isinstance(self.model, LidarOccMamba):
            encoder = self.model.encoder
            low, cell = encoder.low, encoder.voxel_size * encoder.grid[0] / grid.shape[0]
        return OccupancyMap(
            occupied=occupied,
            counts={self.names[i]: int(counts[i]) for i in order if counts[i]},
            names=self.names,
            grid=grid,
            empty=self.head.empty_idx,
            low=low,
            cell=cell,
        )


def _step(values: np.ndarray, columns: int) -> float:
    """How far the values of a point lie from those of the next, if points have so many: neighbours in a sweep are near
    one another, and nothing else is."""
    some = values[:60_000]
    return float(np.nanmedian(np.abs(some[columns:] - some[:-columns]))) if len(some) > columns else np.inf
