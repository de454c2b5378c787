"""Looking things up: models, adapters and pipelines by name. A thin layer over the registry; imports no torch.

Listing and ``zoo.info`` answer from the cards alone; only :func:`adapter` and :func:`pipeline_class` import a
plugin's code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo_registry import ModelName, resolve
from zoo_registry.names import adapter_for, pipeline_for

if TYPE_CHECKING:
    from zoo_registry import ModelCard, WeightsCard

    from .pipelines import Pipeline
    from .reference import ReferenceAdapter

_adapters: dict[str, Any] = {}


def find(name: str | ModelName) -> tuple[ModelCard, WeightsCard | None]:
    """(model card, weights card) of "architecture" or "architecture.tag"; the untagged name means the default tag.

    Raises ``zoo.errors.UnknownModel`` or ``UnknownTag``, which say what would have been right.
    """
    resolved = resolve(name)
    return resolved.card, resolved.weights


def adapter(system: str) -> ReferenceAdapter:
    """The reference adapter of a system (see :func:`zoo.reference.adapter`)."""
    target = adapter_for(system)
    if target not in _adapters:
        _adapters[target] = import_object(target)()
    return _adapters[target]


def pipeline_class(task: str) -> type[Pipeline]:
    """The class that answers a task. Raises ``zoo.errors.UnknownTask``."""
    return import_object(pipeline_for(task))


def import_object(target: str) -> Any:
    """The object named by an import string "module:attribute"."""
    module, _, attribute = target.partition(":")
    value: Any = import_module(module)
    for part in attribute.split(".") if attribute else ():
        value = getattr(value, part)
    return value
