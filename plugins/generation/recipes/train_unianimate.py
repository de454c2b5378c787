"""Train the demo of UniAnimate on generated figures (see stick_figures.py) and measure it on figures it never saw.

    uv run python plugins/generation/recipes/train_unianimate.py

writes the checkpoint and a sample (a figure, the poses of another one) into the plugin, and prints the figures of the
card: the peak signal-to-noise ratio of the animations, and beside it that of the reference shown in every frame.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from stick_figures import random_clip

import zoo
from zoo_generation.unianimate.data import Batches, Clip, psnr
from zoo_generation.unianimate.latents import PatchLatents
from zoo_generation.unianimate.pipeline import HumanAnimation
from zoo_generation.unianimate.training import Batch, train

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_generation"
NAME, TAG = "unianimate_micro", "figures"
SIZE, POSES, WIDTH = 32, (64, 64), 1.0  #: of pictures and of drawn poses, in pixels
STEPS, PRIOR = (
    4,
    751,
)  #: of the sampling that is measured; chosen on clips of seed 2,000,000
WINDOW, OVERLAP = 6, 2  #: frames that are denoised together: as many as in training


def unseen_clips(count: int, frames: int = 8) -> list[Clip]:
    r = np.random.default_rng(1_000_000)
    return [random_clip(r, frames, SIZE) for _ in range(count)]


def measure(pipe: HumanAnimation, clips: list[Clip]) -> dict[str, float]:
    """PSNR in dB of the animations and of showing the reference, against the true videos: of whole frames, and of the
    pixels where the true frame is not as the reference."""
    rows: dict[str, list[float]] = {"psnr": [], "psnr_moved": [], "psnr copied": [], "psnr_moved copied": []}
    for clip in clips:
        assert clip.reference is not None
        answer = pipe((clip.reference, (clip.poses, clip.reference_pose)))
        copied = np.repeat(clip.reference[None], len(clip.frames), axis=0)
        moved = (np.abs(clip.frames.astype(int) - copied) > 24).any(-1)
        for name, frames in (("", answer.frames), (" copied", copied)):
            rows[f"psnr{name}"].append(psnr(frames, clip.frames))
            error = (frames.astype(float) - clip.frames)[moved]
            rows[f"psnr_moved{name}"].append(float(10 * np.log10(255**2 / np.square(error).mean())))
    return {name: float(np.mean(values)) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = zoo.create(NAME)
    batches = Batches(model, PatchLatents(), pose_size=POSES, pose_width=WIDTH)
    began, recent = time.perf_counter(), []

    def batch(r: np.random.Generator) -> Batch:
        return batches.of([random_clip(r, arguments.frames, SIZE) for _ in range(arguments.batch_size)])

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {np.mean(recent):.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
            recent.clear()

    train(
        model,
        batch,
        steps=arguments.steps,
        rate=arguments.rate,
        lowest=1e-4,
        warmup=50,
        average=0.995,
        seed=arguments.seed,
        report=report,
    )
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in weights.items()})  # what is stored is what is measured
    demo = PLUGIN / "demo"
    if not arguments.dry_run:
        demo.mkdir(exist_ok=True)
        save_file(weights, demo / f"{NAME}.{TAG}.safetensors")
        r = np.random.default_rng(7)
        clip, mover = random_clip(r, 12, SIZE), random_clip(r, 12, SIZE)
        Image.fromarray(clip.reference).save(demo / "figure.png")
        mover.poses.save(demo / "figure.npz", clip.reference_pose)
    options = {
        "steps": STEPS,
        "prior": PRIOR,
        "size": WINDOW,
        "overlap": OVERLAP,
        "latents": "patch",
        "pose_size": POSES,
        "pose_width": WIDTH,
        "aligned": False,
    }
    print(json.dumps(measure(HumanAnimation(model, guidance=1.0, **options), unseen_clips(16)), indent=1), flush=True)


if __name__ == "__main__":
    main()
