"""What a plugin may implement. Every hook is optional; hook modules import no torch.

A plugin is a module named by an entry point of the group ``zoo.plugins`` (entry name = domain). It sets
``ZOO_PLUGIN_API = 1`` and decorates functions with :data:`zoo_registry.hookimpl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .cards import ModelCard

PROJECT = "zoo"
#: The hook API that this registry calls. Adding an argument keeps the number; renaming or removing changes it.
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """The specifications. Values are import strings ("module:attribute"), resolved when they are first used."""

    @hookspec
    def zoo_models(self) -> Iterable[ModelCard]:  # type: ignore[empty-body]
        """The cards of this plugin's models (see :func:`zoo_registry.load_cards`)."""

    @hookspec
    def zoo_adapters(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """System id -> import string of its ``zoo.ReferenceAdapter`` class."""

    @hookspec
    def zoo_pipelines(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Task -> import string of the pipeline class that answers it."""

    @hookspec
    def zoo_validators(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Task -> import string of the function that measures a model of this task on labelled data
        (see :mod:`zoo.validation`)."""

    @hookspec
    def zoo_paths(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Scan-path name -> import string of its generator (see ``zoo_kernels.paths.register``)."""

    @hookspec
    def zoo_commands(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Command-line verb -> import string of a ``click.Command``."""

    @hookspec
    def zoo_demos(self) -> Iterable[Mapping[str, str]]:  # type: ignore[empty-body]
        """What ``zoo demo`` runs: mappings with ``model``, ``file`` (a path relative to the plugin's package, or a
        key of its sample data) and optionally ``picture`` ("yes" when looking is better than reading)."""
