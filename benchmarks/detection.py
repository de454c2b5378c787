"""Mask R-CNN on a VMamba backbone: from the pyramid to objects beside torchvision's heads, and a whole picture.

    python benchmarks/detection.py --threads 2

*heads*: proposals, boxes and masks of `vmamba_tiny_s1l8_mask_rcnn` (80 classes, 1000 regions, 100 objects) from the
pyramid of a picture of 800 x 1216 pixels, beside torchvision's `RegionProposalNetwork` and `RoIHeads` with layers of
the same sizes, as many regions and objects, and as dense a sampling. Its conventions are others (the order of the
classes, where a pixel's centre lies), so answers are not compared here; tests compare ours with mmdetection's.
*regions*: RoIAlign alone, of 1000 regions, equal to torchvision's `roi_align` to 1e-3 of the largest. *picture*: from
pixels to objects of a picture of 1024 x 768 through the pipeline, and the backbone's share of it.

Sides run in turn, the best of each is compared. Weights are random: what is measured is cost, not quality.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from timing import shortest
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

import zoo
import zoo_kernels
from zoo_vision.detection.regions import region_features
from zoo_vision.objects import ObjectDetection

THRESHOLD = 0.0125  # just above an 81st: random heads find a hundred objects


class Theirs(torch.nn.Module):
    """torchvision's heads, of the sizes of ours."""

    def __init__(self) -> None:
        super().__init__()
        anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        self.rpn = RegionProposalNetwork(
            anchors, RPNHead(256, 3), 0.7, 0.3, 256, 0.5, {"training": 2000, "testing": 1000},
            {"training": 1000, "testing": 1000}, 0.7,
        )  # fmt: skip
        names = ["0", "1", "2", "3"]
        self.heads = RoIHeads(
            MultiScaleRoIAlign(names, 7, sampling_ratio=0), TwoMLPHead(256 * 49, 1024), FastRCNNPredictor(1024, 81),
            0.5, 0.5, 512, 0.25, None, THRESHOLD, 0.5, 100,
            mask_roi_pool=MultiScaleRoIAlign(names, 14, sampling_ratio=0),
            mask_head=MaskRCNNHeads(256, (256,) * 4, 1), mask_predictor=MaskRCNNPredictor(256, 256, 81),
        )  # fmt: skip
        for layer in (self.heads.box_predictor.cls_score, self.heads.box_predictor.bbox_pred):
            torch.nn.init.normal_(layer.weight, std=0.01)  # as ours begin

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        named = OrderedDict((str(i), m) for i, m in enumerate(maps))
        sizes = [(x.shape[2], x.shape[3])] * len(x)
        regions, _ = self.rpn(ImageList(x, sizes), named)
        return self.heads(named, regions, sizes)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model: Any = zoo.create("vmamba_tiny_s1l8_mask_rcnn").eval()
    model.score_threshold = THRESHOLD
    theirs = Theirs().eval()
    x = torch.randn(1, 3, 800, 1216)
    sizes = [(800, 1216)]
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    pipe = ObjectDetection(model)
    with torch.inference_mode():
        maps = model.maps(x)
        counts = [len(model._detect(maps, sizes)[0]), len(theirs(x, maps)[0]["boxes"])]
        regions = model.propose(*model.rpn_head(maps), sizes, 1000, 1000)
        seen, strides = maps[:-1], model.anchors.strides[:-1]
        quick = region_features(seen, strides, regions, 7)
        with zoo_kernels.backend("reference"):  # torchvision's roi_align
            literal = region_features(seen, strides, regions, 7)
        error = float((quick - literal).abs().max() / literal.abs().max())
        if error > 1e-3:
            raise SystemExit(f"the two forms of RoIAlign differ by {error:.1e}: not timed")

        def torchvision_regions() -> None:
            with zoo_kernels.backend("reference"):
                region_features(seen, strides, regions, 7)

        inner = pipe.prepare(pipe.read(picture))[None]
        spent = shortest(
            {
                "heads": lambda: model._detect(maps, sizes),
                "torchvision_heads": lambda: theirs(x, maps),
                "regions": lambda: region_features(seen, strides, regions, 7),
                "torchvision_regions": torchvision_regions,
                "picture": lambda: pipe(picture),
                "backbone": lambda: model.backbone(inner),
            },
            options.repeat,
        )
    row = {"threads": options.threads, "objects": counts, "regions": len(regions[0]), "relative_error": error}
    row |= {f"{k}_ratio": spent[f"torchvision_{k}"] / spent[k] for k in ("heads", "regions")}
    print(json.dumps(row | {f"{k}_seconds": round(v, 3) for k, v in spent.items()}))


if __name__ == "__main__":
    main()
