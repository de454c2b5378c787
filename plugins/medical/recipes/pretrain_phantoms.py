"""Does MambaMIM's pre-training pay on few labelled phantoms? Measured against training from scratch on the same few.

    python plugins/medical/recipes/pretrain_phantoms.py --seeds 0 1 2 --out benchmarks/results/medical_mambamim.json

For each seed: a micro MambaMIM encoder is pre-trained on phantoms without their labels (seeds from 2000); its state
starts the segmentation network, which is fine-tuned on a few labelled phantoms (seeds from 3000, other ones for each
seed). The same network with random weights (the decoder's are the same) is trained on the same phantoms, in the same
order, with the same augmentation, steps and rates. Both are measured on the same phantoms that neither has seen (seeds
from 0). Nothing is chosen on these: the settings were tried with ``--seeds 100 --first-unseen 500``. Prints every run,
then mean and deviation over the seeds, whichever way they turn out; ``--out`` merges the runs of several calls into one
file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path

import torch
from monai.metrics import DiceMetric
from monai.transforms import NormalizeIntensity
from torch import Tensor, nn
from train_phantoms import augmented

import zoo
from zoo_medical.losses import DiceCE
from zoo_medical.mambamim_pretrain import encoder_state
from zoo_medical.phantoms import LABELS, phantom

SHAPE, SPACING = (32, 32, 32), (3.0, 3.0, 3.0)
#: 206 thousand parameters; two cells a side
NETWORK = {
    "img_size": 32, "channels": [8, 8, 12, 16, 24], "depths": [1] * 5, "expansion": [2] * 5, "depth": 2,
}  # fmt: skip
DECODER_WIDTH, MASK_RATIO = 64, 0.6


@functools.cache
def phantoms(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels (count, 1, *SHAPE)."""
    made = [phantom(first + i, SHAPE, SPACING) for i in range(count)]
    images = torch.stack([torch.from_numpy(p.image)[None] for p in made])
    return images, torch.stack([torch.from_numpy(p.labels)[None].long() for p in made])


def optimise(model: nn.Module, losses, *, steps: int, rate: float) -> float:
    """``steps`` of AdamW on what ``losses(step)`` gives, with a cosine schedule; the last losses' mean."""
    model.train().to(memory_format=torch.channels_last_3d)  # a third less time in convolutions on a CPU
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.04)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    recent = []
    for step in range(steps):
        loss = losses(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
    model.eval()
    return statistics.fmean(recent[-20:])


def pretrained(seed: int, *, count: int, steps: int, rate: float, batch: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = phantoms(2000, count)
    model = zoo.create("mambamim_pretrain", **NETWORK, decoder_width=DECODER_WIDTH, mask_ratio=MASK_RATIO)

    def loss(step: int) -> Tensor:
        rows = torch.randint(count, (batch,), generator=generator)
        return model(augmented(images[rows], labels[rows], generator)[0])

    print(
        f"seed {seed}: pre-training ends at a loss of {optimise(model, loss, steps=steps, rate=rate):.3f}", flush=True
    )
    return model


def fine_tuned(seed: int, start: nn.Module | None, *, few: int, steps: int, rate: float, batch: int) -> nn.Module:
    """The segmentation network on ``few`` labelled phantoms, from ``start``'s encoder or from random weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = phantoms(3000 + seed * few, few)
    model = zoo.create("mambamim_hybird", **NETWORK, num_classes=len(LABELS))
    if start is not None:
        model.load_state_dict(encoder_state(start), strict=False)
    loss_of = DiceCE()

    def loss(step: int) -> Tensor:
        rows = [(step * batch + i) % few for i in range(batch)]
        image, label = augmented(images[rows], labels[rows], generator)
        return loss_of(model(image), label)

    optimise(model, loss, steps=steps, rate=rate)
    return model


@torch.no_grad()
def mean_dice(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The mean over phantoms and organs."""
    metric = DiceMetric(include_background=False, reduction="mean", num_classes=len(LABELS))
    for image, label in zip(images, labels, strict=True):
        ready = NormalizeIntensity(channel_wise=True)(image)
        metric(model(ready[None]).argmax(dim=1, keepdim=True), label[None])
    return float(metric.aggregate())


def summary(runs: list[dict]) -> dict:
    """Mean and deviation over the seeds of both, and of their differences."""
    scratch, tuned = [r["scratch"] for r in runs], [r["pretrained"] for r in runs]
    rows = {"scratch": scratch, "pretrained": tuned, "difference": [b - a for a, b in zip(scratch, tuned, strict=True)]}
    return {
        name: {
            "mean": round(statistics.fmean(v), 4),
            "deviation": round(statistics.stdev(v), 4) if len(v) > 1 else None,
        }
        for name, v in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--unlabelled", type=int, default=200, help="phantoms to pre-train on")
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument("--few", type=int, default=3, help="labelled phantoms to fine-tune on")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning, and of training from scratch")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--unseen", type=int, default=24, help="phantoms to measure on")
    parser.add_argument("--first-unseen", type=int, default=0, help="seed of the first of these")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    settings = {k: v for k, v in vars(o).items() if k not in ("out", "seeds")}
    unseen = phantoms(o.first_unseen, o.unseen)
    runs = []
    for seed in o.seeds:
        began = time.process_time()
        start = pretrained(seed, count=o.unlabelled, steps=o.pretraining_steps, rate=o.rate, batch=o.batch)
        run: dict = {"seed": seed}
        for name, from_ in (("scratch", None), ("pretrained", start)):
            model = fine_tuned(seed, from_, few=o.few, steps=o.steps, rate=o.rate, batch=o.batch)
            run[name] = round(mean_dice(model, *unseen), 4)
        run["cpu_seconds"] = round(time.process_time() - began)
        print(json.dumps(run), flush=True)
        runs.append(run)
    if o.out is not None and o.out.exists():
        earlier = json.loads(o.out.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(f"{o.out} was measured with {earlier['settings']}; now {settings}: choose another --out")
        runs = sorted([r for r in earlier["runs"] if r["seed"] not in o.seeds] + runs, key=lambda r: r["seed"])
    answer = {
        "what": "mean Dice on unseen phantoms, MambaMIM pre-training and fine-tuning against training from scratch",
        "command": "python plugins/medical/recipes/pretrain_phantoms.py --seeds 0 1 2",
        "settings": settings, "runs": runs, "over_seeds": summary(runs),
    }  # fmt: skip
    print(json.dumps(answer["over_seeds"]))
    if o.out is not None:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
