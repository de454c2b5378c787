"""Point-cloud files in; a class, or a label for every point, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .files import EXTENSIONS, Cloud, read_cloud, write_ply
from .geometry import farthest_point_sample
from .pcm import PCM, PCMSegmentation
from .pictures import palette, three_views
from .pointmamba import PointMamba, PointMambaSegmentation


def settings_of(model: nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """How a model's clouds are prepared: the weights' settings, for random weights those of the published ones."""
    if own:
        return own
    info = getattr(model, "zoo_info", None)
    weights = info.card.default_weights if info is not None and info.card is not None else None
    return dict(weights.preprocess) if weights is not None else {}


def least_points(model: nn.Module) -> int:
    """The fewest points that the model can take."""
    if isinstance(model, (PointMamba, PointMambaSegmentation)):
        return max(model.num_groups, model.group_size)
    need, encoder = 1, getattr(model, "encoder", None)
    groupers = list(encoder.local_grouper_list) if encoder is not None else []
    for grouper in reversed(groupers):
        need = max(need * grouper.reducer, grouper.k)
    return need


def prepare_cloud(cloud: Cloud, settings: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(coordinates (N, 3), features (C, N) or None), as the originals' data sets make them.

    Settings: ``normalize`` "unit_sphere" (minus the mean, over the largest radius) or "floor" (minus the mean, lowest
    height 0); ``features``: of "xyz", "normal", "color", "height" (above the lowest point along axis ``gravity``,
    taken before scaling); ``color_mean``, ``color_std``.
    """
    points = cloud.points.astype(np.float32)
    axis = int(settings.get("gravity", 2))
    height = points[:, axis : axis + 1] - points[:, axis].min()
    if settings.get("normalize") is not None:
        points = points - points.mean(axis=0)
    if settings.get("normalize") == "unit_sphere":
        points = points / max(float(np.sqrt((points**2).sum(axis=1)).max()), 1e-12)
    elif settings.get("normalize") == "floor":
        points[:, axis] -= points[:, axis].min()
        height = points[:, axis : axis + 1]
    columns = []
    for name in settings.get("features", ()):
        if name == "color" and cloud.colors is not None:
            mean = np.asarray(settings.get("color_mean", 0.0), np.float32)
            std = np.asarray(settings.get("color_std", 1.0), np.float32)
            columns.append((cloud.colors - mean) / std)
        elif name == "normal" and cloud.normals is not None:
            columns.append(cloud.normals)
        elif name in ("xyz", "height"):
            columns.append(points if name == "xyz" else height)
        else:
            raise ValueError(
                f"the model reads a {name} at every point, and the cloud has none; give a file that has it"
            )
    x = torch.from_numpy(np.concatenate(columns, axis=1).T.astype(np.float32).copy()) if columns else None
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)), x


class _CloudPipeline(Pipeline):
    extensions = EXTENSIONS

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__(model)
        if not isinstance(model, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise errors.BadArgument(
                f"{type(model).__name__} does not answer {self.task}; expected {wanted}",
                argument="model",
                accepted=[],
            )
        self.settings = settings_of(model, self.preprocess)
        self.names = self.labels()

    def read(self, source: Any) -> Cloud:
        cloud = read_cloud(source)
        need = least_points(self.model)
        if len(cloud) < need:
            raise ValueError(f"the cloud has {len(cloud)} points; {self.name} needs at least {need}")
        return cloud

    def _name(self, i: int) -> str:
        return self.names[i] if self.names is not None and i < len(self.names) else f"class {i}"


@dataclass(kw_only=True)
class CloudLabels(Result):
    """The likeliest classes of one cloud, best first."""

    labels: list[str]
    probabilities: list[float]
    points: int = 0
    cloud: Cloud | None = field(default=None, repr=False)

    def summary(self) -> str:
        return self.labels[0]

    @property
    def confidence(self) -> float:
        return self.probabilities[0]

    def picture(self) -> Any:
        if self.cloud is None:
            return None
        shown = None if self.cloud.colors is None else (self.cloud.colors * 255).astype(np.uint8)
        title = f"{Path(self.source).name}: " + ", ".join(
            f"{n} {p:.1%}" for n, p in zip(self.labels[:3], self.probabilities, strict=False)
        )
        return three_views(self.cloud.points, shown, title=title)


class CloudClassification(_CloudPipeline):
    """Point-cloud files to their likeliest classes. ``top_k`` classes are reported.

    Clouds with more points than the model was trained on are thinned by farthest points; smaller ones are taken as they
    are, down to what the model can group. Duplicate points are allowed.
    """

    task = "point-cloud-classification"

    def __init__(self, model: nn.Module, top_k: int = 5) -> None:
        super().__init__(model, (PCM, PointMamba))
        if int(top_k) < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        self.top_k = int(top_k)

    def prepare(self, sample: Cloud) -> Any:
        count = int(self.settings.get("points", 0))
        if count and len(sample) > count:
            index = farthest_point_sample(torch.from_numpy(sample.points)[None], count)[0].numpy()
            sample = sample.take(index)
        pos, x = prepare_cloud(sample, self.settings)
        if isinstance(self.model, PointMamba):
            return pos
        return {"pos": pos} if x is None else {"pos": pos, "x": x}

    def finish(self, output: Tensor, sample: Cloud) -> CloudLabels:
        probabilities, indices = output.softmax(-1).topk(min(self.top_k, output.shape[-1]))
        return CloudLabels(
            labels=[self._name(i) for i in indices.tolist()],
            probabilities=probabilities.tolist(),
            points=len(sample),
            cloud=sample,
        )


@dataclass(kw_only=True)
class PointLabels(Result):
    """A label for every point of one cloud, in the order of the file."""

    counts: dict[str, int]
    mean_probability: float
    names: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    cloud: Cloud = field(repr=False)

    def summary(self) -> str:
        total = max(1, len(self.labels))
        return ", ".join(f"{name} {count / total:.0%}" for name, count in list(self.counts.items())[:4])

    @property
    def confidence(self) -> float:
        return self.mean_probability

    def colors(self) -> np.ndarray:
        """The colour of each point's label, (N, 3) uint8."""
        return palette(len(self.names))[self.labels]

    def save_ply(self, path: str | Path) -> Path:
        """The cloud with its labels (property ``label``) and their colours."""
        return write_ply(path, self.cloud.points, self.labels, self.colors())

    def picture(self) -> Any:
        shades = palette(len(self.names))
        legend = [(name, shades[self.names.index(name)]) for name in self.counts]
        return three_views(self.cloud.points, self.colors(), title=Path(self.source).name, legend=legend)


class CloudSegmentation(_CloudPipeline):
    """Point-cloud files to a label for every point.

    ``shape``: the kind of object, for models of object parts ("chair", or its number). Rooms are thinned to one point
    a voxel, in tiles where they are large; every point of the file then gets its nearest kept point's label. Object
    clouds with more points than the model was trained on are thinned by farthest points in the same way.
    """

    task = "point-cloud-segmentation"

    def __init__(self, model: nn.Module, shape: str | int | None = None) -> None:
        super().__init__(model, (PCMSegmentation, PointMambaSegmentation))
        self.shape = self._shape(shape)

    def _shape(self, shape: str | int | None) -> int | None:
        part: Any = self.model
        count = part.decoder.shapes if isinstance(part, PCMSegmentation) else part.shapes
        if not count:
            return None
        names = (Path(__file__).parent / "labels" / "shapenetpart_shapes.txt").read_text(encoding="utf-8").split()
        number = names.index(shape) if shape in names else shape
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if not isinstance(number, int) or not 0 <= number < count:
            raise errors.BadArgument(
                f"shape is {shape!r}; the model labels the parts of one kind of object: {', '.join(names)}",
                argument="shape",
                accepted=names,
            )
        return number

    def prepare(self, sample: Cloud) -> Any:
        pos, x = prepare_cloud(sample.take(self._kept(sample)), self.settings)
        if isinstance(self.model, PointMambaSegmentation):
            return {"points": pos, "cls": torch.tensor(self.shape)}
        found: dict[str, Any] = {"pos": pos}
        if x is not None:
            found["x"] = x
        if self.shape is not None:
            found["cls"] = torch.tensor(self.shape)
        return found

    def _kept(self, cloud: Cloud) -> np.ndarray:
        """Indices of the points that the model sees; the same for the same cloud."""
        voxel, count = self.settings.get("voxel"), int(self.settings.get("points", 0))
        if voxel:
            cells = np.floor((cloud.points - cloud.points.min(axis=0)) / float(voxel)).astype(np.int64)
            kept = np.sort(np.unique(cells, axis=0, return_index=True)[1])
            need = least_points(self.model)
            return kept if len(kept) >= need else np.arange(len(cloud))
        if count and len(cloud) > count:
            return farthest_point_sample(torch.from_numpy(cloud.points)[None], count)[0].sort().values.numpy()
        return np.arange(len(cloud))

    def finish(self, output: Tensor, sample: Cloud) -> PointLabels:
        probability, label = output.softmax(0).max(dim=0)
        labels, sure = label.numpy(), probability.numpy()
        kept = self._kept(sample)
        if len(kept) < len(sample):
            from scipy.spatial import cKDTree

            nearest = cKDTree(sample.points[kept]).query(sample.points)[1]
            labels, sure = labels[nearest], sure[nearest]
        names = [self._name(i) for i in range(output.shape[0])]
        found, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return PointLabels(
            counts={names[found[i]]: int(counts[i]) for i in order},
            mean_probability=float(sure.mean()),
            names=names,
            labels=labels,
            cloud=sample,
        )
