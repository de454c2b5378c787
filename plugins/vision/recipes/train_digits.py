"""Train a micro model on the handwritten digits that ship inside scikit-learn, and measure it on held-out ones.

    python plugins/vision/recipes/train_digits.py vim_micro

Data: ``sklearn.datasets.load_digits`` (1797 grey images of 8 x 8 pixels; E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI machine learning repository, CC BY 4.0). Split: stratified, 450 images held out,
drawn with ``random_state=0`` and never trained on, whatever ``--seed`` is. Every image is drawn at 64 x 64 pixels and
goes through the transforms of the model's pipeline, so that training sees what ``zoo predict`` sees. Training images
are shifted, turned, scaled, and half of them inverted, so that dark ink on light paper is read as well.

Writes the weights as safetensors and prints one line of JSON with the held-out accuracy after the last epoch; nothing
is chosen on the held-out images.
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
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import zoo
from zoo.files import check_place, whole
from zoo_vision.pipelines import ImageClassification

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_vision"
HELD_OUT = 450
SPLIT_SEED = 0


def digit_image(pixels: np.ndarray) -> Image.Image:
    """One digit (8, 8), values 0 to 16, as a grey image of 64 x 64 pixels, light ink on black."""
    return Image.fromarray((pixels / 16 * 255).round().astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, 8, 8) to train on and held out, then their labels."""
    digits = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=HELD_OUT, stratify=digits.target, random_state=SPLIT_SEED
    )
    return train, test, train_labels, test_labels


def prepared(images: np.ndarray, pipe: ImageClassification) -> Tensor:
    """(n, 1, H, W), as the pipeline prepares a file."""
    return torch.stack([pipe.prepare(digit_image(image)) for image in images])


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift up to an eighth, turn up to 12 degrees, scale by 0.85 to 1.15; half inverted; a little noise."""
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, scale = uniform(-12, 12) * math.pi / 180, uniform(0.85, 1.15)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() / scale, -angle.sin() / scale
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)[:, None, None, None]
    return x * flip + 0.05 * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(-1) for part in x.split(128)])
    return float((found == y).float().mean())


def train(
    name: str, *, epochs: int, batch: int, rate: float, seed: int, settings: dict
) -> tuple[torch.nn.Module, dict]:
    """Train ``name`` and measure it: (model in eval mode, figures)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = zoo.create(name, **settings)
    pipe = ImageClassification(model)
    train_images, test_images, train_labels, test_labels = split()
    x, y = prepared(train_images, pipe), torch.from_numpy(train_labels)
    held_x, held_y = prepared(test_images, pipe), torch.from_numpy(test_labels)
    free = set(model.no_weight_decay())
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and n not in free]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or n in free]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    steps = epochs * (len(x) // batch)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / max(steps - warm, 1)))),
    )
    began = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch]
        for rows in order.split(batch):
            loss = F.cross_entropy(model(augmented(x[rows], generator)), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        spent = time.perf_counter() - began
        print(f"epoch {epoch + 1}: loss {total / (len(x) // batch):.3f}, {spent:.0f} s", flush=True)
    model.half().float()  # measured as stored
    return model.eval(), {
        "model": name,
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_accuracy": accuracy(model, held_x, held_y),
        "held_out_accuracy_inverted": accuracy(model, -held_x, held_y),
        "held_out_images": len(held_x),
        "seconds": round(time.perf_counter() - began),
    }


def write_samples(folder: Path) -> list[Path]:
    """The first held-out image of each digit, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    _, images, _, labels = split()
    written = []
    for digit in range(10):
        path = folder / f"digit_{digit}.png"
        digit_image(images[int(np.flatnonzero(labels == digit)[0])]).save(path, optimize=True)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vim_micro")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="model argument, as paths=row")
    parser.add_argument("--out", type=Path, help="default: zoo_vision/demo/MODEL.digits.safetensors")
    parser.add_argument("--dry", action="store_true", help="measure only, write nothing")
    parser.add_argument("--samples", type=Path, help="write ten held-out images into this folder, and end")
    options = parser.parse_args()
    if options.samples:
        for path in write_samples(options.samples):
            print(path)
        return
    out = options.out or PACKAGE / "demo" / f"{options.model}.digits.safetensors"
    if not options.dry:
        check_place(out)  # before it is trained
    settings = {}
    for text in options.set:
        key, _, value = text.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    model, measured = train(
        options.model,
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        seed=options.seed,
        settings=settings,
    )
    if not options.dry:
        state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
        with whole(out) as work:
            save_file(state, str(work), metadata={"format": "pt", "architecture": options.model})
        measured["bytes"] = out.stat().st_size
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
