"""Train the micro detector on drawn scenes, and measure it on others.

    python plugins/vision/recipes/train_detector.py

Data: made here, as for the segmentor (``train_segmentor.py``), on 96 x 96 pixels: one to three of six shapes on a
ground with a gradient, patches of its own colours and noise; later shapes cover earlier ones. What less than 40 pixels
can be seen of is no object. Scenes are drawn anew for every step; those that are measured come from seeds of their own,
and nothing is chosen on them.

Writes the weights as safetensors and prints one line of JSON with the average precisions (pycocotools').
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_segmentor import CLASSES, draw

import zoo
from zoo.files import check_place, whole
from zoo_vision.objects import ObjectDetection, run_lengths
from zoo_vision.validation import validate_coco

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_vision"
SIZE, SMALLEST = 96, 40  # pixels a side; visible pixels of an object
HELD_OUT, HELD_SEED = 200, 1_000_000
METRICS = ("box AP", "box AP50", "mask AP", "mask AP50")


def objects(shapes: list[tuple[int, np.ndarray]]) -> dict[str, Tensor]:
    """``boxes``, ``labels`` and ``masks`` of a scene's shapes."""
    seen = [(kind - 1, mask) for kind, mask in shapes if mask.sum() >= SMALLEST]
    boxes = []
    for _, mask in seen:
        (rows,), (columns,) = np.nonzero(mask.any(axis=1)), np.nonzero(mask.any(axis=0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        "labels": torch.tensor([kind for kind, _ in seen], dtype=torch.int64),
        "masks": torch.from_numpy(np.array([mask for _, mask in seen]).reshape(-1, SIZE, SIZE)),
    }


def batch(first: int, count: int, pipe: ObjectDetection) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Prepared pictures (count, 3, 96, 96) and what is in them, of the seeds from ``first`` on."""
    drawn = [draw(first + i, SIZE) for i in range(count)]
    return torch.stack([pipe.prepare(picture) for picture, _ in drawn]), [objects(shapes) for _, shapes in drawn]


def write_scenes(folder: Path, count: int) -> Path:
    """``count`` held-out scenes as pictures, and their annotations in COCO's format; returns the annotations' file."""
    images, annotations = [], []
    for i in range(count):
        picture, shapes = draw(HELD_SEED + i, SIZE)
        picture.save(folder / f"scene_{i}.png")
        images.append({"id": i, "file_name": f"scene_{i}.png", "width": SIZE, "height": SIZE})
        found = objects(shapes)
        for (left, top, right, bottom), label, mask in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["masks"].numpy(), strict=True
        ):
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top], "area": int(mask.sum()),
                "segmentation": {"size": [SIZE, SIZE], "counts": run_lengths(mask)},
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES) if i]
    path = folder / "scenes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def measure(model: torch.nn.Module, count: int = HELD_OUT) -> dict[str, float]:
    """Average precisions on ``count`` held-out scenes, through the pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        found = validate_coco(model, write_scenes(Path(folder), count), short_side=SIZE, batch_size=10, progress=False)
    return {name: float(found.metrics[name] or 0.0) for name in METRICS}


def train(name: str, *, steps: int, size: int, rate: float, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = zoo.create(name).train()
    pipe = ObjectDetection(model, short_side=SIZE)
    model.train()
    model.sampled_regions = (64, 0.25)  # of three objects; 512, as for photographs, takes four times as long
    model.training_candidates = model.proposals = 300
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / max(steps - warm, 1)))),
    )
    totals: dict[str, float] = {}
    began = time.perf_counter()
    for step in range(1, steps + 1):
        losses = model.loss(*batch(seed * 10**8 + 10**7 + step * size, size, pipe))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for key, value in losses.items():
            totals[key] = totals.get(key, 0.0) + value.item() / 100
        if step % 100 == 0:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in totals.items())
            print(f"step {step}: {shown}, {time.perf_counter() - began:.0f} s", flush=True)
            totals = {}
    model.half().float()  # measured as stored
    del model.sampled_regions, model.training_candidates, model.proposals
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vmamba_micro_mask_rcnn")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: zoo_vision/demo/MODEL.shapes.safetensors")
    parser.add_argument("--dry", action="store_true", help="measure only, write nothing")
    parser.add_argument("--samples", type=Path, help="write three held-out scenes into this folder, and end")
    options = parser.parse_args()
    if options.samples:
        options.samples.mkdir(parents=True, exist_ok=True)
        for i in range(3):
            draw(HELD_SEED + i, SIZE)[0].save(options.samples / f"objects_{i}.jpg", quality=92)
        return
    out = options.out or PACKAGE / "demo" / f"{options.model}.shapes.safetensors"
    if not options.dry:
        check_place(out)  # before it is trained
    model = train(options.model, steps=options.steps, size=options.batch, rate=options.rate, seed=options.seed)
    if not options.dry:
        state = {k: v.detach() for k, v in model.state_dict().items()}
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
        with whole(out) as work:
            save_file(state, str(work), metadata={"format": "pt", "architecture": options.model})
    measured = {"model": options.model, "steps": options.steps, "seed": options.seed} | measure(model)
    print(json.dumps(measured | ({} if options.dry else {"bytes": out.stat().st_size})))


if __name__ == "__main__":
    main()
