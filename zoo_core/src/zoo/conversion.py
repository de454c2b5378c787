"""Between the originals' formats and the zoo's: reading checkpoints through reference adapters, and writing them again.

A published file in the original's format is converted once: opened safely (:mod:`zoo.checkpoints`), renamed by the
adapter's key table, written as safetensors under the zoo's keys, and kept by the store. From then on it is mapped like
any other file.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo_registry import ModelCard, WeightsCard, errors, resolve, store

from . import building, catalog, checkpoints
from .files import whole

if TYPE_CHECKING:
    from .reference import ReferenceAdapter

logger = logging.getLogger("zoo")

State = dict[str, Tensor]


def from_reference(
    system: str, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = ""
) -> nn.Module:
    """Our model with the original's weights, from the original constructor's arguments and its state dict.

    ``system``: id of a published system ("vim"); ``source``: which of its classes, where it has several.
    Short for ``zoo.reference(system).build(config, state, source=source)``.
    """
    for name, value in (("config", config), ("state", state)):
        if not isinstance(value, Mapping):
            raise errors.BadArgument(
                f"{name} is a {type(value).__name__}; expected two mappings: the original constructor's arguments, and "
                "its state dict",
                argument=name,
                accepted=[],
            )
    return catalog.adapter(system).build(config, state, source=source)


# -- for the loader --------------------------------------------------------------------------------------------------


def is_foreign(weights: WeightsCard | None) -> bool:
    """Whether a published checkpoint must be converted before it can be mapped."""
    return weights is not None and (weights.format != "safetensors" or weights.converter is not None)


def read_published(
    files: store.Files,
    card: ModelCard,
    weights: WeightsCard | None,
    model: Callable[[], nn.Module],
    *,
    device: str,
) -> State:
    """The tensors of a published checkpoint under the zoo's keys. ``model()`` gives the published configuration on the
    meta device; it is called when a conversion is due."""
    if weights is None or not is_foreign(weights) or "zoo_config" in _said(files):
        return checkpoints.read_safetensors(files.paths, device=device)
    system = weights.converter or card.system

    def produce(path: Path) -> None:
        logger.info("converting %s (once) from the format of %s", files.paths[0].name, system)
        state = _foreign_state(files, weights.format, weights.subkey)
        _write(_through(catalog.adapter(system), state, model(), files), path)

    converted = store.derived(list(files.paths), _key(system, card, weights.subkey), produce)
    return checkpoints.read_safetensors([converted], device=device)


def read_own(
    files: store.Files,
    card: ModelCard,
    weights: WeightsCard | None,
    model: nn.Module,
    *,
    subkey: str | None,
    device: str,
) -> State:
    """The tensors of a user's file under the zoo's keys, whichever of the two formats it is in.

    A file that ``zoo.save`` wrote says so. For others both readings are compared with keys and shapes of ``model``, the
    one that fits better is taken; an error then speaks about that one.
    """
    if "zoo_config" in _said(files):
        return checkpoints.read_safetensors(files.paths, device=device)
    state = _foreign_state(files, None, subkey, hint=weights.subkey if weights is not None else None)
    own = _shapes(model.state_dict(keep_vars=True))
    as_is = len(own ^ _shapes(state))
    if as_is == 0:
        return _moved(state, device)
    system = (weights.converter if weights is not None else None) or card.system
    try:
        adapter = catalog.adapter(system)
        theirs = _shapes(_through(adapter, {k: v.to("meta") for k, v in state.items()}, model, files))
    except (errors.UnknownSystem, NotImplementedError, errors.BadCheckpoint) as error:
        logger.info("%s is not in the format of %s (%s)", files.paths[0], system, error)
        return _moved(state, device)
    if len(own ^ theirs) >= as_is:
        return _moved(state, device)
    logger.info("%s is read in the original format of %s", files.paths[0], system)
    converted = store.derived(
        list(files.paths),
        _key(system, card, subkey),
        lambda path: _write(_through(adapter, state, model, files), path),
    )
    return checkpoints.read_safetensors([converted], device=device)


def _shapes(state: Mapping[str, Any]) -> set[tuple[str, tuple[int, ...]]]:
    """Keys with their shapes: two formats may share every key. Counters do not tell formats apart."""
    named = ((k, v) for k, v in state.items() if isinstance(v, Tensor) and not k.endswith(".num_batches_tracked"))
    return {(k, tuple(v.shape)) for k, v in named}


def _said(files: store.Files) -> dict[str, str]:
    return checkpoints.metadata(files.paths[0])


def _foreign_state(files: store.Files, format: str | None, subkey: str | None, hint: str | None = None) -> State:
    state: State = {}
    for path in files.paths:
        try:
            state.update(checkpoints.read_foreign(path, format=format, subkey=subkey or hint))
        except errors.BadCheckpoint:
            if subkey is not None or hint is None:
                raise
            state.update(checkpoints.read_foreign(path, format=format))
    return state


def _through(adapter: ReferenceAdapter, state: Mapping[str, Tensor], model: nn.Module, files: store.Files) -> State:
    try:
        return adapter.to_zoo(state, model=model)
    except (ValueError, KeyError) as error:
        if isinstance(error, errors.ZooError):
            raise
        raise errors.BadCheckpoint(
            f"{files.paths[0]} does not follow the format of {adapter.system}: {error}", path=str(files.paths[0])
        ) from error


def _write(state: State, path: Path) -> None:
    checkpoints.write_safetensors(state, path)


def _moved(state: State, device: str) -> State:
    return state if device == "cpu" else {k: v.to(device) for k, v in state.items()}


def _key(system: str, card: ModelCard, subkey: str | None) -> str:
    """Names a conversion by everything that it depends on beside the file: the adapter's code is part of it, so that a
    corrected key table never meets what the old one wrote."""
    digest = hashlib.sha256()
    for module in (inspect.getmodule(type(catalog.adapter(system))), checkpoints, building):
        file = getattr(module, "__file__", None)
        digest.update(Path(file).read_bytes() if file else repr(module).encode())
    digest.update(repr((card.name, card.config, subkey)).encode())
    return f"{system}-{digest.hexdigest()[:16]}"


# -- for the user ----------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "zoo",
    model: str | None = None,
    system: str | None = None,
    config: Mapping[str, Any] | None = None,
    subkey: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint in the other format; returns the path written.

    ``to="zoo"``: ``source`` is a file in an original's format. With ``model`` (an architecture of the zoo, with
    ``overrides`` of its arguments) ``out`` becomes a folder as ``zoo.save`` writes it, or its one file where ``out``
    ends in .safetensors; with ``system`` and ``config`` (the original constructor's arguments) it becomes one
    .safetensors file under the zoo's keys. ``source`` may also be a name of the zoo ("vim_tiny.in1k"), whose published
    file is fetched and converted.

    ``to="reference"``: ``source`` is anything that ``zoo.load`` takes, or a .safetensors file under the zoo's keys
    together with ``system``; ``out`` becomes a file that the original reads: a state dict as .safetensors, or as .pth,
    .pt, .bin (a torch file).

    Raises UnsafeFile for a pickle that holds code, KeysDoNotMatch or BadCheckpoint when the file is of another system,
    NotImplementedError when a system's adapter has no key table back.
    """
    out = Path(out).expanduser()
    if to == "zoo" and model is None and system is None and _is_name(source):
        from .loading import load

        return _saved(load(source, **overrides), out)
    if to == "zoo":
        return _to_zoo(Path(os.path.expanduser(source)), out, model, system, config, subkey, overrides)
    if to == "reference":
        return _to_reference(source, out, system, overrides)
    raise errors.BadArgument(
        f"to is {to!r}; expected 'zoo' or 'reference'", argument="to", accepted=["zoo", "reference"]
    )


def _is_name(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` is a model of the zoo, and no file of that name lies here."""
    if not isinstance(source, str) or os.path.exists(os.path.expanduser(source)):
        return False
    try:
        resolve(source)
    except (errors.UnknownModel, errors.BadName, errors.LocalFileMissing):
        return False
    return True


def _to_zoo(
    source: Path,
    out: Path,
    name: str | None,
    system: str | None,
    config: Mapping[str, Any] | None,
    subkey: str | None,
    overrides: Mapping[str, Any],
) -> Path:
    from .loading import load

    if name is not None:
        return _saved(load(name, checkpoint=source, subkey=subkey, **overrides), out)
    if not source.exists():
        raise errors.LocalFileMissing(
            f"there is no file {source} (looked at {source.absolute()}), and no model of that name", path=str(source)
        )
    if system is None or config is None:
        raise errors.BadArgument(
            f"it was not said what {source} is a checkpoint of: give model (an architecture of the zoo), or system "
            "together with config (the original constructor's arguments)",
            argument="model",
            accepted=["model", "system and config"],
        )
    built = from_reference(system, config, checkpoints.read_foreign(source, subkey=subkey))
    state = {k: v for k, v in _untied(built).items() if isinstance(v, Tensor)}
    return _atomically(out, lambda path: _write(state, path))


def _saved(model: nn.Module, out: Path) -> Path:
    """``zoo.save``; where ``out`` ends in .safetensors, the file alone, which says everything itself."""
    from .saving import save

    if out.suffix != ".safetensors" or out.is_dir():
        return save(model, out)
    with whole(out) as temporary:
        folder = save(model, temporary.with_suffix(""), shard_bytes=1 << 62)
        try:
            os.replace(folder / "model.safetensors", temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return out


def _to_reference(source: str | os.PathLike[str], out: Path, system: str | None, overrides: Mapping[str, Any]) -> Path:
    from .loading import load

    bare = Path(os.path.expanduser(source)) if re.search(r"[/\\]|\.safetensors$", os.fspath(source)) else None
    if system is not None and bare is not None and bare.is_file():
        state = catalog.adapter(system).to_reference(checkpoints.read_safetensors([bare]))
    else:
        model = load(source, **overrides)
        card = model.zoo_info.card  # type: ignore[union-attr]
        adapter = catalog.adapter(system or card.system)
        state = adapter.to_reference(_untied(model), model=model)
    if out.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise errors.BadArgument(
            f"out is {out}; expected a file that ends in .safetensors, or in .pth, .pt or .bin for a torch file",
            argument="out",
            accepted=[".safetensors", ".pth", ".pt", ".bin"],
        )
    if out.suffix != ".safetensors":
        plain = {k: v.detach().contiguous().clone() for k, v in state.items()}
        return _atomically(out, lambda path: torch.save(plain, path))
    return _atomically(out, lambda path: _write(dict(state), path))


def _untied(model: nn.Module) -> State:
    """The state dict, each tied tensor under its first name only."""
    copies = {name for group in building.tied_groups(model) for name in group[1:]}
    return {k: v for k, v in model.state_dict().items() if k not in copies}


def _atomically(out: Path, write: Callable[[Path], None]) -> Path:
    """Write beside ``out`` and move into place, so that a reader never sees half a file."""
    with whole(out) as temporary:
        write(temporary)
    return out
