"""Trajectory files: D4RL's HDF5, npz and parquet, read into one table and checked.

Rows are steps in order; an episode ends where ``terminals`` or ``timeouts`` is set. Fields and their other names:

=============== ====================================== ========================================================
observations    obs, observation, states, state        (steps, size), required
actions         action                                 (steps, size) floats or (steps,) integers, required
rewards         reward                                 (steps,), required where a reader needs them
terminals       terminal, dones, done                  (steps,), optional: without it the file is one episode
timeouts        timeout, truncated, truncations        (steps,), optional
=============== ====================================== ========================================================

npz arrays may also be (episodes, steps, ...), with ``lengths`` (episodes,) where episodes differ; a row ends with its
episode, and ``terminals`` and ``timeouts`` end others within it. Parquet columns hold one number each
(``observations_0``, ``observations_1`` ...) or a list a row; a column ``episode`` may take the place of ``terminals``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import existing, read_arrays, refused
from zoo_registry import optional

NAMES = {
    "observations": ("observations", "obs", "observation", "states", "state"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminals": ("terminals", "terminal", "dones", "done"),
    "timeouts": ("timeouts", "timeout", "truncated", "truncations"),
}
EXTENSIONS = (".npz", ".hdf5", ".h5", ".parquet")


@dataclass(frozen=True)
class Trajectories:
    """Steps of several episodes, one after the other. ``actions``: (steps,) integers or (steps, size) floats."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None
    ends: np.ndarray  #: (steps,) bool: the last step of an episode; the last one of all is always set
    source: str = "memory"

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def discrete(self) -> bool:
        return self.actions.ndim == 1

    @property
    def episodes(self) -> list[slice]:
        stops = np.flatnonzero(self.ends) + 1
        return [slice(int(a), int(b)) for a, b in zip(np.r_[0, stops[:-1]], stops, strict=True)]

    @property
    def first(self) -> np.ndarray:
        """(steps,) bool: the first step of an episode."""
        return np.r_[True, self.ends[:-1]]

    def returns(self) -> np.ndarray:
        """What each episode brought."""
        rewards = self.need_rewards()
        return np.array([rewards[e].sum() for e in self.episodes])

    def returns_to_go(self) -> np.ndarray:
        """(steps,): the sum of this step's reward and all later ones of its episode."""
        rewards = self.need_rewards()
        found = np.empty(len(self))
        for episode in self.episodes:
            found[episode] = rewards[episode][::-1].cumsum()[::-1]
        return found

    def need_rewards(self) -> np.ndarray:
        if self.rewards is None:
            raise ValueError(f"{self.source}: no rewards; expected a field named {' or '.join(NAMES['rewards'])}")
        return self.rewards

    def fit(self, obs_dims: tuple[int, ...], action_dim: int, *, discrete: bool, limit: float | None = None) -> None:
        """Raise ValueError unless the sizes are a model's, and actions lie in its range: 0 to ``action_dim`` - 1, or
        within ``limit`` of 0 if continuous (None: any)."""
        width = self.observations.shape[1]
        if width not in obs_dims:
            raise ValueError(
                f"{self.source}: observations have {width} numbers; the model takes {' or '.join(map(str, obs_dims))}"
            )
        if discrete != self.discrete:
            words = ("one integer a step", "floats")
            raise ValueError(f"{self.source}: actions are {words[discrete]}; the model's are {words[not discrete]}")
        if discrete:
            bad = (self.actions < 0) | (self.actions >= action_dim)
            expected = f"0 to {action_dim - 1}"
        else:
            if self.actions.shape[1] != action_dim:
                raise ValueError(
                    f"{self.source}: actions have {self.actions.shape[1]} numbers; the model has {action_dim}"
                )
            bad = np.zeros(len(self), bool) if limit is None else (np.abs(self.actions) > limit + 1e-3).any(1)
            expected = f"numbers from {-(limit or 0):g} to {limit or 0:g}"
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{self.source}: the action of step {row} is {self.actions[row].tolist()}; expected {expected} "
                f"({int(bad.sum())} such steps)"
            )


def read(path: str | Path) -> Trajectories:
    """Read a file by its ending. Raises BadFile (a ValueError) that names fields found and expected, or the first bad
    step; FileNotFoundError for a file that is not there."""
    path = existing(path, f"a trajectory file ({', '.join(EXTENSIONS)})")
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".npz": read_arrays, ".hdf5": _hdf5, ".h5": _hdf5, ".parquet": _parquet,
    }  # fmt: skip
    with refused(path):
        if path.suffix.lower() not in readers:
            raise ValueError(f"{path}: a file of type {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
        return from_arrays(readers[path.suffix.lower()](path), source=str(path))


def _hdf5(path: Path) -> dict[str, np.ndarray]:
    h5py = optional("h5py", "a trajectory file in HDF5", "ssm-zoo-rl[hdf5]")
    known = {name for names in NAMES.values() for name in names}
    try:
        with h5py.File(path, "r") as file:
            return {name: file[name][()] for name in file if name in known and isinstance(file[name], h5py.Dataset)}
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 file: {error}") from error


def _parquet(path: Path) -> dict[str, np.ndarray]:
    parquet = optional("pyarrow.parquet", "a trajectory file in parquet", "ssm-zoo-rl[parquet]")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has several
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    columns: dict[str, Any] = {}
    numbered: dict[str, dict[int, np.ndarray]] = {}
    for name in table.column_names:
        values = _values(table.column(name), f"{path}: the rows of {name!r}")
        stem, _, number = name.rpartition("_")
        if number.isdigit() and stem:
            numbered.setdefault(stem, {})[int(number)] = values
        else:
            columns[name] = values
    for stem, parts in numbered.items():
        if sorted(parts) != list(range(min(parts), min(parts) + len(parts))):
            raise ValueError(f"{path}: of {stem}_0, {stem}_1 ... only the numbers {sorted(parts)} are there")
        columns[stem] = np.stack([parts[i] for i in sorted(parts)], 1)
    if "episode" in columns:
        number = columns.pop("episode")
        last = np.r_[number[1:] != number[:-1], True][: len(number)]
        if np.issubdtype(number.dtype, np.floating) and np.isnan(number).any():
            raise ValueError(f"{path}: rows without a number of their episode")
        if last.sum() > len(np.unique(number)):
            raise ValueError(f"{path}: the rows of an episode do not follow one another; sort them by episode and step")
        columns["terminals"] = last
    return columns


def _values(column: Any, what: str) -> np.ndarray:
    """A parquet column as an array: (rows,), or (rows, numbers) of lists. Raises ValueError for uneven lists."""
    kind = str(column.type)
    if not kind.startswith(("list", "large_list", "fixed_size_list")):
        return column.to_numpy()
    try:
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sizes = {len(row) for row in column.to_numpy()}
    except TypeError as error:
        raise ValueError(f"{what} have no list in some places") from error
    if len(sizes) > 1 or flat.dtype == object:
        raise ValueError(f"{what} have lists of different lengths, or of lists")
    return flat.reshape(len(column), -1)


def from_arrays(arrays: Mapping[str, Any], *, source: str = "memory") -> Trajectories:
    """Trajectories from arrays by name (see the module's text), checked. Raises ValueError."""
    found: dict[str, np.ndarray] = {}
    for field, names in NAMES.items():
        name = next((n for n in names if n in arrays), None)
        if name is not None:
            found[field] = np.asarray(arrays[name])
    for field in ("observations", "actions"):
        if field not in found:
            raise ValueError(
                f"{source}: no field {' or '.join(map(repr, NAMES[field]))}; found {sorted(map(str, arrays))}"
            )
    if found["observations"].ndim == 3:
        found = _flat(found, arrays.get("lengths"), source)
    observations, actions = found["observations"], found["actions"]
    if observations.ndim != 2 or not len(observations):
        raise ValueError(
            f"{source}: observations have shape {observations.shape}; expected (steps, numbers), not empty"
        )
    if actions.ndim == 2 and actions.shape[1] == 1 and np.issubdtype(actions.dtype, np.integer):
        actions = actions[:, 0]
    if actions.ndim not in (1, 2):
        raise ValueError(f"{source}: actions have shape {actions.shape}; expected (steps,) or (steps, numbers)")
    if actions.ndim == 1 and not np.issubdtype(actions.dtype, np.integer):
        actions = actions[:, None]
    flags: dict[str, np.ndarray | None] = {
        name: found[name].reshape(-1) for name in ("terminals", "timeouts") if name in found
    }
    rewards = found["rewards"].reshape(-1) if "rewards" in found else None
    sized: dict[str, np.ndarray | None] = {"actions": actions, "rewards": rewards, **flags}
    for name, array in sized.items():
        if array is not None and len(array) != len(observations):
            raise ValueError(f"{source}: {len(array)} {name} for {len(observations)} observations")
    for name, values in (("observations", observations), *sized.items()):
        if values is not None:
            _finite(values, name, source)
    ends = np.zeros(len(observations), bool)
    for flag in flags.values():
        assert flag is not None
        ends |= flag.astype(bool)
    ends[-1] = True
    return Trajectories(
        observations.astype(np.float32),
        actions.astype(np.int64 if actions.ndim == 1 else np.float32),
        None if rewards is None else rewards.astype(np.float64),
        ends,
        source,
    )


def _flat(found: dict[str, np.ndarray], lengths: Any, source: str) -> dict[str, np.ndarray]:
    """(episodes, steps, ...) arrays end to end, cut at each row's length, where an episode ends at the latest."""
    count, steps = found["observations"].shape[:2]
    lengths = np.full(count, steps) if lengths is None else np.asarray(lengths)
    if lengths.shape != (count,) or (lengths < 1).any() or (lengths > steps).any():
        raise ValueError(f"{source}: lengths are {lengths.tolist()}; expected {count} numbers from 1 to {steps}")
    for name, array in found.items():
        if array.shape[:2] != (count, steps):
            raise ValueError(f"{source}: {name} have shape {array.shape}; expected ({count}, {steps}, ...)")
    inside = np.arange(steps) < lengths[:, None]
    flat = {name: array[inside] for name, array in found.items()}
    _finite(flat.get("terminals", np.zeros(1)), "terminals", source)
    ends = (np.arange(steps) == lengths[:, None] - 1)[inside]
    return flat | {"terminals": ends | flat.get("terminals", ends).reshape(len(ends), -1).any(1)}


def _finite(values: np.ndarray, name: str, source: str) -> None:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise ValueError(f"{source}: {name} are of type {values.dtype}; expected numbers")
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        raise ValueError(
            f"{source}: {name} of step {int(np.flatnonzero(bad)[0])} are not finite ({int(bad.sum())} such steps)"
        )
