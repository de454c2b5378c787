"""EEGDM's backbone: a denoiser of one-channel EEG whose blocks mix time by two-sided S4D convolutions.

Paper: Puah et al., "EEGDM: EEG Representation Learning via Generative Diffusion Model", arXiv 2508.14086. Original:
jhpuah/EEGDM @ 976a5f4 (``model/diffusion_model.py``), no licence stated.
Differs from the original: class ids are shifted for the null class in a copy (the original changes the caller's
tensor); a block that only latents are read from computes no skip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.layers import FFTConv, GradCheckpointing, Linear, Recomputed

from .diffusion import NoiseSchedule
from .preparation import Preparation

#: What latents of a block can be read: the gate, the filter and their product.
QUERIES = ("gate", "filter", "inter")


def step_embedding(steps: Tensor, width: int) -> Tensor:
    """Sines and cosines of the diffusion step, (batch, 1) to (batch, width); frequencies fall from 1 to 1e-4."""
    half = width // 2
    k = torch.arange(half, device=steps.device, dtype=torch.float32)
    angles = steps * torch.exp(k * (-math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Embedding(nn.Sequential):
    """Linear, SiLU, Linear, SiLU. Keys ``0.*``, ``2.*``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(nn.Linear(d_in, d_out), nn.SiLU(), nn.Linear(d_out, d_out), nn.SiLU())


class LocalCondition(nn.Module):
    """A map of features over coarse time, stretched to the samples: (batch, 1, F, W) to (batch, length, d_out).

    One transposed convolution for each factor of ``upsample``, with weight norm and LeakyReLU 0.4, cut to ``length``,
    then a linear layer with weight norm over F. Raises ValueError for a map that does not reach ``length``.
    """

    def __init__(self, features: int, d_out: int, upsample: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for s in upsample:
            conv = nn.ConvTranspose2d(1, 1, (3, 2 * s), stride=(1, s), padding=(1, s // 2))
            nn.init.kaiming_normal_(conv.weight)
            layers += [weight_norm(conv), nn.LeakyReLU(0.4)]
        self.conv = nn.Sequential(*layers)
        linear = nn.Linear(features, d_out)
        nn.init.kaiming_normal_(linear.weight)
        self.linear = weight_norm(linear)

    def forward(self, x: Tensor, length: int) -> Tensor:
        y = self.conv(x)
        if y.shape[-1] < length:
            raise ValueError(
                f"the local condition {tuple(x.shape)} reaches {y.shape[-1]} samples; the signal has {length}: give "
                "a longer map"
            )
        return self.linear(y[:, 0, :, :length].transpose(1, 2))


class Block(Recomputed):
    """Norm, condition, S4D over time, a gated unit; to the next block and to the sum of skips.

    Arguments: ``d_model`` D; ``d_cond`` of the condition; ``last``: nothing follows; ``self_gated``: gate and filter
    from the same D features instead of two halves of 2 D; ``local_cond_ch`` F (0: none) and ``local_cond_upsample``;
    ``init``, ``mode``, ``n_ssm``, ``d_state``, ``bidirectional``: :class:`zoo.layers.FFTConv`'s.
    """

    def __init__(
        self,
        d_model: int,
        d_cond: int,
        *,
        last: bool = False,
        self_gated: bool = False,
        local_cond_ch: int = 0,
        local_cond_upsample: Sequence[int] = (8, 8),
        d_state: int = 128,
        n_ssm: int | None = None,
        init: str = "diag",
        mode: str = "diag",
        bidirectional: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        width = d_model if self_gated else 2 * d_model
        self.self_gated = self_gated
        self.cond_linear = nn.Linear(d_cond, d_model)
        if zero_init:
            nn.init.zeros_(self.cond_linear.weight)
            nn.init.zeros_(self.cond_linear.bias)
        self.prenorm1 = nn.LayerNorm(d_model)
        self.pre_layer = nn.Identity() if self_gated else Linear(d_model, width)
        self.layer = FFTConv(
            width, mode=mode, bidirectional=bidirectional, act=None, d_state=d_state, init=init, n_ssm=n_ssm
        )
        self.local = LocalCondition(local_cond_ch, width, local_cond_upsample) if local_cond_ch > 0 else None
        self.linear_next = None if last else Linear(d_model, d_model)
        self.linear_skip = Linear(d_model, d_model)

    def gates(self, x: Tensor, cond: Tensor, local: Tensor | None = None, rate: float = 1.0) -> dict[str, Tensor]:
        """gate, filter and inter, (batch, length, D) each, of x (batch, length, D) and cond (batch, 1, d_cond)."""
        y = self.layer(self.pre_layer(self.prenorm1(x) + self.cond_linear(cond)), rate=rate)
        if local is not None:
            if self.local is None:
                raise ValueError("this model takes no local condition; it was built with local_cond_ch=0")
            y = y + self.local(local, x.shape[1])
        gate, value = (y, y) if self.self_gated else y.chunk(2, dim=-1)
        gate, value = torch.sigmoid(gate), torch.tanh(value)
        return {"gate": gate, "filter": value, "inter": gate * value}

    def following(self, x: Tensor, inter: Tensor) -> Tensor | None:
        """The next block's input; None after the last."""
        return None if self.linear_next is None else self.linear_next(inter) + x

    def forward(
        self, x: Tensor, cond: Tensor, local: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Tensor | None, Tensor]:
        """(next, skip), (batch, length, D) each."""
        inter = self.gates(x, cond, local, rate)["inter"]
        return self.following(x, inter), self.linear_skip(inter)


class DiffusionBackbone(GradCheckpointing, nn.Module):
    """The denoiser of EEGDM (SSMDP): what is to be predicted of a noisy one-channel signal at a diffusion step.

    Arguments: ``in_channels`` of a signal, ``d_model``, ``d_state``, ``n_layer``, ``n_ssm``, ``kernel_init``,
    ``kernel_mode``, ``bidirectional`` of the S4 layers; ``d_cond`` and ``d_cond_embed`` of step and class;
    ``local_cond_ch``, ``local_cond_upsample``; ``n_class`` EEG channels as classes, ``have_null_class``: one more, id
    -1; ``self_gated``; ``zero_init``: condition and output start at zero, as in the original; ``noise_schedule`` and
    ``preparation``: arguments of :class:`~zoo_neuro.eegdm.diffusion.NoiseSchedule` and
    :class:`~zoo_neuro.eegdm.preparation.Preparation`, which say what the model denoises.

    forward: x (batch, in_channels, length), t (batch, 1) int64 steps, cond (batch, 1) int64 class ids, optionally
    ``local_cond`` (batch, 1, F, W); returns (batch, in_channels, length). Raises ValueError for other shapes.
    Source: arXiv 2508.14086, section III; jhpuah/EEGDM ``Wavenet``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        d_model: int = 128,
        d_state: int = 128,
        n_layer: int = 20,
        n_ssm: int | None = None,
        kernel_init: str = "diag",
        kernel_mode: str = "diag",
        bidirectional: bool = True,
        d_cond: int = 512,
        d_cond_embed: int = 128,
        local_cond_ch: int = 0,
        local_cond_upsample: Sequence[int] = (8, 8),
        n_class: int = 22,
        have_null_class: bool = False,
        self_gated: bool = False,
        zero_init: bool = True,
        noise_schedule: Mapping[str, Any] | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.schedule = NoiseSchedule(**(noise_schedule or {}))
        self.preparation = Preparation(**(preparation or {}))
        if n_layer < 1 or n_class < 1:
            raise ValueError(f"n_layer is {n_layer} and n_class {n_class}; expected 1 or more of each")
        if d_cond_embed < 4 or d_cond_embed % 2:
            raise ValueError(f"d_cond_embed is {d_cond_embed}; expected an even number, 4 or more")
        self.in_channels, self.d_model, self.d_embed = in_channels, d_model, d_cond_embed
        self.have_null_class, self.n_class = have_null_class, n_class + int(have_null_class)
        self.in_layer = nn.Sequential(nn.Linear(in_channels, d_model), nn.ReLU())
        self.layers = nn.ModuleList(
            Block(
                d_model,
                d_cond,
                last=i == n_layer - 1,
                self_gated=self_gated,
                local_cond_ch=local_cond_ch,
                local_cond_upsample=local_cond_upsample,
                d_state=d_state,
                n_ssm=n_ssm,
                init=kernel_init,
                mode=kernel_mode,
                bidirectional=bidirectional,
                zero_init=zero_init,
            )
            for i in range(n_layer)
        )
        self.out_layer = nn.Sequential(Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, in_channels))
        nn.init.kaiming_normal_(self.out_layer[0].weight)  # type: ignore[arg-type]
        if zero_init:
            nn.init.zeros_(self.out_layer[2].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.out_layer[2].bias)  # type: ignore[arg-type]
        self.t_embed_in = Embedding(d_cond_embed, d_cond)
        self.label_embed = nn.Embedding(self.n_class, d_cond_embed)
        self.label_embed_in = Embedding(d_cond_embed, d_cond)

    @property
    def channels(self) -> int:
        """EEG channels that the model knows, without the null class."""
        return self.n_class - int(self.have_null_class)

    def condition(self, t: Tensor, cond: Tensor) -> Tensor:
        """(batch, 1) steps and (batch, 1) class ids to (batch, 1, d_cond)."""
        steps = self.t_embed_in(step_embedding(t, self.d_embed).to(self.label_embed.weight.dtype))
        ids = cond + 1 if self.have_null_class else cond
        return self.label_embed_in(self.label_embed(ids)) + steps[:, None]

    def embed(self, x: Tensor) -> Tensor:
        """(batch, in_channels, length) to (batch, length, D)."""
        if x.dim() != 3 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"signals have shape {tuple(x.shape)}; expected (batch, {self.in_channels}, length): every EEG channel "
                "is a sample of its own, its number given as cond"
            )
        return self.in_layer(x.transpose(1, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, local_cond: Tensor | None = None) -> Tensor:
        context = self.condition(t, cond)
        h: Tensor | None = self.embed(x)
        total: Tensor | None = None
        for block in self.layers:
            h, skip = block(h, context, local_cond)
            total = skip if total is None else total + skip
        return self.out_layer(total).transpose(1, 2)
