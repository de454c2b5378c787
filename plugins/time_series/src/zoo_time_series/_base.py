"""What every forecaster of this plugin is: a window of a series in, what follows it out, in the series' own units."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Forecaster(nn.Module):
    """``forecast = model(series)``: (batch, lag, columns) to (batch, horizon, columns)."""

    #: Steps of history that the model was made for.
    lag: int
    #: Steps it answers.
    horizon: int
    #: Columns it takes together; None: any number.
    columns: int | None = None
    #: True where other lengths of history than ``lag`` are defined.
    any_length = False
    #: True where ``forward`` takes ``horizon=``, another number of steps than :attr:`horizon`.
    any_horizon = False

    def loss(self, series: Tensor, target: Tensor) -> Tensor:
        """The training loss of windows (batch, lag, columns) and what followed them (batch, horizon, columns)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Affine:
    """``scale * x - offset`` and back, one of each for a sample and a column: (batch, 1, columns)."""

    scale: Tensor | float
    offset: Tensor | float

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x - self.offset

    def back(self, y: Tensor) -> Tensor:
        return (y + self.offset) / self.scale


TRANSFORMS = ("mean", "mean_input", "last", "standardize", "none")


def affine_of(x: Tensor, method: str, lag: int) -> Affine:
    """How SpaceTime centres a window, from (batch, length, columns).

    mean: minus the mean of the first ``lag`` steps; mean_input: of all steps; last: minus the last of the first ``lag``
    steps; standardize: (x - mean) / std of the first ``lag`` steps, std with n - 1; none. A constant column under
    standardize divides by 0 and gives NaN, as in the original.
    """
    window = x[:, :lag]
    if method == "mean":
        return Affine(1.0, window.mean(1, keepdim=True))
    if method == "mean_input":
        return Affine(1.0, x.mean(1, keepdim=True))
    if method == "last":
        return Affine(1.0, window[:, -1:])
    if method == "standardize":
        scale = 1 / window.std(1, keepdim=True)
        return Affine(scale, window.mean(1, keepdim=True) * scale)
    if method == "none":
        return Affine(1.0, 0.0)
    raise ValueError(f"data_transform is {method!r}; expected one of {', '.join(TRANSFORMS)}")


def call_with(function: Callable[..., Any], given: Mapping[str, Any] | None, what: str) -> Any:
    """``function(**given)``; an argument that it (or a base class of it) does not name is a ValueError that does."""
    given = dict(given or {})
    accepted: set[str] = set()
    for cls in inspect.getmro(function) if inspect.isclass(function) else [function]:
        call = cls.__dict__.get("__init__") if inspect.isclass(cls) else cls
        if call is not None and cls is not object:
            parameters = inspect.signature(call).parameters.values()
            accepted |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", "args"}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    unknown = sorted(set(given) - accepted)
    if unknown:
        raise ValueError(f"{what} has no argument {', '.join(unknown)}; expected among {', '.join(sorted(accepted))}")
    return function(**given)
