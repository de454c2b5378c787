"""Training a detector on annotations in COCO's format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.training import Shuffled
from zoo_registry import errors
from zoo_vision.coco import has_mask, pycocotools, read_coco
from zoo_vision.objects import ObjectDetection
from zoo_vision.segmentation import resize
from zoo_vision.validation import upright_size

from .augment import jittered, samples
from .common import begun_on

#: sides of batches are multiples of this, as in inference
MULTIPLE = 32


def annotations_of(data: Path, images: Path | None) -> tuple[Path, Path]:
    """(the annotations' .json, the folder of the pictures): ``data`` is the file, whose folder then has the pictures,
    or a folder with both. ``images``: another folder of pictures. Raises BadArgument."""
    if not data.is_dir():
        return data, images or data.parent
    found = sorted(data.glob("*.json"))
    if len(found) != 1:
        raise errors.BadArgument(
            f"{data} holds {len(found)} .json files; expected one, of COCO's format, or the file itself with --images",
            argument="data",
            accepted=[],
        )
    return found[0], images or data


@dataclass
class Annotated:
    """A picture, and what is in it: ``boxes`` (n, 4) float32, x0, y0, x1, y1 in its pixels; ``labels`` (n,) int64; the
    ``segmentations`` of COCO's format, if masks are learned."""

    file: Path
    entry: dict[str, Any]
    size: tuple[int, int]  #: width, height, upright
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list[Any] = field(repr=False)

    def masks(self, size: tuple[int, int]) -> np.ndarray:
        """(n, h, w) bool, of the picture resized to ``size`` = (h, w). Polygons are resized before they are drawn."""
        tools = pycocotools("mask")
        scale = np.array([size[1] / self.size[0], size[0] / self.size[1]])
        found = np.zeros((len(self.segmentations), *size), dtype=bool)
        for i, given in enumerate(self.segmentations):
            if isinstance(given, list):
                polygons = [(np.reshape(p, (-1, 2)) * scale).ravel().tolist() for p in given]
                found[i] = tools.decode(tools.merge(tools.frPyObjects(polygons, *size)))
                continue
            packed = given if isinstance(given["counts"], (str, bytes)) else tools.frPyObjects(given, *given["size"])
            whole = torch.from_numpy(tools.decode(packed).astype(np.float32))
            found[i] = (resize(whole[None, None], size)[0, 0] >= 0.5).numpy()
        return found


class Annotations:
    """A file of COCO's format as pictures to train on. ``table`` as :func:`~zoo_vision.coco.read_coco` gives it.

    names: of the classes, in the order of the categories' ids. Boxes are cut at the borders of the picture; what is
    then less than a pixel wide or high is left out, and so are crowds, which are no single objects. Pictures without
    objects are trained on as well.
    """

    def __init__(self, path: Path, folder: Path, names: Sequence[str] | None = None) -> None:
        self.table = read_coco(path)
        categories = sorted(self.table["categories"], key=lambda c: c["id"])
        self.names = [c["name"] for c in categories] if names is None else list(names)
        where = {name.casefold(): i for i, name in enumerate(self.names)}
        used = {a["category_id"] for a in self.table["annotations"]}
        self.classes: dict[Any, int] = {
            c["id"]: where[c["name"].casefold()] for c in categories if c["name"].casefold() in where
        }
        if unknown := [c["name"] for c in categories if c["id"] in used - set(self.classes)]:
            raise errors.BadArgument(
                f"{path} has the category {unknown[0]!r}, which is not trained; expected {', '.join(self.names[:8])}",
                argument="data",
                accepted=self.names,
            )
        own: dict[Any, list[dict[str, Any]]] = {}
        for one in self.table["annotations"]:
            own.setdefault(one["image_id"], []).append(one)
        self.left_out = 0
        entries = sorted(self.table["images"], key=lambda entry: entry["id"])
        self.pictures = [self._picture(e, folder, own.get(e["id"], []), path) for e in entries]

    def _picture(self, entry: dict[str, Any], folder: Path, own: list[dict[str, Any]], path: Path) -> Annotated:
        file = folder / entry["file_name"]
        size = upright_size(file)
        if (said := (entry.get("width", size[0]), entry.get("height", size[1]))) != size:
            raise errors.BadFile(
                f"{file} has {size[0]} x {size[1]} pixels (upright), its annotations in {path} are for {said[0]} x "
                f"{said[1]}; give the folder of the pictures that were annotated as --images",
                path=str(file),
            )
        entry |= {"width": size[0], "height": size[1]}
        single = [a for a in own if not a["iscrowd"]]
        for one in single:
            given = one.get("segmentation")
            if isinstance(given, dict) and list(given.get("size", ())) != [size[1], size[0]]:
                raise errors.BadFile(
                    f"a mask in {path} has the size (height, width) {given.get('size')}, its picture {file} "
                    f"{[size[1], size[0]]}",
                    path=str(path),
                )
        corners = np.array([a["bbox"] for a in single], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = np.clip(corners, 0, np.tile(size, 2))
        large: np.ndarray = np.all(boxes[:, 2:] - boxes[:, :2] >= 1, axis=1)
        self.left_out += len(own) - int(large.sum())
        kept = [a for a, fits in zip(single, large, strict=True) if fits]
        return Annotated(
            file, entry, size, boxes[large].astype(np.float32),
            np.array([self.classes[a["category_id"]] for a in kept], dtype=np.int64),
            [a.get("segmentation") for a in kept],
        )  # fmt: skip

    def has_masks(self) -> bool:
        """Whether all objects have masks. Raises BadArgument where some have."""
        with_mask = [has_mask({"segmentation": s}) for picture in self.pictures for s in picture.segmentations]
        if any(with_mask) and not all(with_mask):
            raise errors.BadArgument(
                f"{with_mask.count(False)} of {len(with_mask)} annotations have no mask (polygons or run lengths); "
                "give all of them masks, or learn boxes alone: --boxes",
                argument="data",
                accepted=[],
            )
        return bool(with_mask) and all(with_mask)


def begun_detector(name: str, start: str | None, seed: int, *, boxes: bool, **arguments: Any) -> nn.Module:
    """:func:`~zoo_vision.training.common.begun_on`; ``boxes``: without masks, which the weights may have."""
    given = begun_on(name, start, seed, **arguments)
    if not (boxes and given.has_masks):
        return given
    config = given.zoo_info.config | {"mask_convs": None}  # type: ignore[operator, union-attr]
    model = zoo.create(given.zoo_info.architecture, **config)  # type: ignore[arg-type, union-attr]
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in given.state_dict().items() if k in own})
    model.zoo_info.weights = given.zoo_info.weights  # type: ignore[union-attr]
    return model


class Batches:
    """Batches of augmented pictures for :func:`zoo.training.fit`: x (batch, channels, H, W), as ``pipe`` prepares
    pictures, padded on the right and below to multiples of 32; the targets of
    :meth:`zoo_vision.detection.Detector.loss`; (height, width) of each picture.

    A picture is resized to the size at which the pipeline sees it times a number between ``scales``; flip and jitter as
    for classifiers. masks: whether they are learned.
    """

    def __init__(
        self,
        pictures: Sequence[Annotated],
        pipe: ObjectDetection,
        *,
        masks: bool,
        batch_size: int = 4,
        seed: int = 0,
        scales: tuple[float, float] = (0.75, 1.25),
        flip: bool = True,
        jitter: float = 0.2,
    ) -> None:
        self.pictures, self.pipe, self.masks = pictures, pipe, masks
        self.scales, self.flip, self.jitter = scales, flip, jitter
        self.order = Shuffled(len(pictures), batch_size, seed)

    def __call__(self, index: int) -> tuple[Tensor, list[dict[str, Tensor]], list[tuple[int, int]]]:
        random = self.order.random(index)
        made = samples(self._sample, (self.pictures[i] for i in self.order(index)), random)
        sizes = [(x.shape[1], x.shape[2]) for x, _ in made]
        height, width = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*sizes, strict=True))
        beyond = [(0, width - w, 0, height - h) for h, w in sizes]
        targets = [target for _, target in made]
        if self.masks:
            for target, pad in zip(targets, beyond, strict=True):
                target["masks"] = F.pad(target["masks"], pad)
        return torch.stack([F.pad(x, pad) for (x, _), pad in zip(made, beyond, strict=True)]), targets, sizes

    def _sample(self, picture: Annotated, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.pipe.read(picture.file)
        pixels = torch.from_numpy(np.array(image)).float()
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        scale = math.exp(random.uniform(*np.log(self.scales)))
        height, width = (max(1, round(side * scale)) for side in self.pipe.size_of(*image.size))
        pixels = resize(pixels[None], (height, width))[0].round().to(torch.uint8)
        ratio = np.tile([width / image.width, height / image.height], 2)
        boxes = torch.from_numpy((picture.boxes * ratio).astype(np.float32))
        target = {"boxes": boxes, "labels": torch.from_numpy(picture.labels)}
        if self.masks:
            target["masks"] = torch.from_numpy(picture.masks((height, width)))
        if self.flip and random.random() < 0.5:
            pixels = pixels.flip(-1)
            target |= {k: v.flip(-1) for k, v in target.items() if k == "masks"}
            target["boxes"] = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        return (jittered(pixels, random, self.jitter) / 255 - self.pipe.mean) / self.pipe.std, target


def loss(model: nn.Module, batch: tuple[Tensor, Sequence[Mapping[str, Tensor]], Sequence[tuple[int, int]]]) -> Tensor:
    """The sum of the detector's losses."""
    return sum(model.loss(*batch).values())  # type: ignore[operator, return-value]
