"""The networks: Mask R-CNN and its cascade in two stages, RetinaNet in one; and how they look for objects.

``forward`` is the network alone, tensors of known shapes; :meth:`Detector.detect` turns what it says into objects, and
:meth:`Detector.loss` compares it with what is there.

Source: He et al., "Mask R-CNN", arXiv 1703.06870; Cai and Vasconcelos, "Cascade R-CNN", arXiv 1906.09756, section 4;
Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002; in the form of mmdetection 3.3
(``models/detectors/two_stage.py``, ``models/roi_heads/{standard,cascade}_roi_head.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo_vision._base import check_count, freeze_norms

from .boxes import Anchors, best, best_solid, decode, ordered
from .heads import BoxHead, MaskHead, RetinaHead, RPNHead
from .regions import region_features

#: height and width of an image
Size = tuple[int, int]

#: what one is for deltas of box heads: of the first, second and third stage
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
#: of anchors' deltas
ANCHOR_STDS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Detections:
    """The objects of one image, surest first."""

    boxes: Tensor  #: (n, 4) float32: x0, y0, x1, y1 in pixels of the network's input
    scores: Tensor  #: (n,) float32, 0 to 1
    labels: Tensor  #: (n,) int64
    masks: Tensor | None = None  #: (n, side, side) float32: probability that this part of the box is the object

    def __len__(self) -> int:
        return len(self.boxes)


class Detector(GradCheckpointing, nn.Module):
    """A backbone that gives a list of maps, a neck that makes a pyramid of them, and heads.

    ``score_threshold``, ``overlap`` and ``per_image`` may be set: what :meth:`detect` leaves out as unlikely, what it
    takes for the same object (intersection over union of boxes of one class), and how many it gives at most.
    """

    score_threshold = 0.05
    overlap = 0.5
    per_image = 100
    #: anchors of one map that are looked at more closely, the likeliest
    candidates = 1000
    num_classes: int

    def __init__(self, backbone: nn.Module, neck: nn.Module, anchors: Anchors, *, frozen_norms: bool = False) -> None:
        super().__init__()
        self.backbone, self.neck, self.anchors, self.frozen_norms = backbone, neck, anchors, frozen_norms
        self.in_chans = int(getattr(backbone, "in_chans", 3))

    @property
    def ends(self) -> dict[str, Any]:
        """What ``num_classes=`` and ``in_chans=`` change in a checkpoint."""
        found: dict[str, Any] = {"num_classes": NewHead(*self._class_layers())}
        first = getattr(self.backbone, "ends", {}).get("in_chans")
        if isinstance(first, InputChannels):
            found["in_chans"] = InputChannels(*(f"backbone.{key}" for key in first.keys))
        return found

    def _class_layers(self) -> list[str]:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.frozen_norms:
            freeze_norms(self.backbone)
        return self

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (batch, in_chans, H, W) to the pyramid's maps, largest first."""
        return list(self.neck(self.backbone(x)))

    def _checked(self, x: Tensor) -> Tensor:
        channels = getattr(self.backbone, "in_chans", "channels")  # a backbone of the user's own need not say
        if x.dim() != 4 or channels not in (x.shape[1], "channels"):
            raise ValueError(f"images have shape {tuple(x.shape)}; expected (batch, {channels}, height, width)")
        return x

    def detect(self, x: Tensor, sizes: Sequence[Size] | None = None) -> list[Detections]:
        """The objects in each of the images x (batch, in_chans, H, W), without gradients.

        ``sizes``: (height, width) of each image where it was padded on the right and below; boxes end there. Raises
        ValueError for other sizes, and where the pyramid holds NaN or infinite values: nothing would be found.
        """
        known = checked_sizes(self._checked(x), sizes)
        if not known:
            return []
        with torch.no_grad():
            maps = self.maps(x)
            if not all(bool(torch.isfinite(m).all()) for m in maps):
                raise ValueError(
                    "the pyramid's maps are not finite: the images or weights hold NaN or infinite values, or numbers "
                    "are too large for the model's type of numbers (float32 and bfloat16 have room)"
                )
            return self._detect(maps, known)

    def _detect(self, maps: list[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        raise NotImplementedError

    def loss(
        self, x: Tensor, targets: Sequence[Mapping[str, Tensor]], sizes: Sequence[Size] | None = None
    ) -> dict[str, Tensor]:
        """What to minimise the sum of: scalars by name.

        ``targets``: for each image ``boxes`` (n, 4), ``labels`` (n,) int64 and, where the network has masks, ``masks``
        (n, H, W) bool or 0 and 1, at the input's resolution. ``sizes`` as in :meth:`detect`. Draws random numbers.
        """
        from .training import checked_targets

        known = checked_targets(targets, self._checked(x), self.num_classes, masks=self.has_masks)
        return self._loss(self.maps(x), known, checked_sizes(x, sizes))

    def _loss(
        self, maps: list[Tensor], targets: Sequence[Mapping[str, Tensor]], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    has_masks = False


def checked_sizes(x: Tensor, sizes: Sequence[Size] | None) -> list[Size]:
    """``sizes`` of the images of a batch x (batch, channels, H, W), all of it where None. Raises ValueError."""
    height, width = x.shape[2:]
    found = [(int(h), int(w)) for h, w in sizes] if sizes is not None else [(height, width)] * len(x)
    if len(found) != len(x) or not all(0 < h <= height and 0 < w <= width for h, w in found):
        raise ValueError(
            f"sizes is {found} for {len(x)} images padded to {(height, width)}; expected (height, width) of each, "
            "no larger than that"
        )
    return found


def by_anchor(x: Tensor, width: int) -> Tensor:
    """A map of what was said of anchors, (anchors * width, h, w), as rows (h * w * anchors, width) in their order."""
    return x.permute(1, 2, 0).reshape(-1, width)


# -- two stages ------------------------------------------------------------------------------------------------------


class RegionHeads(nn.Module):
    """Box and mask heads: one of each, or one for each stage of a cascade."""

    def __init__(self, bbox: Sequence[BoxHead], mask: Sequence[MaskHead]) -> None:
        super().__init__()
        self.bbox_head: nn.Module = bbox[0] if len(bbox) == 1 else nn.ModuleList(bbox)
        self.mask_head: nn.Module | None = None
        if mask:
            self.mask_head = mask[0] if len(bbox) == 1 else nn.ModuleList(mask)

    @property
    def boxes(self) -> list[Any]:
        return _each(self.bbox_head)

    @property
    def masks(self) -> list[Any]:
        return _each(self.mask_head)


def _each(module: nn.Module | None) -> list[Any]:
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]


class TwoStageDetector(Detector):
    """Mask R-CNN, or Cascade Mask R-CNN with several stages: proposals from the pyramid, then a closer look at each.

    Arguments beside :class:`Detector`'s: ``channels`` of the pyramid; ``num_classes``; ``stages`` 1 to 3;
    ``box_convs``, ``box_fcs``, ``box_width``, ``mask_convs``: layers of the heads (``mask_convs`` None: no masks);
    ``class_agnostic``: a box head moves one box for all classes; ``strides`` of the maps that regions are seen in (the
    last of the anchors' strides is for proposals alone); ``box_loss``: "l1" of the deltas, or "giou" of the boxes
    (generalised intersection over union); ``smooth``: up to which error proposals' loss is quadratic.
    """

    proposals = 1000  #: regions of an image that are looked at
    proposal_overlap = 0.7
    #: in training, the likeliest anchors of a map that become proposals
    training_candidates = 2000
    #: in training, how many of an image's anchors and regions are learned from, and how many of these stand for an
    #: object at most
    sampled_anchors = (256, 0.5)
    sampled_regions = (512, 0.25)

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        anchors: Anchors,
        *,
        channels: int = 256,
        num_classes: int = 80,
        stages: int = 1,
        box_convs: int = 0,
        box_fcs: int = 2,
        box_width: int = 1024,
        mask_convs: int | None = 4,
        class_agnostic: bool = False,
        box_loss: str = "l1",
        smooth: float = 0.0,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__(backbone, neck, anchors, frozen_norms=frozen_norms)
        check_count("num_classes", num_classes)
        if not 1 <= stages <= len(STDS):
            raise ValueError(f"stages is {stages}; expected 1 to {len(STDS)}")
        if box_loss not in ("l1", "giou"):
            raise ValueError(f"box_loss is {box_loss!r}; expected 'l1' or 'giou'")
        self.num_classes, self.box_loss, self.smooth = num_classes, box_loss, smooth
        self.rpn_head = RPNHead(channels, anchors.per_place)
        boxes = [
            BoxHead(channels, num_classes, convs=box_convs, fcs=box_fcs, width=box_width, class_agnostic=class_agnostic)
            for _ in range(stages)
        ]
        masks = [] if mask_convs is None else [MaskHead(channels, num_classes, convs=mask_convs) for _ in range(stages)]
        self.roi_head = RegionHeads(boxes, masks)
        self.has_masks = bool(masks)

    def _class_layers(self) -> list[str]:
        kinds = ["bbox_head.fc_cls", "mask_head.conv_logits"]
        if not self.roi_head.boxes[0].class_agnostic:
            kinds.append("bbox_head.fc_reg")
        found = []
        for kind in kinds:
            head, layer = kind.split(".")
            stages = len(self.roi_head.boxes)
            names = [head] if stages == 1 else [f"{head}.{i}" for i in range(stages)]
            found += [f"roi_head.{name}.{layer}" for name in names]
        return found

    def forward(self, x: Tensor, regions: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Images (batch, in_chans, H, W), and regions (batch, n, 4) of them that heads look at.

        Returns ``objectness``, logits (batch, anchors, h, w) for each map, and ``anchor_deltas`` (batch, anchors, 4,
        h, w). With ``regions`` also, a list over the stages each: ``regions`` (batch, n, 4) that the stage looked at,
        ``class_logits`` (batch, n, classes + 1), ``box_deltas`` (batch, n, classes or 1, 4), and ``mask_logits``
        (batch, n, classes, 28, 28) of the last stage's regions.
        """
        maps = self.maps(x)
        objectness, deltas = self.rpn_head(maps)
        found = {"objectness": objectness, "anchor_deltas": [m.unflatten(1, (-1, 4)) for m in deltas]}
        if regions is None:
            return found
        if regions.shape[::2] != (len(x), 4):
            raise ValueError(f"regions have shape {tuple(regions.shape)}; expected ({len(x)}, n, 4)")
        sizes = checked_sizes(x, None)
        seen, logits, moves = self._cascade(maps, list(ordered(regions.float())), sizes)
        answers: dict[str, list[Tensor]] = {
            "regions": [torch.stack(stage) for stage in seen],
            "class_logits": [torch.stack(stage) for stage in logits],
            "box_deltas": [torch.stack(stage) for stage in moves],
        }
        if self.has_masks:
            features = self._mask_features(maps, seen[-1])
            answers["mask_logits"] = [head(features).unflatten(0, (len(x), -1)) for head in self.roi_head.masks]
        return found | answers

    def propose(
        self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sequence[Size], candidates: int, count: int
    ) -> list[Tensor]:
        """At most ``count`` regions (n, 4) of each image, likeliest first, from the ``candidates`` of each map."""
        places = self.anchors([m.shape[2:] for m in objectness], objectness[0].device)  # type: ignore[misc]
        proposals = []
        for i, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, (logit, delta, anchor) in enumerate(zip(objectness, deltas, places, strict=True)):
                score, at = by_anchor(logit[i], 1)[:, 0].float().topk(min(candidates, len(anchor)))
                boxes.append(decode(anchor[at], by_anchor(delta[i], 4)[at], ANCHOR_STDS, size))
                scores.append(score)
                levels.append(torch.full_like(at, level))
            box = torch.cat(boxes)
            kept = best_solid(box, torch.cat(scores), torch.cat(levels), self.proposal_overlap, count)
            proposals.append(box[kept])
        return proposals

    def _cascade(
        self, maps: Sequence[Tensor], regions: list[Tensor], sizes: Sequence[Size]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], list[list[Tensor]]]:
        """What each stage looks at and says: regions (n_i, 4) of each image, logits (n_i, classes + 1) and deltas."""
        seen, logits, moves = [], [], []
        for stage, head in enumerate(self.roi_head.boxes):
            seen.append(regions)
            said, moved = self.look(maps, regions, stage)
            logits.append(said)
            moves.append(moved)
            if stage + 1 < len(self.roi_head.boxes):
                regions = [
                    refined(head, stage, r, s[:, :-1].argmax(dim=1), d, size)
                    for r, s, d, size in zip(regions, said, moved, sizes, strict=True)
                ]
        return seen, logits, moves

    def look(self, maps: Sequence[Tensor], regions: Sequence[Tensor], stage: int) -> tuple[list[Tensor], list[Tensor]]:
        """One stage's logits (n_i, classes + 1) and deltas (n_i, classes or 1, 4) of each image's regions (n_i, 4)."""
        head = self.roi_head.boxes[stage]
        counts = [len(r) for r in regions]
        logits, deltas = head(region_features(*self._seen_by_regions(maps), regions, head.side))
        return list(logits.split(counts)), list(deltas.split(counts))

    def _seen_by_regions(self, maps: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[int]]:
        """All maps but the smallest, and their strides."""
        return maps[:-1], self.anchors.strides[:-1]

    def _mask_features(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        return region_features(*self._seen_by_regions(maps), regions, self.roi_head.masks[0].side)

    def _detect(self, maps: list[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        objectness, deltas = self.rpn_head(maps)
        regions = self.propose(objectness, deltas, sizes, self.candidates, self.proposals)
        seen, logits, moves = self._cascade(maps, regions, sizes)
        last = len(seen) - 1
        found = []
        for i, size in enumerate(sizes):
            mean = torch.stack([stage[i].float() for stage in logits]).mean(dim=0)
            scores = mean.softmax(dim=-1)[:, :-1]
            # Boxes are made of what is likely alone: most classes of most regions are not.
            row, label = torch.where(scores > self.score_threshold)
            which = torch.zeros_like(label) if self.roi_head.boxes[last].class_agnostic else label
            boxes = decode(seen[last][i][row], moves[last][i][row, which], STDS[last], size)
            kept = best(boxes, scores[row, label], label, self.overlap, self.per_image)
            found.append(Detections(boxes[kept], scores[row, label][kept], label[kept]))
        return self._with_masks(maps, found) if self.has_masks else found

    def _with_masks(self, maps: Sequence[Tensor], found: Sequence[Detections]) -> list[Detections]:
        features = self._mask_features(maps, [f.boxes for f in found])
        labels = torch.cat([f.labels for f in found])
        at = torch.arange(len(labels), device=labels.device)
        stages = [head(features)[at, labels].float().sigmoid() for head in self.roi_head.masks]
        masks = torch.stack(stages).mean(dim=0).split([len(f) for f in found])
        return [Detections(f.boxes, f.scores, f.labels, m) for f, m in zip(found, masks, strict=True)]

    def _loss(
        self, maps: list[Tensor], targets: Sequence[Mapping[str, Tensor]], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        from .training import proposal_losses, region_losses

        objectness, deltas = self.rpn_head(maps)
        losses = proposal_losses(self, objectness, deltas, targets, sizes)
        with torch.no_grad():
            count = self.proposals * (1 if len(self.roi_head.boxes) == 1 else 2)
            regions = self.propose(objectness, deltas, sizes, self.training_candidates, count)
        return losses | region_losses(self, maps, regions, targets, sizes)


def refined(head: BoxHead, stage: int, regions: Tensor, labels: Tensor, deltas: Tensor, size: Size) -> Tensor:
    """Regions (n, 4) moved by what a stage said for ``labels`` (n,): where the next stage looks. No gradients."""
    which = torch.zeros_like(labels) if head.class_agnostic else labels
    return decode(regions, deltas.detach()[torch.arange(len(labels), device=labels.device), which], STDS[stage], size)


# -- one stage -------------------------------------------------------------------------------------------------------


class OneStageDetector(Detector):
    """RetinaNet: classes and boxes from every place of the pyramid at once.

    Arguments beside :class:`Detector`'s: ``channels`` of the pyramid, ``num_classes``, ``head_depth`` and
    ``head_width`` of the two stacks of convolutions.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        anchors: Anchors,
        *,
        channels: int = 256,
        num_classes: int = 80,
        head_depth: int = 4,
        head_width: int = 256,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__(backbone, neck, anchors, frozen_norms=frozen_norms)
        check_count("num_classes", num_classes)
        self.num_classes = num_classes
        self.bbox_head = RetinaHead(channels, anchors.per_place, num_classes, head_depth, head_width)

    def _class_layers(self) -> list[str]:
        return ["bbox_head.retina_cls"]

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Norms of the backbone's maps that the neck leaves out."""
        indices = list(getattr(self.backbone, "out_indices", None) or ())[: getattr(self.neck, "start_level", 0)]
        own = [f"backbone.{kind}{i}." for i in indices for kind in ("out_norms.", "outnorm")]
        return tuple(p for p in own if any(name.startswith(p) for name, _ in self.named_parameters()))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Images (batch, in_chans, H, W) to ``class_logits`` (batch, anchors, classes, h, w) and ``anchor_deltas``
        (batch, anchors, 4, h, w) for each map."""
        logits, deltas = self.bbox_head(self.maps(x))
        return {
            "class_logits": [m.unflatten(1, (-1, self.num_classes)) for m in logits],
            "anchor_deltas": [m.unflatten(1, (-1, 4)) for m in deltas],
        }

    def _detect(self, maps: list[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        logits, deltas = self.bbox_head(maps)
        places = self.anchors([m.shape[2:] for m in maps], maps[0].device)  # type: ignore[misc]
        found = []
        for i, size in enumerate(sizes):
            boxes, scores, labels = [], [], []
            for logit, delta, anchor in zip(logits, deltas, places, strict=True):
                likely = by_anchor(logit[i], self.num_classes).float().sigmoid()
                row, label = torch.where(likely > self.score_threshold)
                score, at = likely[row, label].topk(min(self.candidates, len(row)))
                row, label = row[at], label[at]
                boxes.append(decode(anchor[row], by_anchor(delta[i], 4)[row], ANCHOR_STDS, size))
                scores.append(score)
                labels.append(label)
            box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
            kept = best_solid(box, score, label, self.overlap, self.per_image)
            found.append(Detections(box[kept], score[kept], label[kept]))
        return found

    def _loss(
        self, maps: list[Tensor], targets: Sequence[Mapping[str, Tensor]], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        from .training import dense_losses

        logits, deltas = self.bbox_head(maps)
        return dense_losses(self, logits, deltas, targets)
