"""Train the DiMSUM demo on drawn shapes, and measure what it draws on demand.

    uv run python plugins/generation/recipes/train_shapes.py

trains on 20,000 images of eight shapes (drawn_shapes.py) and judges 800 samples of the averaged weights, as they are
shipped, by a classifier trained on other drawings: how often the sample is of the shape that was asked for (chance 1 in
8), and the Frechet distance of its features from those of unseen drawings. Beside it: drawings against drawings, the
best that can be reached, and images drawn from the normal distribution of each class's pixels. It writes the checkpoint
into the plugin and prints the figures for the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import drawn_shapes as shapes
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo_generation.dimsum import flow, training

DEMO = Path(__file__).parents[1] / "src" / "zoo_generation" / "demo"
NAME = "dimsum_micro.shapes"


def gaussians(images: Tensor, labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Images from the normal distribution of the pixels of each wanted class."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(len(wanted), *images.shape[1:])
    for i in range(len(shapes.CLASSES)):
        pixels = images[labels == i].flatten(1).double()
        values, axes = torch.linalg.eigh(torch.cov(pixels.T))
        draws = torch.randn(int((wanted == i).sum()), pixels.shape[1], generator=generator, dtype=torch.float64)
        found[wanted == i] = (pixels.mean(0) + draws * values.clamp(min=0).sqrt() @ axes.T).float().view(-1, 1, 16, 16)
    return found.clamp(-1, 1)


def nearest(images: Tensor, others: Tensor) -> float:
    """The mean distance of each image to the nearest of ``others``: near 0 where images were learned by heart."""
    return float(torch.cdist(images.flatten(1), others.flatten(1)).min(1).values.mean())


def measure(
    model: torch.nn.Module, train: tuple[Tensor, Tensor], held_out: Tensor, judge: shapes.Judge, count: int
) -> dict:
    wanted = torch.arange(len(shapes.CLASSES)).repeat(count)
    noise = torch.randn(len(wanted), 1, 16, 16, generator=torch.Generator().manual_seed(1))
    null = model.y_embedder.null
    sets = {"drawings": shapes.draw(len(wanted), 11), "pixel normals": (gaussians(*train, wanted, 12), wanted)}
    for cfg in (1.0, 1.5, 2.5):
        times: list[float] = []
        images = flow.sample(model, noise, wanted, null=null, cfg=cfg, trace=times).clamp(-1, 1)
        sets[f"model, guidance {cfg:g}, {len(times)} evaluations"] = (images, wanted)
    return {
        name: {
            "accuracy": shapes.accuracy(judge, images, labels),
            "frechet": round(shapes.frechet(judge, images, held_out), 2),
            "nearest training image": round(nearest(images, train[0]), 3),
        }
        for name, (images, labels) in sets.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=100, help="of each shape, to be judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    train = shapes.draw(arguments.images, 1)
    held_out = shapes.draw(2000, 2)
    judge = shapes.train_judge(*shapes.draw(arguments.images, 3))
    print({"judge on unseen drawings": shapes.accuracy(judge, *held_out)}, flush=True)
    torch.manual_seed(arguments.seed)
    model = zoo.create(NAME.partition(".")[0])
    settings = training.Settings(
        steps=arguments.steps, batch_size=32, learning_rate=3e-3, decay=0.998, warmup=100, cosine=True,
        report_every=250, seed=arguments.seed,
    )  # fmt: skip
    training.fit(model, *train, settings, held_out=held_out, on_report=lambda row: print(row, flush=True))
    model.to(torch.float16).to(torch.float32)  # measure what is shipped
    if not arguments.dry_run:
        DEMO.mkdir(exist_ok=True)
        save_file(
            {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}, DEMO / f"{NAME}.safetensors"
        )
        (DEMO / "shapes.txt").write_text("\n".join(shapes.CLASSES) + "\n", encoding="utf-8")
    print(json.dumps(measure(model, train, held_out[0], judge, arguments.samples), indent=1))


if __name__ == "__main__":
    main()
