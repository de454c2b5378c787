"""Train a micro U-Mamba on generated phantoms, and measure it on phantoms that it has not seen.

    python plugins/medical/recipes/train_phantoms.py umamba_micro
    python plugins/medical/recipes/train_phantoms.py umamba_micro --evaluate   # the shipped weights, measured again

Data: ``zoo_medical.phantoms``, bodies of about 100 mm on 32^3 voxels of 3 mm; seeds from 1000 train, 0 to 23 are held
out. Training volumes are moved by up to three voxels, their intensities scaled and bent, and noise is added. Loss: Dice
and cross-entropy with deep supervision. Nothing is chosen on the held-out phantoms.

Writes the weights as safetensors. The measurement goes the way a user goes: NIfTI files through the pipeline, label
maps compared voxel by voxel; once on the training grid, once on files of another voxel size with their axes exchanged
and flipped. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.metrics import DiceMetric
from monai.transforms import NormalizeIntensity
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo_medical.losses import DiceCE
from zoo_medical.phantoms import LABELS, Phantom, phantom

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_medical"
SHAPE, SPACING = (32, 32, 32), (3.0, 3.0, 3.0)
FIRST_TRAINING_SEED = 1000
HELD_OUT = range(24)


def training_set(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, *SHAPE), labels of the same shape."""
    made = [phantom(FIRST_TRAINING_SEED + i, SHAPE, SPACING) for i in range(count)]
    images = torch.stack([torch.from_numpy(p.image)[None] for p in made])
    labels = torch.stack([torch.from_numpy(p.labels)[None].long() for p in made])
    return images, labels


def augmented(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(batch, 1, x, y, z) moved by whole voxels (what comes in is zero), other intensities, z-scored as the pipeline
    does."""

    def uniform(low: float, high: float) -> float:
        return float(torch.rand((), generator=generator) * (high - low) + low)

    images, labels = [], []
    for one, truth in zip(image, label, strict=True):
        shift = [round(uniform(-3, 3)) for _ in range(3)]
        one, truth = moved(one, shift), moved(truth, shift)
        one = one.clamp(min=0) ** uniform(0.8, 1.25) * uniform(0.8, 1.2)
        one = one + uniform(0, 0.05) * torch.randn(one.shape, generator=generator)
        images.append(torch.as_tensor(NormalizeIntensity(channel_wise=True)(one)))
        labels.append(truth)
    return torch.stack(images), torch.stack(labels)


def moved(volume: Tensor, shift: list[int]) -> Tensor:
    """(1, x, y, z) by whole voxels, zeros behind."""
    volume = volume.roll(shift, dims=(1, 2, 3))
    for axis, by in enumerate(shift, start=1):
        if by > 0:
            volume.narrow(axis, 0, by).zero_()
        elif by < 0:
            volume.narrow(axis, volume.shape[axis] + by, -by).zero_()
    return volume


def train(name: str, *, steps: int, count: int, batch: int, rate: float, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = training_set(count)
    model = zoo.create(name, deep_supervision=True)
    outputs = len(model.decoder.seg_layers)
    loss_of = DiceCE(outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    model.train()
    began, recent = time.process_time(), []
    order: list[int] = []
    for step in range(1, steps + 1):
        while len(order) < batch:
            order += torch.randperm(count, generator=generator).tolist()
        rows, order = order[:batch], order[batch:]
        image, label = augmented(images[rows], labels[rows], generator)
        loss = loss_of(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0:
            spent = time.process_time() - began
            print(f"step {step}: loss {statistics.fmean(recent[-50:]):.3f}, {spent:.0f} CPU-seconds", flush=True)
    return model.eval()


def nifti(made: Phantom, path: Path, *, exchanged: bool = False) -> None:
    """The phantom as a NIfTI file, with ``exchanged`` in another order and direction of the axes."""
    image = nibabel.Nifti1Image(made.image, made.affine)
    if exchanged:
        image = image.as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
    nibabel.save(image, path)


def write_samples(folder: Path) -> None:
    """A held-out phantom and its labels as a scanner would write them: 8 bits, axes to the left and the back."""
    made = phantom(1, (40, 34, 26), (2.5, 2.5, 4.0))
    grey = np.clip(np.round(made.image * 64), 0, 255).astype(np.uint8)
    for kind, voxels in (("images", grey), ("labels", made.labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(voxels, made.affine).as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / kind / "phantom_1.nii.gz")


def measure(weights: str, checkpoint: Path | None = None) -> dict[str, dict[str, float]]:
    """Dice of each label, mean over the held-out phantoms, on the training grid and on another one."""
    options = {} if checkpoint is None else {"checkpoint": str(checkpoint), "dtype": "float32"}
    pipe = zoo.pipeline(weights, **options)
    found = {}
    for where, shape, spacing in (
        ("training grid", SHAPE, SPACING),
        ("2 x 2.5 x 3.5 mm", (48, 39, 28), (2.0, 2.5, 3.5)),
    ):
        metric = DiceMetric(include_background=False, reduction="mean_batch", num_classes=len(LABELS))
        for seed in HELD_OUT:
            made = phantom(seed, shape, spacing)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "scan.nii"
                nifti(made, path, exchanged=where != "training grid")
                answer = pipe(path)
                map_ = nibabel.as_closest_canonical(nibabel.load(answer.save(Path(folder) / "labels.nii")))
                got = torch.from_numpy(np.asarray(map_.dataobj).astype(np.int64))
            metric(got[None, None], torch.from_numpy(made.labels.astype(np.int64))[None, None])
        each = metric.aggregate().tolist()
        found[where] = {
            "mean_dice": round(statistics.fmean(each), 4),
            **{label: round(value, 4) for label, value in zip(LABELS[1:], each, strict=True)},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="umamba_micro")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--phantoms", type=int, default=60, help="number of training phantoms")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: zoo_medical/demo/MODEL.phantoms.safetensors")
    parser.add_argument("--evaluate", action="store_true", help="measure the weights of --out, do not train")
    parser.add_argument(
        "--samples", type=Path, help="write a held-out phantom and its labels into this folder, and end"
    )
    options = parser.parse_args()
    if options.samples:
        write_samples(options.samples)
        return
    out = options.out or PACKAGE / "demo" / f"{options.model}.phantoms.safetensors"
    began = time.process_time()
    if not options.evaluate:
        model = train(
            options.model, steps=options.steps, count=options.phantoms, batch=options.batch, rate=options.rate,
            seed=options.seed,
        )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
        save_file(state, str(out), metadata={"format": "pt", "architecture": options.model})
    answer = {
        "model": options.model, "seed": options.seed, "steps": options.steps, "bytes": out.stat().st_size,
        "held_out_phantoms": len(HELD_OUT), **measure(f"{options.model}.phantoms", out),
        "cpu_seconds": round(time.process_time() - began),
    }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
