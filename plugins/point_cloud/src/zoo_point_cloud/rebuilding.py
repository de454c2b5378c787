"""A point cloud in; the patches that a masked autoencoder rebuilds without having seen them, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.pipelines import Result
from zoo_registry import errors

from .files import Cloud, write_labels
from .geometry import gather
from .pictures import three_views
from .pipelines import CloudPipeline, number, prepare_cloud, thinned
from .pointmamba import ORDERS, PointMambaMAE, chamfer

SEEN, HIDDEN, REBUILT = (150, 150, 150), (70, 110, 190), (230, 120, 30)


@dataclass(kw_only=True)
class RebuiltCloud(Result):
    """Patches of one cloud that the model saw, those that it did not see, and what it made in their place.

    Coordinates are the file's own (with ``origin`` added). Patches overlap: a point may lie in a seen and a hidden one.
    """

    loss: float  #: Chamfer distance of hidden patches as in training, in the model's units
    distance: float  #: mean distance to the nearest point of the other, both ways, over hidden patches; file's units
    patches: int
    hidden_patches: int
    points: int  #: of the file
    seen: np.ndarray = field(repr=False)  #: (patches seen, points, 3) float32
    hidden: np.ndarray = field(repr=False)  #: (hidden patches, points, 3): the truth
    rebuilt: np.ndarray = field(repr=False)  #: (hidden patches, points, 3)
    origin: np.ndarray | None = field(default=None, repr=False)  #: as :class:`~zoo_point_cloud.files.Cloud`

    def summary(self) -> str:
        return (
            f"{self.hidden_patches} of {self.patches} patches rebuilt: Chamfer distance {self.loss:.4g}, "
            f"{self.distance:.4g} off on average"
        )

    def save(self, path: str | Path) -> Path:
        """The points seen and the rebuilt ones as .ply, .las or .laz: label 0 "seen" (grey), 1 "rebuilt" (orange)."""
        return write_labels(path, *self._marked(self.rebuilt, REBUILT), ["seen", "rebuilt"])

    def _marked(self, others: np.ndarray, colour: tuple[int, int, int]) -> tuple[Cloud, np.ndarray, np.ndarray]:
        """Others and seen points as one cloud, which is which, and their colours."""
        points = np.concatenate([others.reshape(-1, 3), self.seen.reshape(-1, 3)])
        labels = np.repeat([1, 0], [others.size // 3, self.seen.size // 3])
        return Cloud(points, origin=self.origin), labels, np.array([SEEN, colour], np.uint8)[labels]

    def picture(self) -> Image.Image:
        """Above the cloud with its hidden patches in blue, below with the rebuilt ones in orange. Points of a hidden
        patch that a seen one holds too are grey: they come last, and cover the others."""
        sheets = []
        for others, colour, name in ((self.hidden, HIDDEN, "hidden"), (self.rebuilt, REBUILT, "rebuilt")):
            cloud, _, colours = self._marked(others, colour)
            legend = [("seen", np.array(SEEN)), (name, np.array(colour))]
            sheets.append(three_views(cloud.points, colours, title=f"{Path(self.source).name}: {name}", legend=legend))
        both = Image.new("RGB", (sheets[0].width, sum(s.height for s in sheets)), "white")
        both.paste(sheets[0], (0, 0))
        both.paste(sheets[1], (0, sheets[0].height))
        return both


class _Thinned(NamedTuple):
    """A cloud's size, and those of its points that the model sees."""

    size: int
    cloud: Cloud


class CloudRebuilding(CloudPipeline):
    """Point-cloud files to the patches that a masked autoencoder rebuilds from the others.

    ``mask_ratio`` of the patches are hidden (default: the model's), by chance from ``seed``: the same cloud gives the
    same answer, alone or among others. ``order`` in which the patches are read: "hilbert" or "hilbert-trans" (training
    draws one). ``invalid``: points with NaN or infinite coordinates are an "error", or are left out ("drop"). Clouds
    with more points than the model was trained on are thinned by farthest points.
    """

    task = "point-cloud-pretraining"

    def __init__(
        self,
        model: nn.Module,
        mask_ratio: float | None = None,
        seed: int = 0,
        order: str = "hilbert",
        invalid: str = "error",
    ) -> None:
        super().__init__(model, (PointMambaMAE,), invalid)
        assert isinstance(model, PointMambaMAE)
        self.autoencoder, self.seed = model, seed
        groups = model.trunk.num_groups
        ratio = model.mask_ratio if mask_ratio is None else mask_ratio
        expected = f"a share that hides some of the {groups} patches, not all"
        self.mask_ratio: float = number(ratio, "mask_ratio", float, 1 / groups, 1 - 1e-9, expected)
        if order not in ORDERS:
            raise errors.BadArgument(
                f"order is {order!r}; expected {' or '.join(map(repr, ORDERS))}", argument="order", accepted=[*ORDERS]
            )
        self.order = order

    def read(self, source: Any) -> _Thinned:
        cloud = self._cloud(source)
        return _Thinned(len(cloud), thinned(cloud, int(self.settings.get("points", 0))))

    def prepare(self, sample: _Thinned) -> Tensor:
        return prepare_cloud(sample.cloud, self.settings)[0]

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """(B, N, 3) to patches in the model's coordinates; one cloud at a time, because a batch shares its curve."""
        found = [self._one(points[None]) for points in batch]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _one(self, points: Tensor) -> dict[str, Tensor]:
        model, trunk = self.autoencoder, self.autoencoder.trunk
        patches, centres = trunk.group(points)
        walk = trunk.order(centres, self.order)
        centres, patches = gather(centres, walk), gather(patches.flatten(2), walk).view_as(patches)
        mask = model.draw_mask(centres, self.mask_ratio, torch.Generator().manual_seed(self.seed))
        found = model(points, mask=mask, order=self.order)
        placed = patches + centres[:, :, None]
        rebuilt = found["rebuilt"].float()
        return {
            "loss": found["loss"],
            "distance": chamfer(rebuilt, patches[mask].float(), "cdl1"),
            "seen": placed[~mask],
            "hidden": placed[mask],
            "rebuilt": rebuilt + centres[mask][:, None],
        }

    def finish(self, output: dict[str, Tensor], sample: _Thinned) -> RebuiltCloud:
        scale, shift = _back(sample.cloud.points, self.prepare(sample).numpy())
        world: dict[str, Any] = {
            name: output[name].float().numpy() * scale + shift for name in ("seen", "hidden", "rebuilt")
        }
        return RebuiltCloud(
            loss=float(output["loss"]),
            distance=float(output["distance"]) * float(scale),
            patches=self.autoencoder.trunk.num_groups,
            hidden_patches=len(world["hidden"]),
            points=sample.size,
            origin=sample.cloud.origin,
            **world,
        )


def _back(given: np.ndarray, used: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """(scale, shift) with given = used * scale + shift, for points (N, 3) that were moved and scaled evenly."""
    spread, own = np.ptp(used, axis=0), np.ptp(given, axis=0)
    axis = int(spread.argmax())
    scale = np.float32(own[axis] / spread[axis]) if spread[axis] > 0 else np.float32(1)
    return scale, given.mean(axis=0) - used.mean(axis=0) * scale
