"""Training on labelled clouds: which points of a cloud make a sample, how they are moved, the losses.

Settings as published: PCM's configurations (SkyworkAI/PointCloudMamba ``cfgs``) and PointMamba's (LMD0311/PointMamba
``cfgs/finetune_*.yaml``); docs/point_cloud.md has them as options of ``zoo train-points``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import Cloud
from .geometry import farthest_point_sample
from .labelled import NONE, wrong
from .pipelines import first_of_each_voxel, prepare_cloud, shapes_of
from .pointmamba import PointMambaTrunk

#: Channels of a point's features.
FEATURES = {"xyz": 3, "normal": 3, "color": 3, "height": 1}
#: Clouds are kept with so many times the points that a sample has, which are drawn from them (as PointNeXt's).
SPARE = 1.2


@dataclass(frozen=True)
class Moves:
    """How clouds are moved in training: turned about the axis ``up`` ("up"), any way ("any") or not at all ("none");
    then, once they are normalised, stretched along each axis by ``scale``, moved along each by up to ``shift``, and
    every coordinate by noise of ``jitter``, at most five times that. Raises BadArgument for other values."""

    scale: tuple[float, float] = (2 / 3, 3 / 2)
    shift: float = 0.2
    turn: str = "none"
    jitter: float = 0.0
    up: int = 2

    def __post_init__(self) -> None:
        if self.turn not in ("none", "up", "any"):
            raise wrong(f"turn is {self.turn!r}; expected 'none', 'up' or 'any'", "turn")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise wrong(f"scale is {self.scale}; expected two factors above 0, the smaller one first", "scale")

    def turned(self, cloud: Cloud, random: np.random.Generator) -> Cloud:
        """The cloud about its centre, with its normals."""
        if self.turn == "none":
            return cloud
        rotation = self._rotation(random)
        centre = cloud.points.mean(axis=0)
        points = ((cloud.points - centre) @ rotation.T + centre).astype(np.float32)
        normals = None if cloud.normals is None else (cloud.normals @ rotation.T).astype(np.float32)
        return Cloud(points, cloud.colors, normals)

    def _rotation(self, random: np.random.Generator) -> np.ndarray:
        if self.turn == "any":  # even over all rotations: Q of normal numbers, its signs made unique
            q, r = np.linalg.qr(random.normal(size=(3, 3)))
            q *= np.sign(r.diagonal())
            return q if np.linalg.det(q) > 0 else -q
        angle = random.uniform(0, 2 * np.pi)
        a, b = ((self.up + 1) % 3, (self.up + 2) % 3)
        rotation = np.eye(3)
        rotation[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        return rotation

    def moved(self, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Normalised points (N, 3)."""
        points = points * random.uniform(*self.scale, 3) + random.uniform(-self.shift, self.shift, 3)
        if self.jitter:
            noise = random.normal(0, self.jitter, points.shape)
            points = points + noise.clip(-5 * self.jitter, 5 * self.jitter)
        return points.astype(np.float32)


class Samples:
    """Clouds to train on, in memory: objects with some more points than a sample has, by farthest points; scenes
    (settings with a ``voxel``) with one point a voxel.

    ``points`` of each sample: drawn from an object's, or those of a scene that lie nearest to one of it, drawn as well;
    smaller clouds have some of theirs more than once. ``settings``: as :func:`prepare_cloud`'s.
    """

    def __init__(self, settings: dict[str, Any], points: int, moves: Moves) -> None:
        self.settings, self.points, self.moves = settings, points, moves
        self.clouds: list[Cloud] = []
        self.classes: list[int | np.ndarray] = []
        self.kinds: list[int] = []

    def __len__(self) -> int:
        return len(self.clouds)

    def add(self, cloud: Cloud, classes: int | np.ndarray, kind: int = 0) -> None:
        """A cloud, its class or those of its points (N,), and the number of its kind of object.

        Raises ValueError for one that lacks what the model reads at every point."""
        kept = self._kept(cloud)
        thinned = cloud.take(kept)
        prepare_cloud(thinned, self.settings)
        read = self.settings.get("features", ())
        self.clouds.append(
            Cloud(
                thinned.points,
                thinned.colors if "color" in read else None,
                thinned.normals if "normal" in read else None,
            )
        )
        self.classes.append(classes if isinstance(classes, int) else classes[kept])
        self.kinds.append(kind)

    def _kept(self, cloud: Cloud) -> np.ndarray:
        if voxel := self.settings.get("voxel"):
            return first_of_each_voxel(cloud.points, float(voxel))
        count = round(SPARE * self.points)
        if len(cloud) <= count:
            return np.arange(len(cloud))
        return farthest_point_sample(torch.from_numpy(cloud.points)[None], count)[0].numpy()

    def __call__(self, numbers: Sequence[int], random: np.random.Generator) -> dict[str, Tensor]:
        """A batch of these clouds: ``pos`` (B, N, 3), ``x`` (B, C, N) where the model reads features, ``kind`` (B,),
        ``classes`` (B,) or (B, N) int64."""
        rows = [self._sample(number, random) for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _sample(self, number: int, random: np.random.Generator) -> dict[str, Tensor]:
        cloud, classes = self.clouds[number], self.classes[number]
        chosen = self._chosen(cloud.points, random)
        pos, x = prepare_cloud(
            self.moves.turned(cloud.take(chosen), random), self.settings, lambda p: self.moves.moved(p, random)
        )
        own = classes if isinstance(classes, int) else classes[chosen]
        found = {"pos": pos, "classes": torch.as_tensor(own), "kind": torch.tensor(self.kinds[number])}
        return found if x is None else found | {"x": x}

    def _chosen(self, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
        count = len(points)
        if count <= self.points:
            return np.concatenate([np.arange(count), random.integers(0, count, self.points - count)])
        if not self.settings.get("voxel"):
            return random.choice(count, self.points, replace=False)
        distance = ((points - points[random.integers(count)]) ** 2).sum(axis=1)
        return np.argpartition(distance, self.points - 1)[: self.points]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a model says of a batch of :class:`Samples`: (B, classes) or (B, classes, N)."""
    given = {"points" if isinstance(model, PointMambaTrunk) else "pos": batch["pos"]}
    if "x" in batch:
        given["x"] = batch["x"]
    if batch["classes"].dim() > 1 and shapes_of(model):
        given["cls"] = batch["kind"]
    return model(**given)


def cross_entropy(smoothing: float) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of a batch: cross entropy with smoothed labels, over clouds or points; :data:`NONE` is left out.

    Source: Szegedy et al., arXiv 1512.00567, section 7."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits(model, batch), batch["classes"], ignore_index=NONE, label_smoothing=smoothing)

    return loss
