"""Train the demo restorers on drawings, and measure them on drawings that they have not seen.

    uv run python plugins/restoration/recipes/train_drawings.py serpent_micro
    uv run python plugins/restoration/recipes/train_drawings.py contrast_micro

Data: :func:`zoo_restoration.drawings.drawing`, 250 images of 96 x 96 to train on and 100 others to measure on.
Serpent takes off Gaussian noise of deviation 0.1; Contrast enlarges twice. Measured beside the spoilt image itself, or
for Contrast beside bicubic enlargement. Writes the averaged weights in half precision, as measured, and sample files
into the plugin, and prints the figures for the card. One core, some minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import zoo
from zoo_restoration.degradations import Degradation
from zoo_restoration.drawings import drawing
from zoo_restoration.training import Settings, Trainer, measure, to_tensor
from zoo_restoration.validation import plain_for

DEMO = Path(__file__).parents[1] / "src" / "zoo_restoration" / "demo"
UNSEEN = 1_000_000
DEGRADATIONS = {
    "serpent_micro": Degradation.parse("noise:std=0.1"),
    "contrast_micro": Degradation.parse("bicubic:scale=2"),
}
STEPS = {"serpent_micro": 3000, "contrast_micro": 1000}
SAMPLES = {"serpent_micro": "noisy.png", "contrast_micro": "small.png"}


class Drawings:
    """Drawings ``first`` .. ``first + count - 1``, each drawn once."""

    def __init__(self, first: int, count: int, size: int) -> None:
        self.first, self.count = first, count
        self.draw = functools.lru_cache(maxsize=None)(lambda index: drawing(first + index, size))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.draw(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(DEGRADATIONS))
    parser.add_argument("--steps", type=int, help="default: 3000 for Serpent, 1000 for Contrast")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--patch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="folder that keeps the run, to go on with it later")
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    degradation = DEGRADATIONS[arguments.model]
    torch.manual_seed(arguments.seed)
    model = zoo.create(arguments.model).train()
    settings = Settings(
        steps=arguments.steps or STEPS[arguments.model], batch_size=arguments.batch_size, patch=arguments.patch,
        learning_rate=arguments.rate, ema=0.99, seed=arguments.seed,
    )  # fmt: skip
    unseen = Drawings(UNSEEN, 100, 96)
    trainer = Trainer(model, Drawings(0, 250, 96), degradation, settings, folder=arguments.run)
    began, losses = time.perf_counter(), []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 300 == 0:
            row = {"step": step, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - began}
            row |= measure(trainer.averaged, [unseen[i] for i in range(6)], degradation)
            print(row, flush=True)
            losses.clear()

    model = trainer.train(report).to(torch.float16).to(torch.float32)  # measure what is shipped
    found = {
        "degraded" if degradation.scale == 1 else "bicubic": measure(plain_for(degradation), unseen, degradation),
        arguments.model: measure(model, unseen, degradation),
    }
    print(json.dumps(found, indent=1))
    if not arguments.dry_run:
        DEMO.mkdir(exist_ok=True)
        state = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
        save_file(state, DEMO / f"{arguments.model}.drawings.safetensors")
        clean = to_tensor(drawing(UNSEEN + 7, 96 if degradation.scale > 1 else 80))[None]
        spoilt = degradation(clean, torch.Generator().manual_seed(7))[0]
        pixels = (spoilt.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(DEMO / SAMPLES[arguments.model], optimize=True)


if __name__ == "__main__":
    main()
