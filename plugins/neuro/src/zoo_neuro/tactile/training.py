"""Training as the authors do it: with labels, or without by SimCLR, SimSiam or an autoencoder.

Source: neuroagents-lab/2025-tactile-whisking ``hydra_configs/train/train.yaml``, ``model.py``; arXiv 2505.18361.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .augmentation import TouchAugmentation
from .losses import AutoEncoderLoss, SimCLRLoss, SimSiamLoss
from .model import TactileNetwork
from .recordings import Recordings

OPTIMISERS = ("sgd", "adamw")
OBJECTIVES = ("simclr", "simsiam", "autoencoder")


@dataclass(frozen=True)
class Epoch:
    number: int
    loss: float
    accuracy: float | None = None  #: on the validation recordings


@dataclass(frozen=True)
class Settings:
    """The authors': SGD of momentum 0.9, rate 1e-3, decay 5e-4, a tenth of the rate every 30 of 100 epochs, 256 a
    batch. ``schedule``: "step" or "cosine". Raises ValueError for another name."""

    epochs: int = 100
    batch_size: int = 256
    rate: float = 1e-3
    weight_decay: float = 5e-4
    optimiser: str = "sgd"
    schedule: str = "step"
    step_size: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS or self.schedule not in ("step", "cosine"):
            raise ValueError(
                f"optimiser is {self.optimiser!r} and schedule {self.schedule!r}; expected one of "
                f"{', '.join(OPTIMISERS)}, and step or cosine"
            )

    def optimisation(self, parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        options = {"lr": self.rate, "weight_decay": self.weight_decay}
        optimiser: torch.optim.Optimizer
        if self.optimiser == "sgd":
            optimiser = torch.optim.SGD(parameters, momentum=0.9, **options)  # type: ignore[arg-type]
        else:
            optimiser = torch.optim.AdamW(parameters, **options)  # type: ignore[arg-type]
        if self.schedule == "cosine":
            return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        return optimiser, torch.optim.lr_scheduler.StepLR(optimiser, self.step_size)


def batches(count: int, size: int, generator: torch.Generator, least: int = 1) -> Iterator[Tensor]:
    """Indices of an epoch in a random order; a last batch of fewer than ``least`` is left out."""
    for part in torch.randperm(count, generator=generator).split(size):
        if len(part) >= least:
            yield part


@torch.inference_mode()
def predict(model: nn.Module, frames: Tensor, batch_size: int = 64) -> Tensor:
    """Logits (n, classes) of frames (n, time, ...), on the CPU, in float32."""
    like = next(model.parameters())
    was = model.training
    model.eval()
    found = [model(part.to(like.device, like.dtype)).float().cpu() for part in frames.split(batch_size)]
    model.train(was)
    return torch.cat(found)


def accuracy(model: nn.Module, recordings: Recordings, top: int = 1) -> float:
    """The share of recordings whose category is among the ``top`` likeliest."""
    best = predict(model, recordings.frames).topk(top, dim=1).indices
    return float((best == recordings.labels[:, None]).any(1).float().mean())


def train(
    model: TactileNetwork,
    recordings: Recordings,
    valid: Recordings | None = None,
    settings: Settings | None = None,
    *,
    view: Callable[[Tensor], Tensor] | None = None,
    report: Callable[[Epoch], None] | None = None,
    run: Run | None = None,
) -> list[Epoch]:
    """Cross entropy of the categories; ends with the weights of the best validation accuracy, if there is a set.

    view: what a batch of frames becomes before it is read (a :class:`TouchAugmentation`, or symmetries of the data).
    run: keeps it epoch by epoch, and goes on with what it holds. Raises ValueError where the data have other categories
    than the model has outputs.
    """
    settings = settings or Settings()
    if len(recordings.classes) != model.num_classes:
        raise ValueError(f"the data have {len(recordings.classes)} categories, the model {model.num_classes}")
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser, schedule = settings.optimisation([p for p in model.parameters() if p.requires_grad])
    device = next(model.parameters()).device
    run = run or Run()
    own = {"view": view.generator} if isinstance(view, TouchAugmentation) and view.generator is not None else {}
    began = run.start(model=model, optimiser=optimiser, schedule=schedule, random=generator, **own)
    history = [Epoch(**row) for row in began.get("epochs", [])]
    best: tuple[float, dict[str, Tensor]] | None = began.get("best")
    for number in range(len(history) + 1, settings.epochs + 1):
        model.train()
        total, seen = 0.0, 0
        for which in batches(len(recordings), settings.batch_size, generator, least=2):
            x = recordings.frames[which].to(device)
            loss = F.cross_entropy(model(x if view is None else view(x)), recordings.labels[which].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            total, seen = total + loss.item() * len(which), seen + len(which)
        schedule.step()
        found = None if valid is None else accuracy(model, valid)
        history.append(Epoch(number, total / max(seen, 1), found))
        if found is not None and (best is None or found >= best[0]):
            best = (found, {k: v.clone() for k, v in model.state_dict().items()})
        if report:
            report(history[-1])
        run.keep(number, best=best, epochs=[asdict(epoch) for epoch in history])
    if best is not None:
        model.load_state_dict(best[1])
    model.eval()
    return history


def make_loss(objective: str, model: TactileNetwork, **options: Any) -> nn.Module:
    """The loss of an objective, for a model without a head. Raises ValueError for another name."""
    if objective == "simclr":
        return SimCLRLoss(model.num_features, **options)
    if objective == "simsiam":
        return SimSiamLoss(model.num_features, **options)
    if objective == "autoencoder":
        channels, rows, columns = model.input_shape
        return AutoEncoderLoss(model.num_features, channels, rows, columns, **options)
    raise ValueError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")


def objective_loss(
    objective: str, loss: nn.Module, model: TactileNetwork, x: Tensor, view: Callable[[Tensor], Tensor]
) -> Tensor:
    """The loss of one batch of frames, with two views of it, or rebuilt from a view."""
    if objective == "simclr":
        pair = torch.stack([model(view(x)), model(view(x))], 1)
        return loss(pair.flatten(0, 1))  # type: ignore[no-any-return]
    if objective == "simsiam":
        return loss(model(view(x)), model(view(x)))  # type: ignore[no-any-return]
    x = view(x)
    return loss(model.features(x), model.scaled(x))  # type: ignore[no-any-return]


def pretrain(
    model: TactileNetwork,
    frames: Tensor,
    objective: str = "simclr",
    settings: Settings | None = None,
    *,
    temporal: bool = True,
    report: Callable[[Epoch], None] | None = None,
    run: Run | None = None,
    **options: Any,
) -> list[Epoch]:
    """Train a model without a head (``num_classes=0``) on frames without labels.

    temporal: reversed time is a view, too. run: as for :func:`train`. options: further arguments of the loss.
    Raises ValueError for a model with a head, which no gradient would reach.
    """
    settings = settings or Settings()
    if model.num_classes or len(model.decoder.mlp):
        raise ValueError(
            "the model has linear layers behind its features; expected num_classes=0 and no decoder widths"
        )
    loss = make_loss(objective, model, **options).to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(settings.seed)
    view = TouchAugmentation(temporal, generator)
    optimiser, schedule = settings.optimisation([*model.parameters(), *loss.parameters()])
    device = next(model.parameters()).device
    run = run or Run()
    began = run.start(model=model, loss=loss, optimiser=optimiser, schedule=schedule, random=generator)
    history = [Epoch(**row) for row in began.get("epochs", [])]
    for number in range(len(history) + 1, settings.epochs + 1):
        model.train()
        loss.train()
        total, seen = 0.0, 0
        for which in batches(len(frames), settings.batch_size, generator, least=2):
            value = objective_loss(objective, loss, model, frames[which].to(device), view)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            total, seen = total + value.item() * len(which), seen + len(which)
        schedule.step()
        history.append(Epoch(number, total / max(seen, 1)))
        if report:
            report(history[-1])
        run.keep(number, epochs=[asdict(epoch) for epoch in history])
    model.eval()
    return history


def start_from(model: TactileNetwork, source: TactileNetwork) -> list[str]:
    """Take over a pre-trained encoder and attender; returns the names. Raises ValueError for another form."""
    state = {k: v for k, v in source.state_dict().items() if k.startswith(("encoder.", "attender."))}
    own = model.state_dict()
    wrong = sorted(k for k in {*state, *(k for k in own if k.startswith(("encoder.", "attender.")))}
                   if k not in state or k not in own or own[k].shape != state[k].shape)  # fmt: skip
    if wrong:
        raise ValueError(f"the pre-trained network has another form: {wrong[0]} and {len(wrong) - 1} more differ")
    model.load_state_dict(state, strict=False)
    return sorted(state)
