"""Training Decision Mamba on trajectories, with the paper's self-evolution, and measuring it in an environment.

Source: arXiv 2406.05427; aopolin-lv/DecisionMamba ``experiment.py``, ``training/seq_trainer.py``. Two differences that
matter: the released loss sets the self-evolution's weight to 0 (``evolution="released"`` does the same), and takes the
"past" prediction from the present network; ``evolution="paper"`` asks the network as it was one iteration ago.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .decision_mamba import DecisionMamba
from .trajectories import Trajectories

#: What fills the actions where a window has no step, in training.
PADDING_ACTION = -10.0


@dataclass(frozen=True)
class Settings:
    """The published run's."""

    iterations: int = 40
    steps: int = 2500  #: of gradient, in each iteration
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    warmup: int = 2500
    max_grad_norm: float = 0.25
    scale: float = 1000.0  #: returns are divided by it (reacher2d 10, kitchen 1)
    evolution: str | None = "paper"  #: "paper", "released" (weight 0) or None
    alpha: float = 0.85  #: the weight of the past policy's action grows to this over the iterations
    alpha_limit: float = 0.5  #: and no further than this
    state_weight: float = 0.05
    action_weight: float = 0.9
    return_weight: float = 0.05

    def __post_init__(self) -> None:
        if self.evolution not in ("paper", "released", None):
            raise ValueError(f"evolution is {self.evolution!r}; expected 'paper', 'released' or None")
        for name in ("iterations", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("scale", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")

    def past_weight(self, iteration: int) -> float:
        """How much of the target is the past policy's action, in iteration 1, 2, ..."""
        if self.evolution != "paper":
            return 0.0
        return min(self.alpha_limit, max(0.0, self.alpha * iteration / self.iterations))


@dataclass(frozen=True)
class Batch:
    """Windows of K steps, padded. ``returns_to_go`` is scaled, ``states`` are normalised."""

    states: Tensor  #: (batch, K, S)
    actions: Tensor  #: (batch, K, A), -10 where there is no step
    returns_to_go: Tensor  #: (batch, K, 1)
    timesteps: Tensor  #: (batch, K)
    mask: Tensor  #: (batch, K) bool: steps that exist

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.states, self.actions, self.returns_to_go, self.timesteps


class Windows:
    """Draws windows from trajectories: an episode by its length, then a step of it uniformly.

    The original's windows begin at that step, and what is missing behind an episode's end is padded in front. With
    ``causal`` they end there, or begin where the episode does, and are padded behind: so a policy that is run as a
    state from the beginning of an episode is trained as it runs.

    ``mean`` and ``std`` (+ 1e-6) are those of all observations; a policy is to be given states normalised with them.
    """

    def __init__(
        self, data: Trajectories, length: int, scale: float, max_ep_len: int, *, causal: bool = False, seed: int = 0
    ) -> None:
        if data.discrete:
            raise ValueError(f"{data.source}: actions are integers; Decision Mamba learns continuous ones")
        self.data, self.length, self.max_ep_len, self.causal = data, length, max_ep_len, causal
        self.mean, self.std = data.observations.mean(0), data.observations.std(0) + 1e-6
        self.states = (data.observations - self.mean) / self.std
        self.returns = (data.returns_to_go() / scale).astype(np.float32)
        episodes = data.episodes
        sizes = np.array([e.stop - e.start for e in episodes])
        self.begin, self.end = (np.array([getattr(e, k) for e in episodes]) for k in ("start", "stop"))
        self.chance = sizes / sizes.sum()
        self.generator = np.random.default_rng(seed)
        # what stands before a beginning: states of zeros, normalised as all others
        self.nothing = (-self.mean / self.std).astype(np.float32)

    def draw(self, count: int) -> Batch:
        which = self.generator.choice(len(self.chance), size=count, p=self.chance)
        begin, end = self.begin[which], self.end[which]
        step = self.generator.integers(begin, end)
        start = np.maximum(begin, step - self.length + 1) if self.causal else step
        rows = start[:, None] + np.arange(self.length)
        mask = rows < end[:, None]
        if not self.causal:
            missing = (~mask).sum(1)
            rows = rows - missing[:, None]
            mask = np.arange(self.length) >= missing[:, None]
        safe = np.where(mask, rows, begin[:, None])
        times = np.minimum(rows - begin[:, None], self.max_ep_len - 1)
        keep = mask[..., None]
        return Batch(
            torch.from_numpy(np.where(keep, self.states[safe], self.nothing).astype(np.float32)),
            torch.from_numpy(np.where(keep, self.data.actions[safe], np.float32(PADDING_ACTION))),
            torch.from_numpy(np.where(keep, self.returns[safe][..., None], np.float32(0))),
            torch.from_numpy(np.where(mask, times, 0)),
            torch.from_numpy(mask),
        )


def decision_loss(
    found: Mapping[str, Tensor], batch: Batch, settings: Settings, past: Tensor | None = None, past_weight: float = 0.0
) -> Tensor:
    """Squared error of the actions, and smooth L1 errors of the next states and returns-to-go, over real steps.

    ``past``: the past policy's actions; the target is ``(1 - past_weight) * action + past_weight * past``. Without
    predictions of states and returns, or without a step that has a next one, the actions' error counts alone.
    """
    target = batch.actions
    if past is not None and past_weight:
        target = (1 - past_weight) * target + past_weight * past.detach()
    action = (found["actions"] - target)[batch.mask].square().mean()
    # the mask of the step that is predicted, which is the next one
    after = batch.mask[:, 1:]
    if "states" not in found or not bool(after.any()):
        return action
    state = F.smooth_l1_loss(found["states"][:, :-1][after], batch.states[:, 1:][after])
    returns = F.smooth_l1_loss(found["returns_to_go"][:, :-1][after], batch.returns_to_go[:, 1:][after])
    return settings.action_weight * action + settings.state_weight * state + settings.return_weight * returns


def train(
    model: DecisionMamba,
    data: Trajectories,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    on_iteration: Callable[[dict[str, float]], None] | None = None,
    run: Run | None = None,
) -> Windows:
    """Train in place; returns the windows, whose ``mean`` and ``std`` the policy needs when it runs. ``run``: keeps it,
    and goes on with what it holds.

    Raises ValueError where the data's sizes are not the model's, or their actions leave [-1, 1]; FloatingPointError for
    a loss that is no number, before it reaches the weights.
    """
    settings = settings or Settings()
    data.fit((model.state_dim,), model.act_dim, discrete=False, limit=1.0)
    length = model.max_length or model.max_ep_len
    causal = model.fine == "causal"
    windows = Windows(data, length, settings.scale, model.max_ep_len, causal=causal, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / max(settings.warmup, 1), 1))
    device = next(model.parameters()).device
    run = run or Run()
    kept = run.start(model=model, optimizer=optimizer, schedule=schedule, windows=windows.generator)
    # as the model was an iteration ago, which is where an interrupted run goes on
    past = copy.deepcopy(model).eval() if kept and settings.evolution == "paper" else None
    began = time.perf_counter()
    for iteration in range(run.begun + 1, settings.iterations + 1):
        weight = settings.past_weight(iteration) if past is not None else 0.0
        model.train()
        total = 0.0
        for _ in range(settings.steps):
            batch = windows.draw(settings.batch_size).to(device)
            before = None
            if past is not None and weight:
                with torch.no_grad():
                    before = past(*batch.inputs())["actions"]
            loss = decision_loss(model(*batch.inputs()), batch, settings, before, weight)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"the loss is {float(loss.detach())} in iteration {iteration}; look at rate and scale"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if settings.evolution == "paper":
            past = copy.deepcopy(model).eval()
        if on_iteration is not None:
            seconds = time.perf_counter() - began
            row = {"iteration": iteration, "loss": total / settings.steps, "past": weight, "seconds": seconds}
            on_iteration(row)
        run.keep(iteration, iterations=iteration)
    model.eval()
    return windows
