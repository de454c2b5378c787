"""Residual blocks of the UNETR decoders: two convolutions with a norm, and the way up with a skip.

Layout (batch, channels, *size) in two or three dimensions. Convolutions have no bias, the activation is LeakyReLU 0.01.
``norm``: "instance" (eps 1e-5, no parameters), "batch" or "group", or one of them with its options, as in
``("instance", {"affine": True})``; ``residual=False`` leaves the shortcut out. Parameters are named as in MONAI's
``UnetResBlock``, ``UnetBasicBlock``, ``UnetrBasicBlock``, ``UnetrUpBlock`` (Apache-2.0); state dicts go both ways.
Source: Hatamizadeh et al., "UNETR", arXiv 2103.10504, section 3.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed

from . import lean

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}

#: a norm's name, or its name and options
NormName = str | Sequence[Any]
NORMS: dict[str, dict[int, Any]] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}


def make_norm(norm: NormName, dims: int, channels: int) -> nn.Module:
    """The norm named ``norm``, see the head of this file. Raises ValueError for one that is not known."""
    name = str(norm if isinstance(norm, str) else norm[0]).lower()
    options: Any = {} if isinstance(norm, str) else norm[1]
    if name == "group":
        return nn.GroupNorm(**{"num_channels": channels, **options})
    if name not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected 'instance', 'batch' or 'group', perhaps with its options")
    return NORMS[name][dims](channels, **options)


def named_conv(dims: int, cin: int, cout: int, kernel: int, *, bias: bool = False) -> nn.Sequential:
    """A convolution that keeps the size, registered as ``conv``."""
    return nn.Sequential(OrderedDict(conv=CONV[dims](cin, cout, kernel, padding=kernel // 2, bias=bias)))


class ResidualBlock(Recomputed):
    """``act(norm(conv2(act(norm(conv1 x)))) + shortcut x)``; the shortcut is conv1x1 and norm where channels differ."""

    def __init__(self, dims: int, cin: int, cout: int, norm: NormName = "instance", residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = named_conv(dims, cin, cout, 3)
        self.conv2 = named_conv(dims, cout, cout, 3)
        self.norm1, self.norm2 = make_norm(norm, dims, cout), make_norm(norm, dims, cout)
        self.conv3 = self.norm3 = None
        if residual and cin != cout:
            self.conv3, self.norm3 = named_conv(dims, cin, cout, 1), make_norm(norm, dims, cout)

    def forward(self, x: Tensor) -> Tensor:
        if self.may_be_lean(x):
            return self.lean([x], owned=[False])
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        if self.residual:
            y = y + (x if self.conv3 is None or self.norm3 is None else self.norm3(self.conv3(x)))
        return F.leaky_relu(y, 0.01)

    def may_be_lean(self, x: Tensor) -> bool:
        """Whether :meth:`lean` is this block, and x a map for it."""
        norms = (self.norm1, self.norm2, self.norm3)
        plain = all(isinstance(n, nn.InstanceNorm2d | nn.InstanceNorm3d) for n in norms if n is not None)
        return self.residual and plain and not self.norm1.track_running_stats and lean.lean(self, x)

    def lean(self, maps: Sequence[Tensor], *, owned: Sequence[bool]) -> Tensor:
        """The same for maps side by side, see :func:`zoo_medical.lean.residual`."""
        shortcut = None if self.conv3 is None else self.conv3[0]
        convs = (self.conv1[0], self.conv2[0], shortcut)
        norms = (
            lean.norm_of(self.norm1), lean.norm_of(self.norm2), None if shortcut is None else lean.norm_of(self.norm3)
        )  # fmt: skip
        return lean.residual(maps, convs, norms, 0.01, owned=owned)


class BasicBlock(nn.Module):
    """A residual block under the name ``layer``."""

    def __init__(self, dims: int, cin: int, cout: int, norm: NormName = "instance", residual: bool = True) -> None:
        super().__init__()
        self.layer = ResidualBlock(dims, cin, cout, norm, residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class UpBlock(nn.Module):
    """Double the sides (transposed convolution, kernel and stride 2), put the skip beside it, residual block."""

    def __init__(self, dims: int, cin: int, cout: int, norm: NormName = "instance", residual: bool = True) -> None:
        super().__init__()
        up = TRANSPOSED[dims](cin, cout, 2, stride=2, bias=False)
        self.transp_conv = nn.Sequential(OrderedDict(conv=up))
        self.conv_block = ResidualBlock(dims, 2 * cout, cout, norm, residual)

    def forward(self, x: Tensor, skip: Tensor, owned: bool = False) -> Tensor:
        """``owned``: nobody else reads ``skip``, so that inference may write over it."""
        if lean.lean(self, x) and self.conv_block.may_be_lean(x):
            return self.conv_block.lean([lean.enlarge(x, self.transp_conv[0]), skip], owned=[True, owned])
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))


class OutBlock(nn.Module):
    """A 1x1 convolution with bias to the classes, registered as ``conv.conv``."""

    def __init__(self, dims: int, cin: int, classes: int) -> None:
        super().__init__()
        self.conv = named_conv(dims, cin, classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            return lean.convolve(x, self.conv[0]).contiguous()
        return self.conv(x)
