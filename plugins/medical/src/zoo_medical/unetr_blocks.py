"""Residual blocks of the UNETR decoders: two convolutions with instance norm, and the way up with a skip.

Layout (batch, channels, *size) in two or three dimensions. Convolutions have no bias, instance norms (eps 1e-5) no
parameters, the activation is LeakyReLU 0.01. The parameters are named as in MONAI's ``UnetResBlock``,
``UnetrBasicBlock`` and ``UnetrUpBlock`` (Apache-2.0), so state dicts go both ways.
Source: Hatamizadeh et al., "UNETR", arXiv 2103.10504, section 3.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lean

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def named_conv(dims: int, cin: int, cout: int, kernel: int, *, bias: bool = False) -> nn.Sequential:
    """A convolution that keeps the size, registered as ``conv``."""
    return nn.Sequential(OrderedDict(conv=CONV[dims](cin, cout, kernel, padding=kernel // 2, bias=bias)))


class ResidualBlock(nn.Module):
    """``act(norm(conv2(act(norm(conv1 x)))) + shortcut x)``; the shortcut is conv1x1 and norm where channels differ."""

    def __init__(self, dims: int, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = named_conv(dims, cin, cout, 3)
        self.conv2 = named_conv(dims, cout, cout, 3)
        self.conv3 = named_conv(dims, cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            return self.lean([x], owned=[False])
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        y = F.instance_norm(self.conv2(y))
        return F.leaky_relu(y + (x if self.conv3 is None else F.instance_norm(self.conv3(x))), 0.01)

    def lean(self, maps: Sequence[Tensor], *, owned: Sequence[bool]) -> Tensor:
        """The same for maps side by side, see :func:`zoo_medical.lean.residual`."""
        shortcut = None if self.conv3 is None else self.conv3[0]
        convs = (self.conv1[0], self.conv2[0], shortcut)
        norms = (lean.Norm(), lean.Norm(), None if shortcut is None else lean.Norm())
        return lean.residual(maps, convs, norms, 0.01, owned=owned)


class BasicBlock(nn.Module):
    """A residual block under the name ``layer``."""

    def __init__(self, dims: int, cin: int, cout: int) -> None:
        super().__init__()
        self.layer = ResidualBlock(dims, cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class UpBlock(nn.Module):
    """Double the sides (transposed convolution, kernel and stride 2), put the skip beside it, residual block."""

    def __init__(self, dims: int, cin: int, cout: int) -> None:
        super().__init__()
        up = TRANSPOSED[dims](cin, cout, 2, stride=2, bias=False)
        self.transp_conv = nn.Sequential(OrderedDict(conv=up))
        self.conv_block = ResidualBlock(dims, 2 * cout, cout)

    def forward(self, x: Tensor, skip: Tensor, owned: bool = False) -> Tensor:
        """``owned``: nobody else reads ``skip``, so that inference may write over it."""
        if lean.lean(self, x):
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
