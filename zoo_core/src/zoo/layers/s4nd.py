"""S4ND: state-space kernels along every axis of an image or a video, multiplied as an outer product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import long_conv_nd

from .fft_conv import KERNELS, ActivatedLinear, NormedLinear, activation, dropout
from .linear import Linear
from .ssm_kernel import ConvolutionKernel


class S4ND(nn.Module):
    """``y = (K_1 x ... x K_d) * u + D u``, then, unless ``linear``, activation, dropout, a linear and ``final_act``.

    ``dim`` axes with longest kernels ``l_max`` (one number, one for each, or None); ``channels`` outputs of each
    channel; ``trank``: number of outer products that are averaged (with ``average_ranks=False`` each is an output of
    its own, after the channels of the one before it); ``bidirectional``: kernels for both directions of every axis (the
    present belongs to the first). ``out_channels``: mix channels, too: that many outputs, each the sum of the
    convolutions of all channels with kernels of its own, and no D. ``weight_norm``: of the output linear. Further
    arguments go to the kernels (one for each axis; they share nothing). Parameters: ``D`` (channels, d_model),
    ``kernel.{axis}.*``, ``output_linear.0.*`` (without the ``0.`` where ``final_act`` is None).
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
        average_ranks: bool = True,
        out_channels: int | None = None,
        linear: bool = True,
        weight_norm: bool = False,
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
        if not linear and (out_channels is not None or not average_ranks):
            raise ValueError("S4ND: out_channels and average_ranks=False are defined for linear=True only")
        self.average_ranks, self.out_channels = average_ranks, out_channels
        self.D = nn.Parameter(torch.randn(channels, d_model, **kind))
        sets = channels * (out_channels or 1) * trank * (2 if bidirectional else 1)
        if mode != "conv":
            kernel = {"d_state": d_state, **kernel}
        self.kernel = nn.ModuleList(KERNELS[mode](d_model, sets, length, **kernel, **kind) for length in self.l_max)
        if not linear:
            self.act = activation(act)
            self.drop = dropout(dropout_p, tie_dropout)
            width = d_model * channels
            self.output_linear: nn.Module
            if final_act is None:
                self.output_linear = (NormedLinear if weight_norm else Linear)(width, d_model, **kind)
            else:
                self.output_linear = ActivatedLinear(width, d_model, final_act, weight_norm=weight_norm, **kind)

    def kernels(self, sizes: Sequence[int], rate: float = 1.0) -> list[Tensor]:
        """For each axis (channels [times 2 if bidirectional], d_model, taps)."""
        made = []
        for module, size, taps in zip(self.kernel, sizes, self._taps(sizes, rate), strict=True):
            assert isinstance(module, ConvolutionKernel)
            made.append(module.kept((size, rate), lambda m=module, n=taps: m(n, rate)[0]))
        return made

    def _taps(self, sizes: Sequence[int], rate: float) -> list[int]:
        return [
            size if longest is None else min(size, round(longest / rate))
            for size, longest in zip(sizes, self.l_max, strict=True)
        ]

    def forward(self, u: Tensor, *, rate: float = 1.0) -> Tensor:
        """(batch, *sizes, d_model) to the same.

        Where ``linear``, the last axis is channels * d_model, or channels * out_channels; times ``trank`` where ranks
        are not averaged.
        """
        sizes = u.shape[1:-1]
        if len(sizes) != len(self.l_max):
            raise ValueError(
                f"u has shape {tuple(u.shape)}; this layer works on (batch, {len(self.l_max)} sizes, d_model)"
            )
        made, taps = self.kernels(sizes, rate), self._taps(sizes, rate)
        if all(k.shape[-1] == n for k, n in zip(made, taps, strict=True)):
            halves = [k.chunk(2) if self.bidirectional else (k, k) for k in made]
            ahead, behind = [self._ranks(h[0]) for h in halves], [self._ranks(h[1]) for h in halves]
            if self.average_ranks:
                ahead[0], behind[0] = ahead[0] / self.trank, behind[0] / self.trank
            y = long_conv_nd(u, ahead, back_kernels=behind if self.bidirectional else None)
        else:
            y = self._wrapped(u, made, taps)
        if self.out_channels is None:
            D = self.D if self.average_ranks else self.D.repeat(self.trank, 1)
            y = y + (u.unsqueeze(-2) * D).to(y.dtype)
        else:
            y = y.sum(-1).unflatten(-1, (self.out_channels, -1)).transpose(-1, -2)
        y = y.flatten(-2)
        if self.linear:
            return y
        return self.output_linear(self.drop(self.act(y)))

    def _wrapped(self, u: Tensor, made: Sequence[Tensor], taps: Sequence[int]) -> Tensor:
        """Kernels of other lengths than ``taps``: the original's transforms of size + taps points wrap them."""
        sizes = u.shape[1:-1]
        axes = list(range(-len(sizes), 0))
        spectrum: Tensor | None = None
        for axis, (k, size, n) in enumerate(zip(made, sizes, taps, strict=True)):
            if self.bidirectional:
                k, back = k.chunk(2)
                k = F.pad(k, (0, size)) + F.pad(back.flip(-1), (size, 0))
            last = axis == len(sizes) - 1
            f = (torch.fft.rfft if last else torch.fft.fft)(self._ranks(k), n=size + n)
            spectrum = f if spectrum is None else spectrum.unsqueeze(-1) * f[(..., *[None] * axis, slice(None))]
        assert spectrum is not None
        spectrum = spectrum.mean(0) if self.average_ranks else spectrum.sum(0)
        points = [size + n for size, n in zip(sizes, taps, strict=True)]
        u_f = torch.fft.rfftn(torch.movedim(u, -1, 1), s=points, dim=axes)
        y = torch.fft.irfftn(u_f[:, None] * spectrum, s=points, dim=axes)
        for axis, size in enumerate(sizes):
            y = y.narrow(3 + axis, 0, size)
        return y.permute(0, *range(3, y.dim()), 1, 2)

    def _ranks(self, k: Tensor) -> Tensor:
        """((ranks channels), d_model, taps) to (ranks, channels, d_model, taps); (1, ranks * channels, ...) where each
        rank is an output of its own."""
        return k.unflatten(0, (self.trank if self.average_ranks else 1, -1))
