"""Layers that models of several domains are composed of; each loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mamba import Mamba
    from .mamba2 import Mamba2
    from .norm import GatedRMSNorm, RMSNorm
    from .path_scan import PathScan

_LAZY = {
    "GatedRMSNorm": "norm",
    "Mamba": "mamba",
    "Mamba2": "mamba2",
    "PathScan": "path_scan",
    "RMSNorm": "norm",
}

__all__ = ["GatedRMSNorm", "Mamba", "Mamba2", "PathScan", "RMSNorm"]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
