"""What must not be computed in half precision although the model around it is."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """``with outside_autocast(x): ...`` around recurrences in plain torch: autocast would round their matrix products,
    of whose results powers are taken, and complex numbers have no half precision. The fused operators see to it
    themselves."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # shapes alone have no precision
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
