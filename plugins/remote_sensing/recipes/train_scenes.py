"""Train the demo's MambaBCD on generated scene pairs and measure it on pairs that it has not seen.

    python plugins/remote_sensing/recipes/train_scenes.py

Data: :mod:`scenes` beside this file. Training draws crops of ``--crop`` pixels from ``--scenes`` scenes of 160 pixels
(seeds 0 on), turned, mirrored, with the dates exchanged and each date's light changed; loss and optimiser are the
paper's (cross entropy + 0.75 Lovasz, AdamW), the rate falls along a cosine. Held out: 100 pairs of 128 pixels (seeds
1000000 on). Nothing is chosen on them: they are measured once, after the last step, and the line of JSON that is
printed is what the card says.

``--samples FOLDER`` writes the GeoTIFF pairs of ``examples/change`` (seeds 2000000 on; needs the extra [geo]) and the
pictures that ``zoo demo`` shows; ``--held-out FOLDER`` the held-out pairs as PNG files, as ``zoo validate`` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scenes import scene_pair
from torch import Tensor, nn
from torchmetrics.classification import BinaryCohenKappa, BinaryF1Score, BinaryJaccardIndex

import zoo
from zoo_remote_sensing.losses import bcd_loss

MODEL = "changemamba_micro"
PACKAGE = Path(__file__).parents[1] / "src" / "zoo_remote_sensing"
HELD_OUT, HELD_OUT_FROM, HELD_OUT_SIZE = 100, 1_000_000, 128
SAMPLES_FROM = 2_000_000
MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1)
STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1)


def prepared(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W), normalised as ChangeMamba's models take it."""
    return (torch.from_numpy(picture).permute(2, 0, 1).float() - MEAN) / STD


def crops(
    scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]], batch: int, side: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of training crops: two (batch, 3, side, side) and labels (batch, side, side)."""
    rows = []
    for i in rng.integers(len(scenes), size=batch):
        top, left = rng.integers(scenes[i][2].shape[0] - side + 1, size=2)
        before, after, label = (x[top : top + side, left : left + side] for x in scenes[i])
        if rng.random() < 0.5:
            before, after = after, before
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        parts = []
        for x in (before, after, label):
            x = np.rot90(x, turns)
            parts.append(np.ascontiguousarray(x[:, ::-1] if mirror else x))
        light = [rng.uniform(0.92, 1.08) + rng.normal(0, 0.02, (3, 1, 1)) for _ in range(2)]
        dates = [
            prepared(x) * torch.tensor(gain, dtype=torch.float32) for x, gain in zip(parts[:2], light, strict=True)
        ]
        rows.append((*dates, torch.from_numpy(parts[2].astype(np.int64))))
    before, after, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return before, after, labels


@torch.no_grad()
def measure(model: nn.Module, first_seed: int, count: int, size: int) -> dict[str, float]:
    """F1, IoU and kappa of "changed" over ``count`` pairs."""
    model.eval()
    measures = {"F1": BinaryF1Score(), "IoU": BinaryJaccardIndex(), "kappa": BinaryCohenKappa()}
    for seed in range(first_seed, first_seed + count):
        before, after, label = scene_pair(seed, size)
        found = model(prepared(before)[None], prepared(after)[None]).argmax(1)[0]
        for one in measures.values():
            one.update(found, torch.from_numpy(label.astype(np.int64)))
    return {name: round(float(one.compute()), 4) for name, one in measures.items()}


def save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v.detach().half().contiguous() for k, v in kept.items()}
    save_file(state, str(path), metadata={"format": "pt", "architecture": MODEL})


def train(options: argparse.Namespace) -> tuple[nn.Module, dict]:
    """(the model in eval mode, figures)."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = zoo.create(MODEL)
    scenes = [scene_pair(seed, 160) for seed in range(options.scenes)]
    print(f"{len(scenes)} scenes drawn in {time.process_time():.0f} s", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=options.rate
    )
    warm = max(options.steps // 25, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / (options.steps - warm)))),
    )
    began, total = time.process_time(), 0.0
    for step in range(1, options.steps + 1):
        model.train()
        before, after, labels = crops(scenes, options.batch, options.crop, rng)
        loss = bcd_loss(model(before, after), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % options.report == 0:
            print(
                f"step {step}: loss {total / options.report:.3f}, {time.process_time() - began:.0f} s of CPU",
                flush=True,
            )
            total = 0.0
            if not options.dry:
                save(model, options.out)  # so that a run that is stopped leaves something
    return model.eval(), {
        "model": MODEL,
        "seed": options.seed,
        "steps": options.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(time.process_time() - began),
    }


def write_samples(folder: Path, count: int = 2, size: int = 256) -> list[Path]:
    """GeoTIFF pairs at 1 m a pixel in UTM zone 32 north, and the label of each."""
    import rasterio

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(count):
        *pictures, label = scene_pair(SAMPLES_FROM + number, size)
        place = {
            "driver": "GTiff", "height": size, "width": size, "crs": "EPSG:32632",
            "transform": rasterio.transform.from_origin(500_000 + 1000 * number, 5_400_000, 1.0, 1.0),
        }  # fmt: skip
        for date, picture in zip(("before", "after"), pictures, strict=True):
            path = folder / f"scene_{number}_{date}.tif"
            with rasterio.open(
                path, "w", count=3, dtype="uint8", photometric="YCBCR", compress="JPEG", jpeg_quality=85,
                interleave="pixel", tiled=True, blockxsize=256, blockysize=256, **place,
            ) as file:  # fmt: skip
                file.write(picture.transpose(2, 0, 1))
            written.append(path)
        path = folder / f"scene_{number}_label.tif"
        with rasterio.open(path, "w", count=1, dtype="uint8", compress="deflate", **place) as file:
            file.write(label, 1)
        written.append(path)
    return written


def write_demo_samples(folder: Path, count: int = 2, size: int = 160) -> list[Path]:
    """Pairs of pictures for ``zoo demo``, which must run without the extra [geo]."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(count):
        for date, picture in zip(("before", "after"), scene_pair(SAMPLES_FROM + 100 + number, size), strict=False):
            path = folder / f"scene_{number}_{date}.jpg"
            Image.fromarray(picture).save(path, quality=90)
            written.append(path)
    return written


def write_held_out(folder: Path, count: int = HELD_OUT) -> None:
    """The held-out pairs as ``T1``, ``T2`` and ``GT`` (0 and 255), the layout of ChangeMamba's data sets."""
    for name in ("T1", "T2", "GT"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        before, after, label = scene_pair(HELD_OUT_FROM + number, HELD_OUT_SIZE)
        for name, pixels in (("T1", before), ("T2", after), ("GT", label * 255)):
            Image.fromarray(pixels).save(folder / name / f"{number:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--out", type=Path, default=PACKAGE / "demo" / f"{MODEL}.scenes.safetensors")
    parser.add_argument("--dry", action="store_true", help="measure only, write nothing")
    parser.add_argument("--samples", type=Path, help="write the sample GeoTIFF pairs into this folder, and end")
    parser.add_argument("--held-out", type=Path, help="write the held-out pairs into this folder, and end")
    options = parser.parse_args()
    if options.samples:
        for path in [*write_samples(options.samples), *write_demo_samples(PACKAGE / "demo" / "samples")]:
            print(path)
        return
    if options.held_out:
        write_held_out(options.held_out)
        return
    model, measured = train(options)
    model.half().float()  # measured as stored
    measured["held_out"] = measure(model, HELD_OUT_FROM, HELD_OUT, HELD_OUT_SIZE)
    measured["held_out_pairs"] = HELD_OUT
    if not options.dry:
        save(model, options.out)
        measured["bytes"] = options.out.stat().st_size
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
