"""What the trainings of all tasks share: the model that they begin with, and files that open."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

import zoo
from zoo import catalog
from zoo.cli.training import begun
from zoo.loading import card_of
from zoo_registry import errors
from zoo_vision.validation import upright_size

log = logging.getLogger("zoo")


def begun_on(name: str, start: str | None, seed: int, **arguments: Any) -> nn.Module:
    """A network with a backbone: :func:`zoo.cli.training.begun`, or, where ``start`` names an image classifier, random
    weights with the classifier's in the backbone, and with what the classifier's say of themselves (preprocessing,
    licence).

    Raises BadArgument for a classifier that is another one than the backbone.
    """
    if start is None or (classifier := card_of(start)).task != "image-classification":
        return begun(name, start, seed, **arguments)
    body = zoo.load(start, features_only=True, **{k: v for k, v in arguments.items() if k == "in_chans"}).float()
    if named := catalog.accepts(name, "backbone"):
        theirs = {k: v for k, v in body.zoo_info.config.items() if classifier.config.get(k) != v}
        own_heads = {"num_classes", "features_only", "out_indices"}
        arguments = {"backbone": classifier.name} | {k: theirs[k] for k in set(theirs) - own_heads} | arguments
    model = begun(name, None, seed, **arguments)
    own, given = model.backbone.state_dict(), body.state_dict()  # type: ignore[union-attr, operator]
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    # Norms of the maps are a pyramid's own; anything else means that the two differ.
    lacking = [k for k in own if k not in fitting]
    if strange := [k for k in lacking if "norm" not in k] + [k for k in given if k not in fitting]:
        raise errors.BadArgument(
            f"--start {start} is a {classifier.name}, and the backbone of {name} is another: {len(strange)} of its "
            f"{len(own)} tensors do not fit, as {strange[0]}; name the backbone's own weights"
            + (f", or --set backbone={classifier.name}" if named else ""),
            argument="start",
            accepted=[],
        )
    model.backbone.load_state_dict(own | fitting)  # type: ignore[union-attr, operator]
    log.info("the backbone of %s has the weights of %s; new: %s", name, start, ", ".join(lacking) or "none of its own")
    model.zoo_info.weights = body.zoo_info.weights  # type: ignore[union-attr]
    return model


def preprocess_of(model: nn.Module) -> dict[str, Any]:
    """How pictures were prepared for the weights that a model begins with; {} for random ones."""
    weights = model.zoo_info.weights  # type: ignore[union-attr]
    return {} if weights is None else dict(weights.preprocess)


def check_files(files: Iterable[Path]) -> None:
    """Open every file; pixels are read when they are needed. Raises BadFile naming one that is no picture, or empty."""
    for file in files:
        size = upright_size(file)
        if not all(size):
            raise errors.BadFile(f"{file} has {size[0]} x {size[1]} pixels; mend or remove it", path=str(file))
