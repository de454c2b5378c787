"""UPerNet on a VMamba backbone: its head beside transformers', and a whole picture.

    python benchmarks/segmentation.py --threads 2

*head*: the head of `vmamba_tiny_s1l8_upernet` (512 channels, 150 classes) on the maps of a picture of 512 x 512 pixels,
beside transformers' `UperNetHead` with the same weights, which enlarges and joins the maps before its last convolution;
logits must agree to 1e-4 of the largest. *picture*: from pixels to classes of a picture of 1024 x 768 through the
pipeline, and the backbone's and the head's share of it.

Sides run in turn, the best of each is compared. Weights are random: what is measured is cost, not quality.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from timing import shortest
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

import zoo
from zoo_vision.scenes import SemanticSegmentation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = zoo.create("vmamba_tiny_s1l8_upernet").eval()
    head = model.decode_head
    widths = model.backbone.feature_info.channels()
    theirs = UperNetHead(UperNetConfig(hidden_size=512, num_labels=150), widths).eval()
    state = {k.replace("bn.", "batch_norm.").replace("conv_seg", "classifier"): v for k, v in head.state_dict().items()}
    theirs.load_state_dict(state)
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    pipe = SemanticSegmentation(model)
    with torch.inference_mode():
        maps = model.backbone(torch.randn(1, 3, 512, 512))
        expected = theirs(maps)
        error = float((head(maps) - expected).abs().max() / expected.abs().max())
        if error > 1e-4:
            raise SystemExit(f"the two heads differ by {error:.1e}: not timed")
        heads = shortest({"ours": lambda: head(maps), "transformers": lambda: theirs(maps)}, options.repeat)
        inner = pipe.prepare(pipe.read(picture))[None]
        found = model.backbone(inner)
        parts = {
            "picture": lambda: pipe(picture),
            "backbone": lambda: model.backbone(inner),
            "head": lambda: head(found),
        }
        spent = shortest(parts, options.repeat)
    row = {"threads": options.threads, "relative_error": error, "head_ratio": heads["transformers"] / heads["ours"]}
    print(json.dumps(row | {f"{k}_seconds": round(v, 3) for k, v in {**heads, **spent}.items()}))


if __name__ == "__main__":
    main()
