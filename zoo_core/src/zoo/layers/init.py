"""Initialisers that the papers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_softplus_log_uniform(like: Tensor, low: float, high: float, floor: float = 1e-4) -> Tensor:
    """Biases b with softplus(b) log-uniform in [low, high] and at least ``floor`` (Mamba's dt initialisation).

    Source: state-spaces/mamba ``modules/mamba_simple.py``; Gu et al., "How to Train Your HiPPO", arXiv 2206.12037.
    Returns a float32 tensor of ``like``'s shape and device.
    """
    uniform = torch.rand(like.shape, dtype=torch.float32, device=like.device)
    dt = torch.exp(uniform * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
