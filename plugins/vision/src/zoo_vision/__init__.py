"""Vision models of the zoo of state-space models. Importing this package imports no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["register_timm"]


def register_timm() -> list[str]:
    """Make this plugin's classifiers known to ``timm.create_model``; see :mod:`zoo_vision.timm_models`."""
    from .timm_models import register_timm as register

    return register()


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; its models are built by name: zoo.create(...)"
    )
