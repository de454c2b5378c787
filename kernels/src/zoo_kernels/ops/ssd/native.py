"""The CPU path."""

from __future__ import annotations

from .chunked import backward, forward

__all__ = ["backward", "forward"]
