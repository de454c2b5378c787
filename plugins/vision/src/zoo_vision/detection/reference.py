"""mmdetection's detectors: what their configurations say, and their state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zoo_vision._base import check_reference_config
from zoo_vision.efficientvim import EfficientViM
from zoo_vision.efficientvim_dense import NECK_RULES
from zoo_vision.openmmlab import NetworkAdapter, Way, below, build_backbone
from zoo_vision.pyramids import FPNNeck, neck_arguments

from .boxes import Anchors
from .detectors import ANCHOR_STDS, STDS, Detector, OneStageDetector, TwoStageDetector

#: parts of a model's table that say nothing about the network
_UNREAD = {"data_preprocessor", "train_cfg", "init_cfg", "pretrained"}
_CODER = {"type": "DeltaXYWHBBoxCoder", "target_means": (0.0,) * 4, "target_stds": ANCHOR_STDS, "clip_border": True}


class DetectorAdapter(NetworkAdapter):
    """mmdetection's ``MaskRCNN``, ``FasterRCNN``, ``CascadeRCNN`` and ``RetinaNet`` on a backbone of MzeroMiko/VMamba
    (``MM_VSSM``), NVlabs/MambaVision (``MM_mamba_vision``) or mlvlab/EfficientViM (``EfficientViM_M4``); the
    configuration is its ``model`` dictionary. Versions 2.25 and 3.3 have the same keys."""

    system = "detector"
    network = Detector

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> Detector:
        kinds = {
            "MaskRCNN": two_stages, "FasterRCNN": two_stages, "CascadeRCNN": two_stages, "RetinaNet": one_stage
        }  # fmt: skip
        kind = config.get("type")
        if kind not in kinds:
            raise ValueError(f"the detector's type is {kind!r}; expected {' or '.join(kinds)}")
        backbone: Any = build_backbone(config.get("backbone", {}), state)
        channels = backbone.feature_info.channels()
        wanted = config.get("neck", {}).get("in_channels", channels)
        if list(wanted) != channels:
            raise ValueError(f"neck.in_channels is {list(wanted)}; the backbone's maps have {channels} channels")
        neck = neck_arguments(config.get("neck", {}), len(channels))
        model = kinds[kind](config, backbone, FPNNeck(channels, **neck), neck["out_channels"])
        model.frozen_norms = isinstance(backbone, EfficientViM)
        return self.load(model, state)  # type: ignore[return-value]

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``image`` (batch, 3, H, W) to the heads' maps, ``objectness_0`` and so on; with ``regions`` (batch, n, 4)
        also to what each stage says of them; with ``call="detect"`` to ``boxes_0``, ``scores_0``, ``labels_0``,
        ``masks_0`` of each image."""
        assert isinstance(model, Detector)
        image = inputs["image"]
        if call == "detect":
            found = model.detect(image)
            return {
                f"{name}_{i}": value
                for i, one in enumerate(found)
                for name, value in vars(one).items()
                if value is not None
            }
        given = (inputs["regions"],) if "regions" in inputs else ()
        return {f"{name}_{i}": m for name, maps in model(image, *given).items() for i, m in enumerate(maps)}

    def heads(self, state: Mapping[str, Tensor], way: Way) -> dict[str, Tensor]:
        neck = getattr(NECK_RULES, way)(below("neck.", state))
        rest = {k: v for k, v in super().heads(state, way).items() if not k.startswith("neck.")}
        return rest | {f"neck.{k}": v for k, v in neck.items()}


# -- the model's table -----------------------------------------------------------------------------------------------


def two_stages(config: Mapping[str, Any], backbone: nn.Module, neck: nn.Module, channels: int) -> TwoStageDetector:
    """A detector from the table of ``MaskRCNN``, ``FasterRCNN`` or ``CascadeRCNN``."""
    known = {"type", "backbone", "neck", "rpn_head", "roi_head", "test_cfg"}
    check_reference_config("detector", config, dict.fromkeys(known), _UNREAD)
    rpn = _part("rpn_head", config.get("rpn_head", {}), {
        "in_channels": channels, "feat_channels": channels, "num_convs": 1, "num_classes": 1, "anchor_generator": {},
        "bbox_coder": _CODER, "loss_cls": {}, "loss_bbox": {"type": "L1Loss"},
    })  # fmt: skip
    _same("rpn_head", rpn, {"in_channels": channels, "feat_channels": channels, "num_convs": 1, "num_classes": 1})
    _same("rpn_head.loss_cls", rpn["loss_cls"], {"use_sigmoid": True})
    _check_coder("rpn_head", rpn["bbox_coder"], ANCHOR_STDS)
    roi = _part("roi_head", config.get("roi_head", {}), {
        "type": "StandardRoIHead", "bbox_roi_extractor": {}, "bbox_head": {}, "mask_roi_extractor": None,
        "mask_head": None, "num_stages": 3, "stage_loss_weights": (1, 0.5, 0.25), "shared_head": None,
    })  # fmt: skip
    heads = roi["bbox_head"] if isinstance(roi["bbox_head"], Sequence) else [roi["bbox_head"]]
    stages = len(heads)
    if roi["type"] != ("CascadeRoIHead" if stages > 1 else "StandardRoIHead"):
        raise ValueError(
            f"roi_head is a {roi['type']} of {stages} bbox_head; expected a StandardRoIHead of one or a CascadeRoIHead "
            "of several"
        )
    if stages > 1:
        _same("roi_head", roi, {"num_stages": stages, "stage_loss_weights": (1, 0.5, 0.25)[:stages]})
    anchors = _anchors("rpn_head", rpn["anchor_generator"])
    _check_extractor("bbox_roi_extractor", roi["bbox_roi_extractor"], 7, channels, anchors.strides[:-1])
    boxes = [_box_head(f"bbox_head {i}", head, channels, STDS[i]) for i, head in enumerate(heads)]
    if any(head != boxes[0] for head in boxes):
        raise ValueError("the stages' bbox_heads differ in more than target_stds; expected equal ones")
    mask = roi["mask_head"][0] if isinstance(roi["mask_head"], Sequence) else roi["mask_head"]
    if mask is not None:
        _check_extractor("mask_roi_extractor", roi["mask_roi_extractor"] or {}, 14, channels, anchors.strides[:-1])
        mask = _part("mask_head", mask, {
            "num_convs": 4, "roi_feat_size": 14, "in_channels": channels, "conv_kernel_size": 3,
            "conv_out_channels": channels, "num_classes": 80, "class_agnostic": False, "loss_mask": {},
            "upsample_cfg": {"type": "deconv", "scale_factor": 2}, "conv_cfg": None, "norm_cfg": None,
        })  # fmt: skip
        _same("mask_head", mask, {
            "roi_feat_size": 14, "in_channels": channels, "conv_kernel_size": 3, "conv_out_channels": channels,
            "num_classes": boxes[0]["num_classes"], "class_agnostic": False, "conv_cfg": None, "norm_cfg": None,
            "upsample_cfg": {"type": "deconv", "scale_factor": 2},
        })  # fmt: skip
    distance = rpn["loss_bbox"]
    model = TwoStageDetector(
        backbone, neck, anchors, channels=channels, stages=stages, mask_convs=mask and mask["num_convs"],
        smooth=distance.get("beta", 1.0) if distance.get("type") == "SmoothL1Loss" else 0.0, **boxes[0],
    )  # fmt: skip
    tests = config.get("test_cfg") or {}
    rpn_test, test = dict(tests.get("rpn", {})), dict(tests.get("rcnn", {}))
    model.candidates, model.proposals = rpn_test.get("nms_pre", 1000), rpn_test.get("max_per_img", 1000)
    model.proposal_overlap = rpn_test.get("nms", {}).get("iou_threshold", 0.7)
    _same("test_cfg.rpn", {"min_bbox_size": 0, **rpn_test}, {"min_bbox_size": 0})
    return _searching(model, test)


def one_stage(config: Mapping[str, Any], backbone: nn.Module, neck: nn.Module, channels: int) -> OneStageDetector:
    """A detector from the table of ``RetinaNet``."""
    known = {"type", "backbone", "neck", "bbox_head", "test_cfg"}
    check_reference_config("detector", config, dict.fromkeys(known), _UNREAD)
    head = _part("bbox_head", config.get("bbox_head", {}), {
        "type": "RetinaHead", "num_classes": 80, "in_channels": channels, "stacked_convs": 4, "feat_channels": 256,
        "anchor_generator": {}, "bbox_coder": _CODER, "loss_cls": {}, "loss_bbox": {"type": "L1Loss"},
        "conv_cfg": None, "norm_cfg": None,
    })  # fmt: skip
    _same("bbox_head", head, {"type": "RetinaHead", "in_channels": channels, "conv_cfg": None, "norm_cfg": None})
    _same("bbox_head.loss_cls", {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25,
        **head["loss_cls"]}, {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25})  # fmt: skip
    _check_coder("bbox_head", head["bbox_coder"], ANCHOR_STDS)
    model = OneStageDetector(
        backbone, neck, _anchors("bbox_head", head["anchor_generator"]), channels=channels,
        num_classes=head["num_classes"], head_depth=head["stacked_convs"], head_width=head["feat_channels"],
    )  # fmt: skip
    test = dict(config.get("test_cfg") or {})
    model.candidates = test.pop("nms_pre", 1000)
    _same("test_cfg", {"min_bbox_size": 0, **test}, {"min_bbox_size": 0})
    return _searching(model, test)


def _searching(model: Any, test: Mapping[str, Any]) -> Any:
    """``model`` with the thresholds of a ``test_cfg``."""
    model.score_threshold = test.get("score_thr", 0.05)
    model.overlap = test.get("nms", {}).get("iou_threshold", 0.5)
    model.per_image = test.get("max_per_img", 100)
    kind = test.get("nms", {}).get("type", "nms")
    if kind != "nms":
        raise ValueError(f"test_cfg.nms.type is {kind!r}; expected 'nms'")
    _same("test_cfg", {"mask_thr_binary": 0.5, **test}, {"mask_thr_binary": 0.5})
    return model


def _part(name: str, config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return check_reference_config(name, config, known, {"type", "init_cfg"} - set(known))


def _same(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses values that the published detectors do not have and that would build something else."""
    for key, value in expected.items():
        given = found.get(key)
        given = tuple(given) if isinstance(given, list) else given
        if given != value:
            raise ValueError(f"{name}.{key} is {given!r}; expected {value!r}, as in the published detectors")


def _check_coder(name: str, coder: Mapping[str, Any], stds: Sequence[float]) -> None:
    found = {**_CODER, **coder}
    found |= {k: tuple(float(v) for v in found[k]) for k in ("target_means", "target_stds")}
    _same(f"{name}.bbox_coder", found, {**_CODER, "target_stds": tuple(stds)})


def _check_extractor(name: str, config: Mapping[str, Any], side: int, channels: int, strides: Sequence[int]) -> None:
    layer = {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0, **config.get("roi_layer", {})}
    _same(f"{name}.roi_layer", layer, {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0})
    found = {"type": "SingleRoIExtractor", "out_channels": channels, "featmap_strides": tuple(strides),
        "finest_scale": 56, **config}  # fmt: skip
    _same(name, found, {"type": "SingleRoIExtractor", "out_channels": channels, "featmap_strides": tuple(strides),
        "finest_scale": 56})  # fmt: skip


def _anchors(name: str, config: Mapping[str, Any]) -> Anchors:
    given = check_reference_config(f"{name}.anchor_generator", config, {
        "type": "AnchorGenerator", "strides": (4, 8, 16, 32, 64), "ratios": (0.5, 1.0, 2.0), "scales": None,
        "octave_base_scale": None, "scales_per_octave": None, "base_sizes": None, "scale_major": True, "centers": None,
        "center_offset": 0.0,
    })  # fmt: skip
    _same(f"{name}.anchor_generator", given, {"type": "AnchorGenerator", "base_sizes": None, "scale_major": True,
        "centers": None, "center_offset": 0.0})  # fmt: skip
    scales = given["scales"]
    if scales is None:
        base, count = given["octave_base_scale"] or 8, given["scales_per_octave"] or 1
        scales = [base * 2 ** (i / count) for i in range(count)]
    return Anchors(tuple(given["strides"]), tuple(float(s) for s in scales), tuple(float(r) for r in given["ratios"]))


def _box_head(name: str, config: Mapping[str, Any], channels: int, stds: Sequence[float]) -> dict[str, Any]:
    """Arguments of :class:`TwoStageDetector` from one ``bbox_head``."""
    kinds = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1), "ConvFCBBoxHead": (0, 0)}
    kind = config.get("type", "Shared2FCBBoxHead")
    if kind not in kinds:
        raise ValueError(f"{name}.type is {kind!r}; expected {' or '.join(kinds)}")
    convs, fcs = kinds[kind]
    head = _part(name, config, {
        "num_shared_convs": convs, "num_shared_fcs": fcs, "num_cls_convs": 0, "num_cls_fcs": 0, "num_reg_convs": 0,
        "num_reg_fcs": 0, "conv_out_channels": 256, "fc_out_channels": 1024, "in_channels": channels,
        "roi_feat_size": 7, "num_classes": 80, "bbox_coder": {"target_stds": stds}, "reg_class_agnostic": False,
        "reg_decoded_bbox": False, "norm_cfg": None, "conv_cfg": None, "with_avg_pool": False, "loss_cls": {},
        "loss_bbox": {"type": "L1Loss"},
    })  # fmt: skip
    _same(name, head, {"num_cls_convs": 0, "num_cls_fcs": 0, "num_reg_convs": 0, "num_reg_fcs": 0,
        "in_channels": channels, "roi_feat_size": 7, "conv_cfg": None, "with_avg_pool": False})  # fmt: skip
    _check_coder(name, head["bbox_coder"], stds)
    loss = head["loss_bbox"].get("type", "L1Loss")
    if loss not in ("L1Loss", "GIoULoss", "SmoothL1Loss") or (loss == "GIoULoss") != head["reg_decoded_bbox"]:
        raise ValueError(f"{name} has loss_bbox {loss!r} with reg_decoded_bbox={head['reg_decoded_bbox']}; expected "
            "'L1Loss' of the deltas, or 'GIoULoss' of decoded boxes")  # fmt: skip
    if head["num_shared_convs"]:
        _same(name, head, {"conv_out_channels": channels})
        if (head["norm_cfg"] or {}).get("type") not in ("BN", "SyncBN"):
            raise ValueError(f"{name}.norm_cfg is {head['norm_cfg']!r}; expected batch norm behind the convolutions")
    if not head["num_shared_fcs"]:
        raise ValueError(f"{name}.num_shared_fcs is 0; expected 1 or more")
    return {
        "box_convs": head["num_shared_convs"], "box_fcs": head["num_shared_fcs"],
        "box_width": head["fc_out_channels"], "num_classes": head["num_classes"],
        "class_agnostic": head["reg_class_agnostic"], "box_loss": "giou" if loss == "GIoULoss" else "l1",
    }  # fmt: skip
