"""Train a micro model on generated shapes and measure it on shapes from another random stream.

    python plugins/point_cloud/recipes/train_shapes.py pcm_micro
    python plugins/point_cloud/recipes/train_shapes.py pcm_micro_parts --steps 1500
    python plugins/point_cloud/recipes/train_shapes.py --samples examples/shapes

``pcm_micro`` names the shape (12 classes), ``pcm_micro_parts`` labels every point of a composite with its part (14
parts of 6 kinds of things). Every cloud is drawn anew (shapes.py): proportions, pose, noise, occlusion and density are
random, so that no cloud is seen twice. One CPU core is enough.

Writes the weights as safetensors and prints one line of JSON with the figures after the last step; nothing is chosen
on the clouds that are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from shapes import CLASSES, PART_NAMES, PARTS, POINTS, batch, scan

import zoo

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_point_cloud"
COMPOSITES = tuple(PARTS)
#: Random streams of the clouds that are measured start here; those of training are the seeds themselves.
HELD_OUT_SEED = 10_000


@torch.no_grad()
def measure_classes(model: torch.nn.Module, clouds: int) -> dict:
    """Accuracy on unseen clouds, and each class's recall."""
    r, table = np.random.default_rng(HELD_OUT_SEED), np.zeros((len(CLASSES),) * 2, dtype=int)
    for _ in range(clouds // 50):
        points, labels, _ = batch(r, 50)
        np.add.at(table, (labels, model(torch.from_numpy(points)).argmax(1).numpy()), 1)
    recall = {
        name: round(float(row[i] / row.sum()), 4) for i, (name, row) in enumerate(zip(CLASSES, table, strict=True))
    }
    return {"accuracy": float(table.trace() / table.sum()), "recall": recall, "clouds": int(table.sum())}


@torch.no_grad()
def measure_parts(model: torch.nn.Module, clouds: int) -> dict:
    """As ShapeNetPart is measured: a cloud's IoU is the mean over the parts of its kind of thing (1 for a part that it
    neither has nor is answered); instance mIoU is the mean over clouds, class mIoU over kinds of their clouds' mean.
    Any of the 14 parts may be answered, whatever the kind."""
    r = np.random.default_rng(HELD_OUT_SEED)
    found: dict[str, list[float]] = {name: [] for name in COMPOSITES}
    right = total = 0
    for _ in range(clouds // 50):
        points, labels, parts = batch(r, 50, COMPOSITES)
        answers = model(torch.from_numpy(points)).argmax(1).numpy()
        right, total = right + int((answers == parts).sum()), total + parts.size
        for label, truth, answer in zip(labels, parts, answers, strict=True):
            name = COMPOSITES[label]
            ious = []
            for part in (PART_NAMES.index(p) for p in PARTS[name]):
                union = ((truth == part) | (answer == part)).sum()
                ious.append(1.0 if union == 0 else ((truth == part) & (answer == part)).sum() / union)
            found[name].append(float(np.mean(ious)))
    return {
        "instance_miou": float(np.mean([iou for ious in found.values() for iou in ious])),
        "class_miou": float(np.mean([np.mean(ious) for ious in found.values()])),
        "miou": {name: round(float(np.mean(ious)), 4) for name, ious in found.items()},
        "point_accuracy": right / total,
        "clouds": sum(map(len, found.values())),
    }


def train(name: str, *, steps: int, size: int, rate: float, seed: int) -> torch.nn.Module:
    """Train ``name`` on ``steps`` batches of ``size`` new clouds; the rate falls along a cosine after a short rise."""
    torch.manual_seed(seed)
    r = np.random.default_rng(seed)
    model = zoo.create(name).train()
    parts = name.endswith("_parts")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    warm = max(1, steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / (steps - warm)))),
    )
    began, recent = time.process_time(), []
    for step in range(1, steps + 1):
        points, labels, part = batch(r, size, COMPOSITES if parts else CLASSES)
        answers = model(torch.from_numpy(points))
        loss = F.cross_entropy(answers, torch.from_numpy(part if parts else labels), label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 100 == 0:
            spent = time.process_time() - began
            print(f"step {step}: loss {np.mean(recent[-100:]):.3f}, {spent:.0f} s of CPU time", flush=True)
    return model.eval()


def write_samples(folder: Path) -> list[Path]:
    """Unseen scans; one has more points than the models take."""
    r = np.random.default_rng(HELD_OUT_SEED + 1)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"chair.ply": 256, "mug.ply": 256, "bottle.laz": 300}
    for name, count in files.items():
        points, _ = scan(Path(name).stem, r, count)
        write_points(folder / name, points)
    return [folder / name for name in files]


def write_points(path: Path, points: np.ndarray) -> None:
    """Bare points as .ply or .laz."""
    if path.suffix == ".ply":
        from plyfile import PlyData, PlyElement

        vertex = np.rec.fromarrays(points.T, dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
        PlyData([PlyElement.describe(np.asarray(vertex), "vertex")]).write(str(path))
        return
    import laspy

    header = laspy.LasHeader(version="1.2", point_format=0)
    header.scales = np.full(3, 1e-3)
    data = laspy.LasData(header)
    data.x, data.y, data.z = points.astype(np.float64).T
    data.write(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pcm_micro", choices=["pcm_micro", "pcm_micro_parts"])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clouds", type=int, default=2400, help="unseen clouds that are measured")
    parser.add_argument("--out", type=Path, help="default: zoo_point_cloud/demo/MODEL.shapes.safetensors")
    parser.add_argument("--samples", type=Path, help="write unseen clouds into this folder, and end")
    options = parser.parse_args()
    if options.samples:
        for path in write_samples(options.samples):
            print(path)
        return
    began = time.process_time()
    model = train(options.model, steps=options.steps, size=options.batch, rate=options.rate, seed=options.seed)
    measure = measure_parts if options.model.endswith("_parts") else measure_classes
    figures = measure(model, options.clouds)
    out = options.out or PACKAGE / "demo" / f"{options.model}.shapes.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.detach().contiguous()
        for k, v in model.state_dict().items()
        if not k.endswith(".num_batches_tracked")  # of the training alone
    }
    save_file(state, str(out), metadata={"format": "pt", "architecture": options.model})
    print(
        json.dumps(
            {
                "model": options.model,
                "seed": options.seed,
                "steps": options.steps,
                "points": POINTS,
                "parameters": sum(p.numel() for p in model.parameters()),
                "bytes": out.stat().st_size,
                "cpu_seconds": round(time.process_time() - began),
                **figures,
            }
        )
    )


if __name__ == "__main__":
    main()
