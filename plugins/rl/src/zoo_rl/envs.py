"""Environments by the batch, written in torch: what the recipes train in, without a simulator.

An environment is an object with ``num_envs``, ``obs_dim``, ``action_dim``, ``continuous`` and two methods:

``reset()``            first observations (num_envs, obs_dim)
``step(action)``       ``(observation, reward, done)``; where an episode is done, the observation is already the first
                       one of the next episode. So ``done`` of one step is the reset mark of the next observation.

Actions are (num_envs,) integers, or (num_envs, action_dim) floats in [-1, 1] if continuous. Everything random follows
from ``seed``. gymnasium's environments take part through :class:`Gymnasium`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_registry import errors, optional

Step = tuple[Tensor, Tensor, Tensor]


class Environment(Protocol):
    num_envs: int
    obs_dim: int
    action_dim: int
    continuous: bool

    def reset(self) -> Tensor: ...

    def step(self, action: Tensor) -> Step: ...


def checked(env: Environment, action: Tensor) -> Tensor:
    """The action, of the right shape and range. Raises ValueError."""
    wanted = (env.num_envs, env.action_dim) if env.continuous else (env.num_envs,)
    if tuple(action.shape) != wanted:
        raise ValueError(f"action has shape {tuple(action.shape)}; expected {wanted}")
    if env.continuous:
        if not bool(torch.isfinite(action).all()):
            raise ValueError("action has values that are not finite")
        return action.clamp(-1, 1)
    if action.is_floating_point() or bool(((action < 0) | (action >= env.action_dim)).any()):
        raise ValueError(f"action is {action.tolist()}; expected integers from 0 to {env.action_dim - 1}")
    return action


class Stored:
    """An environment whose tensors, generators and counters are its state, so that a training can be gone on with."""

    def state_dict(self) -> dict[str, Any]:
        """All of them, by name; generators as theirs, an environment inside as its own."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Generator):
                found[name] = value.get_state()
            elif isinstance(value, Stored):
                found[name] = value.state_dict()
            elif isinstance(value, (Tensor, int, float)):
                found[name] = value
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        for name, value in state.items():
            own = getattr(self, name)
            if isinstance(own, torch.Generator):
                own.set_state(value)
            elif isinstance(own, Stored):
                own.load_state_dict(value)
            else:
                setattr(self, name, value)


class RepeatPrevious(Stored):
    """Cards of four suits are shown one by one; say which suit was shown ``k`` cards ago.

    Observation: the suit, one-hot. Reward: plus or minus 1 / (cards - k) a card, none for the first k: an episode
    brings 1 at best, -0.5 by guessing. Source: POPGym (arXiv 2303.01859), as in popjaxrl (easy: 1 deck, k 4; medium: 2,
    32; hard: 3, 64).
    """

    obs_dim, action_dim, continuous = 4, 4, False

    def __init__(self, num_envs: int, *, k: int = 4, decks: int = 1, seed: int = 0) -> None:
        self.num_envs, self.k, self.cards = num_envs, k, 52 * decks
        if not 0 < k < self.cards:
            raise ValueError(f"k is {k}; expected 1 to {self.cards - 1}, for there are {self.cards} cards")
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self) -> Tensor:
        self.deck = torch.zeros(self.num_envs, self.cards, dtype=torch.int64)
        self.time = 0  # all episodes have the same length, so they begin together
        self._deal()
        return self._seen()

    def _deal(self) -> None:
        order = torch.rand(self.num_envs, self.cards, generator=self.generator).argsort(1)
        self.deck = order % 4

    def _seen(self) -> Tensor:
        return F.one_hot(self.deck[:, self.time], 4).float()

    def step(self, action: Tensor) -> Step:
        action = checked(self, action)
        reward = torch.zeros(self.num_envs)
        if self.time >= self.k:
            right = self.deck[:, self.time - self.k] == action
            reward = torch.where(right, 1.0, -1.0) / (self.cards - self.k)
        self.time += 1
        done = torch.full((self.num_envs,), self.time == self.cards)
        if self.time == self.cards:
            self.time = 0
            self._deal()
        return self._seen(), reward, done


class StatelessCartPole(Stored):
    """CartPole of which only the positions are seen: the velocities must be remembered.

    Observation: cart position and pole angle (plus normal noise of deviation ``noise``). Reward: 1 / max_steps a step.
    Source: the classic equations (Barto, Sutton and Anderson, 1983) with gymnasium's constants; POPGym's form.
    """

    obs_dim, action_dim, continuous = 2, 2, False

    def __init__(self, num_envs: int, *, noise: float = 0.0, max_steps: int = 200, seed: int = 0) -> None:
        self.num_envs, self.noise, self.max_steps = num_envs, noise, max_steps
        self.generator = torch.Generator().manual_seed(seed)

    def _fresh(self) -> Tensor:
        return torch.rand(self.num_envs, 4, generator=self.generator) * 0.1 - 0.05

    def reset(self) -> Tensor:
        self.state = self._fresh()  # position, velocity, angle, angular velocity
        self.time = torch.zeros(self.num_envs, dtype=torch.int64)
        return self._seen()

    def _seen(self) -> Tensor:
        seen = self.state[:, ::2]
        return seen + self.noise * torch.randn(seen.shape, generator=self.generator) if self.noise else seen.clone()

    def _move(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """(next state, whether the pole fell or the time is over)."""
        x, dx, angle, spin = self.state.unbind(1)
        force = torch.where(action == 1, 10.0, -10.0)
        cos, sin = torch.cos(angle), torch.sin(angle)
        push = (force + 0.05 * spin.square() * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        pull = push - 0.05 * turn * cos / 1.1
        state = torch.stack([x + 0.02 * dx, dx + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn], 1)
        fallen = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 12 * 2 * math.pi / 360)
        return state, fallen | (self.time + 1 >= self.max_steps)

    def step(self, action: Tensor) -> Step:
        state, done = self._move(checked(self, action))
        self.time = torch.where(done, 0, self.time + 1)
        self.state = torch.where(done[:, None], self._fresh(), state)
        return self._seen(), torch.full((self.num_envs,), 1 / self.max_steps), done


class MetaCartPole(StatelessCartPole):
    """In-context learning: CartPole without velocities, seen through a linear map that is drawn anew every ``trials``
    trials. An agent finds out what it sees in the first trials and uses it in the later ones.

    Observation: four projected numbers, the last action, whether a trial has just ended, whether an episode has just
    begun. Every trial of an episode begins in the same state; ``done`` marks the end of an episode, so a memory
    outlives the trials. Source: popjaxrl's ``NoisyStatelessMetaCartPole`` (without noise there, too).
    """

    obs_dim = 7

    def __init__(self, num_envs: int, *, trials: int = 16, max_steps: int = 200, seed: int = 0) -> None:
        super().__init__(num_envs, max_steps=max_steps, seed=seed)
        self.trials = trials

    def _project(self) -> Tensor:
        square = torch.randn(self.num_envs, 4, 4, generator=self.generator)
        return math.sqrt(2) * torch.linalg.qr(square).Q[:, :2]  # two orthogonal rows of length sqrt(2)

    def reset(self) -> Tensor:
        super().reset()
        self.begin, self.map = self.state.clone(), self._project()
        self.trial = torch.zeros(self.num_envs, dtype=torch.int64)
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        return self._shown(torch.zeros(self.num_envs), never, ~never)

    def _shown(self, action: Tensor, ended: Tensor, first: Tensor) -> Tensor:
        seen = torch.einsum("ni,nij->nj", self.state[:, ::2], self.map)
        return torch.cat([seen, torch.stack([action.float(), ended.float(), first.float()], 1)], 1)

    def step(self, action: Tensor) -> Step:
        state, ended = self._move(checked(self, action))
        self.time = torch.where(ended, 0, self.time + 1)
        self.trial = self.trial + ended
        done = self.trial >= self.trials
        fresh, new_map = self._fresh(), self._project()
        self.begin = torch.where(done[:, None], fresh, self.begin)
        self.map = torch.where(done[:, None, None], new_map, self.map)
        self.trial = torch.where(done, 0, self.trial)
        self.state = torch.where(ended[:, None], self.begin, state)
        reward = torch.full((self.num_envs,), 1 / (self.max_steps * self.trials))
        return self._shown(torch.where(done, 0, action), ended & ~done, done), reward, done


class Glide(Stored):
    """A puck on ice is pushed to a goal; its velocity is not seen.

    Observation: position and goal, two numbers each. Action: a force, two numbers in [-1, 1]. Reward: ``1 - distance``
    a step. Episodes of ``max_steps`` steps. This project's, for recipes that need continuous actions and returns that
    say how well something was done.
    """

    obs_dim, action_dim, continuous = 4, 2, True

    def __init__(self, num_envs: int, *, max_steps: int = 30, seed: int = 0) -> None:
        self.num_envs, self.max_steps = num_envs, max_steps
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self) -> Tensor:
        self.time = 0
        self.place, self.goal = (torch.rand(2, self.num_envs, 2, generator=self.generator) * 2 - 1).unbind()
        self.velocity = torch.zeros(self.num_envs, 2)
        return self._seen()

    def _seen(self) -> Tensor:
        return torch.cat([self.place, self.goal], 1)

    def expert(self) -> Tensor:
        """The action of a controller that sees the velocity as well."""
        return (4 * (self.goal - self.place) - 2.4 * self.velocity).clamp(-1, 1)

    def step(self, action: Tensor) -> Step:
        self.velocity = 0.98 * self.velocity + 0.1 * checked(self, action)
        self.place = self.place + 0.3 * self.velocity
        self.time += 1
        reward = 1 - (self.place - self.goal).norm(dim=1)
        done = torch.full((self.num_envs,), self.time == self.max_steps)
        return self.reset() if self.time == self.max_steps else self._seen(), reward, done


class PreviousAction(Stored):
    """An environment whose observations end with the last action (one-hot, if it is one of several) and a flag that is
    1 at the first step of an episode. Source: popjaxrl's wrapper ``AliasPrevActionV2``."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.num_envs, self.action_dim, self.continuous = env.num_envs, env.action_dim, env.continuous
        self.obs_dim = env.obs_dim + env.action_dim + 1

    def reset(self) -> Tensor:
        return extended(self.env.reset(), None, self.action_dim, torch.ones(self.num_envs, dtype=torch.bool))

    def step(self, action: Tensor) -> Step:
        observation, reward, done = self.env.step(action)
        return extended(observation, action, self.action_dim, done), reward, done


def extended(observation: Tensor, action: Tensor | None, action_dim: int, first: Tensor) -> Tensor:
    """(n, size) to (n, size + actions + 1): the last action, zeros where an episode begins, and the flag follow."""
    if action is None:
        last = observation.new_zeros(len(observation), action_dim)
    elif action.dim() == 1:
        last = F.one_hot(action.long(), action_dim).to(observation.dtype)
    else:
        last = action.to(observation.dtype)
    return torch.cat([observation, last.masked_fill(first[:, None], 0), first[:, None].to(observation.dtype)], 1)


class Gymnasium:
    """Environments of gymnasium, by the batch: ``Gymnasium("CartPole-v1", 8)``, or a function that makes one.

    Boxes of one axis and discrete actions; continuous actions are scaled from [-1, 1] to the action space. Needs
    ``pip install "ssm-zoo-rl[gym]"``.
    """

    def __init__(self, what: str | Callable[[], Any], num_envs: int = 1, *, seed: int = 0, **arguments: Any) -> None:
        gymnasium = optional("gymnasium", "an environment of gymnasium", "ssm-zoo-rl[gym]")
        make = (lambda: gymnasium.make(what, **arguments)) if isinstance(what, str) else what
        try:
            self.envs = [make() for _ in range(num_envs)]
        except gymnasium.error.Error as error:
            raise errors.BadArgument(f"gymnasium has no {what!r}: {error}", argument="name", accepted=[]) from error
        spaces = gymnasium.spaces
        observation, action = self.envs[0].observation_space, self.envs[0].action_space
        if not isinstance(observation, spaces.Box) or len(observation.shape) != 1:
            raise ValueError(f"{what}: observations are {observation}; expected a Box of one axis")
        self.num_envs, self.obs_dim, self.seed = num_envs, int(observation.shape[0]), seed
        self.continuous = not isinstance(action, spaces.Discrete)
        if self.continuous:
            if not isinstance(action, spaces.Box) or len(action.shape) != 1:
                raise ValueError(f"{what}: actions are {action}; expected Discrete or a Box of one axis")
            self.action_dim = int(action.shape[0])
            low, high = torch.as_tensor(action.low).float(), torch.as_tensor(action.high).float()
            if not bool(torch.isfinite(high - low).all()):
                raise ValueError(f"{what}: actions are {action}; expected finite limits")
            self.middle, self.half = (high + low) / 2, (high - low) / 2
        else:
            self.action_dim, self.start = int(action.n), int(action.start)

    def reset(self) -> Tensor:
        return torch.stack([self._tensor(env.reset(seed=self.seed + i)[0]) for i, env in enumerate(self.envs)])

    @staticmethod
    def _tensor(observation: Any) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float32)

    def step(self, action: Tensor) -> Step:
        action = checked(self, action)
        seen, rewards, dones = [], [], []
        for env, one in zip(self.envs, action, strict=True):
            given = (self.middle + self.half * one).numpy() if self.continuous else int(one) + self.start
            observation, reward, terminated, truncated, _ = env.step(given)
            done = bool(terminated or truncated)
            seen.append(self._tensor(env.reset()[0] if done else observation))
            rewards.append(float(reward))
            dones.append(done)
        return torch.stack(seen), torch.tensor(rewards), torch.tensor(dones)


#: Names for the command line.
ENVIRONMENTS: dict[str, Callable[..., Any]] = {
    "repeat-previous": RepeatPrevious,
    "stateless-cartpole": StatelessCartPole,
    "meta-cartpole": MetaCartPole,
    "glide": Glide,
}


def make(name: str, num_envs: int = 1, *, seed: int = 0, **arguments: Any) -> Any:
    """An environment by its name, or "gym:CartPole-v1" for one of gymnasium's. Raises ValueError naming those known."""
    if name.startswith("gym:"):
        return Gymnasium(name.removeprefix("gym:"), num_envs, seed=seed, **arguments)
    if name not in ENVIRONMENTS:
        raise errors.BadArgument(
            f"no environment {name!r}; expected one of {', '.join(ENVIRONMENTS)}, or gym:NAME",
            argument="name",
            accepted=sorted(ENVIRONMENTS),
        )
    return ENVIRONMENTS[name](num_envs, seed=seed, **arguments)
