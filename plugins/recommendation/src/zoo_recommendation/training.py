"""Training and evaluation under RecBole's protocol: early stopping, checkpoints that resume bit by bit.

A run is a folder::

    last.safetensors      weights, optimiser, random state and history after the last finished epoch
    best.safetensors      weights of the best validation epoch
    history.json          the history once more, to read: settings, one row an epoch, the best epoch

Every file is written beside its name and moved into place, and ``last.safetensors`` alone decides where a run stands:
one that is killed at any moment goes on from the last finished epoch and gives what it would have given.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.runs import seeded
from zoo_kernels import runtime
from zoo_registry import errors

from ._base import SequentialRecommender
from .protocol import Ranking, Samples, at_once

#: Rows (items of all sequences together) that go through a network at once in training on a CPU: few enough for the
#: caches, enough for the calls to cost little; 3000 to 6400 are within 3 % of each other.
ROWS = 4800


@dataclass(frozen=True)
class Settings:
    """RecBole's training settings, under its defaults for these models."""

    epochs: int = 300
    batch_size: int = 2048
    learning_rate: float = 1e-3
    patience: int = 10  #: epochs without a better validation score before the run ends
    metric: str = "ndcg@10"  #: chosen on the validation samples
    topk: tuple[int, ...] = (10, 20)
    eval_batch_size: int = 4096
    seed: int = 2020

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number that is not negative")


@dataclass
class History:
    """What a run has done so far."""

    settings: dict[str, Any]
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0  #: counted from 1
    finished: bool = False

    @property
    def best(self) -> dict[str, float]:
        return self.epochs[self.best_epoch - 1]


@torch.no_grad()
def evaluate(
    model: SequentialRecommender, samples: Samples, topk: tuple[int, ...] = (10, 20), batch_size: int = 4096
) -> dict[str, float]:
    """Full ranking of every sample: {"hit@10": ..., "ndcg@10": ..., "mrr@10": ..., ...}, means over samples.

    ``batch_size``: samples at a time at most; over large catalogues fewer, so that memory does not grow with them.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ranking = Ranking(topk)
    for batch in samples.batches(at_once(batch_size, model.n_items)):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        scores = model.scores(model(batch["item_seq"], batch["item_seq_len"], batch["times"]))
        ranking.add(scores, batch["target"])
    model.train(was_training)
    return ranking.result()


def train_epoch(
    model: SequentialRecommender,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    batch_size: int,
    generator: torch.Generator | None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """One pass over the samples, shuffled by ``generator`` (None: in their order); returns the sum of the batch losses,
    as RecBole prints it."""
    model.train()
    device = next(model.parameters()).device
    total, done = 0.0, 0
    for batch in samples.batches(batch_size, generator):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if model.loss_type == "BPR":
            batch["negative"] = torch.randint(1, model.n_items, batch["target"].shape, generator=generator).to(device)
        total += train_step(model, optimizer, batch)
        done += len(batch["target"])
        if progress is not None:
            progress(done, len(samples))
    return total


def train_step(model: SequentialRecommender, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> float:
    """One step down the mean loss of a batch (of :meth:`Samples.batch`, with BPR also ``negative``); returns the loss.

    On a CPU the batch goes through the network some sequences at a time and the gradients add up: what lies between the
    layers then stays in cache. The step is that of the whole batch, to rounding.
    """
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, len(batch["target"])
    for piece in _pieces(batch):
        user = model(piece["item_seq"], piece["item_seq_len"], piece["times"])
        loss = model.loss(user, piece["target"], piece.get("negative")) * (len(piece["target"]) / count)
        value = float(loss.detach())
        if value != value:
            raise FloatingPointError(
                "the loss is not a number; lower the learning rate, or look for extreme timestamps in the data"
            )
        loss.backward()
        total += value
    optimizer.step()
    return total


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what a training step frees for the next one: a tenth of a small model's step.

    It hands memory back to the system beyond twice the largest block that it has seen freed (up to 32 MB), and taking
    it anew costs a page fault every 4 kB. So one such block is made, untouched, and freed. No effect elsewhere.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _pieces(batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The batch in pieces of equal size, of about :data:`ROWS` rows; whole off the CPU and under a forced reference."""
    count, length = batch["item_seq"].shape
    if batch["item_seq"].device.type != "cpu" or runtime.forced_backend() not in ("", "native"):
        yield batch
        return
    size = math.ceil(count / math.ceil(count * length / ROWS))
    for first in range(0, count, size):
        yield {name: tensor[first : first + size] for name, tensor in batch.items()}


def fit(
    model: SequentialRecommender,
    train: Samples,
    valid: Samples,
    folder: str | Path,
    settings: Settings = Settings(),
    *,
    progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train until the validation score stops rising; ``model`` ends with the best epoch's weights.

    ``folder`` keeps the run (see the module's text); a run found there goes on. ``progress(done, all)`` is called
    after each batch, ``on_epoch(row)`` after each epoch. The caller's random state stays as it was. Raises BadArgument
    (a ValueError) when the folder holds a run with other settings, another model or other training samples.
    """
    if not len(train):
        raise ValueError("no training samples: every user needs at least two interactions after the filter")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with seeded(settings.seed, next(model.parameters()).device):
        return _fit(model, train, valid, folder, settings, progress, on_epoch)


def _fit(
    model: SequentialRecommender,
    train: Samples,
    valid: Samples,
    folder: Path,
    settings: Settings,
    progress: Callable[[int, int], None] | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> History:
    keep_freed_memory()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    history = _resume(folder, model, optimizer, settings, train)
    while not history.finished and len(history.epochs) < settings.epochs:
        epoch = len(history.epochs) + 1
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
        started = time.perf_counter()
        loss = train_epoch(model, optimizer, train, settings.batch_size, generator, progress)
        seconds = time.perf_counter() - started
        scores = evaluate(model, valid, settings.topk, settings.eval_batch_size)
        row = {"epoch": epoch, "loss": loss, "seconds": seconds, **scores}
        history.epochs.append(row)
        if epoch == 1 or row[settings.metric] > history.best[settings.metric]:
            history.best_epoch = epoch
            _write(folder / "best.safetensors", {k: v.contiguous() for k, v in model.state_dict().items()})
        history.finished = epoch - history.best_epoch >= settings.patience or epoch >= settings.epochs
        text = json.dumps(asdict(history), indent=1)
        _write(folder / "last.safetensors", _pack(model, optimizer), {"history": text})
        _write_text(folder / "history.json", text)
        if on_epoch is not None:
            on_epoch(row)
    model.load_state_dict(load_file(folder / "best.safetensors"))
    model.eval()
    return history


def _resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, train: Samples
) -> History:
    """The run in ``folder``, model and optimiser brought to its last finished epoch; a new one if there is none."""
    facts = {"model": _fingerprint(model), "arguments": _arguments(model), "data": train.checksum()}
    wanted = json.loads(json.dumps(asdict(settings) | facts))
    path = folder / "last.safetensors"
    if not path.exists():
        return History(settings=wanted)
    with safe_open(path, framework="pt") as file:
        stored = History(**json.loads(file.metadata()["history"]))
    compared = stored.settings.keys() & wanted.keys() - {"epochs", "patience", "arguments"}
    changed = [k for k in sorted(compared) if stored.settings[k] != wanted[k]]
    if not changed:  # else these would be named twice
        before = stored.settings.get("arguments", wanted["arguments"])
        changed = [k for k, value in wanted["arguments"].items() if before.get(k) != value]
    if changed:
        raise errors.BadArgument(
            f"{folder} holds a run with other settings ({', '.join(changed)}); "
            "continue it with its own settings and data, or train into an empty folder",
            argument=changed[0],
            accepted=[],
        )
    state = load_file(path)
    _unpack(state, model, optimizer)
    stored.settings = wanted
    stored.finished = len(stored.epochs) - stored.best_epoch >= settings.patience
    return stored


def _fingerprint(model: nn.Module) -> str:
    """The class and the shapes of its weights."""
    return f"{type(model).__name__} " + ", ".join(f"{k}{list(v.shape)}" for k, v in model.state_dict().items())


def _arguments(model: nn.Module) -> dict[str, Any]:
    """What shapes do not tell of a model: how it was built, its dropout and its loss."""
    info = getattr(model, "zoo_info", None)
    built = getattr(model, "built_from", None) or ({} if info is None else info.config)
    dropout = sorted({module.p for module in model.modules() if isinstance(module, nn.Dropout)})
    return {**built, "dropout": dropout, "loss_type": getattr(model, "loss_type", None)}


def _pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, Adam's moments and torch's random state as one flat dictionary of tensors."""
    flat = {f"model/{k}": v.contiguous() for k, v in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        flat |= {f"optimizer/{index}/{k}": torch.as_tensor(v).contiguous() for k, v in moments.items()}
    flat["random"] = torch.get_rng_state()
    return flat


def _unpack(flat: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({k.removeprefix("model/"): v for k, v in flat.items() if k.startswith("model/")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(flat["random"])


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write beside, then move into place: the file is whole or it is the old one."""
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plot(history: History, path: str | Path) -> Path:
    """The learning curve as a picture: training loss and the validation metrics by epoch, the best one marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history.epochs]
    left.plot(epochs, [row["loss"] for row in history.epochs], color="tab:blue")
    left.set(xlabel="epoch", ylabel="sum of batch losses", title="training")
    for name in [k for k in history.epochs[0] if "@10" in k]:
        right.plot(epochs, [row[name] for row in history.epochs], label=name)
    right.axvline(history.best_epoch, color="grey", linestyle=":", label=f"best: epoch {history.best_epoch}")
    right.set(xlabel="epoch", title="validation, full ranking", ylim=(0, None))
    right.legend(framealpha=0.8, edgecolor="none")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    path = Path(path)
    figure.savefig(path, dpi=120)
    return path
