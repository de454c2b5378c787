"""Weights and inputs computed from their names: full-size checks without stored weights.

A tensor is described by its key, its shape and a fill ``[kind, scale, offset]``. A stream of uniform numbers V
in [0, 1) belongs to each key: numpy's PCG64 seeded with the CRC-32 of salt + key, its raw 64-bit outputs cut to 53
bits, in C order. With U = 2 V - 1:

========== =========================================================================
u          offset + scale * U
log_arange offset + scale * U + log(1 .. N) along the last axis (Mamba's A_log)
neg_arange offset + scale * U - (1 .. N) along the last axis
ids        integers floor(abs(scale) * V) + offset (token ids, labels)
========== =========================================================================
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def procedural_values(key: str, shape: Sequence[int], fill: Sequence[Any], *, salt: str = "") -> Tensor:
    """The tensor of ``key``: float32, or int64 for "ids". ``shape`` may be empty (a scalar)."""
    import numpy as np

    kind, scale, offset = fill
    if kind not in ("u", "log_arange", "neg_arange", "ids"):
        raise ValueError(f"{key}: the fill kind is {kind!r}; expected u, log_arange, neg_arange or ids")
    stream = np.random.PCG64(zlib.crc32(f"{salt}{key}".encode()))
    raw = np.asarray(stream.random_raw(math.prod(shape)), dtype=np.uint64).reshape(tuple(shape))
    uniform = (raw >> np.uint64(11)) / 2.0**53
    if kind == "ids":
        return torch.from_numpy(np.asarray(np.floor(uniform * abs(scale)) + offset, dtype=np.int64))
    values = scale * (2 * uniform - 1) + offset
    if kind != "u":
        ramp = np.arange(1.0, shape[-1] + 1)
        values = values + (np.log(ramp) if kind == "log_arange" else -ramp)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def procedural_state(card: Mapping[str, Any], *, meta: bool = False) -> dict[str, Tensor]:
    """The original's state dict that a full-size card describes: its ``keys``, its ``tied`` copies, and those of its
    ``other_keys`` whose value it gives. ``meta``: shapes only."""
    state: dict[str, Tensor] = {}
    for key, entry in card["keys"].items():
        if meta:
            kind = torch.int64 if entry["fill"][0] == "ids" else torch.float32
            state[key] = torch.empty(entry["shape"], dtype=kind, device="meta")
        else:
            state[key] = procedural_values(key, entry["shape"], entry["fill"], salt=card.get("salt") or "")
    for kept, copy in card.get("tied") or ():
        state[copy] = state[kept]
    for key, value in (card.get("other_values") or {}).items():
        state[key] = torch.tensor(value)
    return state


def procedural_inputs(card: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of a full-size card; their keys are prefixed with "in/" for the stream."""
    salt = card.get("salt") or ""
    return {
        name: procedural_values(f"in/{name}", entry["shape"], entry["fill"], salt=salt)
        for name, entry in card["inputs"].items()
    }
