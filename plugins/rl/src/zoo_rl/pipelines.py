"""A trajectory file in, the policy's actions out: what it would have done at every step that the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from . import trajectories
from .agents import settings_of
from .decision_mamba import DecisionMamba
from .envs import extended
from .s5_rl import S5ActorCritic
from .trajectories import Trajectories

CHUNK = 64  # windows at once


@dataclass(kw_only=True)
class Actions(Result):
    """A policy's action for every step of a file, given all steps of the episode before it.

    ``actions``: (steps,) integers or (steps, size) floats; ``values``: what the critic expects, (steps,), where there
    is one; ``agreement``: the share of steps whose recorded action is the policy's (discrete), or None; ``error``: the
    mean squared difference from the recorded actions (continuous), or None; ``log_prob``: mean log-probability
    (density) of the recorded actions, where the policy has one.
    """

    actions: np.ndarray = field(default_factory=lambda: np.zeros(0))
    values: np.ndarray | None = None
    episodes: int = 0
    agreement: float | None = None
    error: float | None = None
    log_prob: float | None = None
    notes: str = ""

    def summary(self) -> str:
        said = f"{len(self.actions)} actions, {self.episodes} episode{'s' * (self.episodes != 1)}"
        if self.agreement is not None:
            said += f", {self.agreement:.1%} as recorded"
        if self.error is not None:
            said += f", mean squared difference from the recorded {self.error:.4g}"
        return said + (f" ({self.notes})" if self.notes else "")

    def save(self, path: str | Path) -> Path:
        """Write an npz file with ``actions`` (and ``values``)."""
        path = Path(path)
        arrays = {"actions": self.actions} | ({} if self.values is None else {"values": self.values})
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


class Policy(Pipeline):
    """Actions for the steps of a trajectory file (:mod:`zoo_rl.trajectories`), or of a dictionary of arrays.

    For an actor-critic the whole file is one scan with resets where episodes begin; observations may lack the last
    action and the first-step flag, which then follow from the file. For Decision Mamba: ``target_return`` (in the
    environment's units; None: each step's own return-to-go of the file), ``scale``, ``state_mean``, ``state_std`` as in
    training; those of the weights' card are taken unless given.
    """

    task = "policy"
    extensions = trajectories.EXTENSIONS

    def __init__(
        self,
        model: nn.Module,
        target_return: float | None = None,
        scale: float | None = None,
        state_mean: Any = None,
        state_std: Any = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, (S5ActorCritic, DecisionMamba)):
            raise errors.BadArgument(
                f"{type(model).__name__} is no policy; expected S5ActorCritic or DecisionMamba", argument="model",
                accepted=[],
            )  # fmt: skip
        self.policy = model
        own = settings_of(model)
        self.target = target_return
        self.scale = float(own.get("scale", 1.0) if scale is None else scale)
        self.said = [] if scale is not None or "scale" in own else ["returns as they are: no scale given"]
        self.mean = own.get("state_mean") if state_mean is None else state_mean
        self.std = own.get("state_std") if state_std is None else state_std
        if isinstance(model, DecisionMamba):
            if not self.scale > 0:
                raise errors.BadArgument(
                    f"scale is {self.scale}; expected a positive number", argument="scale", accepted=[]
                )
            if (self.mean is None) != (self.std is None):
                raise errors.BadArgument(
                    "state_mean and state_std belong together; one is missing", argument="state_std", accepted=[]
                )
            if self.mean is None:
                self.said.append("states normalised by the file's own mean and deviation")

    # -- reading

    def read(self, source: Any) -> Trajectories:
        if isinstance(source, Trajectories):
            data = source
        elif isinstance(source, Mapping):
            data = trajectories.from_arrays(source, source="the given arrays")
        else:
            data = trajectories.read(source)
        model = self.policy
        if isinstance(model, S5ActorCritic):
            sizes = (model.obs_dim, model.obs_dim - model.action_dim - 1)
            data.fit(tuple(s for s in sizes if s > 0), model.action_dim, discrete=not model.continuous)
        else:
            data.fit((model.state_dim,), model.act_dim, discrete=False, limit=1.0)
        return data

    # -- what the model takes

    def prepare(self, sample: Trajectories) -> dict[str, Tensor]:
        model = self.policy
        if isinstance(model, S5ActorCritic):
            obs, first = torch.from_numpy(sample.observations), torch.from_numpy(sample.first)
            if obs.shape[1] != model.obs_dim:
                actions = torch.from_numpy(sample.actions)
                obs = extended(obs, torch.cat([actions[:1], actions[:-1]]), model.action_dim, first)
            return {"obs": obs, "resets": first}
        steps = self._steps(sample)
        return self._episodes(sample, steps) if model.fine == "causal" else self._windows(sample, steps)

    def _steps(self, sample: Trajectories) -> dict[str, np.ndarray]:
        """States, actions, returns-to-go and timesteps, row by row."""
        assert isinstance(self.policy, DecisionMamba)
        mean, std = self.mean, self.std
        if mean is None:
            mean, std = sample.observations.mean(0), sample.observations.std(0) + 1e-6
        starts = np.repeat([e.start for e in sample.episodes], [e.stop - e.start for e in sample.episodes])
        if self.target is None:
            left = sample.returns_to_go()
        else:
            rewards = sample.need_rewards()
            earned = np.cumsum(rewards) - rewards
            left = self.target - (earned - earned[starts])
        states = (sample.observations - np.asarray(mean)) / np.asarray(std)
        time = np.minimum(np.arange(len(sample)) - starts, self.policy.max_ep_len - 1)
        return {
            "states": states.astype(np.float32),
            "actions": sample.actions,
            "returns_to_go": (left / self.scale).astype(np.float32)[:, None],
            "timesteps": time,
            "starts": starts,
        }

    def _episodes(self, sample: Trajectories, steps: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """(episodes, longest, ...), padded behind: features look back alone."""
        longest = max(e.stop - e.start for e in sample.episodes)
        found = {}
        for name in ("states", "actions", "returns_to_go", "timesteps"):
            padded = np.zeros((len(sample.episodes), longest, *steps[name].shape[1:]), steps[name].dtype)
            for row, episode in zip(padded, sample.episodes, strict=True):
                row[: episode.stop - episode.start] = steps[name][episode]
            found[name] = torch.from_numpy(padded)
        return found

    def _windows(self, sample: Trajectories, steps: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """(steps, window, ...): what :meth:`DecisionMamba.get_action` sees at each step, the present action unknown."""
        assert isinstance(self.policy, DecisionMamba)
        longest = max(e.stop - e.start for e in sample.episodes)
        size = self.policy.max_length or longest
        rows = np.arange(len(sample))[:, None] + np.arange(1 - size, 1)
        inside = rows >= steps["starts"][:, None]
        rows = np.maximum(rows, 0)
        found = {}
        for name in ("states", "actions", "returns_to_go", "timesteps"):
            values = steps[name][rows]
            values[~inside] = 0
            if name == "actions":
                values[:, -1] = 0
            found[name] = torch.from_numpy(values)
        return found

    # -- the answer

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self.policy
        if isinstance(model, S5ActorCritic):
            return model(batch["obs"], batch["resets"])
        count = batch["states"].shape[0]
        flat = [batch[name].flatten(0, 1) for name in ("states", "actions", "returns_to_go", "timesteps")]
        parts = []
        for rows in zip(*(x.split(CHUNK) for x in flat), strict=True):
            parts.append(model(*rows)["actions"] if model.fine == "causal" else model.get_action(*rows))
        return {"actions": torch.cat(parts).unflatten(0, (count, -1))}

    def finish(self, output: Mapping[str, Tensor], sample: Trajectories) -> Actions:
        model = self.policy
        found = Actions(episodes=len(sample.episodes))
        recorded = torch.from_numpy(sample.actions)
        if isinstance(model, S5ActorCritic):
            from . import distributions

            actions = distributions.mode(output)
            found.values = output["value"].numpy()
            found.log_prob = float(distributions.log_prob(output, recorded).mean())
        else:
            actions = output["actions"]
            if model.fine == "causal":
                actions = torch.cat([a[: e.stop - e.start] for a, e in zip(actions, sample.episodes, strict=True)])
            found.notes = "; ".join(self.said)
        if sample.discrete:
            found.agreement = float((actions == recorded).float().mean())
        else:
            found.error = float((actions - recorded).square().mean())
        found.actions = actions.numpy()
        return found
