"""PointMamba's masked pre-training as a loop, and the start of a classifier or part model from its weights.

Settings as published (arXiv 2402.10739; LMD0311/PointMamba ``cfgs/pretrain.yaml``): AdamW, rate 1e-3, weight decay
0.05, cosine with a warm-up, 60 % of the patches hidden, Chamfer loss on their points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.runs import Run

from .files import read_cloud
from .geometry import unit_sphere
from .pointmamba import PointMambaMAE, PointMambaTrunk


def cloud_batches(
    files: Sequence[str | Path], points: int, batch: int, seed: int = 0, invalid: str = "error"
) -> Iterator[Tensor]:
    """Batches (batch, points, 3) without end: each a random choice of files, of each a random choice of points, in the
    unit sphere, stretched by 2/3 to 3/2 along each axis and moved by up to 0.2.

    All files are read before the first batch, so that a bad one is found at once, and kept in memory. ``invalid``:
    points with NaN or infinite coordinates are an "error", or are left out ("drop"). Raises ValueError for no files and
    for a file with fewer points.
    """
    if not files:
        raise ValueError("no point-cloud files were given")
    read = [read_cloud(file, invalid).points for file in files]
    for file, cloud in zip(files, read, strict=True):
        if len(cloud) < points:
            raise ValueError(f"{file} has {len(cloud)} points; batches of {points} points are asked for")
    r = np.random.default_rng(seed)
    while True:
        clouds = []
        for i in r.integers(0, len(files), batch).tolist():
            cloud = unit_sphere(read[i][r.choice(len(read[i]), points, replace=False)])
            clouds.append(cloud * r.uniform(2 / 3, 3 / 2, 3) + r.uniform(-0.2, 0.2, 3))
        yield torch.from_numpy(np.stack(clouds).astype(np.float32))


def pretrain(
    model: PointMambaMAE,
    batches: Iterable[Tensor],
    steps: int,
    *,
    rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: int | None = None,
    clip: float = 10.0,
    report: Callable[[int, float], None] | None = None,
    run: Run | None = None,
) -> list[float]:
    """Train ``model`` in place on ``steps`` batches (B, N, 3), on the model's device; returns the loss of every step.

    The rate rises over ``warmup`` steps (None: a thirtieth of all, as 10 of 300 epochs) and falls along a cosine to a
    thousandth. Norms, biases and other vectors do not decay. ``report(step, loss)`` is called after every step. ``run``
    keeps the training, and it goes on with what that holds; batches that were seen are passed over.
    Raises ValueError when the batches end too early and when a loss is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    rising = max(1, steps // 30) if warmup is None else max(1, warmup)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(
            (i + 1) / rising,
            0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * max(i - rising, 0) / max(steps - rising, 1))),
        ),
    )
    device = model.mask_token.device
    was_training = model.training
    model.train()
    run = run or Run()
    losses: list[float] = run.start(model=model, optimizer=optimizer, schedule=schedule).get("losses", [])
    source = iter(batches)
    for _ in losses:
        next(source, None)
    for step in range(len(losses) + 1, steps + 1):
        points = next(source, None)
        if points is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
        loss = model(points.to(device))["loss"]
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} in step {step}; give a lower rate than {rate}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        losses.append(value)
        if report is not None:
            report(step, value)
        run.keep(step, losses=losses)
    model.train(was_training)
    return losses


@torch.no_grad()
def start_from(model: PointMambaTrunk, pretrained: PointMambaMAE) -> list[str]:
    """Give a classifier or part model the trunk of a pre-trained autoencoder, in place; returns the names of the
    parameters that keep their values (its head). Raises ValueError where the trunks differ."""
    given = pretrained.trunk.state_dict()
    own = model.state_dict()
    wrong = [k for k, v in given.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"the pre-trained trunk does not fit: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; build both "
            "with the same embed_dim and depth"
        )
    model.load_state_dict({**own, **given})
    return [name for name, _ in model.named_parameters() if name not in given]
