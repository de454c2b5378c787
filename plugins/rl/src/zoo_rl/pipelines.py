"""A trajectory file in, the policy's actions out: what it would have done at every step that the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zoo import errors
from zoo.files import check_ending, refused, whole
from zoo.pipelines import Pipeline, Result

from . import trajectories
from .agents import settings_of
from .decision_mamba import DecisionMamba
from .envs import extended
from .s5_rl import S5ActorCritic
from .trajectories import Trajectories

CHUNK = 64  # windows or episodes at once
FIELDS = ("states", "actions", "returns_to_go", "timesteps")


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
        """Write an npz file with ``actions`` (and ``values``); a name without ending gets .npz."""
        path = Path(path)
        path = path if path.suffix else path.with_name(path.name + ".npz")
        check_ending(path, (".npz",))
        arrays = {"actions": self.actions} | ({} if self.values is None else {"values": self.values})
        with whole(path) as work:
            np.savez_compressed(work, **arrays)  # type: ignore[arg-type]
        return path


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
            if not (np.isfinite(self.scale) and self.scale > 0):
                raise errors.BadArgument(
                    f"scale is {self.scale}; expected a positive number", argument="scale", accepted=[]
                )
            if target_return is not None and not np.isfinite(target_return):
                raise errors.BadArgument(
                    f"target_return is {target_return}; expected a number", argument="target_return", accepted=[]
                )
            if (self.mean is None) != (self.std is None):
                raise errors.BadArgument(
                    "state_mean and state_std belong together; one is missing", argument="state_std", accepted=[]
                )
            if self.mean is None:
                self.said.append("states normalised by the file's own mean and deviation")
            else:
                self.mean = _numbers("state_mean", self.mean, model.state_dim)
                self.std = _numbers("state_std", self.std, model.state_dim)
                if not (self.std > 0).all():
                    raise errors.BadArgument(
                        "state_std has values that are not positive", argument="state_std", accepted=[]
                    )

    # -- reading

    def read(self, source: Any) -> Trajectories:
        if isinstance(source, Trajectories):
            data = source
        elif isinstance(source, Mapping):
            data = trajectories.from_arrays(source, source="the given arrays")
        else:
            data = trajectories.read(source)
        with refused(data.source):
            self._check(data)
        return data

    def _check(self, data: Trajectories) -> None:
        model = self.policy
        if isinstance(model, S5ActorCritic):
            sizes = (model.obs_dim, model.obs_dim - model.action_dim - 1)
            data.fit(tuple(s for s in sizes if s > 0), model.action_dim, discrete=not model.continuous)
        else:
            data.fit((model.state_dim,), model.act_dim, discrete=False, limit=1.0)
            data.need_rewards()

    # -- what the model takes

    def prepare(self, sample: Trajectories) -> dict[str, Tensor]:
        model = self.policy
        if isinstance(model, S5ActorCritic):
            obs, first = torch.from_numpy(sample.observations), torch.from_numpy(sample.first)
            if obs.shape[1] != model.obs_dim:
                actions = torch.from_numpy(sample.actions)
                obs = extended(obs, torch.cat([actions[:1], actions[:-1]]), model.action_dim, first)
            return {"obs": obs, "resets": first}
        return {name: torch.from_numpy(rows) for name, rows in self._steps(sample).items()}

    def _steps(self, sample: Trajectories) -> dict[str, np.ndarray]:
        """States, actions, returns-to-go and timesteps, row by row, and the row in which each one's episode begins."""
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
        states = (sample.observations - mean) / std
        time = np.minimum(np.arange(len(sample)) - starts, self.policy.max_ep_len - 1)
        return {
            "states": states.astype(np.float32),
            "actions": sample.actions,
            "returns_to_go": (left / self.scale).astype(np.float32)[:, None],
            "timesteps": time,
            "starts": starts,
        }

    # -- the answer

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self.policy
        if isinstance(model, S5ActorCritic):
            return model(batch["obs"], batch["resets"])
        decide = self._by_episodes if model.fine == "causal" else self._by_windows
        files = [{name: rows[i] for name, rows in batch.items()} for i in range(len(batch["states"]))]
        return {"actions": torch.stack([decide(steps) for steps in files])}

    def _by_episodes(self, steps: Mapping[str, Tensor]) -> Tensor:
        """(steps, actions); episodes are padded behind, for features look back alone."""
        sizes = torch.unique_consecutive(steps["starts"], return_counts=True)[1].tolist()
        episodes = {name: steps[name].split(sizes) for name in FIELDS}
        found = []
        for first in range(0, len(sizes), CHUNK):
            padded = [pad_sequence(episodes[name][first : first + CHUNK], batch_first=True) for name in FIELDS]
            actions = self.policy(*padded)["actions"]
            found += [row[:size] for row, size in zip(actions, sizes[first : first + CHUNK], strict=True)]
        return torch.cat(found)

    def _by_windows(self, steps: Mapping[str, Tensor]) -> Tensor:
        """(steps, actions); every step from what :meth:`DecisionMamba.get_action` sees, the present action unknown."""
        assert isinstance(self.policy, DecisionMamba)
        starts, found = steps["starts"], []
        longest = int(torch.unique_consecutive(starts, return_counts=True)[1].max())
        back = torch.arange(1 - (self.policy.max_length or longest), 1, device=starts.device)
        for rows in torch.arange(len(starts), device=starts.device).split(CHUNK):
            index = rows[:, None] + back
            outside = (index < starts[rows][:, None])[..., None]
            seen = {name: steps[name][index.clamp(min=0)] for name in FIELDS}
            seen = {name: x.masked_fill(outside if x.dim() == 3 else outside[..., 0], 0) for name, x in seen.items()}
            seen["actions"][:, -1] = 0
            found.append(self.policy.get_action(*seen.values()))
        return torch.cat(found)

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
            actions = output["actions"].clamp(-1, 1)  # as an agent's
            found.notes = "; ".join(self.said)
        if sample.discrete:
            found.agreement = float((actions == recorded).float().mean())
        else:
            found.error = float((actions - recorded).square().mean())
        found.actions = actions.numpy()
        return found


def _numbers(name: str, values: Any, size: int) -> np.ndarray:
    """One number, or ``size`` of them. Raises BadArgument."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise errors.BadArgument(f"{name} is {values!r:.80}; expected numbers", argument=name, accepted=[]) from error
    if found.shape not in ((), (size,)) or not np.isfinite(found).all():
        raise errors.BadArgument(
            f"{name} has shape {found.shape}; expected ({size},), finite numbers", argument=name, accepted=[]
        )
    return found
