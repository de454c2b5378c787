"""Other classes, other channels: how a checkpoint is fitted to a model that was built with other arguments.

A model class says what an argument changes; the loader does the rest and reports it. Three ways, the first that the
model has counts:

1. a method ``adapt_state(self, state, overrides) -> (state, report)``: full control. ``report`` maps each key that it
   converted or left out to a sentence; keys of the model that are reported and not in ``state`` are initialised anew;
2. a class attribute ``ends``, a mapping from argument to what it changes::

       ends = {
           "num_classes": NewHead("head"),
           "in_chans": InputChannels("patch_embed.proj.weight"),
           "img_size": Converted("pos_embed", resize_positions),     # function(tensor, shape) -> tensor
       }

3. timm's habit: ``default_cfg`` (or ``pretrained_cfg``) with ``classifier`` and ``first_conv``.

Nothing else may differ: a key that no argument accounts for is an error. ``dropped_keys`` on the model (a set) are keys
of the whole model that this one does not have, as a backbone without its head; a checkpoint may hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]
Report = dict[str, str]


@dataclass(frozen=True, init=False)
class NewHead:
    """Modules (by dotted name) that start anew when their shapes differ from the checkpoint's."""

    modules: tuple[str, ...]

    def __init__(self, *modules: str) -> None:
        object.__setattr__(self, "modules", modules)

    def apply(self, state: State, own: Mapping[str, Tensor], why: str) -> Report:
        report: Report = {}
        for module in self.modules:
            keys = [k for k in {*state, *own} if k == module or k.startswith(module + ".")]
            if all(k in state and k in own and state[k].shape == own[k].shape for k in keys):
                continue
            for key in sorted(keys):
                state.pop(key, None)
                report[key] = f"initialised anew ({why})" if key in own else f"left out ({why})"
        return report


@dataclass(frozen=True, init=False)
class InputChannels:
    """Weights of first layers, (out, in, ...), converted to another number of input channels by :func:`channels`."""

    keys: tuple[str, ...]
    axis: int

    def __init__(self, *keys: str, axis: int = 1) -> None:
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "axis", axis)

    def apply(self, state: State, own: Mapping[str, Tensor], why: str) -> Report:
        report: Report = {}
        for key in self.keys:
            if key in state and key in own and state[key].shape != own[key].shape:
                wanted, had = own[key].shape[self.axis], state[key].shape[self.axis]
                state[key] = channels(state[key], wanted, axis=self.axis)
                report[key] = f"converted from {had} to {wanted} input channels ({why})"
        return report


@dataclass(frozen=True)
class Converted:
    """One tensor that a function brings to its new shape: ``function(tensor, shape) -> tensor``."""

    key: str
    function: Callable[[Tensor, Sequence[int]], Tensor]

    def apply(self, state: State, own: Mapping[str, Tensor], why: str) -> Report:
        key = self.key
        if key not in state or key not in own or state[key].shape == own[key].shape:
            return {}
        had = tuple(state[key].shape)
        state[key] = self.function(state[key], tuple(own[key].shape))
        return {key: f"converted from {had} to {tuple(own[key].shape)} ({why})"}


def channels(weight: Tensor, wanted: int, *, axis: int = 1) -> Tensor:
    """A first layer's weight for another number of input channels, by timm's rule (``adapt_input_conv``).

    One channel gets the sum over all; more are the old ones repeated in turn; the result is scaled by old / new, so
    that the layer's output keeps its size for inputs of equal statistics. weight: (out, in, ...) -> (out, wanted, ...).
    """
    had = weight.shape[axis]
    if wanted == had:
        return weight
    work = weight.float()
    if wanted == 1:
        out = work.sum(dim=axis, keepdim=True)
    else:
        repeats = [1] * weight.dim()
        repeats[axis] = math.ceil(wanted / had)
        out = work.repeat(repeats).narrow(axis, 0, wanted) * (had / wanted)
    return out.to(weight.dtype).contiguous()


def adapt(model: nn.Module, state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> tuple[State, Report]:
    """Fit ``state`` to ``model`` as far as ``overrides`` account for differences. Returns (state, report)."""
    fitted = dict(state)
    report: Report = {}
    for key in getattr(model, "dropped_keys", ()):
        fitted.pop(key, None)
    if not overrides:
        return fitted, report
    own = model.state_dict(keep_vars=True)
    if hasattr(model, "adapt_state"):
        adapted, said = model.adapt_state(fitted, dict(overrides))  # type: ignore[operator]
        return dict(adapted), dict(said)
    ends = ends_of(model)
    for argument, value in overrides.items():
        for end in ends.get(argument, ()):
            report.update(end.apply(fitted, own, f"{argument}={value!r}"))
    return fitted, report


def ends_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Argument -> what it changes, from the model's ``ends`` or from timm's ``default_cfg``."""
    declared = getattr(model, "ends", None)
    if declared is not None:
        return {k: tuple(v) if isinstance(v, (list, tuple)) else (v,) for k, v in declared.items()}
    settings = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    found: dict[str, tuple[Any, ...]] = {}
    if classifier := settings.get("classifier"):
        found["num_classes"] = (NewHead(*_names(classifier)),)
    if first := settings.get("first_conv"):
        found["in_chans"] = (InputChannels(*(f"{name}.weight" for name in _names(first))),)
    return found


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
