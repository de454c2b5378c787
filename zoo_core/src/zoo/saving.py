"""``zoo.save``: a folder that ``zoo.load``, the Hub and a reader understand.

=================== ==============================================================================================
config.json         architecture, every argument of its builder, preprocessing, labels, versions
model.safetensors   the tensors; its header repeats config.json, so that the file alone loads too (large models:
                    several files and model.safetensors.index.json)
README.md           the model card
=================== ==============================================================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from zoo_registry import ModelCard, errors

from . import __version__, building, checkpoints
from .adapting import ends_of
from .files import unwritable
from .loading import FORMAT

logger = logging.getLogger("zoo")

#: Larger weights are written in several files of at most this many bytes.
SHARD_BYTES = 5_000_000_000
#: What a weights card says about its file; a saved folder is another.
_PLACES = (
    "repo_id",
    "filename",
    "revision",
    "sha256",
    "size",
    "shard_sha256",
    "package_file",
    "where",
    "subkey",
    "converter",
    "config_file",
    "format",
    "dtype",
)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    licence: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    notes: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model that the zoo built; returns the folder.

    ``labels``: class names in the order of the outputs. ``licence``: of these weights (SPDX id); weights loaded by name
    keep theirs. ``metrics``: what you measured, as mappings with ``name``, ``value``, ``dataset``, ``source``.
    ``notes``: a paragraph for the model card.

    A new folder appears whole or not at all; in an existing one each file is replaced whole, config.json last. Raises
    BadArgument for a model that the zoo did not build, KeysDoNotMatch when its layers were changed by hand.
    """
    model = unwrapped(model)
    _check_said(model, labels, licence, metrics)
    info = getattr(model, "zoo_info", None)
    if info is None or info.card is None:
        raise errors.BadArgument(
            f"a {type(model).__name__} that the zoo did not build cannot be saved, because zoo.load could not build it "
            "again; make it with zoo.create or zoo.load, or register its class (zoo plugins new)",
            argument="model",
            accepted=[],
        )
    config = present_config(model)
    table = describe_model(model, config, labels=labels, licence=licence, metrics=metrics)
    state = _first_names(model)

    folder = Path(folder).expanduser()
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(None, "it is a file; expected a folder, new or not")
        work.mkdir()
        _write_weights(state, work, table, shard_bytes)
        from .model_card import model_card

        (work / "README.md").write_text(model_card(model, table, notes=notes), encoding="utf-8")
        (work / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():
            os.replace(work, folder)
        else:
            _replace_files(work, folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, inside what torch.compile or parallel training put around it."""
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name)
        if inner is not None and len(model._modules) == 1 and getattr(inner, "zoo_info", None) is not None:
            return inner
    return model


def _check_said(
    model: nn.Module, labels: Sequence[str] | None, licence: str | None, metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse labels, licence and figures that say nothing, or something else than is meant. Raises BadArgument."""
    count = getattr(model, "num_classes", None)
    if labels is not None:
        if isinstance(labels, str):
            raise errors.BadArgument(f"labels is {labels!r}; expected a list of texts", argument="labels", accepted=[])
        if isinstance(count, int) and count > 1 and len(labels) != count:  # said, and saved: it may have taken days
            logger.warning("labels has %d names and the model %d classes; expected one for each", len(labels), count)
    if licence is not None and not isinstance(licence, str):
        raise errors.BadArgument(f"licence is {licence!r}; expected a text, as 'mit'", argument="licence", accepted=[])
    for row in metrics:
        if not all(row.get(name) for name in ("name", "dataset")) or not isinstance(row.get("value"), numbers.Real):
            raise errors.BadArgument(
                f"metrics has the row {dict(row)!r}; expected name, value (a number), dataset, and optionally split "
                "and source",
                argument="metrics",
                accepted=["name", "value", "dataset", "split", "source"],
            )


def present_config(model: nn.Module) -> dict[str, Any]:
    """The builder's arguments that give the model as it is now, also after ``reset_classifier`` and its like."""
    info = model.zoo_info
    assert isinstance(info, building.ZooInfo)
    assert info.card is not None
    config = dict(info.config)
    for argument in ends_of(model):
        if hasattr(model, argument) and config.get(argument, getattr(model, argument)) != getattr(model, argument):
            config[argument] = getattr(model, argument)
    again = building.skeleton(info.card, config)
    own, built = model.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    if _shapes(own) != _shapes(built):  # a head whose size the configuration had left to the builder's default
        config |= {a: getattr(model, a) for a in ends_of(model) if hasattr(model, a)}
        again = building.skeleton(info.card, config)
        built = again.state_dict(keep_vars=True)
    if _shapes(own) != _shapes(built):
        raise errors.KeysDoNotMatch.between(
            f"the model and its own configuration ({info.card.name})",
            missing=[k for k in built if k not in own],
            unexpected=[k for k in own if k not in built],
            mismatched={
                k: (tuple(own[k].shape), tuple(built[k].shape))
                for k in own
                if k in built and isinstance(own[k], Tensor) and own[k].shape != built[k].shape
            },
            hint="its layers were changed after it was built; a saved folder can only hold what the builder can make",
        )
    return config


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in state.items()}


def describe_model(
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    licence: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of config.json."""
    info = model.zoo_info
    assert isinstance(info, building.ZooInfo)
    card = info.card
    assert card is not None
    facts: dict[str, Any] = {}
    if info.weights is not None:
        facts = {
            k: v for k, v in msgspec.to_builtins(info.weights).items() if k not in _PLACES and v not in (None, {}, [])
        }
        # Other weights in the same architecture, or an own head: the published figures are not theirs.
        kept = {"preprocess", "companions", "labels", "num_classes"} if info.tag is None else set(facts)
        if info.weights.tag in ("saved", "own"):  # whoever saved them, or trained on them, said under which licence
            kept |= {"licence"}
        if building.has_new_head(model):
            kept &= {"preprocess", "companions", "licence"}
        facts = {k: v for k, v in facts.items() if k in kept}
    if licence is not None:
        facts["licence"] = licence
    if metrics:  # JSON has no NaN, and a card no use for it
        facts["metrics"] = [
            {**m, "value": m["value"] if isinstance(m["value"], int) else float(m["value"])}  # numpy's, too
            for m in metrics
            if math.isfinite(m["value"])
        ]
        for m in metrics:
            if not math.isfinite(m["value"]):
                logger.warning("the figure %s is %s and is not saved", m["name"], m["value"])
    table: dict[str, Any] = {
        "library": "zoo",
        "format": FORMAT,
        "architecture": card.name,
        "model_args": _plain(config, card),
        "pretrained_cfg": facts,
        "zoo_version": __version__,
        "plugin": {"name": card.plugin, "version": _version(card.plugin)},
    }
    own = None if building.has_new_head(model) else info.folder_config.get("labels")
    names = list(labels) if labels is not None else own
    if names is not None:
        table["labels"] = names
    return table


def _plain(config: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config)))
    except TypeError as error:
        raise errors.BadArgument(
            f"an argument of {card.name} cannot be written to config.json ({error}); builders should take plain values",
            argument="config",
            accepted=[],
        ) from error


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except (PackageNotFoundError, ValueError):  # a plugin registered in this process
        return None


def _first_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied tensor once."""
    copies = {name for group in building.tied_groups(model) for name in group[1:]}
    return {k: v for k, v in model.state_dict().items() if k not in copies and isinstance(v, Tensor)}


def _write_weights(state: Mapping[str, Tensor], folder: Path, table: Mapping[str, Any], limit: int) -> None:
    text = json.dumps(table, sort_keys=True)
    meta = {
        "zoo_config": text,
        "architecture": str(table["architecture"]),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    parts = _parts(state, limit)
    if len(parts) == 1:
        checkpoints.write_safetensors(parts[0], folder / "model.safetensors", meta=meta)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        checkpoints.write_safetensors(part, folder / name, meta=meta)
        weight_map.update({f"{k}::complex" if v.is_complex() else k: name for k, v in part.items()})
    total = sum(v.numel() * v.element_size() for v in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parts(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if parts[-1] and filled + size > limit:
            parts.append({})
            filled = 0
        parts[-1][key] = tensor
        filled += size
    return parts


def _replace_files(work: Path, folder: Path) -> None:
    new = {f.name for f in work.iterdir()}
    for file in sorted(work.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, folder / file.name)
    for old in folder.glob("model*.safetensors*"):
        if old.name not in new:
            old.unlink()
