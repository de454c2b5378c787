"""Inputs to export and compare a model on: an example, its sizes by name, and fresh ones of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo_registry import ModelCard, errors

SIZES = ("batch", "length")


class Inputs:
    """``given`` by the user (a tensor or several by position, or by keyword), or else drawn as the model's card says.

    ``names``: of the model's arguments, in their order. Inputs are dictionaries by these names.
    Raises BadArgument for anything but tensors, and for sizes that the inputs do not have.
    """

    def __init__(self, model: nn.Module, given: Any, dynamic: Collection[str] | None) -> None:
        from .testing.cases import published

        info = getattr(model, "zoo_info", None)
        case = None if info is None or info.card is None else published(info.card)
        self.model = type(model).__name__ if info is None else info.name
        self.specifications = {} if case is None else case.specifications()
        self.described = self.specifications.get("") or self.specifications
        self.drawn = given is None
        if given is None:
            if case is None:
                raise errors.BadArgument(
                    f"{self.model} has no card that describes its inputs; give an example: inputs=tensor, or "
                    "inputs={name: tensor}",
                    argument="inputs",
                    accepted=[],
                )
            given = case.inputs(2)
        if isinstance(given, Mapping) and list(given) == [""]:  # as zoo.testing draws the only one
            given = given[""]
        self.positional = not isinstance(given, Mapping)
        if isinstance(given, Mapping):
            self.values = dict(given)
        else:
            several = list(given) if isinstance(given, (tuple, list)) else [given]
            self.values = dict(zip(_parameters(model, len(several)), several, strict=True))
        for name, value in self.values.items():
            if not isinstance(value, Tensor):
                raise errors.BadArgument(
                    f"inputs has {type(value).__name__} for {name}; expected a tensor on the CPU",
                    argument="inputs",
                    accepted=[],
                )
        self.names = tuple(self.values)
        self._axes = {name: self._named_axes(name) for name in self.names}
        has = {size for axes in self._axes.values() for size in axes.values()}
        for size in () if dynamic is None else dynamic:
            if size not in SIZES or size not in has:
                open_ = [s for s in SIZES if s in has]
                raise errors.BadArgument(
                    f"dynamic has {size!r}; {self.model} has {' and '.join(open_) or 'no sizes'} that may differ, "
                    "() fixes all",
                    argument="dynamic",
                    accepted=open_,
                )

    def _named_axes(self, name: str) -> dict[int, str]:
        """The first axis is the batch; the second of a sequence (ids, or steps of features) its length."""
        value = self.values[name]
        spec = self.specifications.get(name, self.specifications.get("", {}) if self.positional else {})
        if value.dim() == 0 or spec.get("batch") is False:
            return {}
        return {0: "batch", 1: "length"} if spec and is_sequence(spec, value.shape[1:]) else {0: "batch"}

    def axes(self, plan: Collection[str]) -> dict[str, dict[int, str]]:
        """By input: axis -> the name of its size, for the sizes of ``plan``."""
        return {n: {axis: size for axis, size in axes.items() if size in plan} for n, axes in self._axes.items()}

    def plans(self) -> list[tuple[str, ...]]:
        """What to leave open, the most first."""
        has = {size for axes in self._axes.values() for size in axes.values()}
        open_ = [size for size in SIZES if size in has]
        return [tuple(open_[:count]) for count in range(len(open_), -1, -1)]

    def fixed(self, dynamic: Collection[str]) -> Iterator[str]:
        """A sentence for each size that is not open."""
        for size in self.plans()[0]:
            if size not in dynamic:
                yield f"{size} is fixed at {self._size(size)}"

    def _size(self, size: str) -> int:
        return next(
            self.values[name].shape[axis]
            for name, axes in self._axes.items()
            for axis, found in axes.items()
            if found == size
        )

    def traced(self, plan: Collection[str]) -> dict[str, Tensor]:
        """The example; an open size of 1 becomes 2, for tracers take 1 for a fixed one."""
        few = {size: 2 for size in plan if self._size(size) == 1}
        return self.other(few, seed=0) if few else dict(self.values)

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(by position, by keyword)."""
        return (tuple(values.values()), {}) if self.positional else ((), dict(values))

    def call(self, model: Any, values: Mapping[str, Tensor]) -> Any:
        args, kwargs = self.arguments(values)
        return model(*args, **kwargs)

    def other(self, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Fresh inputs; ``sizes`` says which are to differ from the example's."""
        generator = torch.Generator().manual_seed(seed)
        return {name: self._other(name, value, sizes, seed, generator) for name, value in self.values.items()}

    def _other(
        self, name: str, value: Tensor, sizes: Mapping[str, int], seed: int, generator: torch.Generator
    ) -> Tensor:
        from .testing.cases import draw

        shape = list(value.shape)
        for axis, size in self._axes[name].items():
            shape[axis] = sizes.get(size, shape[axis])
        if self.drawn:
            spec = self.specifications[name if name in self.specifications else ""]
            batch = 1 if spec.get("batch") is False else shape.pop(0)
            return draw(spec, batch, seed=seed, name=name, shape=shape)
        # The user's own values drawn again: within their range, and rows of integers as they belong together.
        if value.is_floating_point() and value.numel():
            return value.flatten()[torch.randint(value.numel(), shape, generator=generator)]
        for axis, (now, wanted) in enumerate(zip(value.shape, shape, strict=True)):
            if now != wanted:
                value = value.index_select(axis, torch.randint(now, (wanted,), generator=generator))
        return value

    def samples(self, model: nn.Module, dynamic: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What file and model are compared on: the example, then fresh inputs, of other sizes where these are open."""
        yield "the example", dict(self.values)
        changes: list[dict[str, int]] = []
        if "batch" in dynamic:
            changes += [{"batch": self._size("batch") + 1}, {"batch": 1}]
        if "length" in dynamic:
            now = self._size("length")
            changes += [{"length": now + now // 2 + 1}, {"length": max(now // 2, 2)}]
        tried = 0
        for seed, change in enumerate(changes or [{}], 1):
            given = self.other(change, seed)
            if "length" in change:
                try:
                    self.call(model, given)
                except (ValueError, RuntimeError, IndexError):  # beyond the model's positions, say, or lengths'
                    continue
                tried += 1
            words = " ".join(f"{name} {size}" for name, size in change.items())
            yield f"fresh values{', ' if words else ''}{words}", given
        if "length" in dynamic and not tried:
            raise errors.NotExportable(f"{self.model} takes no other length than the example's", format=None)


def is_sequence(spec: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether an input of a card is a sequence, ids or steps of features: its ``shape`` has no batch axis."""
    return len(shape) in (1, 2) and shape[0] > 1 and "layout" not in spec


def shaped(card: ModelCard, batch: int, *, sides: Sequence[int] | None, length: int | None) -> dict[str, Tensor]:
    """Inputs as the card describes them, of another size: the sides of images and volumes, the length of sequences.

    Raises BadArgument where the card has no such input.
    """
    from .testing.cases import published

    case, shapes = published(card), {}
    for name, spec in case.specifications().items():
        shape = [int(size) for size in spec["shape"]]
        if length is not None and is_sequence(spec, shape):
            shapes[name] = [length, *shape[1:]]
        elif sides is not None and (axes := _sides(spec, shape)):
            if len(axes) != len(sides):
                raise errors.BadArgument(
                    f"size has {len(sides)} sides; {card.name} takes {len(axes)}", argument="size", accepted=[]
                )
            for axis, side in zip(axes, sides, strict=True):
                shape[axis] = side
            shapes[name] = shape
    for argument, value, what in (("size", sides, "images or volumes"), ("length", length, "sequences")):
        if value is not None and not shapes:
            raise errors.BadArgument(
                f"{argument} is given, and {card.name} takes no {what}", argument=argument, accepted=[]
            )
    return case.inputs(batch, shapes=shapes)


def _sides(spec: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """The axes of an image or a volume that are its sides."""
    if "layout" in spec:
        return [axis for axis, letter in enumerate(spec["layout"]) if letter in "HWDXYZ"]
    return list(range(1, len(shape))) if len(shape) in (3, 4) else []


def _parameters(model: nn.Module, count: int) -> list[str]:
    """The names of the first ``count`` arguments of ``forward``; "input_0", ... where it does not name them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return found[:count] if len(found) >= count else [f"input_{i}" for i in range(count)]
