"""Convolution kernels that are not state-space models in continuous time: free taps, and Mega's moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .ssm_kernel import ConvolutionKernel


class FreeKernel(ConvolutionKernel):
    """``kernel`` (channels, d_model, l_max): every tap is a parameter. Source: state-spaces/s4 ``ConvKernel``."""

    def __init__(self, d_model: int, channels: int = 1, l_max: int | None = None, lr=None, *, device=None, dtype=None):
        super().__init__(d_model, channels, l_max, lr)
        if l_max is None:
            raise ValueError("a free kernel needs l_max, its number of taps")
        taps = torch.randn(channels, d_model, l_max, device=device, dtype=dtype) / (d_model * l_max) ** 0.5
        self.add("kernel", taps, "K")

    def has_length(self, length: int, rate: float = 1.0) -> bool:
        return length == self.kernel.shape[-1]

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """All l_max taps, whatever ``length`` is."""
        return self.kernel, None


class EMAKernel(ConvolutionKernel):
    """Damped multi-dimensional moving average: ``K[l] = sum_n p beta q^l gamma / sqrt(N)``.

    ``p = sigmoid(delta)``, ``q = 1 - p sigmoid(alpha)``; ``delta``, ``alpha``, ``beta`` (channels * d_model, N, 1) with
    the channel outer, ``gamma`` (channels * d_model, N). ``dt_tie``: one delta for all N. ``efficient_bidirectional``:
    delta, alpha and beta are shared by the channels. Source: Ma et al., "Mega", arXiv 2209.10655, section 3.1.
    """

    def __init__(
        self, d_model: int, channels: int = 1, l_max: int | None = None, lr=None, *, d_state: int = 2,
        dt_tie: bool = False, efficient_bidirectional: bool = False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(d_model, channels, l_max, lr)
        kind = {"device": device, "dtype": dtype}
        self.shared = efficient_bidirectional
        rows = d_model if efficient_bidirectional else d_model * channels
        sign = torch.ones(d_state, 1, **kind)
        sign[1::2] = -1
        self.add("delta", torch.empty(rows, 1 if dt_tie else d_state, 1, **kind).normal_(std=0.2), "dt")
        self.add("alpha", torch.empty(rows, d_state, 1, **kind).normal_(std=0.2), "dt")
        self.add("beta", torch.empty(rows, d_state, 1, **kind).normal_(std=0.02) + sign, "dt")
        self.gamma = nn.Parameter(torch.randn(d_model * channels, d_state, **kind))

    def has_length(self, length: int, rate: float = 1.0) -> bool:
        return self.l_max is None or length <= self.l_max

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """At most l_max taps; the average has no notion of a rate."""
        if state is not None:
            raise ValueError("the EMA kernel carries no state here; state must be None")
        if self.l_max is not None:
            length = min(self.l_max, length)
        p = torch.sigmoid(self.delta)
        q = 1 - p * torch.sigmoid(self.alpha)
        steps = torch.arange(length, device=q.device, dtype=q.dtype)
        powers = p * self.beta * torch.exp(steps * torch.log(q))  # (rows, N, length)
        gamma = (self.gamma / math.sqrt(self.gamma.shape[1])).unflatten(0, (self.channels, self.d_model))
        if self.shared:
            return torch.einsum("hnl,chn->chl", powers, gamma), None
        return torch.einsum("chnl,chn->chl", powers.unflatten(0, (self.channels, self.d_model)), gamma), None
