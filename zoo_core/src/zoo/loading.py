"""``zoo.load``: from a name, a repository, a folder or a file to a model that is ready to answer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from zoo_registry import HubRepo, LocalPath, ModelCard, ModelName, Resolved, WeightsCard, errors, parse, resolve, store

from . import building, catalog, checkpoints, conversion, placement
from .adapting import adapt
from .building import ZooInfo

logger = logging.getLogger("zoo")

#: The newest ``format`` of a config.json that this version reads.
FORMAT = 1


@dataclass
class Located:
    """A source whose card is known. ``files()`` fetches its bytes."""

    name: str
    card: ModelCard
    weights: WeightsCard | None = None
    config: dict[str, Any] = field(default_factory=dict)  #: arguments of the builder, beyond the card's own
    folder_config: dict[str, Any] = field(default_factory=dict)
    found: store.Files | None = None
    own: bool = False  #: a file of the user, whose format is not known beforehand


def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    max_memory: Mapping[int | str | torch.device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    subkey: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Build a model and give it its weights; returns it in eval mode.

    ``source`` is one of

    * "architecture.tag" or "architecture" (its default tag): a published checkpoint (see ``zoo.list``);
    * "hf-hub:organisation/repository" or "...@revision": a repository that ``zoo.push`` wrote;
    * a folder that ``zoo.save`` or ``zoo.download`` wrote, or one .safetensors file of ``zoo.save``: given as a
      ``Path``, or as text that begins with "./", "/" or "~".

    ``checkpoint``: weights of your own for the architecture ``source``, a file in the zoo's or in the original's format
    (with ``subkey`` where its state dict lies, if it is not plain). ``overrides`` are arguments of the model's builder:
    ``num_classes=10``, ``in_chans=4``, ``drop_path_rate=0.1``; what they change in the weights is logged and listed in
    ``model.zoo_info.changes``, and nothing else may differ.

    ``device`` and ``dtype`` say where and as what the parameters shall be; by default on the CPU, and of the weights
    card's type, or else the file's. ``device_map`` instead of ``device`` spreads
    a large model over accelerators, the CPU and a disk ("auto", or module names to devices), with ``max_memory`` for
    each and ``offload_folder`` for the disk: see :func:`zoo.placement.place`; it needs accelerate. ``revision``,
    ``cache_dir``, ``token``, ``local_files_only`` and ``force_download`` are huggingface_hub's; ``verify`` computes the
    digest anew.

    The weights are mapped and assigned, never copied; loading is strict. Raises ``zoo.errors``: UnknownModel,
    NotOnHub, NotCached, HashMismatch, KeysDoNotMatch, UnsafeFile ... each says what to do.
    """
    access = {
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "force_download": force_download,
        "verify": verify,
    }
    if device_map is None and not (max_memory is None and offload_folder is None):
        raise errors.BadArgument(
            "max_memory and offload_folder belong to device_map, which was not given",
            argument="device_map",
            accepted=["auto"],
        )
    if subkey is not None and checkpoint is None:
        raise errors.BadArgument(
            f"subkey is {subkey!r} and checkpoint was not given, in which it says where the state dict lies",
            argument="subkey",
            accepted=[],
        )
    if device_map is not None:
        if device is not None:
            raise errors.BadArgument(
                f"both device={device!r} and device_map={device_map!r} were given; expected one of them",
                argument="device_map",
                accepted=[],
            )
        placement.needed()  # before anything is fetched
    device, dtype = placement.checked_device(device), placement.checked_dtype(dtype)
    if device is not None and device.type == "meta":
        raise errors.BadArgument(
            "device is 'meta', which holds no numbers; zoo.create(..., device='meta') builds a model without weights",
            argument="device",
            accepted=[],
        )
    located = locate(source, checkpoint=checkpoint, revision=revision, **access)
    if checkpoint is None and located.weights is not None and located.weights.config_file is not None:
        # a folder of zoo.save never gets here: it says everything itself
        located.config.update(_original_config(located, revision=revision, **access))
    base = {**located.card.config, **located.config}
    config = {**base, **overrides}
    model = building.skeleton(located.card, config)
    files = located.found or fetch(located, checkpoint=checkpoint, revision=revision, **access)
    target = "cpu" if device is None else str(device)
    what = f"{located.name if checkpoint is None else os.fspath(checkpoint)} for {located.card.name}"
    if located.own or checkpoint is not None:
        state = conversion.read_own(files, located.card, located.weights, model, subkey=subkey, device=target)
    else:
        plain = model if not overrides or not conversion.is_foreign(located.weights) else None
        state = conversion.read_published(
            files,
            located.card,
            located.weights,
            lambda: plain if plain is not None else building.skeleton(located.card, base),
            device=target,
        )
    put(model, located.card, config, state, overrides, what=what, device=target)
    weights = located.weights
    changes = model.zoo_info.changes  # type: ignore[union-attr]
    if weights is not None and any(building.HEAD.search(change) for change in changes):
        count = overrides.get("num_classes", overrides.get("n_class"))
        weights = msgspec.structs.replace(weights, labels=None, num_classes=count)
    info = ZooInfo(
        located.card.name,
        None if checkpoint is not None or weights is None or weights.tag == "saved" else weights.tag,
        config,
        dict(overrides),
        source=_words(files, located, checkpoint),
        changes=changes,
        card=located.card,
        weights=weights,
        folder_config=located.folder_config if weights is located.weights else {},
        folder=None if located.found is None or located.found.repo_id else located.found.paths[0].parent,
        access={"cache_dir": cache_dir, "local_files_only": local_files_only},
    )
    building.describe(model, info)
    if dtype is None and checkpoint is None and located.weights is not None:
        dtype = located.weights.dtype
    kind = placement.checked_dtype(dtype)
    if device_map is not None:
        folder = None if offload_folder is None else Path(offload_folder)
        return placement.place(model.eval(), device_map, max_memory=max_memory, offload_folder=folder, dtype=kind)
    if device is not None or kind is not None:
        model = model.to(device=device, dtype=kind)
    return model.eval()


def put(
    model: nn.Module,
    card: ModelCard,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    *,
    what: str,
    device: str = "cpu",
) -> None:
    """Fit ``state`` to a model on the meta device, assign it, and restore what it does not carry; in place."""
    fitted, report = adapt(model, state, overrides)
    if report:
        own = model.state_dict(keep_vars=True)
        fresh = [key for key in report if key in own and key not in fitted]
        if fresh:  # their values come from an ordinary build, so that they are what the model's author meant
            values = building.construct(card, config).state_dict()
            fitted.update({key: values[key].to(device) for key in fresh})
        logger.warning("%s: %s", what, "; ".join(f"{key} {said}" for key, said in report.items()))
    try:
        building.fill(model, fitted, what=what, explained=report)
    except errors.KeysDoNotMatch as error:
        if overrides and not report:
            error.add_note(
                f"given were {', '.join(f'{k}={v!r}' for k, v in overrides.items())}; {type(model).__name__} does not "
                "say how these change its weights (see zoo.adapting)"
            )
        raise
    building.restore_derived(model, card, config)
    building.describe(model, ZooInfo(card.name, None, dict(config), changes=[f"{k}: {v}" for k, v in report.items()]))


# -- where it is -----------------------------------------------------------------------------------------------------


def locate(
    source: str | os.PathLike[str], *, checkpoint: Any = None, revision: str | None = None, **access: Any
) -> Located:
    """The card behind a source. Names need no bytes; repositories and folders are read as far as their config.json."""
    wanted = parse(source)
    if isinstance(wanted, ModelName):
        resolved = resolve(wanted)
        weights = resolved.weights
        name = resolved.name if checkpoint is None else resolved.card.name
        tagged = weights is not None and (checkpoint is None or wanted.tag is not None)
        return Located(name, resolved.card, weights, dict(weights.config) if tagged and weights is not None else {})
    if checkpoint is not None:
        raise errors.BadArgument(
            f"checkpoint= belongs to the name of an architecture; {source!r} already says where the weights are",
            argument="checkpoint",
            accepted=[],
        )
    if isinstance(wanted, HubRepo):
        if revision is not None:
            wanted = HubRepo(wanted.repo_id, revision)
        files = store.fetch_repo(wanted, **access)
        assert files.config is not None
        return _from_config(files.config, files, str(wanted))
    return _local(wanted)


def _local(wanted: LocalPath) -> Located:
    path = wanted.path
    if path.is_dir() and (name := store.downloaded_name(path)) is not None:
        resolved = resolve(name)
        config = dict(resolved.weights.config) if resolved.weights is not None else {}
        return Located(name, resolved.card, resolved.weights, config, found=store.local_files(path))
    files = store.local_files(wanted)
    if files.config is not None:
        return _from_config(files.config, files, str(path))
    said = checkpoints.metadata(files.paths[0])
    if "zoo_config" not in said:
        raise errors.BadCheckpoint(
            f"{path} does not say which model it belongs to; give the architecture as well: "
            f"zoo.load('ARCHITECTURE', checkpoint={str(path)!r})",
            path=str(path),
        )
    return _from_table(json.loads(said["zoo_config"]), files, str(path))


def _from_config(file: Path, files: store.Files, name: str) -> Located:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.BadCheckpoint(f"{file} is not JSON: {error}", path=str(file)) from error
    if not isinstance(table, dict) or table.get("library") != "zoo":
        kind = table.get("library") or table.get("model_type") if isinstance(table, dict) else None
        origin = f"of {kind!r}" if kind else "of another library"
        raise errors.BadCheckpoint(
            f"{name} was not written by the zoo (its config.json is {origin}). "
            "To read an original checkpoint, name the architecture: zoo.load('ARCHITECTURE', checkpoint=FILE)",
            path=str(file),
        )
    return _from_table(table, files, name)


def _from_table(table: dict[str, Any], files: store.Files, name: str) -> Located:
    if int(table.get("format", 0)) > FORMAT:
        raise errors.FormatTooNew(
            f"{name} was written by zoo {table.get('zoo_version')} in format {table['format']}; this version reads up "
            f"to {FORMAT}: pip install -U ssm-zoo",
            format=table["format"],
            supported=FORMAT,
        )
    try:
        card = resolve(table["architecture"]).card
    except errors.UnknownModel as error:
        plugin = (table.get("plugin") or {}).get("name")
        if plugin:
            error.add_note(f"{name} was saved with the plugin {plugin}: pip install {plugin}")
        raise
    weights = _weights_of(table.get("pretrained_cfg") or {}, name)
    # The folder holds the whole configuration, so it does not change when the card's defaults do.
    return Located(name, card, weights, dict(table.get("model_args") or {}), table, files)


def _weights_of(facts: dict[str, Any], name: str) -> WeightsCard | None:
    """What a saved folder says about its weights; its own words count, not those of today's card."""
    if not facts:
        return None
    try:
        return msgspec.convert({"tag": "saved", **facts, "where": name}, WeightsCard)
    except msgspec.ValidationError as error:
        raise errors.BadCheckpoint(f"{name}: pretrained_cfg in config.json is damaged: {error}", path=name) from error


def fetch(located: Located, *, checkpoint: Any, revision: str | None, **access: Any) -> store.Files:
    """The files of a located name."""
    return store.fetch(_at(located, revision), checkpoint=checkpoint, **access)


def _original_config(located: Located, *, revision: str | None, **access: Any) -> dict[str, Any]:
    """The builder's arguments from the configuration that the original keeps beside this checkpoint."""
    weights = located.weights
    assert weights is not None
    assert weights.converter is not None
    name = Path(str(weights.config_file)).name
    if located.found is not None:  # a folder of zoo.download
        file = located.found.paths[0].with_name(name)
        if not file.is_file():
            raise errors.LocalFileMissing(
                f"{file} is missing: {located.name} cannot be built without it; zoo.download({located.name!r}) anew",
                path=str(file),
            )
    else:
        found = store.fetch_config(_at(located, revision), **access)
        assert found is not None
        file = found
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return catalog.adapter(weights.converter).arguments(table)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.BadCheckpoint(
            f"{file} is no configuration of {located.name} as its authors write it: {type(error).__name__}: {error}",
            path=str(file),
        ) from error


def _at(located: Located, revision: str | None) -> Resolved:
    """The name with its checkpoint at another commit, if one is asked for."""
    weights = located.weights
    if revision is not None and weights is not None and weights.on_hub:
        weights = msgspec.structs.replace(weights, revision=revision if _is_hash(revision) else None, sha256=None)
        if not _is_hash(revision):
            raise errors.BadArgument(
                f"revision is {revision!r}; for a named checkpoint expected a commit hash of 40 hexadecimal digits",
                argument="revision",
                accepted=[],
            )
    return Resolved(located.card, weights)


def _is_hash(text: str) -> bool:
    return len(text) == 40 and all(c in "0123456789abcdef" for c in text)


def card_of(source: str | os.PathLike[str], **access: Any) -> ModelCard:
    """The model card behind anything that :func:`load` takes."""
    return locate(source, **access).card


def _words(files: store.Files, located: Located, checkpoint: Any) -> str:
    if checkpoint is not None:
        return f"the file {os.fspath(checkpoint)}"
    if files.repo_id is not None:
        return f"hf-hub:{files.repo_id}" + (f"@{files.revision}" if files.revision else "")
    return (
        f"the file {files.paths[0]}"
        if len(files.paths) == 1
        else f"{len(files.paths)} files in {files.paths[0].parent}"
    )
