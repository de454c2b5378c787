"""S4ND: state-space kernels along every axis of an image or a video, multiplied as an outer product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo_kernels import long_conv_nd

from .fft_conv import KERNELS, ActivatedLinear, activation, dropout
from .ssm_kernel import ConvolutionKernel


class S4ND(nn.Module):
    """``y = (K_1 x ... x K_d) * u + D u``, then, unless ``linear``, activation, dropout, a linear and ``final_act``.

    ``dim`` axes with longest kernels ``l_max`` (one number, one for each, or None); ``channels`` outputs of each
    channel; ``trank``: number of outer products that are averaged; ``bidirectional``: kernels for both directions of
    every axis (the present belongs to the first). Further arguments go to the kernels (one for each axis; they share
    nothing). Parameters: ``D`` (channels, d_model), ``kernel.{axis}.*``, ``output_linear.0.*``.
    Source: Nguyen et al., arXiv 2210.06583; state-spaces/s4 ``S4ND``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        l_max: int | Sequence[int | None] | None = None,
        dim: int | None = 2,
        *,
        channels: int = 1,
        bidirectional: bool = True,
        act: str | None = "gelu",
        final_act: str | None = None,
        dropout_p: float = 0.0,
        tie_dropout: bool = False,
        trank: int = 1,
        linear: bool = True,
        mode: str = "dplr",
        device=None,
        dtype=None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        if isinstance(l_max, Sequence):
            self.l_max = list(l_max)
        elif dim is None:
            raise ValueError("S4ND needs dim, or l_max with one length for each axis")
        else:
            self.l_max = [l_max] * dim
        if mode not in KERNELS:
            raise ValueError(f"kernel mode is {mode!r}; expected one of {', '.join(KERNELS)}")
        self.d_model, self.channels, self.trank, self.bidirectional, self.linear = (
            d_model, channels, trank, bidirectional, linear,
        )  # fmt: skip
        self.D = nn.Parameter(torch.randn(channels, d_model, **kind))
        sets = channels * trank * (2 if bidirectional else 1)
        if mode != "conv":
            kernel = {"d_state": d_state, **kernel}
        self.kernel = nn.ModuleList(KERNELS[mode](d_model, sets, length, **kernel, **kind) for length in self.l_max)
        if not linear:
            self.act = activation(act)
            self.drop = dropout(dropout_p, tie_dropout)
            self.output_linear = ActivatedLinear(d_model * channels, d_model, final_act, **kind)

    def kernels(self, sizes: Sequence[int], rate: float = 1.0) -> list[Tensor]:
        """For each axis (channels [times 2 if bidirectional], d_model, taps)."""
        made = []
        for module, size, longest in zip(self.kernel, sizes, self.l_max, strict=True):
            assert isinstance(module, ConvolutionKernel)
            taps = size if longest is None else min(size, round(longest / rate))
            made.append(module.kept((size, rate), lambda m=module, n=taps: m(n, rate)[0][..., :n]))
        return made

    def forward(self, u: Tensor, *, rate: float = 1.0) -> Tensor:
        """(batch, *sizes, d_model) to the same (channels * d_model where ``linear``)."""
        sizes = u.shape[1:-1]
        if len(sizes) != len(self.l_max):
            raise ValueError(
                f"u has shape {tuple(u.shape)}; this layer works on (batch, {len(self.l_max)} sizes, d_model)"
            )
        made = self.kernels(sizes, rate)
        backs = None
        if self.bidirectional:
            halves = [k.chunk(2) for k in made]
            made, backs = [h[0] for h in halves], [self._ranks(h[1]) for h in halves]
        made = [self._ranks(k) for k in made]
        made[0] = made[0] / self.trank
        if backs is not None:
            backs[0] = backs[0] / self.trank
        y = long_conv_nd(u, made, self.D, back_kernels=backs).flatten(-2)
        if self.linear:
            return y
        return self.output_linear(self.drop(self.act(y)))

    def _ranks(self, k: Tensor) -> Tensor:
        """((ranks channels), d_model, taps) to (ranks, channels, d_model, taps)."""
        return k.unflatten(0, (self.trank, self.channels))
