"""Suppression of large values: a mu-law for what exceeds 1, in tensors.

Source: jhpuah/EEGDM ``src/util.py``. A signal of 1 is 100 microvolts (volts times 1e4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Volts to the models' unit.
SCALE = 1e4


def mu_law(x: Tensor, mu: float = 255, scale: float = 1.0) -> Tensor:
    """``sign(x) ln(1 + mu |x|) / ln(1 + mu)`` where |x| > 1, x elsewhere; of ``scale * x``, divided by it again."""
    x = scale * x
    squeezed = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return torch.where(x.abs() > 1, squeezed, x) / scale


def inverse_mu_law(x: Tensor, mu: float = 255, scale: float = 1.0) -> Tensor:
    """``sign(x) ((1 + mu)^|x| - 1) / mu`` where |x| > 1, x elsewhere: :func:`mu_law` undone."""
    x = scale * x
    stretched = x.sign() * torch.expm1(x.abs() * math.log1p(mu)) / mu
    return torch.where(x.abs() > 1, stretched, x) / scale


class MuLaw(nn.Module):
    """Both as a module without parameters: x to (suppressed, restored from that)."""

    def __init__(self, mu: float = 255, scale: float = 1.0) -> None:
        super().__init__()
        self.mu, self.scale = mu, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = mu_law(x, self.mu, self.scale)
        return y, inverse_mu_law(y, self.mu, self.scale)
