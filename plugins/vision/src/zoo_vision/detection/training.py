"""What detectors learn from: which anchor or region stands for which object, and the losses.

Source: Ren et al., arXiv 1506.01497, section 3.1.2; Girshick, arXiv 1504.08083, section 2.3; Cai and Vasconcelos, arXiv
1906.09756; Lin et al., arXiv 1708.02002, section 3; Rezatofighi et al., "Generalized Intersection over Union", arXiv
1902.09630; in the form of mmdetection 3.3 (``task_modules/assigners/max_iou_assigner.py``, ``samplers/
random_sampler.py``, ``dense_heads/anchor_head.py``, ``bbox_heads/bbox_head.py``, ``mask_heads/fcn_mask_head.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou_loss, roi_align, sigmoid_focal_loss

from .boxes import decode, encode
from .detectors import ANCHOR_STDS, STDS, by_anchor, refined

if TYPE_CHECKING:
    from .detectors import OneStageDetector, Size, TwoStageDetector

NOTHING, IGNORED = -1, -2

#: intersection over union from which a region is an object, for each stage
REGION_IS_OBJECT = (0.5, 0.6, 0.7)
STAGE_WEIGHTS = (1.0, 0.5, 0.25)


def checked_targets(
    targets: Sequence[Mapping[str, Tensor]], x: Tensor, num_classes: int, *, masks: bool
) -> list[dict[str, Tensor]]:
    """``targets`` on x's device, boxes and masks as float32. Raises ValueError where they do not fit the images."""
    if len(targets) != len(x):
        raise ValueError(f"there are targets for {len(targets)} images; expected {len(x)}, one for each")
    found = []
    for i, target in enumerate(targets):
        wanted = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
        if lacking := [key for key in wanted if key not in target]:
            raise ValueError(f"the targets of image {i} have no {lacking[0]!r}; expected {', '.join(wanted)}")
        one = {k: target[k].to(x.device) for k in wanted}
        boxes, labels = one["boxes"].float().reshape(-1, 4), one["labels"].long()
        if labels.shape != boxes.shape[:1] or not ((labels >= 0) & (labels < num_classes)).all():
            raise ValueError(
                f"image {i} has {len(boxes)} boxes and labels {labels.tolist()}; expected one label of 0 to "
                f"{num_classes - 1} for each box"
            )
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ValueError(f"a box of image {i} has no area: {boxes.tolist()}; expected x0, y0, x1, y1 in pixels")
        one |= {"boxes": boxes, "labels": labels}
        if masks:
            one["masks"] = one["masks"].float()
            if one["masks"].shape != (len(boxes), *x.shape[2:]):
                raise ValueError(
                    f"the masks of image {i} have shape {tuple(one['masks'].shape)}; expected "
                    f"{(len(boxes), *x.shape[2:])}: one of the input's size for each box"
                )
            low, high = torch.aminmax(one["masks"]) if one["masks"].numel() else (0.0, 0.0)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"the masks of image {i} go from {low:g} to {high:g}; expected bool, or 0 and 1")
        found.append(one)
    return found


def assign(
    boxes: Tensor, objects: Tensor, *, object_from: float, nothing_below: float, at_least: float | None
) -> Tensor:
    """Which of ``objects`` (n, 4) each of ``boxes`` (m, 4) stands for: (m,) indices, :data:`NOTHING` or
    :data:`IGNORED`.

    A box is the object that it overlaps most if the intersection over union reaches ``object_from``, and nothing if all
    overlaps lie below ``nothing_below``. ``at_least``: the boxes that overlap an object most are that object's too if
    they overlap it by so much; None: they are not.
    """
    found = torch.full((len(boxes),), IGNORED, device=boxes.device)
    if not len(objects):
        return found.fill_(NOTHING)
    if not len(boxes):
        return found
    overlaps = box_iou(objects, boxes)
    most, which = overlaps.max(dim=0)
    found[most < nothing_below] = NOTHING
    found = torch.where(most >= object_from, which, found)
    if at_least is not None:
        best_of_object = overlaps.amax(dim=1)
        for i in range(len(objects)):  # a later object takes what an earlier one had
            if best_of_object[i] >= at_least:
                found[overlaps[i] == best_of_object[i]] = i
    return found


def sample(assigned: Tensor, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices of at most ``count`` boxes, drawn at random: of objects, at most ``share`` of them, and of nothing."""
    (objects,), (nothing,) = torch.where(assigned >= 0), torch.where(assigned == NOTHING)
    objects = _drawn(objects, int(count * share))
    return objects, _drawn(nothing, count - len(objects))


def _drawn(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


def _distance(found: Tensor, wanted: Tensor, smooth: float) -> Tensor:
    """Summed absolute differences, quadratic below ``smooth``."""
    return F.smooth_l1_loss(found, wanted, reduction="sum", beta=smooth)


# -- proposals -------------------------------------------------------------------------------------------------------


def proposal_losses(
    model: TwoStageDetector,
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[Size],
) -> dict[str, Tensor]:
    """``proposal_objects`` and ``proposal_boxes``, means over the sampled anchors of all images."""
    anchors = torch.cat(model.anchors([m.shape[2:] for m in objectness], objectness[0].device))  # type: ignore[misc]
    logits, wanted, moves, goals = [], [], [], []
    for i, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        logit = torch.cat([by_anchor(m[i], 1)[:, 0] for m in objectness]).float()
        delta = torch.cat([by_anchor(m[i], 4) for m in deltas]).float()
        usable = torch.arange(len(anchors), device=anchors.device)
        if len(model.roi_head.boxes) > 1:  # the cascade's recipe leaves out what reaches beyond the image
            low, high = anchors[:, :2], anchors[:, 2:]
            (usable,) = torch.where((low >= 0).all(dim=1) & (high < low.new_tensor([size[1], size[0]])).all(dim=1))
        assigned = assign(anchors[usable], target["boxes"], object_from=0.7, nothing_below=0.3, at_least=0.3)
        objects, nothing = sample(assigned, *model.sampled_anchors)
        logits.append(logit[usable[torch.cat([objects, nothing])]])
        wanted.append(torch.cat([torch.ones_like(objects), torch.zeros_like(nothing)]).float())
        moves.append(delta[usable[objects]])
        goals.append(encode(anchors[usable[objects]], target["boxes"][assigned[objects]], ANCHOR_STDS))
    count = max(sum(len(w) for w in wanted), 1)
    return {
        "proposal_objects": F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(wanted), reduction="sum")
        / count,
        "proposal_boxes": _distance(torch.cat(moves), torch.cat(goals), model.smooth) / count,
    }


# -- regions ---------------------------------------------------------------------------------------------------------


def region_losses(
    model: TwoStageDetector,
    maps: Sequence[Tensor],
    regions: list[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[Size],
) -> dict[str, Tensor]:
    """``classes``, ``boxes`` and ``masks``; of a cascade for each stage, as ``classes_0``, with the stage's weight."""
    stages = model.roi_head.boxes
    losses: dict[str, Tensor] = {}
    for stage, head in enumerate(stages):
        drawn = [_draw(model, stage, r, t) for r, t in zip(regions, targets, strict=True)]
        logits, deltas = model.look(maps, [d["regions"] for d in drawn], stage)
        labels = torch.cat([d["labels"] for d in drawn])
        found = {
            "classes": F.cross_entropy(torch.cat(logits).float(), labels, reduction="sum") / max(len(labels), 1),
            "boxes": _box_loss(model, head, stage, drawn, deltas) / max(len(labels), 1),
        }
        if model.has_masks:
            found["masks"] = _mask_loss(model, stage, maps, drawn, targets)
        for name, value in found.items():
            losses[name if len(stages) == 1 else f"{name}_{stage}"] = value * STAGE_WEIGHTS[stage]
        if stage + 1 < len(stages):
            with torch.no_grad():
                regions = [
                    _refined(model, stage, d, s, m, size)
                    for d, s, m, size in zip(drawn, logits, deltas, sizes, strict=True)
                ]
    return losses


def _draw(model: TwoStageDetector, stage: int, regions: Tensor, target: Mapping[str, Tensor]) -> dict[str, Any]:
    """Regions of one image to learn from, those of objects first: ``regions`` (n, 4), ``labels`` (n,), the
    ``objects`` (count,) that the first of them stand for, and ``given`` (count,): which of those are the objects' own
    boxes. These are among the proposals, so that there is something to learn from at first."""
    boxes = torch.cat([target["boxes"], regions])
    threshold = REGION_IS_OBJECT[stage]
    # Mask R-CNN's recipe gives an object what overlaps it most even if that is not much more than enough; a cascade's
    # does not, which here, with the boxes themselves among the regions, hardly matters.
    at_least = threshold if len(model.roi_head.boxes) == 1 else None
    assigned = assign(boxes, target["boxes"], object_from=threshold, nothing_below=threshold, at_least=at_least)
    objects, nothing = sample(assigned, *model.sampled_regions)
    labels = torch.cat([target["labels"][assigned[objects]], torch.full_like(nothing, model.num_classes)])
    return {
        "regions": boxes[torch.cat([objects, nothing])],
        "labels": labels,
        "objects": assigned[objects],
        "goals": target["boxes"][assigned[objects]],
        "given": objects < len(target["boxes"]),
    }


def _box_loss(
    model: TwoStageDetector, head: Any, stage: int, drawn: Sequence[Mapping[str, Any]], deltas: Sequence[Tensor]
) -> Tensor:
    """Summed over the regions that stand for an object."""
    regions, moves, goals = [], [], []
    for one, moved in zip(drawn, deltas, strict=True):
        count = len(one["objects"])
        which = torch.zeros_like(one["labels"][:count]) if head.class_agnostic else one["labels"][:count]
        regions.append(one["regions"][:count])
        moves.append(moved[torch.arange(count, device=which.device), which].float())
        goals.append(one["goals"])
    region, move, goal = torch.cat(regions), torch.cat(moves), torch.cat(goals)
    if model.box_loss == "giou":
        return 10.0 * generalized_box_iou_loss(decode(region, move, STDS[stage]), goal, reduction="sum", eps=1e-6)
    return _distance(move, encode(region, goal, STDS[stage]), 0.0)


def _mask_loss(
    model: TwoStageDetector,
    stage: int,
    maps: Sequence[Tensor],
    drawn: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """Mean over the parts of all regions that stand for an object, of that object's class alone."""
    regions = [one["regions"][: len(one["objects"])] for one in drawn]
    labels = torch.cat([one["labels"][: len(one["objects"])] for one in drawn])
    logits = model.roi_head.masks[stage](model._mask_features(maps, regions))
    if not len(labels):
        return logits.sum()
    side = logits.shape[-1]
    wanted = []
    for region, one, target in zip(regions, drawn, targets, strict=True):
        if len(region):
            rois = torch.cat([one["objects"][:, None].float(), region], dim=1)
            masks = target["masks"][:, None]
            wanted.append(roi_align(masks, rois, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5)
    chosen = logits[torch.arange(len(labels), device=labels.device), labels].float()
    return F.binary_cross_entropy_with_logits(chosen, torch.cat(wanted).float())


def _refined(
    model: TwoStageDetector, stage: int, drawn: Mapping[str, Any], logits: Tensor, deltas: Tensor, size: Size
) -> Tensor:
    """Where the next stage looks: the drawn regions, moved, without the objects' own boxes."""
    labels = drawn["labels"]
    labels = torch.where(labels == model.num_classes, logits[:, :-1].argmax(dim=1), labels)
    moved = refined(model.roi_head.boxes[stage], stage, drawn["regions"], labels, deltas, size)
    kept = torch.ones(len(moved), dtype=torch.bool, device=moved.device)
    kept[: len(drawn["given"])] = ~drawn["given"]
    return moved[kept]


# -- one stage -------------------------------------------------------------------------------------------------------


def dense_losses(
    model: OneStageDetector, logits: Sequence[Tensor], deltas: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """``classes`` (focal loss) and ``boxes``, sums over all anchors by the number of those that stand for an object."""
    anchors = torch.cat(model.anchors([m.shape[2:] for m in logits], logits[0].device))  # type: ignore[misc]
    classes, boxes, count = [], [], 0
    for i, target in enumerate(targets):
        said = torch.cat([by_anchor(m[i], model.num_classes) for m in logits]).float()
        moved = torch.cat([by_anchor(m[i], 4) for m in deltas]).float()
        assigned = assign(anchors, target["boxes"], object_from=0.5, nothing_below=0.4, at_least=0.0)
        (objects,) = torch.where(assigned >= 0)
        wanted = torch.zeros_like(said)
        wanted[objects, target["labels"][assigned[objects]]] = 1.0
        counted = assigned != IGNORED
        classes.append(sigmoid_focal_loss(said[counted], wanted[counted], alpha=0.25, gamma=2.0, reduction="sum"))
        goals = encode(anchors[objects], target["boxes"][assigned[objects]], ANCHOR_STDS)
        boxes.append(_distance(moved[objects], goals, 0.0))
        count += len(objects)
    return {"classes": sum(classes) / max(count, 1), "boxes": sum(boxes) / max(count, 1)}  # type: ignore[dict-item]
