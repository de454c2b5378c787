"""One training loop in plain torch, for the commands that train: AdamW, warm-up and half a cosine, averaged weights.

A batch is a function of its number and of nothing else. So a run that was interrupted goes on bit by bit, batches are
made ahead on a thread while the model computes, and processes that train together take their own without asking one
another::

    order = Shuffled(len(pictures), batch_size=16, seed=0)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        return collate(augmented(pictures[i], order.random(index)) for i in order(index))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    fit(model, batch, loss, Settings(steps=2000, rate=1e-3), run=run, report=report)

Several GPUs or processes: the same command under ``torchrun --nproc-per-node N -m -- zoo.cli ...``, in
:func:`processes`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import math
import os
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .nests import map_tensors
from .runs import Run, seeded

Batch = TypeVar("Batch")

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
#: Batches that are made while the model computes.
AHEAD = 2


@dataclass(frozen=True)
class Settings:
    """``steps`` of AdamW.

    rate: the learning rate after ``warmup`` steps (None: a twentieth of the steps), which falls along half a cosine to
    ``final`` of it. weight_decay: of matrices and kernels; vectors, and what the model names in ``no_weight_decay()``,
    have none. clip: largest norm of the gradient (0: any). accumulate: batches whose gradients make up one step.
    average: decay of the moving average of the weights, which is what is scored and kept (0: the weights themselves).
    precision: "bfloat16" computes under autocast. recompute: activations are computed again in the backward pass
    instead of kept (the model's ``set_grad_checkpointing``). seed: of dropout, dropped paths and other draws of the
    model and the loss.
    """

    steps: int = 1000
    rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int | None = None
    final: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    accumulate: int = 1
    average: float = 0.0
    precision: str = "float32"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.accumulate) < 1:
            raise ValueError(f"steps is {self.steps} and accumulate {self.accumulate}; expected 1 or more")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate is {self.rate}; expected a number above 0, as 1e-3")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; expected a decay from 0 (none) to below 1, as 0.999")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")

    def rate_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        if step < warmup:
            return self.rate * (step + 1) / warmup
        share = (step - warmup) / max(self.steps - warmup, 1)
        return self.rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share)))


class Shuffled:
    """The samples of each batch: all ``count`` once an epoch, in an order of its own that ``seed`` gives.

    Batches are always full: one may hold the last samples of an epoch and the first of the next.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError("there is no sample to train on")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.count, self.batch_size, self.seed = count, batch_size, seed % 2**63
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, index: int) -> list[int]:
        """Numbers of the samples in batch ``index``."""
        first = index * self.batch_size
        return [self._at(*divmod(place, self.count)) for place in range(first, first + self.batch_size)]

    def random(self, index: int) -> np.random.Generator:
        """Random numbers for the augmentation of batch ``index``."""
        return np.random.default_rng((self.seed, 1, index))

    def _at(self, epoch: int, place: int) -> int:
        if epoch not in self._orders:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.count)
            # A new dictionary and not a changed one: batches are made on several threads.
            self._orders = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders = {**self._orders, epoch: order}
        return int(self._orders[epoch][place])


def held_out(groups: Sequence[Hashable], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on and of those that are held out, both rising: ``share`` of each group, drawn by
    ``seed``, at least one of a group of two or more and never all of it; a share of 0 holds nothing out.

    groups: of every sample, as its class; all equal where there are none. Raises ValueError for a share that is not
    from 0 to below 1, and where nothing could be held out.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; expected one from 0 to below 1, as 0.2")
    if share == 0:
        return list(range(len(groups))), []
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    random = np.random.default_rng((seed % 2**63, 2))
    rest: set[int] = set()
    for numbers in members.values():
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        rest.update(random.permutation(numbers)[:count].tolist())
    if not rest:
        raise ValueError(
            f"of {len(groups)} samples none can be held out and its like stay to train on; give two or more of a kind"
        )
    return [n for n in range(len(groups)) if n not in rest], sorted(rest)


# -- processes that train together -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One of ``world`` processes that train together."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[Place]:
    """This process's place among those that torchrun started; alone where it did not.

    On "cuda" each process takes the GPU of its number. All but the first print nothing.
    """
    place = Place(torch.device(device), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if place.world == 1:
        yield place
        return
    gpu = place.device.type == "cuda"
    if gpu:
        place = Place(torch.device("cuda", int(os.environ["LOCAL_RANK"])), place.rank, place.world)
        torch.cuda.set_device(place.device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if not place.first:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield place
    finally:
        dist.destroy_process_group()


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _mean(value: Tensor) -> float:
    """The mean over all processes."""
    value = value.detach().double()
    _, world = _rank_and_world()
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


# -- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Fitted:
    """What :func:`fit` measured: the loss of every step, (finished steps, score) as often as it was taken, and the
    number of steps after which the weights that the model now has were taken."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    taken_at: int = 0


class _Objective(nn.Module):
    """The loss as a module's forward, which DistributedDataParallel needs."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def fit(
    model: nn.Module,
    batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    settings: Settings = Settings(),
    *,
    run: Run | None = None,
    report: Callable[[int, float], None] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    score_every: int | None = None,
) -> Fitted:
    """Train ``model`` in place, on the device where it is; it is in evaluation mode afterwards.

    batch(index): any nesting of dicts, lists and tuples of CPU tensors; called on a thread, ahead of its use.
    loss(model, batch): a scalar. report(step, loss): after every step, counted from 0. score(model): larger is better;
    taken in evaluation mode after every ``score_every`` steps (None: ten times in all) and after the last: the model
    ends with the weights that had the best one, the first of equals. run: keeps the state, and goes on with what it
    holds.

    Raises ValueError when a loss is not finite, and when ``recompute`` is asked of a model that cannot.
    """
    device = next(model.parameters()).device
    rank, world = _rank_and_world()
    run = run or Run()
    if settings.recompute:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"{type(model).__name__} cannot compute activations again; train it without recompute")
        model.set_grad_checkpointing(True)
    every = score_every or max(settings.steps // 10, 1)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.rate, betas=settings.betas, fused=_fused(model)
    )
    averaged = _Averaged(model, settings.average) if settings.average else None
    parts = {"model": model, "optimizer": optimizer} | ({} if averaged is None else {"averaged": averaged.model})
    kept = run.start(**parts)
    found = Fitted(
        list(kept.get("losses", [])), [(int(n), s) for n, s in kept.get("scores", [])], kept.get("taken_at", 0)
    )
    best: dict[str, Tensor] = dict(kept.get("best", {}))
    objective: nn.Module = _Objective(model, loss)
    if world > 1:
        # A batch without objects leaves a detector's mask head out, and a forward its experts: found out each time.
        objective = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    autocast = PRECISIONS[settings.precision]
    first = len(found.losses)
    numbers = (n * world + rank for n in range(first * settings.accumulate, settings.steps * settings.accumulate))
    trained = [p for p in model.parameters() if p.requires_grad]
    with contextlib.closing(_ahead(batch, numbers)) as batches:
        for step in range(first, settings.steps):
            model.train()  # a score leaves it in evaluation mode
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(step)
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for micro in range(settings.accumulate):
                last = micro + 1 == settings.accumulate
                unsynced = contextlib.nullcontext() if last or world == 1 else objective.no_sync()  # type: ignore[operator]
                given = map_tensors(lambda t: t.to(device, non_blocking=True), next(batches))
                with seeded(_seed(settings.seed, step, micro, rank), device), unsynced:
                    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                        value = objective(given) / settings.accumulate
                    value.backward()
                total += value.detach()
            found.losses.append(_mean(total))
            if not math.isfinite(found.losses[-1]):
                raise ValueError(
                    f"the loss is {found.losses[-1]} at step {step + 1}; try a smaller rate (now {settings.rate:g}) or "
                    "a longer warm-up, and look at the data"
                )
            if settings.clip:
                nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            if averaged is not None:
                averaged.follow(model, step)
            if report is not None:
                report(step, found.losses[-1])
            if score is not None and ((step + 1) % every == 0 or step + 1 == settings.steps):
                candidate = model if averaged is None else averaged.model
                value_now = _scored(score, candidate)
                if not found.scores or value_now > max(s for _, s in found.scores):
                    best, found.taken_at = _copied(candidate), step + 1
                found.scores.append((step + 1, value_now))
            run.keep(step + 1, losses=found.losses, scores=found.scores, best=best, taken_at=found.taken_at)
    if not found.scores:
        found.taken_at = settings.steps
        best = {} if averaged is None else averaged.model.state_dict()
    if best:
        model.load_state_dict(best)
    if settings.recompute:
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    model.eval()
    return found


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: decayed, and not (vectors, scalars, and names in the model's ``no_weight_decay()``).

    Parameters that do not require gradients are left out. Raises ValueError where none is left.
    """
    free = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1 and name not in free].append(parameter)
    if not any(groups.values()):
        raise ValueError(f"no parameter of {type(model).__name__} requires gradients; there is nothing to train")
    return [{"params": p, "weight_decay": weight_decay if decays else 0.0} for decays, p in groups.items() if p]


class _Averaged:
    """The moving average of a model's weights: fast in the beginning, when there is nothing worth keeping."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        new = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), new)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


def _ahead(batch: Callable[[int], Batch], numbers: Iterator[int]) -> Generator[Batch, None, None]:
    """The batches of ``numbers``, each made on a thread while those before it are used."""
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="batch") as pool:
        made: collections.deque[Future[Batch]] = collections.deque(
            pool.submit(batch, number) for number in itertools.islice(numbers, AHEAD)
        )
        try:
            while made:
                given = made.popleft().result()
                for number in itertools.islice(numbers, 1):
                    made.append(pool.submit(batch, number))
                yield given
        finally:
            for future in made:
                future.cancel()


def _fused(model: nn.Module) -> bool:
    """AdamW in one kernel, where torch has it."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())


def _seed(*numbers: int) -> int:
    state = np.random.SeedSequence([n % 2**63 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0])


def _scored(score: Callable[[nn.Module], float], model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(score(model))


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
