"""What surrounds the layers of a deep S4 model: norms, residual functions and pooling, by the original's names.

Source: state-spaces/s4 ``src/models/nn/normalization.py``, ``src/models/nn/residual.py``,
``src/models/sequence/modules/pool.py``. All work on (batch, ..., channels); parameter names are the original's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Named = str | Mapping[str, Any] | None


def named(value: Named, what: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a part that a configuration names, or describes as a mapping with ``_name_``."""
    if value is None or isinstance(value, str):
        return value or "none", {}
    options = dict(value)
    if "_name_" not in options:
        raise ValueError(f"{what} is {dict(value)!r}; expected a name, or a mapping that gives it as '_name_'")
    return options.pop("_name_"), options


class ScalarNorm(nn.Module):
    """``s / std * (x - mean + m)`` over channels, biased deviation, no epsilon; ``m``, ``s``: single numbers."""

    def __init__(self, device=None, dtype=None) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.s = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=-1, correction=0, keepdim=True)
        return self.s / std * (x - mean + self.m)


class PlainNorm(nn.Module):
    """A layer norm under the key ``ln``: the original's channels-first norm with ``scalar=False``."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x)


class ChannelBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis over all others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


class ChannelInstanceNorm(nn.InstanceNorm1d):
    """Normalisation of each channel (last axis) over the positions of its sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, -2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class SequenceGroupNorm(nn.GroupNorm):
    """Normalisation over channels and positions of a sequence at once."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, -2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class SequenceNorm(nn.Module):
    """The norm that a configuration names, under the key ``norm``.

    "layer" (scalar when ``transposed``), "batch", "instance", "group" or None; a mapping gives arguments of the torch
    class besides ``_name_`` ("scalar" for the channels-first layer norm).
    """

    def __init__(self, d_model: int, kind: Named, transposed: bool = False) -> None:
        super().__init__()
        name, options = named(kind, "norm")
        self.positions = name in ("batch", "instance", "group")  # whether other positions take part
        self.norm: nn.Module
        if name == "layer" and transposed:
            self.norm = ScalarNorm() if options.get("scalar", True) else PlainNorm(d_model)
        elif name == "layer":
            self.norm = nn.LayerNorm(d_model, **options)
        elif name == "batch":
            self.norm = ChannelBatchNorm(d_model, **options)
        elif name == "instance":
            self.norm = ChannelInstanceNorm(d_model, **options)
        elif name == "group":
            self.norm = SequenceGroupNorm(1, d_model, **options)
        elif name == "none":
            self.norm = nn.Identity()
        else:
            raise ValueError(f"norm is {name!r}; expected 'layer', 'batch', 'instance', 'group' or None")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Residual(nn.Module):
    """``alpha x + beta y`` with constants. The base of the other residual functions."""

    def __init__(self, d_model: int, index: int, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.beta * y if self.beta != 1.0 else y
        return self.alpha * x + y if self.alpha else y


class Feedforward(Residual):
    """No residual: y alone."""

    def __init__(self, d_model: int, index: int) -> None:
        super().__init__(d_model, index, alpha=0.0)


class Affine(Residual):
    """``alpha x + affine y``, ``affine`` learned, one number or one a channel, ``beta / index^gamma`` at first."""

    def __init__(
        self, d_model: int, index: int, alpha: float = 1.0, beta: float = 1.0, scalar: bool = True, gamma: float = 0.0
    ) -> None:
        super().__init__(d_model, index, alpha, beta)
        self.affine = nn.Parameter(beta * index**-gamma * torch.ones(1 if scalar else d_model))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.alpha * x + self.affine * y


class Highway(Residual):
    """``c (1 - r) x + r y`` with ``y <- Wy y`` and the gate ``r = sigmoid(Wx x + y)``; c 1.732 or 1."""

    def __init__(self, d_model: int, index: int, scaling_correction: bool = False, elemwise: bool = False) -> None:
        super().__init__(d_model, index)
        self.scale = 1.732 if scaling_correction else 1.0
        self.Wx = nn.Linear(d_model, d_model)
        self.Wy: Any = nn.Parameter(torch.randn(d_model)) if elemwise else nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.Wy(y) if isinstance(self.Wy, nn.Linear) else self.Wy * y
        gate = torch.sigmoid(self.Wx(x) + y)
        return self.scale * (1 - gate) * x + gate * y


class DecayResidual(Residual):
    """``a x + b y`` with ``b = index^-power`` and ``a = sqrt(1 - b^2)`` (``l2``) or 1 - b."""

    def __init__(self, d_model: int, index: int, power: float = 0.5, l2: bool = True) -> None:
        b = index**-power
        super().__init__(d_model, index, (1 - b**2) ** 0.5 if l2 else 1 - b, b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.alpha * x + self.beta * y


RESIDUALS: dict[str, type[Residual]] = {
    "R": Residual, "residual": Residual, "F": Feedforward, "N": Feedforward, "none": Feedforward, "ff": Feedforward,
    "feedforward": Feedforward, "A": Affine, "affine": Affine, "H": Highway, "highway": Highway, "D": DecayResidual,
    "decay": DecayResidual,
}  # fmt: skip


def make_residual(d_model: int, index: int, residual: bool | Named) -> Residual | None:
    """The residual function of layer ``index`` (from 1). True: a plain sum; None, False: y alone."""
    if residual is None or residual is False:
        return None
    name, options = ("R", {}) if residual is True else named(residual, "residual")
    if name not in RESIDUALS:
        raise ValueError(f"residual is {name!r}; expected None or one of {', '.join(RESIDUALS)}")
    return RESIDUALS[name](d_model, index, **options)


class Pool(nn.Module):
    """Every ``stride``-th position ("sample"), means of ``stride`` positions ("avg", "pool"), or low frequencies alone
    ("spectral", as in the original a second inverse transform, so that time runs backwards).

    ``expand``: so many times as many channels, by repetition, or for means by a linear layer under the key ``linear``.
    """

    def __init__(self, d_model: int, kind: str, stride: int = 1, expand: int | None = None) -> None:
        super().__init__()
        if kind not in ("sample", "avg", "pool", "spectral"):
            raise ValueError(f"pool is {kind!r}; expected 'sample', 'avg', 'pool' or 'spectral'")
        self.kind, self.stride, self.expand = kind, stride, expand
        self.d_output = d_model * (expand or 1)
        if kind in ("avg", "pool") and expand is not None:
            self.linear = nn.Linear(d_model, self.d_output)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, channels) to (batch, length / stride, channels * expand); likewise with several lengths,
        except for "sample". Means drop an incomplete last window."""
        if self.kind == "sample":
            x = x[:, :: self.stride]
        elif self.kind == "spectral":
            x = self._spectral(x)
        else:
            for axis in range(1, x.dim() - 1):
                kept = x.shape[axis] // self.stride
                x = x.narrow(axis, 0, kept * self.stride).unflatten(axis, (kept, self.stride)).mean(axis + 1)
            return self.linear(x) if self.expand is not None else x
        return x.repeat_interleave(self.expand, -1) if self.expand is not None and self.expand > 1 else x

    def _spectral(self, x: Tensor) -> Tensor:
        for axis in range(1, x.dim() - 1):
            length = x.shape[axis]
            if length % self.stride:
                raise ValueError(f"x has {length} positions; spectral pooling needs a multiple of {self.stride}")
            kept = length // self.stride
            f = torch.fft.ifft(x, dim=axis)
            # Of an odd number the original takes one frequency too many; the second transform cuts the last.
            low, high = f.narrow(axis, 0, kept - kept // 2), f.narrow(axis, length + (-kept) // 2, -((-kept) // 2))
            x = torch.fft.ifft(torch.cat([low, high], axis), n=kept, dim=axis)
        return x.real
