"""The plugins: found by entry point, each loaded alone, checked, and asked once for everything it brings.

Entry points are listed without importing anything. A plugin that cannot be used (its import fails, it was written
for another hook API, a hook has the wrong signature, raises or answers with the wrong type) is remembered as a
:class:`BrokenPlugin`, reported once as a warning, and left out; the others keep working. Two plugins that claim
one name are an error that names both: nothing is chosen silently.

``ZOO_PLUGINS`` names the only plugins to load, ``ZOO_DISABLE_PLUGINS`` plugins to leave out; both take entry names
("vision") or distributions ("ssm-zoo-vision"), separated by commas. An empty ``ZOO_PLUGINS`` loads none.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import threading
import tomllib
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pluggy

from .cards import IMPORT_STRING, ModelCard
from .errors import BrokenPluginWarning, DuplicateName, PluginApiMismatch, PluginError
from .hookspecs import API_VERSION, PROJECT, Hooks

GROUP = "zoo.plugins"
#: Hook API numbers that this registry can call.
SUPPORTED_API = range(1, API_VERSION + 1)

log = logging.getLogger("zoo.plugins")

#: The hooks that map a name to an import string: attribute of Plugin -> what the name is called in messages.
_MAPPINGS = {
    "adapters": "system",
    "pipelines": "task",
    "validators": "validator of task",
    "paths": "scan path",
    "commands": "command",
}


@dataclass(frozen=True)
class Plugin:
    """One loaded plugin and everything it brings."""

    name: str  #: entry name, by convention the domain
    distribution: str
    version: str
    module: str
    models: tuple[ModelCard, ...] = field(default=(), repr=False)
    adapters: Mapping[str, str] = field(default_factory=dict, repr=False)
    pipelines: Mapping[str, str] = field(default_factory=dict, repr=False)
    validators: Mapping[str, str] = field(default_factory=dict, repr=False)
    paths: Mapping[str, str] = field(default_factory=dict, repr=False)
    commands: Mapping[str, str] = field(default_factory=dict, repr=False)
    demos: tuple[Mapping[str, str], ...] = field(default=(), repr=False)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(card.domain for card in self.models))


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that was left out, and why. ``str()`` is the whole message."""

    name: str
    distribution: str
    version: str
    module: str
    reason: str
    error: BaseException | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return (
            f"plugin {self.name!r} of {self.distribution} {self.version} ({self.module}) is left out: {self.reason}. "
            f"The other plugins keep working; ZOO_DISABLE_PLUGINS={self.name} silences this message."
        )


@dataclass(frozen=True)
class PluginEntry:
    """An installed entry point, not imported."""

    name: str
    value: str
    distribution: str
    version: str


def installed_plugins() -> list[PluginEntry]:
    """Every entry point of the group ``zoo.plugins``, sorted by name. Imports none of them.

    A source folder on ``sys.path`` counts too (``PYTHONPATH=plugins/vision/src``), by the pyproject.toml above it, so
    that a checkout works without being installed.
    """
    from importlib.metadata import distributions

    found: dict[tuple[str, str], PluginEntry] = {}
    for distribution in distributions():
        try:
            entries = [e for e in distribution.entry_points if e.group == GROUP]
            if not entries:
                continue
            name, version = distribution.metadata["Name"] or "unknown", distribution.metadata["Version"] or "unknown"
        except Exception as error:  # half-removed or damaged metadata of any distribution, most of them not ours
            log.debug("the metadata of a distribution cannot be read: %s", _describe(error))
            continue
        for entry in entries:
            # The first on sys.path wins, as for any import; a second copy of a distribution is no duplicate.
            found.setdefault((entry.name, normalised(name)), PluginEntry(entry.name, entry.value, name, version))
    for own in _checkouts():
        found.setdefault((own.name, normalised(own.distribution)), own)
    return sorted(found.values(), key=lambda e: (e.name, e.distribution))


def _checkouts() -> Iterator[PluginEntry]:
    for place in dict.fromkeys(sys.path):
        project = Path(place).parent / "pyproject.toml"
        if os.path.basename(place) != "src" or not project.is_file():
            continue
        try:
            text = project.read_text(encoding="utf-8")
            if GROUP not in text:
                continue
            table = tomllib.loads(text)["project"]
            for name, value in table["entry-points"][GROUP].items():
                yield PluginEntry(str(name), str(value), str(table["name"]), str(table.get("version", "unknown")))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            log.debug("%s names no plugins: %s", project, _describe(error))


def normalised(name: str) -> str:
    """A distribution name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Manager:
    """Holds the loaded plugins. Everybody uses the one from :func:`manager`; tests build their own."""

    def __init__(self, entries: Iterable[PluginEntry] | None = None, *, env: Mapping[str, str] | None = None) -> None:
        self._entries = entries
        self._env = env
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(Hooks)
        self._plugins: dict[str, Plugin] = {}
        self._modules: dict[str, Any] = {}
        # Computed when asked for, forgotten when a plugin comes or goes.
        self._conflicts: list[tuple[str, str, tuple[str, str]]] | None = None
        self._models: dict[str, ModelCard] | None = None
        self._loaded = False
        self._lock = threading.RLock()
        #: Plugins that were left out because they do not work.
        self.broken: list[BrokenPlugin] = []
        #: Installed plugins that ZOO_PLUGINS or ZOO_DISABLE_PLUGINS leave out.
        self.disabled: list[PluginEntry] = []

    # -- loading

    def load(self) -> Manager:
        """Load the installed plugins, once. Every other method calls it."""
        with self._lock:
            if self._loaded:
                return self
            self._loaded = True
            entries = list(installed_plugins() if self._entries is None else self._entries)
            chosen = self._choose(entries)
            for entry in chosen:
                self._load_entry(entry)
            for broken in self.broken:
                warnings.warn(str(broken), BrokenPluginWarning, stacklevel=2)
        return self

    def _choose(self, entries: list[PluginEntry]) -> list[PluginEntry]:
        env = os.environ if self._env is None else self._env
        chosen = entries
        for variable, wanted in (("ZOO_PLUGINS", True), ("ZOO_DISABLE_PLUGINS", False)):
            if variable not in env:
                continue
            names = {normalised(n.strip()) for n in env[variable].split(",") if n.strip()}
            named = [e for e in entries if {normalised(e.name), normalised(e.distribution)} & names]
            known = {normalised(e.name) for e in entries} | {normalised(e.distribution) for e in entries}
            for name in sorted(names - known):
                warnings.warn(
                    f"{variable} names {name!r}, which is not installed; installed plugins: "
                    f"{', '.join(e.name for e in entries) or 'none'}",
                    BrokenPluginWarning,
                    stacklevel=3,
                )
            chosen = [e for e in chosen if (e in named) == wanted]
        self.disabled = [e for e in entries if e not in chosen]
        return chosen

    def _load_entry(self, entry: PluginEntry) -> None:
        try:
            # A plugin is foreign code and may raise anything, SystemExit at import included.
            module = importlib.import_module(entry.value.partition(":")[0])
            for attribute in filter(None, entry.value.partition(":")[2].split(".")):
                module = getattr(module, attribute)
            self._add(entry, module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = error.args[0] if isinstance(error, PluginError) else _import_failure(entry, error)
            self.broken.append(
                BrokenPlugin(entry.name, entry.distribution, entry.version, entry.value, str(reason), error)
            )
            log.debug("plugin %s failed", entry.name, exc_info=error)

    def _add(self, entry: PluginEntry, module: Any) -> Plugin:
        """Check a plugin, ask it for everything, keep it. Raises PluginError and leaves no trace when it is bad."""
        _check_api(entry, module)
        key = f"{entry.name} ({entry.distribution})"
        try:
            try:
                self._pm.register(module, name=key)
                self._pm.check_pending()
            except pluggy.PluginValidationError as error:
                raise PluginError(f"a hook does not fit the hook API: {_first_line(error)}") from error
            except ValueError as error:
                raise PluginError(f"it is registered twice: {_first_line(error)}") from error
            plugin = self._ask(entry, module)
        except BaseException:
            if self._pm.has_plugin(key) and self._pm.get_plugin(key) is module:
                self._pm.unregister(name=key)
            raise
        self._plugins[key] = plugin
        self._modules[key] = module
        self._conflicts = self._models = None
        log.debug("loaded plugin %s of %s %s", entry.name, entry.distribution, entry.version)
        return plugin

    def _ask(self, entry: PluginEntry, module: Any) -> Plugin:
        others = [p for p in self._pm.get_plugins() if p is not module]

        def call(hook: str) -> Any:
            try:
                answers = self._pm.subset_hook_caller(hook, others)()
                # Generators run here, inside the try, so that what they raise is attributed too.
                answer = answers[0] if answers else None
                return list(answer) if isinstance(answer, Iterator) else answer
            except Exception as error:
                raise PluginError(f"its hook {hook} raised {_describe(error)}") from error

        models = call("zoo_models")
        mappings = {attribute: call(f"zoo_{attribute}") for attribute in _MAPPINGS}
        demos = call("zoo_demos")
        return Plugin(
            entry.name,
            entry.distribution,
            entry.version,
            entry.value,
            models=_check_models(models, entry),
            demos=_check_demos(demos),
            **{attribute: _check_mapping(attribute, answer) for attribute, answer in mappings.items()},
        )

    # -- in-process plugins, for tests and notebooks

    def register(self, module: Any, *, name: str | None = None) -> Plugin:
        """Add a plugin that is not installed: a module, or any object with hooks and ``ZOO_PLUGIN_API``.

        Raises PluginError when it does not work and DuplicateName when it claims a name that is taken; then nothing
        was added.
        """
        self.load()
        label = name or getattr(module, "__name__", type(module).__name__).rpartition(".")[2]
        value = module.__name__ if isinstance(module, ModuleType) else type(module).__qualname__
        with self._lock:
            plugin = self._add(PluginEntry(label, value, label, "in process"), module)
            try:
                self.check()
            except DuplicateName:
                self.unregister(module)
                raise
        return plugin

    def unregister(self, module: Any) -> None:
        """Take a plugin out again. Raises ValueError when it is not registered."""
        with self._lock:
            key = next((k for k, m in self._modules.items() if m is module), None)
            if key is None:
                raise ValueError(f"{module!r} is not a registered plugin; registered: {', '.join(self._modules)}")
            self._pm.unregister(name=key)
            del self._plugins[key], self._modules[key]
            self._conflicts = self._models = None

    # -- what the plugins bring

    @property
    def plugins(self) -> list[Plugin]:
        """The plugins that work, sorted by entry name. Also available while two of them claim one name."""
        return sorted(self.load()._plugins.values(), key=lambda p: (p.name, p.distribution))

    def conflicts(self) -> list[tuple[str, str, tuple[str, str]]]:
        """Every (kind, name, (distribution, distribution)) that two plugins claim."""
        self.load()
        if self._conflicts is None:
            self._conflicts = self._find_conflicts()
        return self._conflicts

    def _find_conflicts(self) -> list[tuple[str, str, tuple[str, str]]]:
        found = []
        owners: dict[tuple[str, str], Plugin] = {}
        for plugin in self.plugins:
            for claim in _claims(plugin):
                owner = owners.setdefault(claim, plugin)
                if owner is not plugin:
                    found.append((*claim, (owner.distribution, plugin.distribution)))
        return found

    def check(self) -> None:
        """Raise DuplicateName when two plugins claim one name."""
        conflicts = self.conflicts()
        if not conflicts:
            return
        kind, name, (first, second) = conflicts[0]
        more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
        raise DuplicateName(
            f"two plugins claim the {kind} {name!r}{more}: {first} and {second}. Uninstall one of them, or leave one "
            f"out: ZOO_DISABLE_PLUGINS={second}",
            kind=kind,
            name=name,
            distributions=(first, second),
        )

    def models(self) -> dict[str, ModelCard]:
        """Name -> card, over all plugins. Raises DuplicateName."""
        self.check()
        if self._models is None:
            self._models = {card.name: card for plugin in self.plugins for card in plugin.models}
        return dict(self._models)

    def _mapping(self, attribute: str) -> dict[str, str]:
        self.check()
        return {k: v for plugin in self.plugins for k, v in getattr(plugin, attribute).items()}

    def adapters(self) -> dict[str, str]:
        """System -> import string of its reference adapter."""
        return self._mapping("adapters")

    def pipelines(self) -> dict[str, str]:
        """Task -> import string of its pipeline."""
        return self._mapping("pipelines")

    def validators(self) -> dict[str, str]:
        """Task -> import string of the function that measures a model on labelled data."""
        return self._mapping("validators")

    def paths(self) -> dict[str, str]:
        """Scan-path name -> import string of its generator."""
        return self._mapping("paths")

    def commands(self) -> dict[str, str]:
        """Verb -> import string of its click command."""
        return self._mapping("commands")

    def demos(self) -> list[tuple[Plugin, Mapping[str, str]]]:
        """What ``zoo demo`` runs, each with the plugin that brought it."""
        return [(plugin, demo) for plugin in self.plugins for demo in plugin.demos]


# -- checks ------------------------------------------------------------------------------------------------------


def _check_api(entry: PluginEntry, module: Any) -> None:
    api = getattr(module, "ZOO_PLUGIN_API", None)
    low, high = SUPPORTED_API[0], SUPPORTED_API[-1]
    facts = {"plugin": entry.name, "distribution": entry.distribution, "api": api, "supported": (low, high)}
    if type(api) is not int:
        raise PluginApiMismatch(
            f"it must set ZOO_PLUGIN_API to an integer and has {api!r}; write ZOO_PLUGIN_API = {high} beside its hooks",
            **facts,
        )
    supported = str(high) if low == high else f"{low} to {high}"
    if api > high:
        raise PluginApiMismatch(
            f"it was written for hook API {api}, this registry supports {supported}; upgrade the registry: "
            "pip install -U ssm-zoo-registry",
            **facts,
        )
    if api < low:
        raise PluginApiMismatch(
            f"it was written for hook API {api}, this registry supports {supported}; upgrade the plugin: "
            f"pip install -U {entry.distribution}",
            **facts,
        )


def _check_models(answer: Any, entry: PluginEntry) -> tuple[ModelCard, ...]:
    if answer is None:
        return ()
    if isinstance(answer, (str, Mapping)) or not isinstance(answer, Iterable):
        raise PluginError(f"its hook zoo_models answered {type(answer).__name__}; expected ModelCard objects")
    names: set[str] = set()
    cards: list[ModelCard] = []
    for card in answer:
        if not isinstance(card, ModelCard):
            raise PluginError(f"its hook zoo_models yields {type(card).__name__}; expected ModelCard objects")
        for name in card.names:
            if name in names:
                raise PluginError(f"it claims the model name {name!r} twice")
            names.add(name)
        cards.append(msgspec.structs.replace(card, plugin=entry.distribution))
    return tuple(cards)


def _check_mapping(attribute: str, answer: Any) -> dict[str, str]:
    if answer is None:
        return {}
    if not isinstance(answer, Mapping):
        raise PluginError(f"its hook zoo_{attribute} answered {type(answer).__name__}; expected a mapping")
    for name, value in answer.items():
        if not isinstance(name, str) or not isinstance(value, str) or not IMPORT_STRING.fullmatch(value):
            raise PluginError(
                f"its hook zoo_{attribute} maps {name!r} to {value!r}; expected an import string 'package.module:name'"
            )
    return dict(answer)


def _check_demos(answer: Any) -> tuple[Mapping[str, str], ...]:
    if answer is None:
        return ()
    if isinstance(answer, (str, Mapping)) or not isinstance(answer, Iterable):
        raise PluginError(f"its hook zoo_demos answered {type(answer).__name__}; expected a list of mappings")
    demos = tuple(answer)
    for demo in demos:
        if not isinstance(demo, Mapping) or not {"model", "file"} <= set(demo):
            raise PluginError(f"its hook zoo_demos holds {demo!r}; expected a mapping with 'model' and 'file'")
    return demos


def _claims(plugin: Plugin) -> Iterator[tuple[str, str]]:
    for card in plugin.models:
        for name in card.names:
            yield "model name", name
    for attribute, kind in _MAPPINGS.items():
        for name in getattr(plugin, attribute):
            yield kind, name


# -- what went wrong, in one line --------------------------------------------------------------------------------


def _import_failure(entry: PluginEntry, error: BaseException) -> str:
    """Which import of which file failed, and the first line of the error. The traceback is logged at debug level."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    place = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if place and isinstance(error, ImportError):
        place += f" ({frames[-1].line})"
    return f"importing {entry.value} failed with {_describe(error)}{place}"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}" if str(error) else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pluggy puts the sentence that matters last.
    if isinstance(error, pluggy.PluginValidationError):
        return " ".join(lines)
    return lines[0] if lines else ""


# -- the one that everybody uses ---------------------------------------------------------------------------------

_manager: Manager | None = None
_manager_lock = threading.Lock()


def manager() -> Manager:
    """The process's plugin manager; the installed plugins are loaded on first use."""
    global _manager
    with _manager_lock:
        if _manager is None:
            _manager = Manager()
    return _manager


def reset() -> None:
    """Forget every loaded plugin, so that the next use lists the entry points anew (after installing one)."""
    global _manager
    with _manager_lock:
        _manager = None
