"""Looking things up: models, adapters and pipelines by name. A thin layer over the registry; imports no torch.

Listing and ``zoo.info`` answer from the cards alone; only :func:`adapter` and :func:`pipeline_class` import a
plugin's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from zoo_registry import ModelName, errors, query, resolve
from zoo_registry.names import adapter_for, nearest, pipeline_for, validator_for

if TYPE_CHECKING:
    from zoo_registry import ModelCard, WeightsCard

    from .pipelines import Pipeline
    from .reference import ReferenceAdapter
    from .validation import Measured

_adapters: dict[str, Any] = {}


def find(name: str | ModelName) -> tuple[ModelCard, WeightsCard | None]:
    """(model card, weights card) of "architecture" or "architecture.tag"; the untagged name means the default tag.

    Raises ``zoo.errors.UnknownModel`` or ``UnknownTag``, which say what would have been right.
    """
    resolved = resolve(name)
    return resolved.card, resolved.weights


def accepts(name: str | ModelName, argument: str) -> bool:
    """Whether a model's builder has an argument."""
    card, _ = find(name)
    return argument in inspect.signature(import_object(card.builder)).parameters


def adapter(system: str) -> ReferenceAdapter:
    """The reference adapter of a system (see :func:`zoo.reference.adapter`)."""
    target = adapter_for(system)
    if target not in _adapters:
        _adapters[target] = import_object(target)()
    return _adapters[target]


def pipeline_class(task: str) -> type[Pipeline]:
    """The class that answers a task. Raises ``zoo.errors.UnknownTask``."""
    return import_object(pipeline_for(task))


def validator(task: str) -> Callable[..., Measured]:
    """The function that measures a model of a task on labelled data. Raises ``zoo.errors.UnknownTask``."""
    return import_object(validator_for(task))


def import_object(target: str) -> Any:
    """The object named by an import string "module:attribute"."""
    module, _, attribute = target.partition(":")
    value: Any = import_module(module)
    for part in attribute.split(".") if attribute else ():
        value = getattr(value, part)
    return value


def list_models(pattern: str | Sequence[str] = "*", **filters: Any) -> list[str]:
    """Names of models and checkpoints, in natural order; ``zoo.list()``.

    ``pattern``: a shell pattern or several ("vim*", "*.in1k", "vision/*"). Filters: ``exclude``, ``domain``, ``task``,
    ``system``, ``licence``, ``min_params``, ``max_params``, ``pretrained``, ``on_hub``, ``plugin``
    (see :func:`zoo_registry.query`). A model with weights is listed once for each of its tags.

    Raises ``zoo.errors.BadFilter`` for a filter that nothing can match.
    """
    known = list(inspect.signature(query).parameters)[1:-1]  # but the pattern, and the manager
    for name in filters:
        if name not in known:
            raise errors.BadFilter(
                f"there is no filter {name!r}; nearest: {', '.join(nearest(name, known) or known)}; known: "
                f"{', '.join(known)}",
                filter=name,
                value=filters[name],
                accepted=tuple(known),
            )
    patterns = pattern if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Iterable) else [pattern]
    if not all(isinstance(one, str) for one in patterns):
        raise errors.BadFilter(f"pattern is {pattern!r}; expected a text such as 'vim*', or several of them")
    return [entry.name for entry in query(patterns, **filters)]


@dataclass(frozen=True)
class ModelInfo:
    """Everything the cards say about a model; ``print`` it, or take ``to_dict()``."""

    card: ModelCard
    weights: WeightsCard | None

    @property
    def name(self) -> str:
        return self.card.full_name(self.weights)

    def to_dict(self) -> dict[str, Any]:
        """The facts that are known, as plain Python; unknown ones are absent."""
        card = _facts(self.card)
        card.pop("weights", None)
        tags = list(self.card.weights)
        found = {"name": self.name, **{k: v for k, v in card.items() if k != "name"}, "architecture": self.card.name}
        if tags:
            found["tags"] = tags
        if self.weights is not None:
            found["weights"] = _facts(self.weights)
            found["loadable"] = self.weights.loadable
        return found

    def __str__(self) -> str:
        return "\n".join(f"{key:<18}{value}" for key, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """(title, text) for display, in a fixed order."""
        card, weights = self.card, self.weights
        rows: list[tuple[str, Any]] = [
            ("model", self.name),
            ("description", card.description),
            ("system", card.system),
            ("domain, task", f"{card.domain}, {card.task}"),
            ("parameters", f"{card.params:,}" if card.params is not None else None),
            ("paper", " ".join(filter(None, (card.paper, card.paper_title))) or None),
            ("original code", "@".join(filter(None, (card.reference_code, card.reference_commit))) or None),
            ("after", "the paper alone (no public code)" if card.faithful == "paper" else None),
            ("licence of code", card.licence_code),
            ("input", _short(card.input)),
            ("output", _short(card.output)),
            ("plugin", card.plugin),
            ("tags", ", ".join(_mark(tag, card) for tag in card.weights) or "none (random weights only)"),
        ]
        if weights is not None:
            rows += [
                ("licence of weights", weights.licence or "unknown"),
                ("weights", _place(weights)),
                ("trained on", weights.trained_on),
                ("classes", weights.num_classes),
                ("preprocess", _short(weights.preprocess)),
                ("also needed", "; ".join(f"hf-hub:{k} {', '.join(v)}" for k, v in weights.companions.items())),
                *(("metric", _metric(m)) for m in weights.metrics),
                ("notes", weights.notes),
            ]
        rows.append(("notes", card.notes))
        return [(title, str(value)) for title, value in rows if value not in (None, "")]


def info(name: str) -> ModelInfo:
    """What the cards say about "architecture" or "architecture.tag" (the untagged name shows its default tag)."""
    return ModelInfo(*find(name))


def _facts(card: Any) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(card).items() if v not in (None, "", {}, [], ())}


def _short(table: dict[str, Any]) -> str | None:
    return ", ".join(f"{k} {v}" for k, v in table.items()) or None


def _mark(tag: str, card: ModelCard) -> str:
    return f"{tag} (default)" if card.weights[tag] is card.default_weights else tag


def _place(weights: WeightsCard) -> str:
    if weights.repo_id is not None:
        pinned = f"@{weights.revision[:12]}" if weights.revision else " (not pinned)"
        return f"hf-hub:{weights.repo_id}{pinned} {weights.filename}"
    if weights.package_file is not None:
        return f"in the plugin ({weights.package_file})"
    return f"not on the Hub: {weights.where}"


def _metric(metric: Any) -> str:
    split = f" {metric.split}" if metric.split else ""
    return f"{metric.name} {metric.value:g} on {metric.dataset}{split} ({metric.source})"


def download(name: str, to: str | Path | None = None, **options: Any) -> list[Path]:
    """Fetch a published checkpoint, and what answering needs beside it, without loading it; returns its own files.

    Into the Hub's cache, or with ``to`` into a folder that another machine can load: ``zoo.load("./folder")``. Options:
    ``cache_dir``, ``token``, ``local_files_only``, ``force_download``, ``verify``.
    """
    from zoo_registry import store

    resolved = resolve(name)
    if to is not None:
        return list(store.download(resolved, to, **options).paths)
    files = store.fetch(resolved, **options)
    store.companions(resolved, **options)
    return list(files.paths)
