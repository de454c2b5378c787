"""Layers that models of several domains are composed of; each loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpointing import GradCheckpointing, Recomputed, recompute
    from .fft_conv import FFTConv, S4Block
    from .linear import Linear
    from .lru import LRU
    from .mamba import Mamba
    from .mamba2 import Mamba2
    from .mamba3 import Mamba3
    from .norm import GatedRMSNorm, RMSNorm
    from .path_scan import PathScan
    from .s4d import S4D
    from .s4nd import S4ND
    from .s5 import S5, S5Layer
    from .ss2d import SS2D, GridScan, GridSSD
    from .vss import ConvDownsample, Mlp, PatchEmbed, PatchMerging, VSSBlock

_LAZY = {
    "ConvDownsample": "vss",
    "FFTConv": "fft_conv",
    "GatedRMSNorm": "norm",
    "GradCheckpointing": "checkpointing",
    "GridScan": "ss2d",
    "GridSSD": "ss2d",
    "LRU": "lru",
    "Linear": "linear",
    "Mamba": "mamba",
    "Mamba2": "mamba2",
    "Mamba3": "mamba3",
    "Mlp": "vss",
    "PatchEmbed": "vss",
    "PatchMerging": "vss",
    "PathScan": "path_scan",
    "RMSNorm": "norm",
    "Recomputed": "checkpointing",
    "S4Block": "fft_conv",
    "S4D": "s4d",
    "S4ND": "s4nd",
    "S5": "s5",
    "S5Layer": "s5",
    "SS2D": "ss2d",
    "VSSBlock": "vss",
    "recompute": "checkpointing",
}

__all__ = [
    "LRU",
    "S4D",
    "S4ND",
    "S5",
    "SS2D",
    "ConvDownsample",
    "FFTConv",
    "GatedRMSNorm",
    "GradCheckpointing",
    "GridSSD",
    "GridScan",
    "Linear",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "PathScan",
    "RMSNorm",
    "Recomputed",
    "S4Block",
    "S5Layer",
    "VSSBlock",
    "recompute",
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
