"""Reading cards and other files that lie beside a plugin's code."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec

from .cards import ModelCard, WeightsCard
from .errors import CardError, LocalFileMissing

T = TypeVar("T")
_TABLES = {"defaults", "weights_defaults", "models"}


def load_cards(package: str | ModuleType | Path, folder: str = "cards") -> list[ModelCard]:
    """The cards of every ``*.toml`` in ``folder`` of an import package, in the order of file names and of lines.

    ``package`` is its name, the module, or the path of the card folder itself (``Path(__file__).parent / "cards"``).

    Raises CardError (a ValueError) that names file, model and field for a card that breaks a rule, and
    LocalFileMissing (a FileNotFoundError) when the package has no such folder or the folder no card files.
    """
    if isinstance(package, Path):
        root, name = package, _package_around(package)
    else:
        name = package if isinstance(package, str) else package.__name__
        root = package_root(name) / folder
    files = sorted(root.glob("*.toml")) if root.is_dir() else []
    if not files:
        raise LocalFileMissing(
            f"the package {name!r} has no card files: expected at least one *.toml in {root}",
            path=str(root),
        )
    cards: list[ModelCard] = []
    seen: dict[str, Path] = {}
    for file in files:
        for card in read_cards(file, package=name):
            if card.name in seen:
                raise CardError(
                    f"{file}: the model {card.name!r} is already in {seen[card.name]}; a name belongs to one card",
                    path=str(file),
                )
            seen[card.name] = file
            cards.append(card)
    return cards


def read_cards(file: str | Path, *, package: str = "") -> list[ModelCard]:
    """The cards of one TOML file. ``package`` is the import package that its relative paths belong to."""
    file = Path(file)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{file}: this is not TOML: {error}", path=str(file)) from error
    if unknown := sorted(set(data) - _TABLES):
        raise CardError(
            f"{file}: unknown table [{unknown[0]}]; a card file holds [defaults], [weights_defaults] and "
            "[models.NAME] with [models.NAME.weights.TAG]",
            path=str(file),
        )
    defaults, weights_defaults, models = (data.get(t, {}) for t in ("defaults", "weights_defaults", "models"))
    if not models:
        raise CardError(f"{file}: no [models.NAME] table in it", path=str(file))
    return [_card(file, name, own, defaults, weights_defaults, package) for name, own in models.items()]


def _card(
    file: Path, name: str, own: Any, defaults: dict[str, Any], weights_defaults: dict[str, Any], package: str
) -> ModelCard:
    if not isinstance(own, dict):
        raise CardError(f"{file}: models.{name} is {own!r}; expected a table", path=str(file))
    fields = _merge(defaults, own)
    fields.setdefault("name", name)
    if fields["name"] != name:
        raise CardError(f"{file}: models.{name} has name {fields['name']!r}; leave the name out", path=str(file))
    every = fields.get("weights", {})
    if isinstance(every, dict):
        fields["weights"] = {
            tag: _convert(
                {"tag": tag} | _merge(weights_defaults, w) if isinstance(w, dict) else w,
                WeightsCard,
                f"{file}: model {name!r}, weights {tag!r}",
            )
            for tag, w in every.items()
        }
    fields["package"] = package
    return _convert(fields, ModelCard, f"{file}: model {name!r}")


def _convert(value: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # msgspec ends its messages with "- at `$.config.depth`"; put the place first, as TOML spells it.
        text, _, place = str(error).partition(" - at `")
        place = place.rstrip("`").removeprefix("$").removeprefix(".")
        raise CardError(f"{where}: {place + ': ' if place else ''}{text}", where=where) from error


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key, anything else (lists too) is replaced. Neither argument is changed."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# -- other files of a plugin -------------------------------------------------------------------------------------


def package_root(package: str) -> Path:
    """The folder of an import package. Finding it imports at most the package's parents, never the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise LocalFileMissing(f"the package {package!r} cannot be found: {error}") from error
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise LocalFileMissing(
            f"there is no import package {package!r} (a folder with __init__.py) here; is its distribution installed?"
        )
    return Path(places[0])


def _package_around(folder: Path) -> str:
    """The import package that a folder of data lies in; "" when it lies in none."""
    parts: list[str] = []
    inside = folder.absolute()
    while not (inside / "__init__.py").exists() and inside != inside.parent:
        inside = inside.parent
    while (inside / "__init__.py").exists():
        parts.insert(0, inside.name)
        inside = inside.parent
    return ".".join(parts)


def package_path(card: ModelCard | str, relative: str) -> Path:
    """The path of a file that a plugin ships, for example ``package_path(card, "demo/vim_micro.safetensors")``.

    ``card`` is a card or the name of an import package. Raises LocalFileMissing when there is no such file.
    """
    package = card if isinstance(card, str) else card.package or card.builder.partition(":")[0].partition(".")[0]
    root = package_root(package)
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise LocalFileMissing(f"{relative!r} leads out of the package {package!r}", path=str(path))
    if not path.exists():
        raise LocalFileMissing(
            f"the package {package!r} should hold {relative!r} and does not ({path}); reinstall "
            f"{(card.plugin if isinstance(card, ModelCard) else '') or package}",
            path=str(path),
        )
    return path


def read_labels(card: ModelCard, weights: WeightsCard | None = None) -> tuple[str, ...] | None:
    """The labels of a checkpoint, in the order of its outputs, from a text file of the plugin (one a line).

    ``weights.labels`` is a path inside the package ("demo/digits.txt") or the name of a set, looked up as
    ``labels/<name>.txt``. Returns None when the card names no labels, or a set that the plugin keeps elsewhere (as
    the vision plugin keeps ``imagenet-1k`` in timm). Raises CardError when their number is not ``num_classes``.
    """
    weights = weights or card.default_weights
    if weights is None or weights.labels is None:
        return None
    if weights.labels.endswith(".txt"):
        path = package_path(card, weights.labels)
    else:
        try:
            path = package_path(card, f"labels/{weights.labels}.txt")
        except LocalFileMissing:
            return None
    labels = tuple(path.read_text(encoding="utf-8").splitlines())
    if weights.num_classes is not None and len(labels) != weights.num_classes:
        raise CardError(
            f"{card.full_name(weights)}: {path} has {len(labels)} labels, the card says num_classes = "
            f"{weights.num_classes}",
            path=str(path),
        )
    return labels
