"""How good a model is on labelled data: ``zoo.validate`` and ``zoo validate``, for every task.

A domain plugin names a function for each of its tasks in its ``zoo_validators`` hook::

    def validate_folder(model, data, *, batch_size=32, limit=None, progress=True) -> zoo.Measured: ...

``model`` is a loaded module in eval mode, ``data`` a path; the keyword arguments are the function's own and become
options of the command line. What the data must look like is the function's docstring, which ``zoo validate NAME``
prints when no data is given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from zoo_registry import errors

from . import catalog
from .building import wrong_type
from .pipelines import task_of
from .results import plain


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What ``zoo.validate`` found. ``metrics`` are in the order in which they are printed."""

    model: str  #: name of the model
    data: str  #: where the data lies
    samples: int  #: how many were measured
    #: name -> value: a fraction unless the name says otherwise; None where the metric has no meaning for these data
    metrics: Mapping[str, float | None]
    seconds: float  #: all of it, reading and preparing included
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  #: class -> metric -> value
    notes: str = ""  #: what a reader must know, for example how labels were matched

    @property
    def per_second(self) -> float:
        """Samples a second, reading and preparing included."""
        return self.samples / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, ready for JSON."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain({k: v for k, v in found.items() if v not in ("", {})} | {"per_second": self.per_second})

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items() if value is not None)
        return f"{self.model} on {self.samples} samples of {self.data}: {values}"


def validate(
    model: str | Path | nn.Module, data: str | Path, task: str | None = None, *, progress: bool = False, **options: Any
) -> Measured:
    """Measure ``model`` on the labelled data at ``data`` with the metrics of its task.

    ``model``: whatever ``zoo.load`` takes, or a loaded model. ``task``: only needed for models of your own.
    ``options``: those that the task's validator has (``batch_size=``, ``limit=`` ...) go to it, all others to
    ``zoo.load``.

    Raises ``zoo.errors.UnknownTask`` when no installed plugin measures the task, ``LocalFileMissing`` when ``data``
    does not exist, and ``BadArgument`` for an option that the validator does not have and data that it cannot read.
    """
    from .loading import card_of, load

    if isinstance(model, nn.Module):
        info = getattr(model, "zoo_info", None)
        own = info.card.task if info is not None and info.card is not None else None
    else:
        own = card_of(model).task
    function = catalog.validator(task_of(task or own, model))
    accepted = options_of(function)
    if not Path(data).exists():
        raise errors.LocalFileMissing(f"there is no file or folder {str(data)!r} (in {Path.cwd()})", path=str(data))
    mine = {k: v for k, v in options.items() if k in accepted}
    if (wrong := wrong_type(function, mine)) is not None:  # before anything is loaded
        raise errors.BadArgument(wrong[1], argument=wrong[0], accepted=[])
    rest = {k: v for k, v in options.items() if k not in mine}
    if isinstance(model, nn.Module):
        if rest:
            raise errors.BadArgument(
                f"{', '.join(sorted(rest))}: no such option; {function.__name__} takes {', '.join(accepted) or 'none'}",
                argument=next(iter(rest)),
                accepted=accepted,
            )
    else:
        model = load(model, **rest)
    if "progress" in inspect.signature(function).parameters:
        mine["progress"] = progress
    return function(model.eval(), Path(data), **mine)


def options_of(function: Callable[..., Measured]) -> list[str]:
    """The names of a validator's own options."""
    parameters = list(inspect.signature(function).parameters.values())[2:]
    return [p.name for p in parameters if p.name != "progress"]
