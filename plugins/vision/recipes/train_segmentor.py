"""Train the micro segmentor on drawn scenes, and measure it on others.

    python plugins/vision/recipes/train_segmentor.py

Data: made here. A scene of 64 x 64 pixels has one to three of six shapes, of any colour, size and place, turned by up
to 20 degrees, on a ground with a gradient and patches of its own colours, and noise over all; later shapes cover
earlier ones. Colours say nothing about the class: it lies in the shape alone. Scenes are drawn anew for every step;
those that are measured come from seeds of their own, and nothing is chosen on them.

Writes the weights as safetensors and prints one line of JSON with the intersection over union of every class.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.files import check_place, whole
from zoo_vision.scenes import SemanticSegmentation

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_vision"
CLASSES = ("ground", "disc", "ring", "square", "triangle", "cross", "star")
SIZE, FINE = 64, 3  # pixels, and how much finer shapes are drawn
HELD_OUT, HELD_SEED = 200, 1_000_000


def outline(kind: str, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape around the origin."""
    if kind == "star":
        polar = [(radius * (1 if i % 2 == 0 else 0.42), 2 * math.pi * i / 10) for i in range(10)]
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in polar]
    elif kind == "cross":
        t = radius * 0.33
        points = [(-t, -radius), (t, -radius), (t, -t), (radius, -t), (radius, t), (t, t), (t, radius), (-t, radius),
                  (-t, t), (-radius, t), (-radius, -t), (-t, -t)]  # fmt: skip
    else:
        sides = {"square": 4, "triangle": 3}.get(kind, 48)
        shift = 0.5 if kind == "square" else 0.0  # on a side, the triangle and the star point up
        turns = [2 * math.pi * (i + shift) / sides for i in range(sides)]
        points = [(radius * math.cos(t), radius * math.sin(t)) for t in turns]
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def draw(seed: int, size: int = SIZE) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """A picture, and class and mask (size, size) bool of each of its shapes, where later ones do not cover it."""
    r = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    first, second = r.uniform(0, 255, (2, 3))
    mix = (across * math.cos(a := r.uniform(0, 2 * math.pi)) + down * math.sin(a))[..., None]
    ground = Image.fromarray(np.clip(first + (second - first) * mix, 0, 255).astype(np.uint8))
    patches = ImageDraw.Draw(ground)
    for _ in range(r.integers(0, 6)):
        x, y, w, h = r.uniform(0, size, 2).tolist() + r.uniform(4, 20, 2).tolist()
        patches.ellipse((x - w, y - h, x + w, y + h), fill=tuple(r.integers(0, 256, 3).tolist()))
    picture = ground.filter(ImageFilter.GaussianBlur(6)).resize((size * FINE, size * FINE))
    shapes: list[tuple[int, np.ndarray]] = []
    for _ in range(r.integers(1, 4)):
        kind = int(r.integers(1, len(CLASSES)))
        radius, angle = r.uniform(9, 18) * FINE, r.uniform(-0.35, 0.35) - math.pi / 2
        x, y = r.uniform(8, size - 8, 2) * FINE
        mask = Image.new("L", picture.size, 0)
        pen = ImageDraw.Draw(mask)
        pen.polygon([(x + u, y + v) for u, v in outline(CLASSES[kind], radius, angle)], fill=255)
        if CLASSES[kind] == "ring":
            inner = radius * r.uniform(0.45, 0.65)
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
        picture.paste(tuple(r.integers(0, 256, 3).tolist()), mask=mask)
        own = np.asarray(mask)[FINE // 2 :: FINE, FINE // 2 :: FINE] > 0
        shapes = [(k, m & ~own) for k, m in shapes] + [(kind, own)]
    values = np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    values = np.clip(values + r.normal(0, r.uniform(2, 14), values.shape), 0, 255)
    return Image.fromarray(values.round().astype(np.uint8)), shapes


def scene(seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture and its classes (64, 64)."""
    picture, shapes = draw(seed)
    classes = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for kind, mask in shapes:
        classes[mask] = kind
    return picture, classes


def batch(first: int, count: int, pipe: SemanticSegmentation) -> tuple[Tensor, Tensor]:
    """Prepared pictures (count, 3, 64, 64) and classes (count, 64, 64) of the seeds from ``first`` on."""
    drawn = [scene(first + i) for i in range(count)]
    images = torch.stack([pipe.prepare(picture) for picture, _ in drawn])
    return images, torch.from_numpy(np.stack([classes for _, classes in drawn]).astype(np.int64))


def measure(pipe: SemanticSegmentation, count: int = HELD_OUT) -> dict[str, float]:
    """Intersection over union of every class over ``count`` held-out scenes, through the pipeline."""
    both = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    for i in range(count):
        picture, classes = scene(HELD_SEED + i)
        found = pipe(picture).classes
        both += np.bincount(classes.ravel() * len(CLASSES) + found.ravel(), minlength=both.size).reshape(both.shape)
    hit = np.diag(both)
    iou = hit / (both.sum(0) + both.sum(1) - hit)
    return dict(zip(CLASSES, iou.tolist(), strict=True)) | {
        "mIoU": float(iou.mean()),
        "pixels": float(hit.sum() / both.sum()),
    }


def train(name: str, *, steps: int, size: int, rate: float, seed: int) -> SemanticSegmentation:
    torch.manual_seed(seed)
    model = zoo.create(name).train()
    pipe = SemanticSegmentation(model, short_side=SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / max(steps - warm, 1)))),
    )
    total, began = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        loss = model.loss(*batch(seed * 10**8 + 10**7 + step * size, size, pipe))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {total / 100:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
            total = 0.0
    model.half().float()  # measured as stored
    return SemanticSegmentation(model.eval(), short_side=SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vmamba_micro_upernet")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: zoo_vision/demo/MODEL.shapes.safetensors")
    parser.add_argument("--dry", action="store_true", help="measure only, write nothing")
    parser.add_argument("--samples", type=Path, help="write three held-out scenes into this folder, and end")
    options = parser.parse_args()
    if options.samples:
        options.samples.mkdir(parents=True, exist_ok=True)
        for i in range(3):
            scene(HELD_SEED + i)[0].save(options.samples / f"scene_{i}.jpg", quality=92)
        return
    out = options.out or PACKAGE / "demo" / f"{options.model}.shapes.safetensors"
    if not options.dry:
        check_place(out)  # before it is trained
    pipe = train(options.model, steps=options.steps, size=options.batch, rate=options.rate, seed=options.seed)
    measured = {"model": options.model, "steps": options.steps, "seed": options.seed} | measure(pipe)
    if not options.dry:
        state = {k: v.detach() for k, v in pipe.model.state_dict().items()}
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
        with whole(out) as work:
            save_file(state, str(work), metadata={"format": "pt", "architecture": options.model})
        measured["bytes"] = out.stat().st_size
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
