"""Training DiMSUM by flow matching: AdamW, averaged weights, dropped labels, clipped gradients.

Source: VinAIResearch/DiMSUM ``dimsum/train.py``: learning rate 1e-4, no weight decay, gradients clipped to 1, an
average of decay 0.9999; stochastic depth and label dropout are arguments of the model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.placement import device_of
from zoo.runs import Run

from . import flow


@dataclass(frozen=True)
class Settings:
    """``steps`` of ``batch_size`` images. ``cosine``: the rate falls to nothing at the end; ``warmup``: steps in which
    it rises. ``flip``: mirror half of the images. ``decay``: of the averaged weights, with which training ends."""

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    decay: float = 0.9999
    warmup: int = 0
    cosine: bool = False
    flip: bool = False
    report_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; expected 0 or more and below 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min((step + 1) / (self.warmup + 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0
        return self.learning_rate * rise * fall


@dataclass
class History:
    """The mean loss of every ``report_every`` steps, of the model in training and, if given, of held-out images.
    ``interrupted``: by Ctrl-C."""

    rows: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False


def batches(
    images: Tensor, labels: Tensor | None, settings: Settings, first: int = 0
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless batches from number ``first`` on, every image once an epoch, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(images))
    number = 0
    while True:
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            turned = torch.rand(size, generator=generator) < 0.5 if settings.flip else None
            if number >= first:
                batch = images[rows]
                if turned is not None:
                    batch = torch.where(turned[:, None, None, None], batch.flip(-1), batch)
                yield batch, None if labels is None else labels[rows]
            number += 1


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    settings: Settings,
    *,
    held_out: tuple[Tensor, Tensor | None] | None = None,
    on_report: Callable[[dict[str, float]], None] | None = None,
    run: Run | None = None,
) -> History:
    """Train ``model`` in place; it ends with the averaged weights, in evaluation mode.

    images: (count, C, R, R) in [-1, 1] (or latents, scaled); labels: (count,) or None. held_out: images and labels
    whose loss is measured at each report. KeyboardInterrupt ends training early and keeps the average so far. run:
    keeps it, and goes on with what it holds.
    """
    if len(images) == 0 or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images and {None if labels is None else len(labels)} labels; expected as many")
    torch.manual_seed(settings.seed)
    device = device_of(model)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    run = run or Run()
    kept = run.start(model=model, optimizer=optimizer, average=average)
    history, losses, began = History(kept.get("rows", [])), kept.get("losses", []), time.perf_counter()
    model.train()
    try:
        for step, (batch, wanted) in enumerate(batches(images, labels, settings, run.begun), start=run.begun):
            if step == settings.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            value = flow.loss(model, batch.to(device), None if wanted is None else wanted.to(device)).mean()
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(learned, settings.clip)
            optimizer.step()
            _follow(average, model, min(settings.decay, (step + 1) / (step + 10)))
            losses.append(float(value.detach()))
            if (step + 1) % settings.report_every == 0 or step + 1 == settings.steps:
                row = {"step": step + 1, "loss": sum(losses) / len(losses)}
                if held_out is not None:
                    row["held_out"] = held_out_loss(average, *held_out)
                row["seconds"] = time.perf_counter() - began
                history.rows.append(row)
                losses = []
                if on_report is not None:
                    on_report(row)
            run.keep(step + 1, rows=history.rows, losses=losses)
    except KeyboardInterrupt:
        if not history.rows and not losses:
            raise
        history.interrupted = True
    model.load_state_dict(average.state_dict())
    model.eval()
    return history


def to_model_space(images: Tensor, encoder: Any = None) -> Tensor:
    """Images as the model learns them: themselves, or their latents by ``encoder.encode``."""
    return images if encoder is None else torch.cat([encoder.encode(one) for one in images.split(8)])


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        if new.requires_grad:
            kept.lerp_(new, 1 - decay)


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor, labels: Tensor | None, *, batch_size: int = 256) -> float:
    """The flow-matching loss of images that were not trained on, at evenly spread times and fixed noise."""
    device, found = device_of(model), []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    t = (torch.arange(len(images)) * 0.6180339887 + 0.5) % 1  # evenly spread, in no order of the images
    for rows in torch.arange(len(images)).split(batch_size):
        wanted = None if labels is None else labels[rows].to(device)
        each = flow.loss(model, images[rows].to(device), wanted, noise=noise[rows].to(device), t=t[rows].to(device))
        found.append(each.cpu())
    return float(torch.cat(found).mean())
