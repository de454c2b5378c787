"""What the contract checks run on: a registered model in its tiny form, and inputs drawn from its card.

A card's ``input`` is one specification, or several by the names of the model's arguments::

    input = { shape = [3, 224, 224], dtype = "float32", range = [0, 1] }
    [models.x.input]
    tokens = { shape = [128], dtype = "int64", range = [0, 1000] }
    lengths = { shape = [], dtype = "int64", range = [1, 129] }

``shape`` has no batch axis. ``range`` is [low, high): uniform floats or integers; without it (or when it is a sentence)
floats are normal. One specification is passed by position, several by keyword. ``tiny`` and ``tiny_input`` on the card
override ``config`` and ``input``. Two optional entries of a specification: ``odd`` is a shape (or several) that the
model must also take, ``batch = false`` says that the tensor has no batch axis.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.building import ZooInfo, construct, describe
from zoo.catalog import find
from zoo_registry import ModelCard, errors


def is_specification(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "shape" in entry


@dataclass
class Case:
    """One model to check. ``build(**overrides)`` makes it tiny, ``inputs(batch)`` makes what it takes."""

    card: ModelCard
    config: dict[str, Any] = field(default_factory=dict)
    specification: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.card.name

    def build(self, *, seed: int = 0, **overrides: Any) -> nn.Module:
        """A tiny model with random weights from ``seed``, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = {**self.config, **overrides}
            model = construct(self.card, config)
        describe(model, ZooInfo(self.card.name, None, config, dict(overrides), card=self.card))
        return model

    def inputs(self, batch: int = 2, *, seed: int = 0, shapes: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Inputs by name; the only one of a model with one specification is called "" (passed by position)."""
        return {
            name: draw(spec, batch, seed=seed, name=name, shape=(shapes or {}).get(name))
            for name, spec in self.specifications().items()
        }

    def specifications(self) -> dict[str, dict[str, Any]]:
        spec = self.specification
        if is_specification(spec):
            return {"": dict(spec)}
        named = {name: dict(entry) for name, entry in spec.items() if is_specification(entry)}
        if not named:
            raise errors.CardError(
                f"the card of {self.name} describes no input; expected input = {{ shape = [...], dtype = ... }} or one "
                "such table for each argument"
            )
        return named


def case(name: str | Case) -> Case:
    """The case of a registered model, from its card's ``tiny`` and ``tiny_input``."""
    if isinstance(name, Case):
        return name
    card, _ = find(name)
    specification = dict(card.input)
    for key, value in card.tiny_input.items():
        both = isinstance(value, Mapping) and isinstance(specification.get(key), Mapping)
        specification[key] = {**specification[key], **value} if both else value
    return Case(card, {**card.config, **card.tiny}, specification)


def published(card: ModelCard) -> Case:
    """A model as its card describes it, not in its tiny form."""
    return Case(card, dict(card.config), dict(card.input))


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call a model on inputs from :meth:`Case.inputs`."""
    if "" in inputs:
        return model(inputs[""])
    return model(**inputs)


def draw(spec: Mapping[str, Any], batch: int, *, seed: int = 0, name: str = "", shape: Any = None) -> Tensor:
    """One input tensor from its specification; the same for the same name and seed, whatever else is drawn."""
    sizes = [int(s) for s in (spec["shape"] if shape is None else shape)]
    full = sizes if spec.get("batch") is False else [batch, *sizes]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))
    dtype = getattr(torch, str(spec.get("dtype", "float32")))
    limits = spec.get("range")
    low, high = limits if isinstance(limits, (list, tuple)) and len(limits) == 2 else (None, None)
    if dtype == torch.bool:
        return torch.rand(full, generator=generator) < 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        if low is None or high is None:
            raise errors.CardError(f"the input {name!r} is of integers; its card needs range = [low, high)")
        return torch.randint(int(low), max(int(high), int(low) + 1), full, generator=generator, dtype=dtype)
    if low is None or high is None:
        return torch.randn(full, generator=generator, dtype=dtype)
    return torch.rand(full, generator=generator, dtype=dtype) * (high - low) + low


def tensors(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor in a model's output, by a path into it."""
    if isinstance(output, Tensor):
        return {prefix or "output": output}
    if isinstance(output, Mapping):
        items = [(str(k), v) for k, v in output.items()]
    elif isinstance(output, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(output)]
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module):
        items = list(vars(output).items())
    else:
        return {}
    return {k: v for name, value in items for k, v in tensors(value, f"{prefix}.{name}" if prefix else name).items()}


def model_names(plugin: str | None = None) -> list[str]:
    """Architectures (without tags) of the installed plugins, or of one of them, for parametrised tests."""
    from zoo_registry import query

    entries = query("*", plugin=plugin) if plugin is not None else query("*")
    return list(dict.fromkeys(entry.card.name for entry in entries))
