"""Every exception of the zoo, in one place (``zoo.errors`` is this module).

Each class is a :class:`ZooError` and also the builtin that a caller would expect, so both
``except zoo.errors.NotOnHub`` and ``except FileNotFoundError`` work. Each message says what was received, what is
accepted and what to do next. Facts that a program may want (``repo_id``, ``path``, ``nearest`` ...) are attributes.

``exit_code`` is what the command line ends with: 2 a wrong name or argument, 3 something is not there,
4 the network, 5 the bytes are not what they should be, 6 a plugin, 7 the disk.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class ZooError(Exception):
    """Base class of all errors of the zoo. Keyword arguments become attributes, and are kept together in ``facts``."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts
        for name, value in facts.items():  # not __dict__: ``filename`` and ``path`` are slots of some builtins
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self.facts), self.args

    # Without this a KeyError prints the repr of its message and an OSError its errno.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


# -- names -------------------------------------------------------------------------------------------------------


class UnknownModel(ZooError, KeyError):
    """No installed plugin has a model of this name. ``name``, ``nearest``."""

    exit_code = 2


class UnknownTag(UnknownModel):
    """The model exists, this tag of it does not. ``name``, ``tag``, ``tags``."""


class UnknownSystem(ZooError, KeyError):
    """No installed plugin has a reference adapter for this system. ``system``, ``nearest``."""

    exit_code = 2


class UnknownTask(ZooError, KeyError):
    """No installed plugin has a pipeline for this task. ``task``, ``nearest``."""

    exit_code = 2


class BadName(ZooError, ValueError):
    """The text cannot be a model name, or could be two different things. ``name``."""

    exit_code = 2


class BadFilter(ZooError, ValueError):
    """A filter of ``zoo.list`` has a value that nothing can match. ``filter``, ``value``, ``accepted``."""

    exit_code = 2


# -- cards and plugins -------------------------------------------------------------------------------------------


class CardError(ZooError, ValueError):
    """A card breaks a rule. The message names the file, the model and the field."""

    exit_code = 6


class PluginError(ZooError, ImportError):
    """A plugin cannot be used. ``plugin``, ``distribution``, ``version``."""

    exit_code = 6


class PluginApiMismatch(PluginError):
    """A plugin was written for another hook API. ``api``, ``supported``."""


class DuplicateName(ZooError, ValueError):
    """Two plugins claim one name. ``kind``, ``name``, ``distributions``."""

    exit_code = 6


class MissingExtra(ZooError, ImportError):
    """An optional dependency is not installed. ``extra``, ``command``."""

    exit_code = 6


class ZooWarning(UserWarning):
    """Base class of all warnings of the zoo."""


class BrokenPluginWarning(ZooWarning):
    """A plugin was left out; the message says why and how to disable it."""


class RenamedModelWarning(ZooWarning, FutureWarning):
    """A model was asked for by a former name; the message gives the present one."""


class NotPinnedWarning(ZooWarning):
    """A card names no revision or no digest, so that what is loaded may change when its authors change it."""


class LicenceWarning(ZooWarning):
    """Weights whose licence restricts their use are being downloaded for the first time."""


# -- bytes -------------------------------------------------------------------------------------------------------


class StoreError(ZooError, OSError):
    """The bytes of a checkpoint cannot be had. ``repo_id``, ``filename``, ``revision`` where they apply."""

    exit_code = 3


class NoWeights(StoreError, FileNotFoundError):
    """No weights are known for this model: it can be created, not loaded. ``name``."""


class NotOnHub(StoreError, FileNotFoundError):
    """The checkpoint exists, but its authors did not put it on the Hub. ``name``, ``where``."""


class LocalFileMissing(StoreError, FileNotFoundError):
    """A file or folder given by the user, or one that a plugin should contain, is not there. ``path``."""


class RepoNotFound(StoreError, FileNotFoundError):
    """The Hub has no such repository, or hides it from this token."""


class RevisionNotFound(StoreError, FileNotFoundError):
    """The repository exists, this revision of it does not."""


class FileNotInRepo(StoreError, FileNotFoundError):
    """The repository exists, this file is not in it."""


class AccessDenied(StoreError, PermissionError):
    """The Hub refuses: the repository is gated or private, or the token is wrong (401, 403). ``status``."""


class RepoHidden(RepoNotFound, AccessDenied):
    """The Hub answers 401 both for repositories that do not exist and for private ones: it can be either."""


class HubUnavailable(StoreError, ConnectionError):
    """The Hub cannot be reached or answers with an error of its own (5xx). ``status`` where there was an answer."""

    exit_code = 4


class HubTimeout(HubUnavailable, TimeoutError):
    """The Hub did not answer in time."""


class NotCached(StoreError, FileNotFoundError):
    """Offline, and the file is not in the cache. ``cache_dir``, ``command``."""

    exit_code = 4


class IncompleteDownload(HubUnavailable):
    """The transfer ended before the whole file had come; nothing was kept."""


class HashMismatch(StoreError, ValueError):
    """The file is not the one that the card describes. ``path`` (where it was moved), ``expected``, ``received``."""

    exit_code = 5


class DiskFull(StoreError):
    """No space is left; nothing half-written was kept. ``path``, ``needed``, ``free``."""

    exit_code = 7

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.errno = errno.ENOSPC


class CacheReadOnly(StoreError, PermissionError):
    """The cache cannot be written. ``path``."""

    exit_code = 7


# -- what is inside a file ---------------------------------------------------------------------------------------


class UnsafeFile(ZooError, ValueError):
    """A pickle holds objects beyond tensors and plain values; it was not opened. ``path``, ``objects``."""

    exit_code = 5


class BadCheckpoint(ZooError, ValueError):
    """A checkpoint cannot be read: damaged, another format, or no state dict where the card says. ``path``."""

    exit_code = 5


class BadFile(ZooError, ValueError):
    """A file of the user's cannot be read as what it was given for: damaged, another format, no file. ``path``."""

    exit_code = 5


class FormatTooNew(ZooError, ValueError):
    """A saved folder was written by a newer zoo. ``format``, ``supported``."""

    exit_code = 5


class BadArgument(ZooError, TypeError, ValueError):
    """A model does not take this argument or value. ``argument``, ``accepted``."""

    exit_code = 2


class NotExportable(ZooError, RuntimeError):
    """A model cannot be written in a format, or the file answers differently. ``format``, maybe ``difference``."""

    exit_code = 2


class KeysDoNotMatch(ZooError, KeyError):
    """A state dict does not fit a model. Nothing was changed in the model.

    ``missing`` are keys of the model that the state dict lacks, ``unexpected`` keys that the model does not have,
    ``mismatched`` maps a key to (shape in the state dict, shape in the model), ``explained`` maps a key to the
    option of the caller that accounts for it (``num_classes=10``): listed, but not a reason to fail.
    """

    exit_code = 5
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]] = {}
    explained: Mapping[str, str] = {}

    @classmethod
    def between(
        cls,
        what: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
        explained: Mapping[str, str] | None = None,
        hint: str | None = None,
    ) -> KeysDoNotMatch:
        """The error with its whole message. ``what`` names source and model ("x.pth for vim_tiny")."""
        mismatched, explained = dict(mismatched or {}), dict(explained or {})
        missing, unexpected = tuple(missing), tuple(unexpected)
        lines = [
            f"the keys do not match: {what}: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(mismatched)} of another shape; nothing was changed in the model"
        ]
        lines += _some("missing", missing)
        lines += _some("unexpected", unexpected)
        lines += _some(
            "shape",
            [
                f"{key}: {tuple(found)} in the file, {tuple(own)} in the model"
                for key, (found, own) in mismatched.items()
            ],
        )
        lines += _some("explained by your options", [f"{key} ({option})" for key, option in explained.items()])
        cause = hint or likely_cause(missing, unexpected, mismatched)
        if cause:
            lines.append(f"  likely cause: {cause}")
        return cls("\n".join(lines), missing=missing, unexpected=unexpected, mismatched=mismatched, explained=explained)


def _some(title: str, items: Sequence[str], limit: int = 5) -> list[str]:
    if not items:
        return []
    more = f" ... and {len(items) - limit} more" if len(items) > limit else ""
    return [f"  {title}: {', '.join(items[:limit])}{more}"]


#: Prefixes that training frameworks put before every key.
_WRAPPERS = {
    "module.": "DataParallel or DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "model.": "a Lightning module or a training wrapper",
    "backbone.": "a detection or segmentation framework",
    "encoder.": "a pre-training wrapper",
    "net.": "a training wrapper",
    "state_dict.": "a checkpoint dictionary that was flattened",
}


def likely_cause(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]],
) -> str | None:
    """The commonest explanation that fits the facts, or None. Never changes anything."""
    absent = set(missing)
    for prefix, origin in _WRAPPERS.items():
        inside = [key for key in unexpected if key.startswith(prefix)]
        if inside and sum(key.removeprefix(prefix) in absent for key in inside) * 2 > len(inside):
            return (
                f"the file's keys begin with {prefix!r} (saved from inside {origin}); "
                f"remove the prefix from every key and load again"
            )
        bare = [key for key in missing if key.startswith(prefix)]
        extra = set(unexpected)
        if bare and sum(key.removeprefix(prefix) in extra for key in bare) * 2 > len(bare):
            return f"the model's keys begin with {prefix!r} and the file's do not; add the prefix to every key"
    if unexpected and all(
        key in {"model", "state_dict", "optimizer", "epoch", "args", "model_ema", "scheduler", "lr_scheduler"}
        for key in unexpected
    ):
        return f"this is a training checkpoint; its state dict lies under one of {', '.join(sorted(unexpected))}"
    if mismatched and not missing and not unexpected:
        if all("head" in key or "classifier" in key or key.startswith("fc") for key in mismatched):
            return "the file was trained with another number of classes; pass num_classes= to keep the rest"
        return "the file belongs to another size or variant of this model"
    if missing and not unexpected and not mismatched:
        return "the file holds a part of the model only (a backbone, or a file that was cut short)"
    if missing and unexpected and len(missing) + len(unexpected) > 20:
        return "the file belongs to another model, or is in the original's format (see zoo.from_reference)"
    return None
