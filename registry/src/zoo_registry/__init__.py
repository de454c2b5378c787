"""Names, cards, hooks and the byte store of the zoo of state-space models. Imports no torch.

A plugin needs four names of it::

    from zoo_registry import hookimpl, load_cards

    ZOO_PLUGIN_API = 1

    @hookimpl
    def zoo_models():
        return load_cards(__package__)
"""

from __future__ import annotations

from .card_files import load_cards, package_path, read_cards, read_labels
from .cards import Metric, ModelCard, WeightsCard
from .extras import optional
from .hookspecs import API_VERSION, hookimpl
from .manager import Manager, manager
from .names import HubRepo, LocalPath, ModelName, Resolved, natural_sorted, parse, resolve
from .query import query

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "HubRepo",
    "LocalPath",
    "Manager",
    "Metric",
    "ModelCard",
    "ModelName",
    "Resolved",
    "WeightsCard",
    "hookimpl",
    "load_cards",
    "manager",
    "natural_sorted",
    "optional",
    "package_path",
    "parse",
    "query",
    "read_cards",
    "read_labels",
    "resolve",
]
