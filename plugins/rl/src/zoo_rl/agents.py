"""A policy that runs: ``agent.act(observation, reward, done)``, in constant memory however long it runs.

::

    agent = zoo_rl.agent(zoo.load("s5_micro"))
    action = agent.act(observation)                       # the first step
    action = agent.act(observation, reward, done)         # every later one: what the environment answered

``reward`` and ``done`` are those that came with the observation; after ``done`` the observation is the first one of the
next episode. A single environment gives and gets arrays without a batch axis, ``batch`` of them with one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import distributions
from .decision_mamba import DecisionMamba
from .envs import extended
from .s5_rl import S5ActorCritic, Unrolled


class Agent(ABC):
    """What runs have in common: checked input, numpy or tensors, one environment or several.

    ``obs_dim``: size of an observation; ``batch``: number of environments (None: one, without a batch axis).
    """

    obs_dims: tuple[int, ...]
    action_dim: int

    def __init__(self, model: nn.Module, batch: int | None) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"batch is {batch}; expected 1 or more, or None for one environment without a batch axis")
        self.model, self.batch = model.eval(), batch
        self.count = batch or 1
        self.started = False
        parameter = next(model.parameters())
        self.kind: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}

    @abstractmethod
    def begin(self) -> None:
        """Forget everything."""

    @abstractmethod
    def _act(self, observation: Tensor, reward: Tensor, first: Tensor) -> Tensor:
        """Actions for (n, obs) observations; ``first``: (n,) which begin an episode."""

    def reset(self) -> None:
        """Forget everything: the next observation is the first of an episode."""
        self.started = False
        self.begin()

    @torch.no_grad()
    def act(self, observation: Any, reward: Any = 0.0, done: Any = False) -> Any:
        """The action: an integer (discrete) or an array (actions,); with ``batch`` arrays (batch,) or (batch, actions).
        Tensors are answered with tensors. Raises ValueError for input of another size and for values that are not
        finite, and changes nothing then."""
        seen = self._floats("observation", observation)
        alone = (self.obs_dims[0],) if self.batch is None else (self.batch, self.obs_dims[0])
        if seen.dim() != len(alone) or seen.shape[-1] not in self.obs_dims or seen.shape[:-1] != alone[:-1]:
            sizes = " or ".join(str((*alone[:-1], size)) for size in dict.fromkeys(self.obs_dims))
            raise ValueError(f"observation has shape {tuple(seen.shape)}; expected {sizes}")
        rewards = self._each("reward", self._floats("reward", reward))
        dones = self._each("done", self._floats("done", done)) != 0
        first = dones if self.started else torch.ones_like(dones)
        self.started = True
        action = self._act(seen.reshape(self.count, -1), rewards, first)
        if self.batch is None:
            action = action[0]
        if isinstance(observation, Tensor):
            return action.to(observation.device)
        return int(action) if action.dim() == 0 else action.float().cpu().numpy() if action.is_floating_point() else (
            action.cpu().numpy()
        )  # fmt: skip

    def _floats(self, name: str, value: Any) -> Tensor:
        try:
            tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value, **self.kind)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r:.80}; expected numbers") from error
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite: {int((~torch.isfinite(tensor)).sum())} of them")
        return tensor

    def _each(self, name: str, value: Tensor) -> Tensor:
        if value.dim() == 0:
            value = value.expand(self.count)
        if tuple(value.shape) != (self.count,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one number, or ({self.count},)")
        return value


class S5Agent(Agent):
    """An :class:`~zoo_rl.s5_rl.S5ActorCritic` that runs. Observations may come with the last action and the first-step
    flag already appended, or without them: then the agent appends its own.

    ``greedy``: the most likely action instead of a drawn one; ``seed``: of the draws; ``memoryless``: the state is
    dropped at every step (the last action and the flag stay): the baseline of :class:`zoo_rl.ppo.Trainer`.
    """

    def __init__(
        self,
        model: S5ActorCritic,
        batch: int | None = None,
        *,
        greedy: bool = False,
        seed: int = 0,
        memoryless: bool = False,
    ) -> None:
        super().__init__(model, batch)
        self.policy, self.greedy, self.memoryless, self.action_dim = model, greedy, memoryless, model.action_dim
        self.obs_dims = tuple(size for size in (model.obs_dim, model.obs_dim - model.action_dim - 1) if size > 0)
        self.generator = torch.Generator(self.kind["device"]).manual_seed(seed)
        self.begin()

    def begin(self) -> None:
        self.unrolled = Unrolled(self.policy)
        self.state = self.policy.init_state(self.count)
        self.last: Tensor | None = None

    def _act(self, observation: Tensor, reward: Tensor, first: Tensor) -> Tensor:
        if observation.shape[1] != self.policy.obs_dim:
            observation = extended(observation, self.last, self.action_dim, first)
        outputs = self.unrolled.step(observation, self.state, torch.ones_like(first) if self.memoryless else first)
        action = distributions.mode(outputs) if self.greedy else distributions.sample(outputs, self.generator)
        self.last = action
        return action


class DecisionAgent(Agent):
    """A :class:`~zoo_rl.decision_mamba.DecisionMamba` that runs.

    ``target_return``: what an episode should bring, in the environment's own units; what has been earned is taken off
    step by step. ``scale``: what returns were divided by in training; ``state_mean``, ``state_std``: what states were
    normalised with. ``bounds``: actions are cut to this range (None: as the model gives them).

    With ``fine="causal"`` the memory is the scans' states; with the original's tiled features it is the last
    ``max_length`` steps.
    """

    def __init__(
        self,
        model: DecisionMamba,
        batch: int | None = None,
        *,
        target_return: float,
        scale: float = 1.0,
        state_mean: Any = 0.0,
        state_std: Any = 1.0,
        bounds: tuple[float, float] | None = (-1.0, 1.0),
    ) -> None:
        super().__init__(model, batch)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}; expected a positive number")
        if not math.isfinite(target_return):
            raise ValueError(f"target_return is {target_return}; expected a number")
        self.policy, self.action_dim, self.obs_dims = model, model.act_dim, (model.state_dim,)
        self.target, self.scale, self.bounds = float(target_return), float(scale), bounds
        self.mean, self.std = self._floats("state_mean", state_mean), self._floats("state_std", state_std)
        for name, value in (("state_mean", self.mean), ("state_std", self.std)):
            if value.dim() and tuple(value.shape) != (model.state_dim,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({model.state_dim},)")
        if not bool((self.std > 0).all()):
            raise ValueError("state_std has values that are not positive")
        self.begin()

    def begin(self) -> None:
        self.left = torch.full((self.count, 1), self.target / self.scale, **self.kind)
        self.time = torch.zeros(self.count, dtype=torch.int64, device=self.kind["device"])
        if self.policy.fine == "causal":
            self.state = self.policy.init_agent(self.count)
            self.fresh = self.policy.init_agent(1)
        else:
            # Windows that begin with zeros, as those that training and get_action pad.
            size = self.policy.max_length or self.policy.max_ep_len
            sizes = (self.policy.state_dim, self.policy.act_dim, 1)
            self.window = [torch.zeros(self.count, size, width, **self.kind) for width in sizes]
            self.times = torch.zeros(self.count, size, dtype=torch.int64, device=self.kind["device"])

    def _act(self, observation: Tensor, reward: Tensor, first: Tensor) -> Tensor:
        again = torch.full_like(self.left, self.target / self.scale)
        self.left = torch.where(first[:, None], again, self.left - reward[:, None] / self.scale)
        self.time = torch.where(first, 0, self.time + 1)
        time = self.time.clamp(max=self.policy.max_ep_len - 1)
        state = (observation - self.mean) / self.std
        action = self._recur(state, time, first) if self.policy.fine == "causal" else self._look(state, time, first)
        return action if self.bounds is None else action.clamp(*self.bounds)

    def _recur(self, state: Tensor, time: Tensor, first: Tensor) -> Tensor:
        if bool(first.any()):
            self.state = _where(first, self.fresh, self.state)
        action = self.policy.decide(self.state, state, self.left, time)
        taken = action if self.bounds is None else action.clamp(*self.bounds)
        self.policy.record(self.state, taken, time)
        return action

    def _look(self, state: Tensor, time: Tensor, first: Tensor) -> Tensor:
        keep = ~first[:, None, None]
        rows = (state, torch.zeros(self.count, self.policy.act_dim, **self.kind), self.left)
        self.window = [
            torch.cat([old[:, 1:] * keep, new[:, None]], 1) for old, new in zip(self.window, rows, strict=True)
        ]
        self.times = torch.cat([self.times[:, 1:] * keep[..., 0], time[:, None]], 1)
        states, actions, left = self.window
        action = self.policy.get_action(states, actions, left, self.times)
        actions[:, -1] = action if self.bounds is None else action.clamp(*self.bounds)
        return action


def _where(rows: Tensor, fresh: Any, state: Any) -> Any:
    """Nested states with the rows of ``rows`` replaced by the (single) rows of ``fresh``."""
    if isinstance(state, Tensor):
        return torch.where(rows.reshape(-1, *[1] * (state.dim() - 1)), fresh, state)
    if isinstance(state, dict):
        return {k: _where(rows, fresh[k], v) for k, v in state.items()}
    return [_where(rows, f, s) for f, s in zip(fresh, state, strict=True)]


def agent(model: nn.Module, batch: int | None = None, **options: Any) -> Agent:
    """An agent that runs ``model``: :class:`S5Agent` or :class:`DecisionAgent`, with that class's options.

    Options that the loaded weights' card names in ``preprocess`` (scale, state_mean, state_std, target_return) are
    taken from there unless given. Raises ValueError for a model that is no policy, TypeError for unknown options.
    """
    if isinstance(model, S5ActorCritic):
        return S5Agent(model, batch, **options)
    if not isinstance(model, DecisionMamba):
        raise ValueError(f"{type(model).__name__} is no policy; expected S5ActorCritic or DecisionMamba")
    known = {k: v for k, v in settings_of(model).items() if k in ("target_return", "scale", "state_mean", "state_std")}
    options = {**known, **options}
    if "target_return" not in options:
        raise ValueError("target_return is missing: say what an episode should bring, in the environment's units")
    return DecisionAgent(model, batch, **options)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The ``preprocess`` settings of the weights that ``model`` was loaded with."""
    info = getattr(model, "zoo_info", None)
    if info is None:
        return {}
    if info.weights is not None:
        return dict(info.weights.preprocess)
    return dict((info.folder_config.get("pretrained_cfg") or {}).get("preprocess") or {})


def run(agent: Agent, env: Any, episodes: int) -> Tensor:
    """Returns of ``episodes`` episodes in ``env`` (:mod:`zoo_rl.envs`, as many environments as the agent's batch).

    Every environment plays equally many, so that short episodes are not preferred; the first ``episodes`` are returned.
    """
    if env.num_envs != agent.count:
        raise ValueError(f"the agent runs {agent.count} environments, {type(env).__name__} has {env.num_envs}")
    agent.reset()
    each = -(-episodes // env.num_envs)
    found: list[list[float]] = [[] for _ in range(env.num_envs)]
    observation, reward, done = env.reset(), torch.zeros(env.num_envs), torch.zeros(env.num_envs, dtype=torch.bool)
    running = torch.zeros(env.num_envs)
    while min(len(one) for one in found) < each:
        seen = observation if agent.batch is not None else observation[0]
        action = agent.act(seen, reward, done)
        observation, reward, done = env.step(action if agent.batch is not None else action[None])
        running = running + reward
        for i in done.nonzero()[:, 0].tolist():
            found[i].append(float(running[i]))
            running[i] = 0
    return torch.tensor([one[k] for k in range(each) for one in found][:episodes])


def random_returns(env: Any, episodes: int, seed: int = 0) -> Tensor:
    """As :func:`run`, for actions drawn at random: what an agent must beat."""

    class Random(Agent):
        def __init__(self) -> None:
            super().__init__(nn.Linear(1, 1), env.num_envs)
            self.obs_dims, self.action_dim = (env.obs_dim,), env.action_dim
            self.generator = torch.Generator().manual_seed(seed)

        def begin(self) -> None:
            pass

        def _act(self, observation: Tensor, reward: Tensor, first: Tensor) -> Tensor:
            if env.continuous:
                return torch.rand(self.count, env.action_dim, generator=self.generator) * 2 - 1
            return torch.randint(env.action_dim, (self.count,), generator=self.generator)

    return run(Random(), env, episodes)
