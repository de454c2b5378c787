"""Names: ``arch.tag``, and the other ways to say where a model comes from.

``parse`` reads the text alone; ``resolve`` looks the name up and answers every mistake with what would have been
right: the nearest names, the tags that exist, the plugin that is not installed.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .cards import NAME, TAG, ModelCard, WeightsCard
from .errors import BadName, LocalFileMissing, RenamedModelWarning, UnknownModel, UnknownSystem, UnknownTag, UnknownTask
from .manager import Manager, manager

HUB_PREFIX = "hf-hub:"
LOCAL_PREFIXES = ("local:", "local-dir:")

# -- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelName:
    """A name of the registry; ``tag`` is None where the default is meant."""

    name: str
    tag: str | None = None

    def __str__(self) -> str:
        return self.name if self.tag is None else f"{self.name}.{self.tag}"


@dataclass(frozen=True)
class HubRepo:
    """A repository in the zoo's own format on the Hub; ``revision`` is None where its main branch is meant."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class LocalPath:
    """A file or folder that exists."""

    path: Path

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    def __str__(self) -> str:
        return str(self.path)


Source = ModelName | HubRepo | LocalPath


def parse(source: str | os.PathLike[str] | Source) -> Source:
    """What a user means by ``source``.

    - ``arch`` or ``arch.tag``: a name of the registry
    - ``hf-hub:org/repo`` or ``hf-hub:org/repo@revision``: a repository on the Hub
    - a path that begins with ``./``, ``../``, ``/``, ``~``, a drive, or ``local:``: a local folder or file; any
      ``pathlib.Path`` too

    ``a/b`` alone could be a folder or a repository and is refused (BadName, a ValueError) with both spellings:
    guessing would load other weights than were meant. A local path that does not exist raises LocalFileMissing.
    """
    if isinstance(source, (ModelName, HubRepo, LocalPath)):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise BadName(
            f"a {type(source).__name__} was given; expected a name of the zoo, a path, or "
            "'hf-hub:ORGANISATION/REPOSITORY'"
        )
    if not isinstance(source, str):
        return _local(Path(os.fspath(source)), str(source))
    text = source.strip()
    if text.startswith(HUB_PREFIX):
        return _hub(text)
    for prefix in LOCAL_PREFIXES:
        if text.startswith(prefix):
            return _local(Path(text.removeprefix(prefix)), text)
    if text in (".", "..", "~") or re.match(r"(\.{1,2}|~[^/\\]*)?[/\\]|[A-Za-z]:[/\\]", text):
        return _local(Path(text), text)
    if "/" in text or "\\" in text:
        last = re.split(r"[/\\]", text)[-1]
        raise BadName(
            f"{text!r} could be a local folder or a repository on the Hub. Write ./{text} for the folder or "
            f"{HUB_PREFIX}{text} for the repository; a name of the zoo has no slash ({last})",
            name=text,
        )
    name, dot, tag = text.partition(".")
    if (Path(text).suffix and Path(text).is_file()) and not (NAME.fullmatch(name) and TAG.fullmatch(tag)):
        raise BadName(f"{text!r} is no name of the zoo; for the local file write ./{text}", name=text)
    return ModelName(name, tag if dot else None)


def _hub(text: str) -> HubRepo:
    repo_id, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or (at and not revision):
        raise BadName(
            f"{text!r} names no repository; expected {HUB_PREFIX}ORGANISATION/REPOSITORY or "
            f"{HUB_PREFIX}ORGANISATION/REPOSITORY@REVISION",
            name=text,
        )
    return HubRepo(repo_id, revision or None)


def _local(path: Path, text: str) -> LocalPath:
    path = Path(os.path.expanduser(path))  # pathlib's raises for a user that does not exist
    if not path.exists():
        missing = next((p for p in reversed(path.absolute().parents) if not p.exists()), path)
        raise LocalFileMissing(
            f"there is no file or folder {text!r} (looked at {path.absolute()}; {missing} does not exist)",
            path=str(path),
        )
    return LocalPath(path)


# -- looking up --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """A card and, where the model has any, the weights that the name means."""

    card: ModelCard
    weights: WeightsCard | None

    @property
    def name(self) -> str:
        return self.card.full_name(self.weights)

    def __str__(self) -> str:
        return self.name


def resolve(name: str | ModelName, *, plugins: Manager | None = None) -> Resolved:
    """The card (and weights) of ``arch`` or ``arch.tag``; aliases work, former names with a RenamedModelWarning.

    Raises UnknownModel or UnknownTag (both KeyErrors) that say what would have been right, and BadName.
    """
    plugins = plugins or manager()
    wanted = parse(name) if isinstance(name, str) else name
    if not isinstance(wanted, ModelName):
        raise BadName(f"{str(name)!r} is no name of the zoo; expected 'arch' or 'arch.tag'", name=str(name))
    cards = plugins.models()
    card = cards.get(wanted.name)
    if card is None:
        card = next((c for c in cards.values() if wanted.name in c.names), None)
        if card is None:
            raise _unknown_model(wanted, plugins)
        if wanted.name in card.former_names:
            warnings.warn(
                f"the model {wanted.name!r} is called {card.name!r} now; the old name will go away in two minor "
                "versions",
                RenamedModelWarning,
                stacklevel=2,
            )
    if wanted.tag is None:
        return Resolved(card, card.default_weights)
    if wanted.tag not in card.weights:
        raise _unknown_tag(card, wanted)
    return Resolved(card, card.weights[wanted.tag])


def _unknown_tag(card: ModelCard, wanted: ModelName) -> UnknownTag:
    if not card.weights:
        text = f"{card.name} has no published weights, so no tag {wanted.tag!r}; zoo.create({card.name!r}) builds it"
    else:
        rows = "".join(f"\n  {line}" for line in describe_tags(card))
        text = f"{card.name} has no tag {wanted.tag!r}; its tags are:{rows}"
    return UnknownTag(text, name=card.name, tag=wanted.tag, tags=tuple(card.weights))


def describe_tags(card: ModelCard) -> list[str]:
    """One line a tag: the default one marked, and where the weights are."""
    lines = []
    for weights in card.weights.values():
        if weights.on_hub:
            place = f"weights on the Hub ({weights.repo_id})"
        elif weights.package_file:
            place = "weights in the plugin"
        else:
            place = "weights not on the Hub, checkpoint= takes the file"
        mark = " (default)" if weights is card.default_weights else ""
        lines.append(f"{card.name}.{weights.tag}{mark}: {place}")
    return lines


# -- what was meant ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """A domain that has a plugin, and the systems in it, to tell which plugin a name lacks."""

    distribution: str
    systems: tuple[str, ...]


#: Plugins that exist, whether installed or not. Data for messages only: nothing depends on this table.
KNOWN_DOMAINS = {
    "vision": Domain(
        "ssm-zoo-vision",
        ("vim", "vmamba", "res_vmamba", "a2mamba", "efficientvim", "mambaout", "mambavision", "mambamixer", "vim2"),
    ),
    "language": Domain(
        "ssm-zoo-language",
        (
            *("mamba", "mamba2", "mamba3", "phi_mamba", "sambay", "bdh", "birdie", "icll", "stree", "hax"),
            *("dynamax", "bmojo", "hydra_lm", "memmamba"),
        ),
    ),
    "remote_sensing": Domain(
        "ssm-zoo-remote-sensing",
        ("changemamba", "mambabcd", "mambascd", "mambabda", "mamba_fcs", "rsmamba", "morpmamba"),
    ),
    "medical": Domain("ssm-zoo-medical", ("mambamim", "umamba", "vm_unet", "segmamba", "swin_umamba")),
    "point_cloud": Domain("ssm-zoo-point-cloud", ("pcm", "pointmamba", "occmamba")),
    "audio": Domain("ssm-zoo-audio", ("samba_asr", "sashimi")),
    "recommendation": Domain("ssm-zoo-recommendation", ("tim4rec", "mamba4rec", "ssd4rec")),
    "time_series": Domain("ssm-zoo-time-series", ("spacetime", "tsm2")),
    "generation": Domain("ssm-zoo-generation", ("dimsum", "unianimate")),
    "restoration": Domain("ssm-zoo-restoration", ("serpent", "contrast")),
    "graph": Domain("ssm-zoo-graph", ("gmn", "graph_mamba")),
    "network": Domain("ssm-zoo-network", ("netmamba",)),
    "rl": Domain("ssm-zoo-rl", ("decision_mamba", "s5_rl")),
    "biology": Domain("ssm-zoo-biology", ("bio_xlstm",)),
    "neuro": Domain("ssm-zoo-neuro", ("eegdm", "tactile_ead")),
    "multimodal": Domain("ssm-zoo-multimodal", ("merc_broad_mamba", "mmmamba", "mixture_of_mamba")),
}


def domain_hint(domain: str, plugins: Manager | None = None) -> str | None:
    """The sentence about a domain whose plugin is not installed; None when it is, or when no such plugin is known."""
    plugins = plugins or manager()
    known = KNOWN_DOMAINS.get(domain)
    if known is None or any(domain in (p.name, *p.domains) for p in plugins.plugins):
        return None
    for broken in plugins.broken:
        if broken.name == domain:
            return f"the plugin for domain {domain} is installed and broken: {broken.reason}"
    for entry in plugins.disabled:
        if entry.name == domain:
            return f"the plugin for domain {domain} is disabled by ZOO_PLUGINS or ZOO_DISABLE_PLUGINS"
    return f"plugin for domain {domain} is not installed: pip install {known.distribution}"


def _domain_of(name: str) -> str | None:
    """The domain whose system begins ``name``, the longest fit; None when none does."""
    fits = [
        (len(system), domain)
        for domain, known in KNOWN_DOMAINS.items()
        for system in known.systems
        if name == system or name.startswith(f"{system}_")
    ]
    return max(fits)[1] if fits else None


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> list[str]:
    """The names most like ``name``, best first; capitals and dashes do not count as differences."""
    plain = _plain(name)
    candidates = {n: _plain(n) for n in names}
    exact = [n for n, p in candidates.items() if p == plain]
    close = difflib.get_close_matches(plain, dict.fromkeys(candidates.values()), n=count, cutoff=0.6)
    found = exact + [n for p in close for n, q in candidates.items() if p == q]
    if len(plain) >= 3:
        found += natural_sorted(n for n, p in candidates.items() if p.startswith(plain))
    return list(dict.fromkeys(found))[:count]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _unknown_model(wanted: ModelName, plugins: Manager) -> UnknownModel:
    cards = plugins.models()
    named = {name: card for card in cards.values() for name in (card.name, *card.aliases)}
    near = nearest(wanted.name, named, count=6)
    if wanted.tag is not None:  # "vim-tiny.in1k", but also "vim.tiny" for "vim_tiny"
        joined = f"{wanted.name}_{wanted.tag}"
        other = nearest(joined, named)
        near = other + near if other and _plain(joined) == other[0] else near + other
    # each card once, under that of its names which is nearest
    first: dict[str, str] = {}
    for candidate in near:
        first.setdefault(named[candidate].name, candidate)
    near = list(first.values())[:3]
    shown = [named[n].full_name(named[n].default_weights).replace(named[n].name, n, 1) for n in near]
    parts = [f"no model {str(wanted)!r}"]
    if shown:
        stem = re.match(r"[a-z]+", near[0])
        parts.append(f"nearest: {', '.join(shown)}")
        parts.append(f"`zoo list '{stem.group() if stem else near[0]}*'` shows all of them")
    else:
        parts.append("`zoo list` shows the names" if cards else "no model is installed")
    if Path(str(wanted)).exists():
        parts.append(f"./{wanted}, with ./ in front, is the file or folder of that name here")
    domain = _domain_of(_plain(wanted.name))
    hints = [domain_hint(domain, plugins)] if domain else []
    if not domain and not shown:
        absent = [d for d in KNOWN_DOMAINS if domain_hint(d, plugins) and not any(d == b.name for b in plugins.broken)]
        if absent:
            hints.append(
                f"plugins not installed: {', '.join(absent)} (pip install {KNOWN_DOMAINS[absent[0]].distribution}, ...)"
            )
        hints += [f"plugin {b.name} is broken and left out" for b in plugins.broken]
    parts += [hint for hint in hints if hint]
    return UnknownModel("; ".join(parts), name=str(wanted), nearest=tuple(shown))


def adapter_for(system: str, *, plugins: Manager | None = None) -> str:
    """The import string of a system's reference adapter. Raises UnknownSystem (a KeyError)."""
    plugins = plugins or manager()
    return _lookup(system, plugins.adapters(), "reference adapter for system", UnknownSystem, "system", plugins)


def pipeline_for(task: str, *, plugins: Manager | None = None) -> str:
    """The import string of a task's pipeline. Raises UnknownTask (a KeyError)."""
    plugins = plugins or manager()
    return _lookup(task, plugins.pipelines(), "pipeline for task", UnknownTask, "task", plugins)


def validator_for(task: str, *, plugins: Manager | None = None) -> str:
    """The import string of a task's validator. Raises UnknownTask (a KeyError)."""
    plugins = plugins or manager()
    return _lookup(task, plugins.validators(), "validator for task", UnknownTask, "task", plugins)


def _lookup(
    name: str, known: dict[str, str], what: str, error: type[UnknownSystem | UnknownTask], fact: str, plugins: Manager
) -> str:
    if name in known:
        return known[name]
    near = nearest(name, known)
    parts = [f"no {what} {name!r}"]
    if near:
        parts.append(f"nearest: {', '.join(near)}")
    parts.append(f"known: {', '.join(sorted(known)) or 'none'}")
    domain = _domain_of(_plain(name))
    if domain and (hint := domain_hint(domain, plugins)):
        parts.append(hint)
    raise error("; ".join(parts), nearest=tuple(near), **{fact: name})


# -- order and patterns ------------------------------------------------------------------------------------------


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sorts digits as numbers: mamba_130m before mamba_1400m, s2 before s10."""
    parts = re.findall(r"\d+|\D+", name)
    # The name itself decides between "s2" and "s02", so that the order is always the same.
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts), name


def natural_sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural_key)


def matches(pattern: str | Sequence[str], card: ModelCard, weights: WeightsCard | None) -> bool:
    """Whether a shell pattern (``*``, ``?``, ``[ab]``) fits a model.

    With a dot the pattern is held against ``arch.tag``, without against ``arch``; aliases count. ``vision/v*`` asks
    for the domain too. Several patterns: any of them.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    for one in patterns:
        domain, slash, rest = one.rpartition("/")
        if slash and not fnmatchcase(card.domain, domain):
            continue
        tag = f".{weights.tag}" if weights is not None and "." in rest else ""
        if any(fnmatchcase(f"{name}{tag}", rest or "*") for name in (card.name, *card.aliases)):
            return True
    return False
