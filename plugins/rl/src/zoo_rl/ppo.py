"""Proximal policy optimisation for a recurrent policy: trajectories by steps, gradients by the parallel scan.

Source: Schulman et al., arXiv 1707.06347; popjaxrl ``ppo_s5.py``, whose settings are the defaults.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.runs import Run

from . import distributions
from .envs import Environment, Stored
from .s5_rl import Memory, S5ActorCritic, Unrolled


@dataclass(frozen=True)
class Settings:
    """The published run's. ``num_envs`` is the environment's."""

    steps: int = 1024  #: of every environment in one rollout
    total_steps: int = 15_000_000  #: over all environments
    epochs: int = 30
    minibatches: int = 8  #: parts of the environments, each with its whole trajectory
    learning_rate: float = 5e-5
    anneal: bool = False  #: the learning rate falls to 0 linearly
    gamma: float = 0.99
    gae_lambda: float = 1.0
    clip: float = 0.2
    entropy: float = 0.0
    value: float = 1.0
    max_grad_norm: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "total_steps", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")


@dataclass
class Rollout:
    """Trajectories, (num_envs, steps, ...), and the memory at their beginning."""

    obs: Tensor
    resets: Tensor  #: this observation is the first of an episode
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    memory: Memory
    advantages: Tensor
    targets: Tensor  #: of the values


def advantages_of(
    values: Tensor, rewards: Tensor, next_resets: Tensor, last_value: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates, all (num_envs, steps); ``next_resets``: an episode ended with this step."""
    following = torch.cat([values[:, 1:], last_value[:, None]], 1)
    on = (~next_resets).float()
    delta = rewards + gamma * following * on - values
    found = torch.empty_like(delta)
    running = torch.zeros_like(last_value)
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * gae_lambda * on[:, t] * running
        found[:, t] = running
    return found


def ppo_loss(
    outputs: Mapping[str, Tensor],
    actions: Tensor,
    log_probs: Tensor,
    values: Tensor,
    advantages: Tensor,
    targets: Tensor,
    settings: Settings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective plus the clipped value error minus entropy: (loss, its parts). All (num_envs, steps)."""
    value = outputs["value"]
    clipped = values + (value - values).clamp(-settings.clip, settings.clip)
    value_loss = 0.5 * torch.maximum((value - targets).square(), (clipped - targets).square()).mean()
    ratio = torch.exp(distributions.log_prob(outputs, actions) - log_probs)
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    bounded = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    actor_loss = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    entropy = distributions.entropy(outputs).mean()
    loss = actor_loss + settings.value * value_loss - settings.entropy * entropy
    return loss, {"actor": actor_loss, "value": value_loss, "entropy": entropy}


#: Where a trainer stands in its environment.
_PLACE = ("obs", "reset", "memory", "running")


class Trainer:
    """PPO on one environment. ``memoryless``: every step is a first one, so that nothing is ever remembered: the
    baseline of the same network, data and time that shows what a memory is worth.

    ::

        trainer = Trainer(model, PreviousAction(RepeatPrevious(64)), Settings(total_steps=1_000_000))
        trainer.train(on_update=print)
    """

    def __init__(
        self,
        model: S5ActorCritic,
        env: Environment,
        settings: Settings | None = None,
        *,
        seed: int = 0,
        memoryless: bool = False,
    ) -> None:
        settings = settings or Settings()
        if (model.obs_dim, model.action_dim, model.continuous) != (env.obs_dim, env.action_dim, env.continuous):
            raise ValueError(
                f"the model has obs_dim {model.obs_dim}, action_dim {model.action_dim}, continuous {model.continuous}; "
                f"the environment has {env.obs_dim}, {env.action_dim} and {env.continuous}"
            )
        if env.num_envs % settings.minibatches:
            raise ValueError(
                f"{env.num_envs} environments do not divide into {settings.minibatches} minibatches: a trajectory "
                "stays whole; change either number"
            )
        self.model, self.env, self.settings, self.memoryless = model, env, settings, memoryless
        self.device = next(model.parameters()).device  # environments and rollouts stay on the CPU
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, eps=1e-5)
        self.obs = env.reset()
        self.reset = torch.ones(env.num_envs, dtype=torch.bool)
        self.memory = model.init_state(env.num_envs)
        self.running = torch.zeros(env.num_envs)
        self.returns: list[float] = []  #: of the episodes that ended in the last rollout

    def _marks(self, reset: Tensor) -> Tensor:
        return torch.ones_like(reset) if self.memoryless else reset

    def _act(self, policy: Unrolled, memory: Memory) -> dict[str, Tensor]:
        found = policy.step(self.obs.to(self.device), memory, self._marks(self.reset).to(self.device))
        return {name: value.cpu() for name, value in found.items()}

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Act for ``settings.steps`` steps."""
        s, start = self.settings, [{"ssm": m["ssm"].clone()} for m in self.memory]
        rows: dict[str, list[Tensor]] = {k: [] for k in ("obs", "reset", "action", "log_prob", "value", "reward")}
        self.returns = []
        policy = Unrolled(self.model)
        for _ in range(s.steps):
            out = self._act(policy, self.memory)
            action = distributions.sample(out, self.generator)
            obs, reward, done = self.env.step(action)
            found = (self.obs, self.reset, action, distributions.log_prob(out, action), out["value"], reward)
            for name, value in zip(rows, found, strict=True):
                rows[name].append(value)
            self.running += reward
            self.returns += self.running[done].tolist()
            self.running[done] = 0
            self.obs, self.reset = obs, done
        # the value of what comes next, without moving the memory on
        ahead = [{"ssm": m["ssm"].clone()} for m in self.memory]
        last = self._act(policy, ahead)["value"]
        r = {name: torch.stack(values, 1) for name, values in rows.items()}
        next_resets = torch.cat([r["reset"][:, 1:], self.reset[:, None]], 1)
        advantages = advantages_of(r["value"], r["reward"], next_resets, last, s.gamma, s.gae_lambda)
        return Rollout(
            r["obs"], r["reset"], r["action"], r["log_prob"], r["value"], r["reward"], start, advantages,
            advantages + r["value"],
        )  # fmt: skip

    def update(self, data: Rollout) -> dict[str, float]:
        """Gradient steps on one rollout; the means of the loss's parts. Raises FloatingPointError for a loss that is no
        number, before it reaches the weights."""
        s = self.settings
        sums: dict[str, float] = {}
        size = self.env.num_envs // s.minibatches
        for _ in range(s.epochs):
            order = torch.randperm(self.env.num_envs, generator=self.generator)
            for rows in order.split(size):
                memory = [{"ssm": m["ssm"][rows.to(self.device)]} for m in data.memory]
                part = {name: x[rows].to(self.device) for name, x in vars(data).items() if name != "memory"}
                outputs = self.model(part["obs"], self._marks(part["resets"]), state=memory)
                loss, parts = ppo_loss(
                    outputs, part["actions"], part["log_probs"], part["values"], part["advantages"], part["targets"], s
                )
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(f"the loss is {float(loss.detach())}; a lower learning rate may help")
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), s.max_grad_norm)
                self.optimizer.step()
                for name, value in {"loss": loss, **parts}.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / (s.epochs * s.minibatches)
        return sums

    def train(
        self, on_update: Callable[[dict[str, float]], None] | None = None, run: Run | None = None
    ) -> list[dict[str, float]]:
        """Rollouts and updates until ``total_steps``; one row a rollout: steps, mean return, losses, seconds.

        ``run``: keeps it, and goes on with what it holds. Environments that have no ``state_dict``, as gymnasium's,
        begin their episodes anew then.
        """
        s, began = self.settings, time.perf_counter()
        count = max(1, s.total_steps // (s.steps * self.env.num_envs))
        run = run or Run()
        rows = run.start(model=self.model, trainer=self).get("rows", [])
        self.model.train()
        for i in range(len(rows), count):
            if s.anneal:
                self.optimizer.param_groups[0]["lr"] = s.learning_rate * (1 - i / count)
            data = self.rollout()
            mean = sum(self.returns) / len(self.returns) if self.returns else float("nan")
            row = {"steps": float((i + 1) * s.steps * self.env.num_envs), "return": mean, **self.update(data)}
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
            if on_update is not None:
                on_update(row)
            run.keep(i + 1, rows=rows)
        self.model.eval()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """All that a training goes on with, but for the model."""
        found = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        if isinstance(self.env, Stored):
            found |= {name: getattr(self, name) for name in _PLACE} | {"env": self.env.state_dict()}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if isinstance(self.env, Stored):
            self.env.load_state_dict(state["env"])
            for name in _PLACE:
                setattr(self, name, state[name])
            self.memory = [{name: t.to(self.device) for name, t in layer.items()} for layer in self.memory]
