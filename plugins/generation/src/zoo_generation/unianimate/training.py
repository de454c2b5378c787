"""Training UniAnimate: the loss, batches of clips, the loop.

Source: arXiv 2406.01188, section 3 and 4.1 (AdamW, 5e-5, joint training with the first-frame and the reference
condition); the released code has no training script, so what is not in the paper or in its diffusion is plain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoo.runs import Run

from .diffusion import Schedule, training_loss
from .unet import UNet


@dataclass
class Batch:
    """x0 (batch, 4, frames, h, w) latents of the clips, and their conditions by the names of ``UNet.forward``."""

    x0: Tensor
    conditions: Mapping[str, Tensor | None]


def train(
    model: UNet,
    batches: Callable[[np.random.Generator], Batch],
    *,
    steps: int,
    rate: float = 5e-5,
    weight_decay: float = 0.0,
    warmup: int = 0,
    lowest: float | None = None,
    average: float | None = None,
    first_frame: float = 0.0,
    unconditional: float = 0.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    run: Run | None = None,
) -> list[float]:
    """Train in place on ``batches(generator)``, one a step; the loss of every step.

    The step of the diffusion is uniform for each clip, the noise has its offset, and conditions are dropped by the
    model's own probabilities (``misc_dropout``, ``p_all_zero``, ``p_all_keep``). first_frame: how often a clip is shown
    with its own first frame as ``local_image`` in place of the reference, as far as the model has both. unconditional:
    how often a batch goes without any condition (the model itself never drops the reference's frame). lowest: the
    rate falls to it along half a cosine (None: constant). average: the model is left at the moving average of its
    weights with this decay. run: keeps it, and goes on with what it holds. Raises ValueError when a loss is not finite.
    """
    device = model.time_embed["0"].weight.device
    schedule, r = Schedule(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    mean = copy.deepcopy(model.state_dict()) if average is not None else None
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, random=r)
    losses: list[float] = began.get("losses", [])
    if mean is not None and "mean" in began:
        mean = {k: v.to(mean[k].device) for k, v in began["mean"].items()}
    model.train()
    for step in range(len(losses), steps):
        now = rate * min((step + 1) / max(warmup, 1), 1.0)
        if lowest is not None:
            now = lowest + (now - lowest) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = now
        batch = batches(r)
        given = {k: None if v is None else v.to(device) for k, v in batch.conditions.items()}
        if given.get("local_image") is not None and given.get("randomref") is not None:
            given["randomref" if r.random() < first_frame else "local_image"] = None
        if unconditional > 0 and r.random() < unconditional:
            given = dict.fromkeys(given)
        x0 = batch.x0.to(device)
        t = torch.from_numpy(r.integers(0, schedule.steps, len(x0))).to(device)
        loss = training_loss(model, x0, t, given, schedule=schedule).mean()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step}; a lower rate may help")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if mean is not None:
            assert average is not None
            decay = min(average, (1 + step) / (10 + step))  # a young average follows quickly
            for key, value in model.state_dict().items():
                mean[key].lerp_(value, 1 - decay)
        if report is not None:
            report(step, losses[-1])
        run.keep(step + 1, losses=losses, mean=mean)
    if mean is not None:
        model.load_state_dict(mean)
    model.eval()
    return losses
