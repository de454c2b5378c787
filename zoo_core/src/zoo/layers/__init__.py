"""Layers that models of several domains are composed of; each loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mamba import Mamba
    from .mamba2 import Mamba2
    from .mamba3 import Mamba3
    from .norm import GatedRMSNorm, RMSNorm
    from .path_scan import PathScan
    from .ss2d import SS2D, GridScan, GridSSD
    from .vss import ConvDownsample, PatchEmbed, PatchMerging, VSSBlock

_LAZY = {
    "ConvDownsample": "vss",
    "GatedRMSNorm": "norm",
    "GridSSD": "ss2d",
    "GridScan": "ss2d",
    "Mamba": "mamba",
    "Mamba2": "mamba2",
    "Mamba3": "mamba3",
    "PatchEmbed": "vss",
    "PatchMerging": "vss",
    "PathScan": "path_scan",
    "RMSNorm": "norm",
    "SS2D": "ss2d",
    "VSSBlock": "vss",
}

__all__ = [
    "SS2D",
    "ConvDownsample",
    "GatedRMSNorm",
    "GridSSD",
    "GridScan",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "PatchEmbed",
    "PatchMerging",
    "PathScan",
    "RMSNorm",
    "VSSBlock",
]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
