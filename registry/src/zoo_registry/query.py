"""Finding models: one function with every filter, on cards alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from .cards import ModelCard, WeightsCard
from .errors import BadFilter
from .manager import Manager, manager, normalised
from .names import Resolved, domain_hint, matches, natural_key, nearest


def query(
    pattern: str | Sequence[str] = "*",
    *,
    exclude: str | Sequence[str] = (),
    domain: str | None = None,
    task: str | None = None,
    system: str | None = None,
    licence: str | None = None,
    min_params: int | None = None,
    max_params: int | None = None,
    pretrained: bool | None = None,
    on_hub: bool | None = None,
    plugin: str | None = None,
    plugins: Manager | None = None,
) -> list[Resolved]:
    """Every model and checkpoint that passes all filters, in natural order of names.

    One entry a checkpoint (``arch.tag``); a model without weights has one entry (``arch``).

    - ``pattern``, ``exclude``: shell patterns or several of them, against ``arch``, or against ``arch.tag`` when they
      hold a dot; ``vision/v*`` asks for the domain too
    - ``domain``, ``task``, ``system``, ``plugin`` (entry name or distribution): equal to
    - ``licence``: of the weights, and of the code where there are no weights; letter case does not count;
      a pattern like "cc-by*" is allowed
    - ``min_params``, ``max_params``: inclusive; a card without a number of parameters passes neither
    - ``pretrained``: True keeps checkpoints that the zoo can load by itself (from the Hub or a plugin), False the rest
    - ``on_hub``: True keeps checkpoints on the Hub, False the rest

    Raises BadFilter (a ValueError) for a domain, task, system or plugin that no card has.
    """
    plugins = plugins or manager()
    cards = plugins.models()
    if min_params is not None and max_params is not None and min_params > max_params:
        raise BadFilter(f"min_params {min_params} is above max_params {max_params}; nothing can match")
    if plugin is not None:
        names = {p.name for p in plugins.plugins} | {p.distribution for p in plugins.plugins}
        _known("plugin", plugin, names, plugins, same=normalised)
        wanted = normalised(plugin)
        owners = [p for p in plugins.plugins if wanted in (normalised(p.name), normalised(p.distribution))]
        cards = {card.name: card for owner in owners for card in owner.models}
    for field, value in (("domain", domain), ("task", task), ("system", system)):
        if value is not None:
            _known(field, value, {getattr(c, field) for c in plugins.models().values()}, plugins)
            cards = {n: c for n, c in cards.items() if getattr(c, field) == value}

    found = []
    for card in cards.values():
        if min_params is not None and (card.params is None or card.params < min_params):
            continue
        if max_params is not None and (card.params is None or card.params > max_params):
            continue
        for weights in card.weights.values() or (None,):
            if (
                matches(pattern, card, weights)
                and not (exclude and matches(exclude, card, weights))
                and (pretrained is None or pretrained == (weights is not None and weights.loadable))
                and (on_hub is None or on_hub == (weights is not None and weights.on_hub))
                and (licence is None or _licensed(licence, card, weights))
            ):
                found.append(Resolved(card, weights))
    return sorted(found, key=lambda entry: natural_key(entry.name))


def _licensed(licence: str, card: ModelCard, weights: WeightsCard | None) -> bool:
    own = weights.licence if weights is not None else card.licence_code
    return own is not None and fnmatchcase(own.lower(), licence.lower())


def _known(
    field: str, value: str, accepted: set[str], plugins: Manager, *, same: Callable[[str], str] = lambda name: name
) -> None:
    if same(value) in {same(a) for a in accepted}:
        return
    near = nearest(value, accepted)
    parts = [f"no model has {field} {value!r}"]
    if near:
        parts.append(f"nearest: {', '.join(near)}")
    parts.append(f"known: {', '.join(sorted(accepted)) or 'none'}")
    if field == "domain" and (hint := domain_hint(value, plugins)):
        parts.append(hint)
    raise BadFilter("; ".join(parts), filter=field, value=value, accepted=tuple(sorted(accepted)))
