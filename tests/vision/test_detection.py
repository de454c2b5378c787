"""Detectors against mmdetection's recorded answers, against definitions, and in published files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import zoo
import zoo_kernels
from zoo.testing.procedural import procedural_values
from zoo_registry import errors
from zoo_vision.detection import TwoStageDetector, training
from zoo_vision.detection.boxes import Anchors, best, decode, encode, inside, ordered, pyramid_level
from zoo_vision.detection.building import cascade_mask_rcnn, mask_rcnn, retinanet
from zoo_vision.detection.regions import by_products, region_features
from zoo_vision.objects import pasted

# -- mmdetection's configurations ------------------------------------------------------------------------------------

VMAMBA = {
    "type": "MM_VSSM", "out_indices": (0, 1, 2, 3), "pretrained": "", "dims": 8, "depths": (1, 1, 1, 1),
    "ssm_d_state": 1, "ssm_dt_rank": "auto", "ssm_ratio": 1.0, "ssm_conv": 3, "ssm_conv_bias": False,
    "forward_type": "v05_noz", "mlp_ratio": 4.0, "downsample_version": "v3", "patchembed_version": "v2",
    "drop_path_rate": 0.0, "norm_layer": "ln2d",
}  # fmt: skip
MAMBAVISION = {
    "type": "MM_mamba_vision", "out_indices": (0, 1, 2, 3), "pretrained": "", "depths": (1, 1, 1, 2),
    "num_heads": (1, 2, 2, 4), "window_size": (8, 8, 8, 4), "dim": 16, "in_dim": 8, "mlp_ratio": 4,
    "drop_path_rate": 0.0, "norm_layer": "ln2d", "layer_scale": None,
}  # fmt: skip
EFFICIENTVIM = {
    "type": "EfficientViM_M4", "pretrained": None, "frozen_stages": -1, "in_channels": [224, 320, 512],
    "embed_dim": (16, 24, 32), "depths": (1, 1, 1), "state_dim": (12, 9, 4),
}  # fmt: skip
C, CLASSES = 16, 5
STRIDES = [4, 8, 16, 32]


def coder(*stds: float) -> dict:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}


def extractor(side: int) -> dict:
    return {"type": "SingleRoIExtractor", "roi_layer": {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0},
        "out_channels": C, "featmap_strides": STRIDES}  # fmt: skip


def box_head(stds: tuple, cascade: bool, agnostic: bool = False) -> dict:
    head = {
        "in_channels": C, "fc_out_channels": 32, "roi_feat_size": 7, "num_classes": CLASSES, "bbox_coder": coder(*stds),
        "reg_class_agnostic": agnostic,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    }  # fmt: skip
    if not cascade:
        return head | {"type": "Shared2FCBBoxHead", "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0}}
    return head | {
        "type": "ConvFCBBoxHead", "num_shared_convs": 2, "num_shared_fcs": 1, "conv_out_channels": C,
        "reg_decoded_bbox": True, "norm_cfg": {"type": "BN", "requires_grad": True},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
    }  # fmt: skip


def assigner(found: float, nothing: float, least: float, low: bool = True) -> dict:
    return {"type": "MaxIoUAssigner", "pos_iou_thr": found, "neg_iou_thr": nothing, "min_pos_iou": least,
        "match_low_quality": low, "ignore_iof_thr": -1}  # fmt: skip


def everything(own: bool) -> dict:
    """A sampler that leaves nothing out."""
    return {"type": "RandomSampler", "num": 10**6, "pos_fraction": 1.0, "neg_pos_ub": -1, "add_gt_as_proposals": own}


def two_stages(cascade: bool = False, masks: bool = True, agnostic: bool = False) -> dict:
    suppress = {"type": "nms", "iou_threshold": 0.7}
    stages = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
    found = {
        "type": "CascadeRCNN" if cascade else "MaskRCNN" if masks else "FasterRCNN",
        "backbone": MAMBAVISION if cascade else VMAMBA,
        "neck": {"type": "FPN", "in_channels": [16, 32, 64, 128] if cascade else [8, 16, 32, 64], "out_channels": C,
            "num_outs": 5},
        "rpn_head": {
            "type": "RPNHead", "in_channels": C, "feat_channels": C,
            "anchor_generator": {"type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0],
                "strides": [*STRIDES, 64]},
            "bbox_coder": coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "SmoothL1Loss", "beta": 1 / 9, "loss_weight": 1.0} if cascade
                else {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "CascadeRoIHead" if cascade else "StandardRoIHead", "bbox_roi_extractor": extractor(7),
            "bbox_head": [box_head(s, True, agnostic) for s in stages] if cascade
                else box_head(stages[0], False, agnostic),
        },
        "train_cfg": {
            "rpn": {"assigner": assigner(0.7, 0.3, 0.3), "sampler": everything(False),
                "allowed_border": 0 if cascade else -1, "pos_weight": -1, "debug": False},
            "rpn_proposal": {"nms_pre": 2000, "max_per_img": 2000 if cascade else 1000, "nms": suppress,
                "min_bbox_size": 0},
            "rcnn": [{"assigner": assigner(t, t, t, not cascade), "sampler": everything(True), "mask_size": 28,
                "pos_weight": -1, "debug": False} for t in (0.5, 0.6, 0.7)[: 3 if cascade else 1]],
        },
        "test_cfg": {
            "rpn": {"nms_pre": 1000, "max_per_img": 1000, "nms": suppress, "min_bbox_size": 0},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100,
                "mask_thr_binary": 0.5},
        },
    }  # fmt: skip
    if cascade:
        found["roi_head"] |= {"num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]}
    else:
        found["train_cfg"]["rcnn"] = found["train_cfg"]["rcnn"][0]
    if masks:
        mask = {"type": "FCNMaskHead", "num_convs": 2, "in_channels": C, "conv_out_channels": C, "num_classes": CLASSES,
            "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0}}  # fmt: skip
        found["roi_head"] |= {"mask_roi_extractor": extractor(14), "mask_head": mask}
    return found


def one_stage(backbone: dict = VMAMBA, **neck: object) -> dict:
    return {
        "type": "RetinaNet", "backbone": backbone,
        "neck": {"type": "FPN", "in_channels": [8, 16, 32, 64], "out_channels": C, "start_level": 1,
            "add_extra_convs": "on_input", "num_outs": 5} | neck,
        "bbox_head": {
            "type": "RetinaHead", "num_classes": CLASSES, "in_channels": C, "stacked_convs": 2, "feat_channels": 24,
            "anchor_generator": {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0], "strides": [8, 16, 32, 64, 128]},
            "bbox_coder": coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "train_cfg": {"assigner": assigner(0.5, 0.4, 0), "sampler": {"type": "PseudoSampler"}, "allowed_border": -1,
            "pos_weight": -1, "debug": False},
        "test_cfg": {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100},
    }  # fmt: skip


CASES = {
    "mask_rcnn": two_stages(),
    "faster_rcnn_agnostic": two_stages(masks=False, agnostic=True),
    "cascade_mask_rcnn": two_stages(cascade=True),
    "retinanet": one_stage(),
}
PADDED, SIZES = (96, 128), [(90, 128), (96, 101)]


def filled(key: str, like: torch.Tensor) -> torch.Tensor:
    """A weight made of its name, so that answers are moderate: the reference's files hold the answers alone."""
    if not like.is_floating_point():
        return like.clone()
    if key.endswith("running_var") or (key.endswith("weight") and like.dim() == 1) or key.endswith((".D", ".Ds")):
        return procedural_values(key, like.shape, ["u", 0.3, 1.0])
    if like.dim() < 2:
        return procedural_values(key, like.shape, ["u", 0.1, -1.0 if "retina_cls" in key else 0.0])
    if key.endswith(("A_log", "A_logs")):
        return like.clone()
    size = (6.0 / like[0].numel()) ** 0.5
    size *= 0.1 if "fc_cls" in key else 0.3 if "cls" in key or "_reg" in key else 1.0
    return procedural_values(key, like.shape, ["u", size, 0.0])


def images() -> torch.Tensor:
    x = procedural_values("images", (2, 3, *PADDED), ["u", 2.0, 0.0])
    for i, (h, w) in enumerate(SIZES):
        x[i, :, h:], x[i, :, :, w:] = 0, 0
    return x


def targets() -> list[dict[str, torch.Tensor]]:
    found = []
    for i, (h, w) in enumerate(SIZES):
        low = procedural_values(f"low{i}", (3, 2), ["u", 0.3, 0.3]) * torch.tensor([w, h])
        boxes = torch.cat([low, low + procedural_values(f"size{i}", (3, 2), ["u", 12.0, 22.0])], dim=1)
        boxes = inside(boxes, (h, w))
        masks = torch.zeros(3, *PADDED, dtype=torch.bool)
        for k, (x0, y0, x1, y1) in enumerate(boxes.round().int().tolist()):
            masks[k, y0:y1, x0:x1] = procedural_values(f"mask{i}{k}", (y1 - y0, x1 - x0), ["u", 1.0, 0.2]) > 0
        labels = procedural_values(f"labels{i}", (3,), ["ids", CLASSES, 0])
        found.append({"boxes": boxes, "labels": labels, "masks": masks})
    return found


def built(name: str, config: dict | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A detector with weights from their names, and its state under mmdetection's keys."""
    config = CASES[name] if config is None else config
    body, rest = config["backbone"], {"num_classes": CLASSES}
    if body is VMAMBA:
        backbone = zoo.create("vmamba_tiny_s1l8", dims=8, depths=(1, 1, 1, 1), features_only=True)
    else:
        own = {k: body[k] for k in ("depths", "num_heads", "window_size", "dim", "in_dim", "mlp_ratio")}
        backbone = zoo.create("mambavision_tiny", features_only=True, pyramid_norm="ln2d", **own)
    if config["type"] == "RetinaNet":
        model: nn.Module = retinanet(backbone, neck_channels=C, head_depth=2, head_width=24, **rest)
    else:
        cascade = config["type"] == "CascadeRCNN"
        model = TwoStageDetector(
            backbone, mask_rcnn(backbone, neck_channels=C).neck, Anchors((*STRIDES, 64), (8.0,)), channels=C,
            stages=3 if cascade else 1, box_convs=2 if cascade else 0, box_fcs=1 if cascade else 2, box_width=32,
            mask_convs=2 if "mask_head" in config["roi_head"] else None, **rest,
            class_agnostic="agnostic" in name,
        )  # fmt: skip
    model.load_state_dict({k: filled(k, v) for k, v in model.state_dict().items()})
    return model.eval(), zoo.reference("detector").to_reference(model.state_dict(), model=model)


RECORDED = json.loads((Path(__file__).parent / "recorded" / "detectors.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_answers_losses_and_gradients_are_mmdetections(name):
    """Recorded from mmdetection 3.3 with these weights; its RoIAlign and suppression were torchvision's."""
    _, state = built(name)
    model = zoo.reference("detector").build(CASES[name], state)
    expected = RECORDED[name]
    for i, (one, wanted) in enumerate(zip(model.detect(images(), SIZES), expected["found"], strict=True)):
        assert len(one) == wanted["count"]
        shown = len(wanted["labels"])
        assert one.labels[:shown].tolist() == wanted["labels"]
        torch.testing.assert_close(one.scores[:shown], torch.tensor(wanted["scores"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(one.boxes[:shown], torch.tensor(wanted["boxes"]), rtol=0, atol=1e-3)
        if "pixels" in wanted:
            own = [int(pasted(m, b, SIZES[i])[0].sum()) for m, b in zip(one.masks, one.boxes, strict=True)]
            np.testing.assert_allclose(own[:shown], wanted["pixels"], atol=1)
    # Sampling draws random numbers; with all anchors and regions there is nothing to draw.
    model.sampled_anchors = model.sampled_regions = (10**6, 1.0)
    wanted = [t if model.has_masks else {k: t[k] for k in ("boxes", "labels")} for t in targets()]
    losses = model.loss(images(), wanted, SIZES)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected["losses"], rel=1e-4)
    sum(losses.values()).backward()
    norms = {k: dict(model.named_parameters())[k].grad.norm().item() for k in expected["gradients"]}
    assert norms == pytest.approx(expected["gradients"], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_published_format(name, tmp_path):
    """Through the adapter and back; strict, and with the prefix of parallel training."""
    model, state = built(name)
    adapter = zoo.reference("detector")
    again = adapter.build(CASES[name], {f"module.{k}": v for k, v in state.items()})
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    with pytest.raises(errors.KeysDoNotMatch, match=r"neck\.lateral_convs\.0"):
        adapter.build(CASES[name], {k: v for k, v in state.items() if not k.startswith("neck.lateral_convs.0")})
    found = adapter.run(again, {"image": images()}, call="detect")
    assert {"boxes_0", "scores_1", "labels_1"} <= set(found)


def test_a_published_file_through_its_card(tmp_path):
    small = {"dims": 8, "depths": (1, 1, 1, 1), "neck_channels": 16, "box_width": 24, "mask_convs": 1, "num_classes": 5}
    model = zoo.create("vmamba_tiny_s1l8_mask_rcnn", **small)
    state = zoo.reference("detector").to_reference(model.state_dict(), model=model)
    assert any(k.startswith("backbone.layers.0.blocks.0.op.") for k in state)
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "epoch_12.pth")
    again = zoo.load("vmamba_tiny_s1l8_mask_rcnn.coco", checkpoint=tmp_path / "epoch_12.pth", **small)
    with torch.no_grad():
        first, second = model.eval()(images()), again(images())
    torch.testing.assert_close(second["anchor_deltas"], first["anchor_deltas"])
    small["num_classes"] = 2
    other = zoo.load("vmamba_tiny_s1l8_mask_rcnn.coco", checkpoint=tmp_path / "epoch_12.pth", **small)
    assert other.roi_head.mask_head.conv_logits.weight.shape[0] == 2


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_efficientvim_in_its_own_format(kind):
    name = f"efficientvim_m4_{kind}"
    heads = {"box_width": 32, "mask_convs": 2} if kind == "mask_rcnn" else {"head_depth": 2, "head_width": 24}
    heads |= {"neck_channels": 16, "num_classes": 5}
    model = zoo.create(name, embed_dim=(16, 24, 32), depths=(1, 1, 1), state_dim=(12, 9, 4), **heads)
    adapter = zoo.reference("detector")
    state = adapter.to_reference(model.state_dict(), model=model)
    assert state["neck.batch_norm.0.weight"].shape == (1, 16, 1, 1)
    neck = {"type": "EfficientViTFPN", "in_channels": [16, 24, 32], "pre_norm": True, "start_level": 0}
    if kind == "mask_rcnn":
        config = two_stages() | {"backbone": EFFICIENTVIM}
        config["neck"] = neck | {"out_channels": 16, "num_outs": 5, "num_extra_trans_convs": 2}
    else:
        config = one_stage(EFFICIENTVIM, **neck, num_extra_trans_convs=1)
    again = adapter.build(config, state)
    assert again.frozen_norms
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(x)["anchor_deltas"], model.eval()(x)["anchor_deltas"])
    assert not any(m.training for m in again.train().backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_configurations_that_would_build_something_else():
    _, state = built("mask_rcnn")
    build = zoo.reference("detector").build
    good = two_stages()
    with pytest.raises(ValueError, match="type is 'FCOS'; expected MaskRCNN or"):
        build({**good, "type": "FCOS"}, state)
    with pytest.raises(ValueError, match=r"no argument 'rpn_heads'.*rpn_head"):
        build({**good, "rpn_heads": {}}, state)
    with pytest.raises(ValueError, match=r"backbone's type is 'ResNet'; expected MM_VSSM or"):
        build({**good, "backbone": {"type": "ResNet"}}, state)
    with pytest.raises(ValueError, match=r"neck.in_channels is \[8, 16\]; the backbone's maps have \[8, 16, 32, 64\]"):
        build({**good, "neck": {**good["neck"], "in_channels": [8, 16]}}, state)
    wrong = {**good["roi_head"], "bbox_head": {**good["roi_head"]["bbox_head"], "bbox_coder": coder(1, 1, 1, 1)}}
    with pytest.raises(ValueError, match=r"target_stds is \(1.0, 1.0, 1.0, 1.0\); expected \(0.1"):
        build({**good, "roi_head": wrong}, state)
    soft = {**good["test_cfg"], "rcnn": {"nms": {"type": "soft_nms", "iou_threshold": 0.5}}}
    with pytest.raises(ValueError, match="'soft_nms'; expected 'nms'"):
        build({**good, "test_cfg": soft}, state)
    fewer = {**good["test_cfg"], "rcnn": {"score_thr": 0.2, "max_per_img": 7}}
    found = build({**good, "test_cfg": fewer}, state).detect(images())
    assert all(len(one) <= 7 and (one.scores > 0.2).all() for one in found)


# -- definitions -----------------------------------------------------------------------------------------------------


def test_anchors_lie_where_they_should():
    anchors = Anchors((4, 8), (2.0, 4.0), (0.5, 1.0))
    first, second = anchors([(2, 3), (1, 1)], torch.device("cpu"))
    assert (first.shape, second.shape) == ((24, 4), (4, 4))
    wide, square = first[0], first[2]
    torch.testing.assert_close(square, torch.tensor([-4.0, -4, 4, 4]))  # two strides wide, around the first pixel
    torch.testing.assert_close((wide[2] - wide[0]) / (wide[3] - wide[1]), torch.tensor(2.0))
    torch.testing.assert_close(first[4 * 4 + 2], square + torch.tensor([4.0, 4, 4, 4]))  # row 1, column 1
    with pytest.raises(ValueError, match="1 maps, the anchors strides for 2"):
        anchors([(2, 3)], torch.device("cpu"))


def test_boxes_come_back():
    boxes = torch.tensor([[3.0, 5, 20, 30], [0, 0, 8, 4]])
    wanted = torch.tensor([[1.0, 9, 25, 26], [2, 1, 5, 40]])
    stds = (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(decode(boxes, encode(boxes, wanted, stds), stds), wanted)
    torch.testing.assert_close(inside(torch.tensor([-3.0, 2, 50, 60]), (40, 30)), torch.tensor([0.0, 2, 30, 40]))
    torch.testing.assert_close(ordered(torch.tensor([5.0, 1, 2, 8])), torch.tensor([2.0, 1, 5, 8]))
    grown = decode(boxes, torch.full((2, 4), 100.0), (1.0,) * 4)
    torch.testing.assert_close(grown[:, 2] - grown[:, 0], (boxes[:, 2] - boxes[:, 0]) * 62.5)


def test_overlapping_boxes_of_one_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.95]), torch.tensor([0, 0, 1, 0])
    assert best(boxes, scores, labels, 0.5, 10).tolist() == [3, 0, 2]
    assert best(boxes, scores, labels, 0.5, 2).tolist() == [3, 0]
    assert best(boxes, scores, labels, 0.9, 10).tolist() == [3, 0, 1, 2]


def test_levels_follow_the_size():
    sides = torch.tensor([10.0, 111, 113, 223, 225, 4000])
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    assert pyramid_level(boxes, 4).tolist() == [0, 0, 1, 1, 2, 3]


def test_region_features_are_averages_of_the_region():
    """On a map that is a plane, the average over a bin is the plane at the bin's centre."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    plane = (2 * x + 3 * y)[None, None]
    regions = [torch.tensor([[20.0, 24, 76, 66]])]
    found = region_features([plane], [4], regions, 7)[0, 0]
    centres = torch.arange(7) + 0.5
    columns, rows = (20 + centres * 8) / 4 - 0.5, (24 + centres * 6) / 4 - 0.5
    torch.testing.assert_close(found, 2 * columns[None] + 3 * rows[:, None])


@pytest.mark.parametrize("side", [1, 7])
def test_region_features_by_products_are_torchvision_s(side):
    """Regions inside, across each border, outside, of no width, turned inside out, and larger than the map."""
    from torchvision.ops import roi_align

    generator = torch.Generator().manual_seed(0)
    m = torch.randn(2, 5, 24, 33, generator=generator)
    corner = torch.rand(60, 2, generator=generator) * 160 - 20
    regions = torch.cat([corner, corner + torch.rand(60, 2, generator=generator) ** 3 * 150], dim=1)
    regions[0] = torch.tensor([40.0, 20, 40, 60])
    regions[1] = torch.tensor([90.0, 60, 40, 20])
    regions[2] = torch.tensor([-900.0, -900, -800, -800])
    regions[3] = torch.tensor([-50.0, -50, 300, 300])
    rois = torch.cat([torch.arange(60)[:, None] % 2, regions], dim=1)
    expected = roi_align(m, rois, side, 0.25, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(by_products(m, rois, side, 0.25), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        quick = region_features([m, m], [4, 8], [regions[:30], regions[30:]], side)
        with zoo_kernels.backend("reference"):
            literal = region_features([m, m], [4, 8], [regions[:30], regions[30:]], side)
    torch.testing.assert_close(quick, literal, rtol=1e-5, atol=1e-5)


def test_who_stands_for_what():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 100, 140, 140]])
    boxes = torch.tensor([[0.0, 0, 10, 11], [0, 0, 10, 15], [50, 50, 60, 60], [100, 100, 120, 120]])
    arguments = {"object_from": 0.7, "nothing_below": 0.3}
    assert training.assign(boxes, objects, at_least=0.2, **arguments).tolist() == [0, training.IGNORED, -1, 1]
    assert training.assign(boxes, objects, at_least=None, **arguments).tolist() == [0, training.IGNORED, -1, -1]
    assert training.assign(boxes, objects[:0], at_least=0.2, **arguments).tolist() == [-1] * 4
    assigned = torch.tensor([0, 1, -1, -1, -1, training.IGNORED, 0, 0])
    found, nothing = training.sample(assigned, 4, 0.5)
    assert len(found) == len(nothing) == 2
    assert set(found.tolist()) <= {0, 1, 6, 7}
    assert set(nothing.tolist()) <= {2, 3, 4}


def test_sizes_and_targets_are_checked():
    model, _ = built("mask_rcnn")
    with pytest.raises(ValueError, match=r"sizes is \[\(200, 100\)\] for 2 images padded to \(96, 128\)"):
        model.detect(images(), [(200, 100)])
    good = targets()
    with pytest.raises(ValueError, match="targets for 1 images; expected 2"):
        model.loss(images(), good[:1])
    with pytest.raises(ValueError, match="image 1 have no 'masks'"):
        model.loss(images(), [good[0], {k: good[1][k] for k in ("boxes", "labels")}])
    with pytest.raises(ValueError, match=r"labels .* expected one label of 0 to 4"):
        model.loss(images(), [good[0], {**good[1], "labels": torch.tensor([0, 1, 5])}])
    with pytest.raises(ValueError, match="a box of image 0 has no area"):
        model.loss(images(), [{**good[0], "boxes": good[0]["boxes"].flip(1)}, good[1]])
    with pytest.raises(ValueError, match=r"masks of image 0 have shape \(3, 90, 128\)"):
        model.loss(images(), [{**good[0], "masks": good[0]["masks"][:, :90]}, good[1]])
    with pytest.raises(ValueError, match=r"regions have shape \(1, 3, 4\); expected \(2, n, 4\)"):
        model(images(), torch.zeros(1, 3, 4))


def test_any_backbone_and_nothing_to_see():
    """Detectors on another system's pyramid, on an image without objects, and one in which nothing is found."""
    body = zoo.create("efficientvim_m1", features_only=True, embed_dim=(16, 24, 32), depths=(1, 1, 1))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 96, 128)}
    for make in (mask_rcnn, cascade_mask_rcnn):
        model = make(body, num_classes=3, neck_channels=16, box_width=16, mask_convs=1)
        losses = model.train().loss(images(), [targets()[0] | {"labels": torch.tensor([0, 1, 2])}, empty])
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
        assert all(p.grad is not None for p in model.rpn_head.parameters())
        sum(model.loss(images(), [empty, empty]).values()).backward()
        model.score_threshold = 1.0
        (one, _) = model.eval().detect(images())
        assert len(one) == 0
        assert one.masks.shape == (0, 28, 28)
    faster = mask_rcnn(body, num_classes=3, neck_channels=16, box_width=16, mask_convs=None)
    assert faster.eval().detect(images())[0].masks is None
    single = retinanet(body, num_classes=3, neck_channels=16, head_depth=1, head_width=16)
    assert [len(one) for one in single.eval().detect(images())] == [0, 0]
    assert torch.isfinite(single.train().loss(images(), [empty, empty])["classes"])
    with pytest.raises(ValueError, match="features_only=True"):
        mask_rcnn(zoo.create("vim_micro"))


def test_padding_changes_little_and_boxes_end_where_the_image_does():
    model, _ = built("mask_rcnn")
    x = images()[1:, :, :, :101]
    padded = nn.functional.pad(x, (0, 27))
    (one,) = model.detect(padded, [(96, 101)])
    assert len(one)
    assert one.boxes[:, 2].max() <= 101
    assert model.detect(padded)[0].boxes[:, 2].max() > 101
