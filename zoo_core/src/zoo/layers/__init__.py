"""Layers that models of several domains are composed of."""

from .path_scan import PathScan

__all__ = ["PathScan"]
