"""Bytes: from a card, a Hub repository or the user's disk to files that can be opened.

What is inside a file is not known here. Every function either returns paths whose bytes are the right ones or
raises an error that says what to do (see :mod:`zoo_registry.errors`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from . import _disk as disk
from .card_files import package_path
from .cards import ModelCard, WeightsCard
from .derived import derived
from .errors import (
    BadCheckpoint,
    FileNotInRepo,
    HashMismatch,
    LicenceWarning,
    LocalFileMissing,
    NotCached,
    NotOnHub,
    NotPinnedWarning,
    NoWeights,
)
from .hub import Access, HubFile, cached, get
from .names import HubRepo, LocalPath, ModelName, Resolved, describe_tags, parse, resolve

__all__ = [
    "Files",
    "companions",
    "derived",
    "download",
    "fetch",
    "fetch_config",
    "fetch_repo",
    "hub_file",
    "is_cached",
    "local_files",
    "sha256",
]

log = logging.getLogger("zoo.store")

#: What a saved folder holds, in the order in which it is looked for.
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json")
#: Written by download(): which checkpoint the folder holds.
DOWNLOADED = "zoo-download.json"


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint. ``paths`` has one entry, or the shards in the order of their names."""

    paths: tuple[Path, ...]
    index: Path | None = None  #: the index of a sharded checkpoint
    config: Path | None = None  #: config.json of a folder or repository in the zoo's own format
    repo_id: str | None = None
    revision: str | None = None
    weight_map: Mapping[str, Path] = field(default_factory=dict, repr=False)  #: sharded: tensor -> its file

    @property
    def path(self) -> Path:
        """The only file. A sharded checkpoint has several; ask for ``paths`` and ``weight_map``."""
        if len(self.paths) != 1:
            raise ValueError(f"the checkpoint consists of {len(self.paths)} files; use .paths and .weight_map")
        return self.paths[0]

    @property
    def sharded(self) -> bool:
        return self.index is not None

    @property
    def size(self) -> int:
        """Bytes, without index and config."""
        return sum(path.stat().st_size for path in self.paths)


# -- by card -----------------------------------------------------------------------------------------------------


def fetch(
    model: str | ModelName | Resolved,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = False,
) -> Files:
    """The files of a published checkpoint.

    ``checkpoint`` is a local file or folder that the user has; it is taken instead and never changed (with
    ``verify=True`` its digest must be the card's). ``verify=True`` computes digests anew instead of trusting
    an earlier verdict; the other arguments are huggingface_hub's.

    Raises NoWeights for a model without weights, NotOnHub (with the place) for a checkpoint that its authors keep
    elsewhere, and the errors of :mod:`zoo_registry.hub` for everything that can happen on the way.
    """
    resolved = model if isinstance(model, Resolved) else resolve(model)
    card, weights = resolved.card, resolved.weights
    if checkpoint is not None:
        files = local_files(checkpoint)
        if verify and weights is not None and weights.sha256 and not files.sharded:
            _same(files.path, weights.sha256, resolved.name, again=True)
        return files
    if weights is None:
        raise NoWeights(
            f"{card.name} has no published weights; zoo.create({card.name!r}) builds it with random ones, checkpoint= "
            "loads a file of yours",
            name=card.name,
        )
    if weights.package_file is not None:
        path = package_path(card, weights.package_file)
        if weights.sha256:
            _same(path, weights.sha256, resolved.name, again=verify)
        return Files((path,))
    if weights.repo_id is None or weights.filename is None:
        raise NotOnHub(_not_on_hub(card, weights), name=resolved.name, where=weights.where)

    access = Access(cache_dir, token, local_files_only, force_download, verify)
    file = HubFile(weights.repo_id, weights.filename, weights.revision, weights.sha256, resolved.name)
    if cached(file, cache_dir) is None:
        _first_time(resolved.name, weights)
    return _with_shards(file, access, weights.shard_sha256)


def fetch_config(
    model: str | ModelName | Resolved,
    *,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = False,
) -> Path | None:
    """The original's own configuration, where the card names its ``config_file``; options as for :func:`fetch`."""
    resolved = model if isinstance(model, Resolved) else resolve(model)
    weights = resolved.weights
    if weights is None or weights.config_file is None or weights.repo_id is None:
        return None
    access = Access(cache_dir, token, local_files_only, force_download, verify)
    return get(HubFile(weights.repo_id, weights.config_file, weights.revision, None, resolved.name), access)


def companions(model: str | ModelName | Resolved, **options: Any) -> dict[tuple[str, str], Path]:
    """The files in other repositories that the card names beside the weights: (repository, name) to the file; options
    as for :func:`hub_file`. One that its repository lacks is left out, with a message."""
    resolved = model if isinstance(model, Resolved) else resolve(model)
    found = {}
    for repo_id, names in ({} if resolved.weights is None else resolved.weights.companions).items():
        for name in names:
            try:
                found[repo_id, name] = hub_file(repo_id, name, **options)
            except FileNotInRepo as error:
                log.warning("%s goes without %s: %s", resolved.name, name, error)
    return found


def companion_in(folder: str | os.PathLike[str], repo_id: str, filename: str) -> Path:
    """Where :func:`download` puts a companion."""
    return Path(folder) / "companions" / repo_id.replace("/", "--") / filename


def _first_time(name: str, weights: WeightsCard) -> None:
    """What a user should know before the first download."""
    if weights.licence and any(
        fnmatchcase(weights.licence.lower(), p) for p in ("*-nc*", "*non-commercial*", "*research*")
    ):
        warnings.warn(f"the weights {name} are licensed {weights.licence}, which restricts their use", LicenceWarning)
    if weights.revision is None and weights.sha256 is None:
        warnings.warn(
            f"the card of {name} pins neither a revision nor a digest of {weights.repo_id}: the newest file is loaded, "
            "and kept until force_download=True",
            NotPinnedWarning,
        )


def _not_on_hub(card: ModelCard, weights: WeightsCard) -> str:
    name = card.full_name(weights)
    others = [line for line in describe_tags(card) if "checkpoint=" not in line]
    text = (
        f"{name} is not on the Hub. Its authors put it here: {weights.where}. Fetch the file and pass it: "
        f"zoo.load({name!r}, checkpoint='PATH')"
    )
    return text + (f". These can be loaded directly: {'; '.join(others)}" if others else "")


def _same(path: Path, expected: str, name: str, *, again: bool) -> None:
    """A file of the user or of a plugin: compared, never touched."""
    received = disk.digest(path, again=again)
    if received != expected:
        raise HashMismatch(
            f"{name}: {path} is not the file that the card describes: sha256 expected {expected}, received {received}. "
            "The file was not changed and not used",
            path=str(path),
            expected=expected,
            received=received,
            name=name,
        )


def sha256(path: str | os.PathLike[str], *, again: bool = False) -> str:
    """The digest of a file, remembered for as long as its path, size and time stay the same."""
    return disk.digest(Path(path), again=again)


def is_cached(model: str | ModelName | Resolved, *, cache_dir: str | Path | None = None) -> bool:
    """Whether ``fetch`` needs no network for this checkpoint."""
    try:
        fetch(model, cache_dir=cache_dir, local_files_only=True)
    except (NotCached, NoWeights, NotOnHub, HashMismatch):
        return False
    return True


# -- shards ------------------------------------------------------------------------------------------------------


def _with_shards(file: HubFile, access: Access, digests: Mapping[str, str]) -> Files:
    """A file of the Hub, and the files that it names when it is an index."""
    path = get(file, access)
    revision = file.revision or _revision_of(path)
    if not file.filename.endswith(".index.json"):
        return Files((path,), repo_id=file.repo_id, revision=revision)
    # All shards come from the commit that the index came from, also where the card pins none.
    shards = {
        name: get(HubFile(file.repo_id, sibling(file.filename, name), revision, digests.get(name), file.name), access)
        for name in shard_names(path)
    }
    return Files(
        tuple(shards.values()),
        index=path,
        repo_id=file.repo_id,
        revision=revision,
        weight_map=_weight_map(path, shards),
    )


def _revision_of(path: Path) -> str | None:
    """The commit that a file of the cache belongs to (the folder below ``snapshots``)."""
    parts = path.parts
    at = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else -1
    return parts[at + 1] if 0 <= at < len(parts) - 1 else None


def sibling(filename: str, name: str) -> str:
    """The path in its repository of a shard that lies beside ``filename``."""
    folder = filename.rpartition("/")[0]
    return f"{folder}/{name}" if folder else name


def _index(path: Path) -> dict[str, str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = dict(entries)
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{path} is no index of a sharded checkpoint (expected JSON with a 'weight_map'): {error}", path=str(path)
        ) from error
    for name in names.values():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise BadCheckpoint(
                f"{path} names the shard {name!r}; expected a file name without folders", path=str(path)
            )
    return names


def shard_names(path: Path) -> list[str]:
    """The files that an index names, sorted."""
    return sorted(set(_index(path).values()))


def _weight_map(path: Path, shards: Mapping[str, Path]) -> dict[str, Path]:
    return {tensor: shards[name] for tensor, name in _index(path).items()}


# -- by repository and by path -----------------------------------------------------------------------------------


def hub_file(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = False,
) -> Path:
    """Any one file of a repository on the Hub, checked and explained as by :func:`fetch`.

    Without a commit hash as ``revision`` the Hub is asked whether the file has changed; when it cannot be reached,
    the copy in the cache serves and a message says so.
    """
    access = Access(cache_dir, token, local_files_only, force_download, verify, newest=True)
    return get(HubFile(repo_id, filename, revision, sha256), access)


def fetch_repo(
    repo: str | HubRepo,
    *,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = False,
) -> Files:
    """A repository in the zoo's own format (``hf-hub:org/repo@revision``): config.json and the weights.

    Without a commit hash the Hub is asked for the newest commit of the branch; the weights come from the same commit
    as config.json. When the Hub cannot be reached, the copy in the cache serves and a message says so.
    """
    source = parse(repo) if isinstance(repo, str) else repo
    if not isinstance(source, HubRepo):
        raise ValueError(f"{repo!r} is no Hub repository; expected 'hf-hub:ORGANISATION/REPOSITORY'")
    access = Access(cache_dir, token, local_files_only, force_download, verify, newest=True)
    config = get(HubFile(source.repo_id, "config.json", source.revision, None, str(source)), access)
    revision = _revision_of(config) or source.revision
    for name in WEIGHT_NAMES:
        try:
            files = _with_shards(HubFile(source.repo_id, name, revision, None, str(source)), access, {})
        except (FileNotInRepo, NotCached) as error:
            if name == WEIGHT_NAMES[-1]:
                if isinstance(error, NotCached):
                    raise
                raise FileNotInRepo(
                    f"{source} has neither {' nor '.join(WEIGHT_NAMES)}: it holds no weights that the zoo can read",
                    repo_id=source.repo_id,
                    revision=revision,
                ) from error
            continue
        return replace(files, config=config)
    raise AssertionError("unreachable")


def local_files(path: str | os.PathLike[str] | LocalPath) -> Files:
    """A file of the user, the index of a sharded checkpoint, or a folder that holds one of either.

    A folder holds ``model.safetensors`` or its index, else exactly one file that looks like a checkpoint.
    """
    path = path.path if isinstance(path, LocalPath) else Path(os.path.expanduser(path))
    if not path.exists():
        raise LocalFileMissing(f"there is no file or folder {path} (looked at {path.absolute()})", path=str(path))
    if path.is_dir():
        config = path / "config.json"
        files = local_files(_checkpoint_in(path))
        return replace(files, config=config if config.is_file() else None)
    if not path.name.endswith(".index.json"):
        return Files((path,))
    shards = {}
    for name in shard_names(path):
        shards[name] = path.with_name(name)
        if not shards[name].is_file():
            raise LocalFileMissing(f"{path} names the shard {name}, which is not beside it", path=str(shards[name]))
    return Files(tuple(shards.values()), index=path, weight_map=_weight_map(path, shards))


def _checkpoint_in(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(
        p
        for p in folder.iterdir()
        if p.name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".msgpack", ".index.json"))
    )
    indices = [p for p in found if p.name.endswith(".index.json")]
    if len(indices) == 1:
        return indices[0]
    if len(found) == 1:
        return found[0]
    if not found:
        raise LocalFileMissing(
            f"the folder {folder} holds no checkpoint; expected {WEIGHT_NAMES[0]}, {WEIGHT_NAMES[1]}, or one other "
            "file",
            path=str(folder),
        )
    raise BadCheckpoint(
        f"the folder {folder} holds {len(found)} checkpoints ({', '.join(p.name for p in found[:5])}); name the file",
        path=str(folder),
    )


# -- for machines without a network ------------------------------------------------------------------------------


def download(model: str | ModelName | Resolved, to: str | os.PathLike[str], **options: Any) -> Files:
    """Copy a checkpoint's files into a folder, to be carried to another machine: its own, and its companions.

    ``zoo-download.json`` beside them says which checkpoint it is (its card, and the digest of every file). Options
    as for :func:`fetch`. A file appears under its name only when it is whole.
    """
    resolved = model if isinstance(model, Resolved) else resolve(model)
    files = fetch(resolved, **options)
    config = fetch_config(resolved, **options)
    beside = companions(resolved, **options)
    folder = Path(to).expanduser()
    own = (*files.paths, *(extra for extra in (files.index, config) if extra is not None))
    copies = {path: folder / path.name for path in own}
    copies |= {path: companion_in(folder, *place) for place, path in beside.items()}
    try:
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(path, temporary)
                disk.commit(temporary, copy)
            finally:
                temporary.unlink(missing_ok=True)
        disk.write_json(
            folder / DOWNLOADED,
            {
                "name": resolved.name,
                "repo_id": files.repo_id,
                "revision": files.revision,
                "files": {str(copy.relative_to(folder)): disk.digest(path) for path, copy in copies.items()},
                "card": msgspec.to_builtins(resolved.card),
            },
        )
    except OSError as error:
        if disk.is_full(error):
            raise disk.disk_full(
                folder, needed=files.size, what=resolved.name, advice="Choose a larger disk"
            ) from error
        raise disk.unwritable(folder, error) from error
    return Files(
        tuple(copies[path] for path in files.paths),
        index=copies[files.index] if files.index else None,
        repo_id=files.repo_id,
        revision=files.revision,
        weight_map={tensor: copies[path] for tensor, path in files.weight_map.items()},
    )


def downloaded_name(folder: str | os.PathLike[str]) -> str | None:
    """The name of the checkpoint that :func:`download` put into a folder; None for any other folder."""
    facts = disk.read_json(Path(folder) / DOWNLOADED)
    name = facts.get("name") if facts else None
    return name if isinstance(name, str) else None
