"""Training and measuring Broad Mamba: weighted F1, epochs over whole dialogues, a head by ridge regression."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.runs import Run

from .broad_mamba import BroadMamba, emotion_loss
from .dialogues import Dialogue, join


@dataclass
class Settings:
    epochs: int = 30
    batch_size: int = 16
    rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    modality_weight: float = 1.0
    seed: int = 0


class Epoch(NamedTuple):
    """One epoch's figures; ``weighted_f1`` on the validation dialogues."""

    number: int
    loss: float
    weighted_f1: float


class Scores(NamedTuple):
    accuracy: float
    weighted_f1: float
    f1: list[float]  #: of each class; 0 where it neither occurs nor is predicted
    support: list[int]  #: utterances of each class


def scores(predicted: Tensor, true: Tensor, classes: int) -> Scores:
    """Accuracy, F1 of each class, and their mean weighted by how often each class occurs, as the benchmarks report it.

    predicted, true: (utterances,) class numbers. Raises ValueError where there are none.
    """
    if not len(true):
        raise ValueError("there is no utterance with a label to measure on")
    table = torch.zeros(classes, classes, dtype=torch.double)
    table.index_put_((true, predicted), torch.ones(len(true), dtype=torch.double), accumulate=True)
    hit, occurs, said = table.diagonal(), table.sum(1), table.sum(0)
    f1 = 2 * hit / (occurs + said).clamp(min=1)
    return Scores(
        float(hit.sum() / len(true)), float((f1 * occurs).sum() / len(true)), f1.tolist(), occurs.long().tolist()
    )


def fit(
    model: BroadMamba, train: Sequence[Dialogue], valid: Sequence[Dialogue], settings: Settings,
    report: Callable[[Epoch], None] | None = None, run: Run | None = None,
) -> list[Epoch]:  # fmt: skip
    """Train in place with AdamW and a cosine, and leave the model at its best epoch by weighted F1 on ``valid``.

    ``run``: keeps it epoch by epoch, and goes on with what it holds. Raises ValueError for dialogues without labels and
    when a loss is not finite.
    """
    for d in [*train, *valid]:
        if d.labels is None:
            raise ValueError(f"{d.name} has no labels; every dialogue needs one for each utterance")
    device = next(model.parameters()).device
    r = np.random.default_rng(settings.seed)
    a_pass = -(-len(train) // settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * a_pass
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, schedule=schedule, random=r)
    best, kept = began.get("best", -math.inf), began.get("kept") or copy.deepcopy(model.state_dict())
    found = [Epoch(*row) for row in began.get("epochs", [])]
    for number in range(len(found), settings.epochs):
        model.train()
        order, total = r.permutation(len(train)), 0.0
        for i in range(a_pass):
            own = order[i * settings.batch_size : (i + 1) * settings.batch_size]
            batch = join([train[j] for j in own], model).to(device)
            loss = emotion_loss(model(**batch.inputs, labels=batch.labels), batch.labels, settings.modality_weight)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss is {float(loss.detach())} in epoch {number}; a lower rate may help")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        found.append(Epoch(number, total / a_pass, measure(model, valid).weighted_f1))
        if found[-1].weighted_f1 > best:
            best, kept = found[-1].weighted_f1, copy.deepcopy(model.state_dict())
        if report is not None:
            report(found[-1])
        run.keep(number + 1, best=best, kept=kept, epochs=found)
    model.load_state_dict(kept)
    model.eval()
    return found


@torch.no_grad()
def measure(model: BroadMamba, dialogues: Sequence[Dialogue], batch_size: int = 32) -> Scores:
    """Scores over all labelled utterances, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    predicted, true = [], []
    for i in range(0, len(dialogues), batch_size):
        batch = join(dialogues[i : i + batch_size], model).to(device)
        known = batch.labels >= 0
        predicted.append(model(**batch.inputs)["logits"].argmax(-1)[known].cpu())
        true.append(batch.labels[known].cpu())
    return scores(torch.cat(predicted), torch.cat(true), len(model.classes))


@torch.no_grad()
def solve_head(model: BroadMamba, dialogues: Sequence[Dialogue], penalty: float, batch_size: int = 32) -> None:
    """Solve a broad head by ridge regression on all labelled utterances; everything before it stays as it is."""
    model.eval()
    device = next(model.parameters()).device
    fused, labels = [], []
    for i in range(0, len(dialogues), batch_size):
        batch = join(dialogues[i : i + batch_size], model).to(device)
        given = dict(batch.inputs)
        sides = (given.pop("lengths"), given.pop("speaker", None), given.pop("present"))
        parts = model.parts(given, *sides, None)
        known = batch.labels >= 0
        fused.append(parts["fused"][known])
        labels.append(batch.labels[known])
    model.solve_head(torch.cat(fused), torch.cat(labels), penalty)


def alone(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Every utterance as a dialogue of its own: what a model without context sees."""
    found = []
    for d in dialogues:
        for i in range(len(d)):
            own = slice(i, i + 1)
            features = {m: a[own] for m, a in d.features.items()}
            speakers, words, labels = (None if v is None else v[own] for v in (d.speakers, d.words, d.labels))
            found.append(Dialogue(features, speakers, words, labels, f"{d.name}, utterance {i + 1}"))
    return found
