"""Point-cloud files in; a class, or a label for every point, out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .blocks import blended
from .files import EXTENSIONS, Cloud, read_cloud, write_labels
from .geometry import centred, farthest_point_sample, unit_sphere
from .pcm import PCM, PCMSegmentation, tiles
from .pictures import palette, three_views
from .pointmamba import PointMamba, PointMambaMAE, PointMambaSegmentation, PointMambaTrunk


def settings_of(model: nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """How a model's clouds are prepared: the weights' settings, for random weights those of the published ones."""
    if own:
        return own
    info = getattr(model, "zoo_info", None)
    weights = info.card.default_weights if info is not None and info.card is not None else None
    return dict(weights.preprocess) if weights is not None else {}


def shapes_of(model: nn.Module) -> int:
    """How many kinds of objects a model of parts is told; 0 for a model that labels every kind alike."""
    part: Any = model
    return part.decoder.shapes if isinstance(part, PCMSegmentation) else part.shapes


def kinds_of(settings: dict[str, Any]) -> list[str]:
    """The names of these kinds: those that the model was trained on, otherwise ShapeNetPart's."""
    published = Path(__file__).parent / "labels" / "shapenetpart_shapes.txt"
    return list(settings.get("kinds") or published.read_text(encoding="utf-8").split())


def least_points(model: nn.Module) -> int:
    """The fewest points that the model can take."""
    trunk = model.trunk if isinstance(model, PointMambaMAE) else model
    if isinstance(trunk, PointMambaTrunk):
        return max(trunk.num_groups, trunk.group_size)
    need, encoder = 1, getattr(model, "encoder", None)
    groupers = list(encoder.local_grouper_list) if encoder is not None else []
    for grouper in reversed(groupers):
        need = max(need * grouper.reducer, grouper.k)
    return need


def thinned(cloud: Cloud, count: int) -> Cloud:
    """``count`` farthest points; smaller clouds as they are, and all where ``count`` is 0."""
    if not count or len(cloud) <= count:
        return cloud
    return cloud.take(farthest_point_sample(torch.from_numpy(cloud.points)[None], count)[0].numpy())


def prepare_cloud(
    cloud: Cloud, settings: dict[str, Any], moved: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[Tensor, Tensor | None]:
    """(coordinates (N, 3), features (C, N) or None), as the originals' data sets make them.

    Settings: ``normalize`` "unit_sphere" (minus the mean, over the largest radius) or "floor" (minus the mean, lowest
    height 0); ``features``: of "xyz", "normal", "color", "height" (above the lowest point along axis ``gravity``,
    taken before scaling); ``color_mean``, ``color_std``. ``moved``: in training, what is done to normalised points.
    """
    points = cloud.points.astype(np.float32)
    axis = int(settings.get("gravity", 2))
    height = points[:, axis : axis + 1] - points[:, axis].min()
    if settings.get("normalize") == "unit_sphere":
        points = unit_sphere(points)
    elif settings.get("normalize") == "floor":
        points = centred(points)
        points[:, axis] -= points[:, axis].min()
        height = points[:, axis : axis + 1]
    points = points if moved is None else moved(points)
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


def number(value: Any, name: str, kind: type, low: float, high: float, expected: str) -> Any:
    """An option as an int or float, which may come as text; BadArgument where it is none from ``low`` to ``high``."""
    try:
        found = kind(value)
    except (TypeError, ValueError):
        found = None
    if found is None or not low <= found <= high or (kind is int and found != float(value)):
        raise errors.BadArgument(f"{name} is {value!r}; expected {expected}", argument=name, accepted=[])
    return found


class CloudPipeline(Pipeline):
    """What the tasks of single clouds share: files to clouds that the model can take."""

    extensions = EXTENSIONS

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...], invalid: str) -> None:
        super().__init__(model)
        if invalid not in ("error", "drop"):
            raise errors.BadArgument(
                f"invalid is {invalid!r}; expected 'error' or 'drop' (points with NaN or infinite coordinates)",
                argument="invalid",
                accepted=["error", "drop"],
            )
        self.invalid = invalid
        if not isinstance(model, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise errors.BadArgument(
                f"{type(model).__name__} does not answer {self.task}; expected {wanted}",
                argument="model",
                accepted=[],
            )
        self.settings = settings_of(model, self.preprocess)
        self.names = self.labels()

    def read(self, source: Any) -> Any:
        return self._cloud(source)

    def _cloud(self, source: Any) -> Cloud:
        cloud = read_cloud(source, self.invalid)
        need = least_points(self.model)
        if len(cloud) < need:
            raise ValueError(f"the cloud has {len(cloud)} points; {self.name} needs at least {need}")
        return cloud

    def forward(self, batch: Any) -> Tensor:
        """One cloud at a time where the others of a batch would change its answer: as published, a batch shares the
        bits of its curves, and only a room that comes alone is cut into tiles."""
        if not (getattr(self.model, "mixes_batch", False) or getattr(self.model, "test_crop", None)):
            return self._answer(batch)
        if isinstance(batch, Tensor):
            return torch.cat([self._answer(cloud) for cloud in batch.split(1)])
        count = len(next(iter(batch.values())))
        return torch.cat([self._answer({k: v[i : i + 1] for k, v in batch.items()}) for i in range(count)])

    def _answer(self, batch: Any) -> Tensor:
        return super().forward(batch)

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)  # coordinates stay float32; the models cast what goes into their layers

    def _name(self, i: int) -> str:
        return self.names[i] if self.names is not None and i < len(self.names) else f"class {i}"


@dataclass(kw_only=True)
class CloudLabels(Result):
    """The likeliest classes of one cloud, best first."""

    labels: list[str]
    probabilities: list[float]
    indices: list[int] = field(default_factory=list, repr=False)
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
        shown = None if self.cloud.colors is None else (self.cloud.colors * 255).round().astype(np.uint8)
        title = f"{Path(self.source).name}: " + ", ".join(
            f"{n} {p:.1%}" for n, p in zip(self.labels[:3], self.probabilities, strict=False)
        )
        return three_views(self.cloud.points, shown, title=title)


class CloudClassification(CloudPipeline):
    """Point-cloud files to their likeliest classes. ``top_k`` classes are reported; ``invalid``: points with NaN or
    infinite coordinates are an "error", or are left out ("drop").

    Clouds with more points than the model was trained on are thinned by farthest points; smaller ones are taken as they
    are, down to what the model can group. Duplicate points are allowed.
    """

    task = "point-cloud-classification"

    def __init__(self, model: nn.Module, top_k: int = 5, invalid: str = "error") -> None:
        super().__init__(model, (PCM, PointMamba), invalid)
        self.top_k = number(top_k, "top_k", int, 1, inf, "a whole number, 1 or more")

    def prepare(self, sample: Cloud) -> Any:
        pos, x = prepare_cloud(thinned(sample, int(self.settings.get("points", 0))), self.settings)
        if isinstance(self.model, PointMamba):
            return pos
        return {"pos": pos} if x is None else {"pos": pos, "x": x}

    def finish(self, output: Tensor, sample: Cloud) -> CloudLabels:
        probabilities, indices = output.softmax(-1).topk(min(self.top_k, output.shape[-1]))
        return CloudLabels(
            labels=[self._name(i) for i in indices.tolist()],
            indices=indices.tolist(),
            probabilities=probabilities.tolist(),
            points=len(sample),
            cloud=sample,
        )


@dataclass(kw_only=True)
class PointLabels(Result):
    """A label for every point of one cloud, in the order of the file (with ``invalid="drop"``, of the points left)."""

    counts: dict[str, int]
    mean_probability: float
    names: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    cloud: Cloud = field(repr=False)
    values: list[int] = field(default_factory=list, repr=False)  #: of the classes in the files that were trained on

    def summary(self) -> str:
        total = max(1, len(self.labels))
        return ", ".join(f"{name} {count / total:.0%}" for name, count in list(self.counts.items())[:4])

    @property
    def confidence(self) -> float:
        return self.mean_probability

    def colors(self) -> np.ndarray:
        """The colour of each point's label, (N, 3) uint8."""
        return palette(len(self.names))[self.labels]

    def save_labels(self, path: str | Path) -> Path:
        """The cloud with labels (property or extra dimension ``label``) and their colours, as .ply, .las or .laz.
        Labels are numbers of classes; of models that were trained here, those of the files they were trained on."""
        values = np.asarray(self.values or range(len(self.names)))
        named = dict(zip(values.tolist(), self.names, strict=True))
        return write_labels(path, self.cloud, values[self.labels], self.colors(), named)

    def picture(self) -> Any:
        shades = palette(len(self.names))
        legend = [(name, shades[self.names.index(name)]) for name in self.counts]
        return three_views(self.cloud.points, self.colors(), title=Path(self.source).name, legend=legend)


@dataclass
class _Thinned:
    """A cloud, and the indices of the points that the model sees."""

    cloud: Cloud
    kept: np.ndarray


class CloudSegmentation(CloudPipeline):
    """Point-cloud files to a label for every point.

    ``shape``: the kind of object, for models of object parts that need it ("chair", or its number). Rooms are thinned
    to one point a voxel; object clouds with more points than the model was trained on are thinned by farthest points.
    Every point of the file then gets its nearest kept point's label.

    Large scenes: rooms go through the model whole or in the tiles that its authors evaluate with; scenes whose tiles
    would hold more than twice the points that those are meant for, or fewer than the model can group, go through in
    blocks of at most ``block_points`` points that overlap by the share ``overlap`` of a block on each side, and the
    probabilities are blended. Memory is then bounded, whatever the scene's size. ``block_points`` may be given to have
    blocks in any case.
    ``invalid``: points with NaN or infinite coordinates are an "error", or are left out ("drop").
    """

    task = "point-cloud-segmentation"

    def __init__(
        self,
        model: nn.Module,
        shape: str | int | None = None,
        block_points: int | None = None,
        overlap: float = 0.125,
        invalid: str = "error",
    ) -> None:
        super().__init__(model, (PCMSegmentation, PointMambaSegmentation), invalid)
        self.shape = self._shape(shape)
        self.block_points = None
        if block_points is not None:
            if isinstance(model, PointMambaSegmentation):
                raise errors.BadArgument(
                    f"block_points is {block_points}; {self.name} labels objects, which go through whole: leave it out",
                    argument="block_points",
                    accepted=[],
                )
            need = least_points(model)
            expected = f"a whole number; {self.name} needs at least {need} points, blocks at least {2 * need}"
            self.block_points = number(block_points, "block_points", int, 2 * need, inf, expected)
        self.overlap = number(overlap, "overlap", float, 0, 1, "a share of a block, 0 to 1")

    def _shape(self, shape: str | int | None) -> int | None:
        count = shapes_of(self.model)
        if not count:
            if shape is not None:
                raise errors.BadArgument(
                    f"shape is {shape!r}; {self.name} labels every kind of object alike: leave it out",
                    argument="shape",
                    accepted=[],
                )
            return None
        if shape is None and count == 1:
            return 0
        names = kinds_of(self.settings)
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

    def read(self, source: Any) -> _Thinned:
        cloud = self._cloud(source)
        return _Thinned(cloud, self._kept(cloud))

    def prepare(self, sample: _Thinned) -> Any:
        pos, x = prepare_cloud(sample.cloud.take(sample.kept), self.settings)
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
            kept = first_of_each_voxel(cloud.points, float(voxel))
            return kept if len(kept) >= least_points(self.model) else np.arange(len(cloud))
        if count and len(cloud) > count:
            return farthest_point_sample(torch.from_numpy(cloud.points)[None], count)[0].sort().values.numpy()
        return np.arange(len(cloud))

    def _answer(self, batch: Any) -> Tensor:
        most = self._block_size(batch.get("pos"))
        if most is None:
            return super()._answer(batch)
        return torch.stack(
            [self._in_blocks({k: v[b] for k, v in batch.items()}, most) for b in range(len(batch["pos"]))]
        )

    def _block_size(self, pos: Tensor | None) -> int | None:
        """The most points of a block where the scenes go through in blocks, otherwise None."""
        crop = getattr(self.model, "test_crop", None)
        if pos is None or pos.shape[1] <= (self.block_points or crop or pos.shape[1]):
            return None
        if self.block_points is not None:
            return self.block_points
        assert crop is not None
        sizes = [len(index) for cloud in pos for index in tiles(cloud, crop)]
        return crop if max(sizes) > 2 * crop or min(sizes) < least_points(self.model) else None

    def _in_blocks(self, scene: dict[str, Tensor], most: int) -> Tensor:
        """One scene's log-probabilities (classes, points). A block begins at zero, as the authors' tiles do."""

        def answer(index: np.ndarray) -> Tensor:
            chosen = torch.from_numpy(index).to(scene["pos"].device)
            pos = scene["pos"][chosen]
            block = {"pos": (pos - pos.amin(dim=0))[None]}
            if "x" in scene:
                block["x"] = scene["x"][:, chosen][None]
            if "cls" in scene:
                block["cls"] = scene["cls"][None]
            return self.model(**block)[0]

        points = scene["pos"].float().cpu().numpy()
        return blended(points, answer, most, self.overlap, least_points(self.model)).log_()

    def finish(self, output: Tensor, sample: _Thinned) -> PointLabels:
        probability, label = output.softmax(0).max(dim=0)
        labels, sure = label.numpy(), probability.numpy()
        cloud, kept = sample.cloud, sample.kept
        if len(kept) < len(cloud):
            from scipy.spatial import cKDTree

            nearest = cKDTree(cloud.points[kept]).query(cloud.points)[1]
            labels, sure = labels[nearest], sure[nearest]
        names = [self._name(i) for i in range(output.shape[0])]
        values = list(self.settings.get("label_values", ()))
        found, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return PointLabels(
            counts={names[found[i]]: int(counts[i]) for i in order},
            mean_probability=float(sure.mean()),
            names=names,
            labels=labels,
            cloud=cloud,
            values=values if len(values) == len(names) else [],  # else the head is another
        )


def first_of_each_voxel(points: np.ndarray, size: float) -> np.ndarray:
    """Indices (M,), ascending, of the first point in each occupied cube of ``size`` in a cloud (N, 3)."""
    cells = np.floor((points - points.min(axis=0)) / size).astype(np.int64)
    extent = cells.max(axis=0) + 1
    if float(extent[0]) * float(extent[1]) * float(extent[2]) >= 2**63:
        raise ValueError(
            f"the cloud is {tuple(np.ptp(points, axis=0).tolist())} large and voxels of {size} are too many to count; "
            "its coordinates are expected in metres, without far-off outliers"
        )
    key = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    return np.sort(np.unique(key, return_index=True)[1])
