"""Training models of interleaved documents: AdamW with a warm-up and a cosine, one loss over all modalities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.runs import Run

from .mixture_lm import MixtureLM, losses
from .transfusion import TransfusionMamba

#: What the diffusion loss counts beside the text's (arXiv 2408.11039).
IMAGE_WEIGHT = 5.0


@dataclass
class Settings:
    steps: int = 1000
    batch_size: int = 32
    rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (batch, longest), padded by zeros, and lengths (batch,)."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def optimise(
    model: nn.Module, loss: Callable[[np.random.Generator], Tensor], settings: Settings,
    report: Callable[[int, float], None] | None = None, run: Run | None = None, **parts: Any,
) -> list[float]:  # fmt: skip
    """``settings.steps`` of AdamW on ``loss(random numbers)``. Raises ValueError when a loss is not finite.

    ``run``: keeps it, and goes on with what it holds; ``parts``: what else the loss has a state in (see
    :meth:`zoo.runs.Run.start`).
    """
    r = np.random.default_rng(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    rising = max(1, settings.warmup)
    left = max(1, settings.steps - rising)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(i - rising, 0) / left)))
    )
    model.train()
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, schedule=schedule, random=r, **parts)
    found: list[float] = began.get("losses", [])
    for step in range(len(found), settings.steps):
        value = loss(r)
        found.append(float(value.detach()))
        if not math.isfinite(found[-1]):
            raise ValueError(f"the loss is {found[-1]} at step {step}; a lower rate may help")
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, found[-1])
        run.keep(step + 1, losses=found)
    model.eval()
    return found


def fit(
    model: MixtureLM, rows: Sequence[Sequence[int]], settings: Settings,
    report: Callable[[int, float], None] | None = None, run: Run | None = None,
) -> list[float]:  # fmt: skip
    """Train on documents' ids, each of two or more, in place; returns the loss (nats a token) of every step."""
    check_rows(model, rows)
    device = next(model.parameters()).device

    def loss(r: np.random.Generator) -> Tensor:
        ids, lengths = padded([rows[i] for i in r.integers(0, len(rows), settings.batch_size)])
        total, count = losses(model, ids.to(device), lengths.to(device))
        return total.sum() / count.sum()

    return optimise(model, loss, settings, report, run)


def fit_transfusion(
    model: TransfusionMamba, input_ids: Tensor, latents: Tensor, lengths: Tensor, settings: Settings,
    report: Callable[[int, float], None] | None = None, run: Run | None = None,
) -> list[float]:  # fmt: skip
    """Train on (documents, length) ids and clean latents (documents, length, latent_dim), in place: text + 5 image."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)

    def loss(r: np.random.Generator) -> Tensor:
        own = torch.from_numpy(r.integers(0, len(input_ids), settings.batch_size))
        batch = (input_ids[own].to(device), latents[own].to(device), lengths[own].to(device))
        found = model.losses(*batch, generator=generator)
        return found["text"] + IMAGE_WEIGHT * found["image"]

    return optimise(model, loss, settings, report, run, noise=generator)


def check_rows(model: MixtureLM, rows: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for documents of fewer than two ids and for ids outside the vocabulary."""
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"document {i} has {len(row)} tokens; expected two or more")
        if not 0 <= min(row) <= max(row) < model.vocab_size:
            raise ValueError(
                f"document {i} has ids from {min(row)} to {max(row)}; expected 0 to {model.vocab_size - 1}"
            )


@torch.no_grad()
def bits(model: MixtureLM, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[float | None]:
    """Bits a token of each modality, in evaluation mode; None where there is none."""
    check_rows(model, rows)
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(len(model.vocab_sizes), dtype=torch.float64)
    count = torch.zeros_like(total)
    for i in range(0, len(rows), batch_size):
        ids, lengths = padded(rows[i : i + batch_size])
        own, many = losses(model, ids.to(device), lengths.to(device))
        total += own.double().cpu()
        count += many.cpu()
    return [float(t / n / math.log(2)) if n else None for t, n in zip(total, count, strict=True)]
