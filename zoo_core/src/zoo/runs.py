"""A training run on disk, so that one that was interrupted goes on as if it had not been.

A loop says what its state is, and at the end of every step (or epoch) that it may be kept::

    run = Run(out / "training.run", about={"rate": 1e-3, "files": 12})
    losses = run.start(model=model, optimizer=optimizer, random=r).get("losses", [])
    for step in range(len(losses), steps):
        ...
        run.keep(step + 1, losses=losses)  # writes once a minute
    run.finish()

The file holds tensors and JSON (safetensors); reading one executes nothing. It is written whole or not at all. Torch's
own random state is part of it, so a run that goes on equals one that was never interrupted, bit by bit on a CPU. Of
processes that train together (torch.distributed) all read the file and the first writes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo_registry import errors

from .files import whole

log = logging.getLogger("zoo")

FORMAT = "1"
#: Lists of so many floats are stored as tensors.
LONG = 64


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers follow ``seed`` within, on the CPU and on ``device``; the caller's go on after it as if
    nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Run:
    """One run. ``path`` None: nothing is kept (what a loop uses when its caller wants none).

    ``about``: what the run depends on, as JSON; a file whose run had other values is refused. ``every``: seconds
    between two writes, and no write before twenty times what the last one took has passed; 0: after every step.
    ``on_resume(done)``: called when a run is taken up.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
        *,
        every: float = 60.0,
        on_resume: Callable[[int], None] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.every, self.on_resume = every, on_resume
        self.about: dict[str, Any] = json.loads(json.dumps(dict(about or {}), default=str))
        self.begun = 0  #: steps that were done when the run was taken up
        self.kept = 0  #: steps that the file holds
        self._parts: dict[str, Any] = {}
        self._due = float("inf")

    def start(self, **parts: Any) -> dict[str, Any]:
        """Say what the state is, bring it to that of the file if there is one, and return the facts of :meth:`keep`.

        parts: objects with ``state_dict`` and ``load_state_dict``, and generators of random numbers (torch's, numpy's).
        Raises BadFile for a file that is damaged or another model's, and for a run with another ``about``.
        """
        self._parts = parts
        if self.path is None:
            return {}
        self._due = time.monotonic() + self.every
        if not self.path.exists():
            return {}
        said, tree = _read(self.path)
        changed = [k for k in sorted({*said, *self.about}) if said.get(k) != self.about.get(k)]
        if changed:
            facts = ", ".join(f"{k} {said.get(k)!r} (now {self.about.get(k)!r})" for k in changed)
            raise errors.BadFile(
                f"{self.path} holds an interrupted run with {facts}; give the same values to go on with it, or start "
                "over (--anew, or another folder)",
                path=str(self.path),
            )
        try:
            for name, part in parts.items():
                _put(part, tree["parts"][name])
            torch.set_rng_state(tree["random"])
            if tree["cuda"] and torch.cuda.is_available():
                for i, state in enumerate(tree["cuda"][: torch.cuda.device_count()]):  # fewer GPUs than before, perhaps
                    torch.cuda.set_rng_state(state, i)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise errors.BadFile(
                f"{self.path} holds the run of another model: {str(error).splitlines()[0]}; start over (--anew, or "
                "another folder)",
                path=str(self.path),
            ) from error
        self.begun = self.kept = int(tree["done"])
        if self.on_resume is not None:
            self.on_resume(self.begun)
        found = tree["facts"]
        assert isinstance(found, dict)
        return found

    def keep(self, done: int, **facts: Any) -> None:
        """Write the run if it is time. done: finished steps; facts: nested dicts and lists of numbers, texts, tensors.

        A disk that cannot be written does not end the training: a message says so, and the file before stays.
        """
        if self.path is None or time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            self.write(done, **facts)
        except errors.StoreError as error:
            log.warning("the run is not kept: %s. Training goes on", error)
        now = time.monotonic()
        self._due = now + (max(self.every, 20 * (now - began)) if self.every else 0.0)

    def write(self, done: int, **facts: Any) -> None:
        """As :meth:`keep`, now. Raises StoreError."""
        if self.path is None or not _first():
            return
        tensors: dict[str, Tensor] = {}
        tree = {
            "done": done,
            "facts": facts,
            "parts": {name: _taken(part) for name, part in self._parts.items()},
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        metadata = {
            "zoo_run": FORMAT,
            "about": json.dumps(self.about),
            "tree": json.dumps(_flat(tree, tensors, "run")),
        }
        with whole(self.path) as work:
            try:
                save_file(tensors, work, metadata=metadata)
            except SafetensorError as error:  # which does not tell a full disk from others
                raise OSError(None, str(error), str(work)) from error
        self.kept = done

    def finish(self) -> None:
        """The run is over and its result is saved: remove the file. Processes that train together wait here."""
        if self.path is None:
            return
        if _first():
            self.path.unlink(missing_ok=True)
        if _together():
            dist.barrier()
        self.begun = self.kept = 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _first() -> bool:
    """Whether this process is the one that writes, of those that train together."""
    return not _together() or dist.get_rank() == 0


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(about, tree) of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("zoo_run") != FORMAT:
                raise ValueError(f"format {said.get('zoo_run')}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        return json.loads(said["about"]), _deep(json.loads(said["tree"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise errors.BadFile(
            f"{path} is no run that can be gone on with (damaged, or another file): {error}; start over (--anew, or "
            "another folder)",
            path=str(path),
        ) from error


def _taken(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part.state_dict()


def _put(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    else:
        part.load_state_dict(state)


def _flat(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """``value`` as JSON in which {"kind": ...} stands for all but plain values; its tensors go into ``tensors``."""

    def stored(tensor: Tensor, kind: str) -> dict[str, str]:
        key = f"{len(tensors)}"
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {kind: key}

    if isinstance(value, Tensor):
        return stored(value, "tensor")
    if isinstance(value, np.ndarray):
        return stored(torch.from_numpy(value.copy()), "array")
    if isinstance(value, Mapping):  # keys of optimisers' states are integers
        return {"dict": [[k, _flat(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        if len(value) >= LONG and all(type(v) is float for v in value):
            return stored(torch.tensor(value, dtype=torch.float64), "floats")
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flat(v, tensors, f"{name}[{i}]") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}; a run keeps tensors, arrays, numbers, texts, lists and dicts")


def _deep(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_flat`."""
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "dict":
        return {k: _deep(v, tensors) for k, v in inside}
    if kind in ("list", "tuple"):
        found = [_deep(v, tensors) for v in inside]
        return tuple(found) if kind == "tuple" else found
    tensor = tensors[inside]
    return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.tolist()
