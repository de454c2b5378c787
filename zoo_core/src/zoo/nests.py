"""Nests of dicts, lists and tuples with tensors in them, as batches and outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def map_tensors(function: Any, first: Any, *rest: Any) -> Any:
    """Apply ``function`` to the tensors of equal nests of dicts, lists and tuples; other leaves are kept."""
    if isinstance(first, Tensor):
        return function(first, *rest)
    if isinstance(first, Mapping):
        return {k: map_tensors(function, v, *(r[k] for r in rest)) for k, v in first.items()}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(map_tensors(function, v, *(r[i] for r in rest)) for i, v in enumerate(first)))
    if isinstance(first, (list, tuple)):
        return type(first)(map_tensors(function, v, *(r[i] for r in rest)) for i, v in enumerate(first))
    return first
