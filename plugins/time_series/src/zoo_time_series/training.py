"""Training a forecaster under the Informer protocol, with SpaceTime's settings."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zoo import errors
from zoo.runs import Run, seeded

from ._base import Forecaster
from .baselines import last_value, seasonal_naive
from .protocol import Windows
from .spacetime import SpaceTime


@dataclass(frozen=True)
class Settings:
    """SpaceTime's training commands: AdamW, early stopping on the validation error of the forecast."""

    epochs: int = 500
    batch_size: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    patience: int = 20  #: epochs without a better validation error before the run ends
    steps: int | None = None  #: batches of an epoch, None: all windows
    #: epochs in which SpaceTime's open-loop terms count too. 1 is what the original does (its first validation switches
    #: them off for good); None: always, as the paper's loss reads.
    open_loop_epochs: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise errors.BadArgument(f"{name} is {value}; expected at least 1", argument=name, accepted=[])
        for name, least in (("learning_rate", "more than 0"), ("weight_decay", "0 or more")):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name == "learning_rate"):
                raise errors.BadArgument(f"{name} is {value}; expected {least}", argument=name, accepted=[])


@dataclass
class History:
    """One row an epoch; ``best_epoch`` is counted from 1. ``interrupted``: by Ctrl-C."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    interrupted: bool = False


class Errors:
    """Sums of squared and absolute errors, for means over everything that was added."""

    def __init__(self) -> None:
        self.squares, self.absolute, self.count = 0.0, 0.0, 0

    def add(self, found: Tensor, expected: Tensor) -> None:
        gap = (found - expected).double()
        self.squares += float(gap.square().sum())
        self.absolute += float(gap.abs().sum())
        self.count += gap.numel()

    def result(self) -> dict[str, float]:
        mse = self.squares / max(self.count, 1)
        return {"mse": mse, "mae": self.absolute / max(self.count, 1), "rmse": math.sqrt(mse)}


def evaluate(model: Forecaster, windows: Windows, batch_size: int = 200) -> dict[str, float]:
    """MSE, MAE and RMSE over every step of every window, on the standardised scale."""
    was_training, gaps = model.training, Errors()
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for series, target in windows.batches(batch_size):
            made = model(series.to(device), **({"horizon": windows.horizon} if model.any_horizon else {}))
            gaps.add(made.float().cpu(), target)
    model.train(was_training)
    return gaps.result()


def baselines(windows: Windows, batch_size: int = 200) -> dict[str, dict[str, float]]:
    """The same errors of the last value and of the last season (its period found in each window)."""
    found = {"last value": Errors(), "last season": Errors()}
    for series, target in windows.batches(batch_size):
        found["last value"].add(last_value(series, windows.horizon), target)
        found["last season"].add(seasonal_naive(series, windows.horizon), target)
    return {name: gaps.result() for name, gaps in found.items()}


def fit(
    model: Forecaster,
    train: Windows,
    val: Windows,
    settings: Settings = Settings(),
    *,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    run: Run | None = None,
) -> History:
    """Train until the validation RMSE stops falling; ``model`` ends in eval mode with the best epoch's weights.

    An interruption (KeyboardInterrupt) ends the run with the best epoch so far, if there is one. ``run``: keeps it, and
    goes on with what it holds. Raises FloatingPointError when the loss is not a number. Random numbers of the caller's
    are left as they are.
    """
    device = next(model.parameters()).device
    with seeded(settings.seed, device):
        return _fit(model, train, val, settings, device, on_epoch, on_batch, run or Run())


def _fit(
    model: Forecaster,
    train: Windows,
    val: Windows,
    settings: Settings,
    device: torch.device,
    on_epoch: Callable[[dict[str, float]], None] | None,
    on_batch: Callable[[int, int], None] | None,
    run: Run,
) -> History:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    kept = run.start(model=model, optimizer=optimizer)
    history = History(kept.get("epochs", []), kept.get("best_epoch", 0))
    best = kept.get("best") or copy.deepcopy(model.state_dict())
    try:
        while len(history.epochs) < settings.epochs and len(history.epochs) - history.best_epoch < settings.patience:
            epoch = len(history.epochs) + 1
            began = time.perf_counter()
            loss = _epoch(model, optimizer, train, settings, epoch, device, on_batch)
            row = {"epoch": epoch, "loss": loss, "seconds": time.perf_counter() - began}
            row |= {f"val_{name}": value for name, value in evaluate(model, val).items()}
            history.epochs.append(row)
            if history.best_epoch == 0 or row["val_rmse"] < history.epochs[history.best_epoch - 1]["val_rmse"]:
                history.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
            if on_epoch is not None:
                on_epoch(row)
            run.keep(epoch, epochs=history.epochs, best_epoch=history.best_epoch, best=best)
    except KeyboardInterrupt:
        if not history.best_epoch:
            raise
        history.interrupted = True
    model.load_state_dict(best)
    model.eval()
    return history


def _epoch(
    model: Forecaster,
    optimizer: torch.optim.Optimizer,
    train: Windows,
    settings: Settings,
    epoch: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] | None,
) -> float:
    """One pass over the training windows; the mean of the batches' losses."""
    model.train()
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    opened = settings.open_loop_epochs is None or epoch <= settings.open_loop_epochs
    batches = math.ceil(len(train) / settings.batch_size)
    batches = batches if settings.steps is None else min(batches, settings.steps)
    total = 0.0
    for done, (series, target) in enumerate(train.batches(settings.batch_size, generator), start=1):
        series, target = series.to(device), target.to(device)
        if isinstance(model, SpaceTime):
            loss = model.loss(series, target, (1.0, 1.0, 1.0) if opened else (1.0, 0.0, 0.0))
        else:
            loss = model.loss(series, target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in epoch {epoch}; lower the learning rate, or look for extreme values in the data"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += value
        if on_batch is not None:
            on_batch(done, batches)
        if done == batches:
            break
    return total / batches


def plot(history: History, path: str | Path) -> Path:
    """The learning curve as a picture: training loss and validation RMSE by epoch, the best one marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history.epochs]
    axes.plot(epochs, [row["loss"] for row in history.epochs], color="tab:blue", label="training loss")
    axes.plot(epochs, [row["val_rmse"] for row in history.epochs], color="tab:orange", label="validation RMSE")
    axes.axvline(history.best_epoch, color="grey", linestyle=":", label=f"best: epoch {history.best_epoch}")
    axes.set(xlabel="epoch", ylabel="standardised scale")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(framealpha=0.8, edgecolor="none")
    figure.savefig(path, dpi=120)
    return Path(path)
