"""Waveforms as tokens: 8-bit mu-law and linear quantisation, with the scaling of each recording to its own range.

Source: ITU-T G.711 (the curve); state-spaces/s4 ``src/dataloaders/audio.py`` (scaling, rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 8
_EPS = 1e-6


def _scaled(audio: Tensor, low: float) -> Tensor:
    """Each recording (batch, length, channels) to [low, 1] by its own least and greatest value."""
    smallest, largest = audio.amin((1, 2), keepdim=True), audio.amax((1, 2), keepdim=True)
    return low + (1 - low) * (audio - smallest) / (largest - smallest + _EPS)


def _quantised(unit: Tensor, bits: int) -> Tensor:
    """[0, 1] to 0 .. 2^bits - 1; the borders are drawn in a little so that 1 stays inside."""
    return torch.floor(unit * (2**bits - 0.01) + 0.005).long()


def mu_law_encode(audio: Tensor, bits: int = BITS, *, scale: bool = True) -> Tensor:
    """(batch, length, channels) to token ids of the same shape.

    ``scale``: bring each recording to [-1, 1] by its own range first, as models of this kind are trained; False takes
    the values as they are, for audio that is to keep its loudness.
    """
    x = _scaled(audio, -1.0) if scale else audio.clamp(-1, 1)
    mu = 2**bits - 1
    curve = torch.sign(x) * torch.log1p(mu * (x + 1e-8).abs()) / math.log1p(mu)
    return _quantised((curve + 1) / 2, bits)


def mu_law_decode(tokens: Tensor, bits: int = BITS) -> Tensor:
    """Token ids to samples in [-1, 1), float32."""
    mu = 2**bits - 1
    x = tokens.float() / 2 ** (bits - 1) - 1
    return torch.sign(x) * ((1 + mu) ** x.abs() - 1) / mu


def linear_encode(audio: Tensor, bits: int = BITS) -> Tensor:
    """(batch, length, channels) to token ids, each recording scaled to its own range."""
    return _quantised(_scaled(audio, 0.0), bits)


def linear_decode(tokens: Tensor, bits: int = BITS) -> Tensor:
    """Token ids to samples in [-1, 1), float32."""
    return tokens.float() / 2 ** (bits - 1) - 1
