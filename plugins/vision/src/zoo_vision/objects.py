"""Detection in image files: what is where, with a score, and which pixels of the picture belong to it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from zoo.files import check_ending, whole
from zoo.pipelines import Result
from zoo_registry import errors

from .pictures import legend_card
from .resized import ResizedPictures
from .scenes import palette


@dataclass(kw_only=True)
class Found:
    """One object of a picture."""

    label: str
    index: int  #: of the class
    score: float  #: 0 to 1
    box: tuple[float, float, float, float]  #: left, top, right, bottom in pixels of the picture
    #: the pixels (h, w) around the box that belong to it, bool; None from a network without masks
    mask: np.ndarray | None = field(default=None, repr=False)
    corner: tuple[int, int] = field(default=(0, 0), repr=False)  #: row and column where ``mask`` begins

    def whole_mask(self, size: tuple[int, int]) -> np.ndarray:
        """The mask at the size of the picture, ``size`` = (width, height): (height, width) bool. Without a mask, the
        pixels whose centres lie in the box."""
        out = np.zeros((size[1], size[0]), dtype=bool)
        part, (top, left) = self.part(size)
        out[top : top + part.shape[0], left : left + part.shape[1]] = part
        return out

    def part(self, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """The part of :meth:`whole_mask` that holds all its pixels, and the row and column where that begins."""
        if self.mask is not None:
            return self.mask, self.corner
        left, right = (min(max(round(v), 0), size[0]) for v in self.box[::2])
        top, bottom = (min(max(round(v), 0), size[1]) for v in self.box[1::2])
        return np.ones((max(bottom - top, 0), max(right - left, 0)), dtype=bool), (top, left)


@dataclass(kw_only=True)
class Objects(Result):
    """What was found in one picture, surest first."""

    objects: list[Found]
    size: tuple[int, int]  #: width, height
    image: Image.Image | None = field(default=None, repr=False)

    def summary(self) -> str:
        counts = Counter(one.label for one in self.objects)
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing found"

    @property
    def confidence(self) -> float | None:
        return self.objects[0].score if self.objects else None

    def to_dict(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for one in self.objects:
            rows.append({"label": one.label, "index": one.index, "score": one.score, "box": list(one.box)})
            if one.mask is not None:
                rows[-1]["pixels"] = int(one.mask.sum())
        return super().to_dict() | {"objects": rows}

    def coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Entries of COCO's results format. ``category_id`` is the class's index: COCO's own ids have gaps, see
        :func:`zoo_vision.validation.validate_coco`. Masks are run lengths that are not compressed
        (``pycocotools.mask.frPyObjects`` compresses them)."""
        rows = []
        for one in self.objects:
            left, top, right, bottom = one.box
            row: dict[str, Any] = {
                "image_id": image_id, "category_id": one.index, "score": one.score,
                "bbox": [left, top, right - left, bottom - top],
            }  # fmt: skip
            if one.mask is not None:
                whole = (self.size[1], self.size[0])
                row["segmentation"] = {"size": list(whole), "counts": run_lengths(one.mask, one.corner, whole)}
            rows.append(row)
        return rows

    def save(self, path: str | Path) -> Path:
        """A ``.json`` of COCO's results format, or a ``.png`` of 16 bits: the number of the object that each pixel
        belongs to, 1 for the surest, 0 for none; where two overlap, the surer one's."""
        path = Path(path)
        check_ending(path, [".json", ".png"])
        with whole(path) as work:
            if path.suffix.lower() == ".json":
                work.write_text(json.dumps(self.coco(Path(self.source).name)), encoding="utf-8")
            else:
                Image.fromarray(self.numbers()).save(work)
        return path

    def numbers(self) -> np.ndarray:
        """(height, width) uint16, as :meth:`save` describes it."""
        out = np.zeros((self.size[1], self.size[0]), dtype=np.uint16)
        for number, one in reversed(list(enumerate(self.objects, 1))):
            part, (top, left) = one.part(self.size)
            out[top : top + part.shape[0], left : left + part.shape[1]][part] = number
        return out

    def picture(self) -> Image.Image | None:
        """The picture with its objects outlined, and what they are."""
        if self.image is None:
            return None
        colours = palette(max((one.index for one in self.objects), default=0) + 1)
        painted = np.array(self.image.convert("RGB"))
        for one in reversed(self.objects):
            if one.mask is not None:
                top, left = one.corner
                part = painted[top : top + one.mask.shape[0], left : left + one.mask.shape[1]]
                part[one.mask] = (part[one.mask] * 0.5 + np.array(colours[one.index]) * 0.5).astype(np.uint8)
        drawn = Image.fromarray(painted)
        pen = ImageDraw.Draw(drawn)
        thick = max(1, round(max(drawn.size) / 300))
        for one in reversed(self.objects):
            pen.rectangle(one.box, outline=colours[one.index], width=thick)
        rows = [(f"{one.label} {one.score:.0%}", colours[one.index]) for one in self.objects[:14]]
        return legend_card(self.image, drawn, rows, title=f"{self.model}   {Path(self.source).name}")


def run_lengths(mask: np.ndarray, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> list[int]:
    """COCO's run lengths of a mask (h, w) bool: pixels column by column, counts of zeros and ones in turn.

    ``corner``: row and column of a picture of ``size`` (height, width) where the mask begins; zeros are around it. So
    an object costs what it covers, however large the picture.
    """
    height, width = mask.shape if size is None else size
    steps = np.diff(np.pad(mask, ((1, 1), (0, 0))).astype(np.int8), axis=0).T  # (w, h + 1): where ones begin and end
    begins, ends = (column * height + row for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1)))
    apart = begins[1:] != ends[:-1]  # ones may go on in the next column
    if len(begins):
        begins, ends = begins[np.r_[True, apart]], ends[np.r_[apart, True]]
    edges = np.stack([begins, ends], axis=1).ravel() + corner[1] * height + corner[0]
    counts = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
    return counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """A box's mask at the picture's resolution.

    ``mask`` (side, side): probabilities on an even grid over ``box`` (4,), in pixels of a picture of ``size`` (height,
    width). Returns the pixels (h, w) bool around the box that belong to it, those whose centre has a probability of at
    least one half (bilinear between the grid's, zero outside), and the row and column where they begin.
    """
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    right, bottom = min(int(-(-x1 // 1)) + 1, width), min(int(-(-y1 // 1)) + 1, height)
    x = (torch.arange(left, max(right, left), device=mask.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(top, max(bottom, top), device=mask.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5, (top, left)


class ObjectDetection(ResizedPictures):
    """Image files to the objects in them: box, class and score of each, and its pixels if the network has masks.

    As mmdetection tests: the picture is resized, its sides in proportion, until the shorter is ``short_side`` long, or
    the longer ``long_side`` if that comes first (None: what the weights were tested at, else 800 and 1333), and padded
    to multiples of 32. ``min_score``: less sure objects are left out; below the model's ``score_threshold`` (0.05) it
    has no effect. Pictures: paths, PIL images or arrays (H, W, 3) of uint8.
    """

    task = "object-detection"

    def __init__(
        self,
        model: nn.Module,
        min_score: float = 0.3,
        short_side: int | None = None,
        long_side: int | None = None,
    ) -> None:
        super().__init__(model, short_side, long_side, usual=(800, 1333))
        if not hasattr(model, "detect"):
            raise errors.BadArgument(
                f"{self.name} has no detect(images, sizes) that gives boxes, scores and labels; is it a classifier or "
                "a backbone?",
                argument="model",
                accepted=[],
            )
        if not 0 <= min_score <= 1:
            raise errors.BadArgument(
                f"min_score is {min_score}; expected 0 to 1", argument="min_score", accepted=[]
            )  # fmt: skip
        self.min_score = min_score
        self.names = self.labels()

    def forward(self, batch: Tensor) -> list[dict[str, Tensor]]:
        size = (batch.shape[2], batch.shape[3])
        padded = F.pad(batch, (0, -size[1] % 32, 0, -size[0] % 32))
        found = self.model.detect(padded, [size] * len(batch))  # type: ignore[operator]
        return [{k: v for k, v in vars(one).items() if v is not None} for one in found]

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: dict[str, Tensor], sample: Image.Image) -> Objects:
        inner = self.size_of(sample.width, sample.height)
        scale = torch.tensor([sample.width / inner[1], sample.height / inner[0]]).repeat(2)
        boxes = output["boxes"] * scale
        objects = []
        for i, (score, index) in enumerate(zip(output["scores"].tolist(), output["labels"].tolist(), strict=True)):
            if score < self.min_score:
                break
            label = self.names[index] if self.names is not None and index < len(self.names) else f"class {index}"
            left, top, right, bottom = boxes[i].tolist()
            one = Found(label=label, index=index, score=score, box=(left, top, right, bottom))
            if "masks" in output:
                mask, one.corner = pasted(output["masks"][i], boxes[i], (sample.height, sample.width))
                one.mask = mask.numpy()
            objects.append(one)
        return Objects(objects=objects, size=sample.size, image=sample)
