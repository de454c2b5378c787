"""Parts that the point networks share: pointwise layers on (..., channels), the two-way Mamba mixer and its block."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba, PathScan, RMSNorm
from zoo_kernels import causal_conv1d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "hardswish": nn.Hardswish,
    "leakyrelu": nn.LeakyReLU,
}


def activation(name: str) -> nn.Module:
    """An activation by its name in the originals' configurations."""
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]()


class DropPath(nn.Module):
    """Whole samples set to zero with probability ``rate`` in training, the others scaled up (arXiv 1603.09382)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path is {rate}; expected 0 <= rate < 1")
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), device=x.device, dtype=x.dtype).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class PointConv(nn.Module):
    """A convolution of kernel 1 over points: (..., in) to (..., out). ``weight`` (out, in / groups), ``bias`` (out)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 1, bias: bool = False) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels do not divide into {groups} groups")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        weight = self.weight.unflatten(0, (self.groups, -1))
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), weight).flatten(-2)
        return y if self.bias is None else y + self.bias


class PointNorm(nn.BatchNorm1d):
    """Batch normalisation over all leading axes: (..., channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class ConvNormAct(nn.Module):
    """Pointwise convolution, batch norm, activation."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False, act: str = "relu") -> None:
        super().__init__()
        self.net = nn.Sequential(
            PointConv(in_channels, out_channels, bias=bias), PointNorm(out_channels), activation(act)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ResidualMLP(nn.Module):
    """``act(net2(net1(x)) + x)`` on (..., channels). Source: PointMLP, arXiv 2202.07123, section 3.2."""

    def __init__(self, channels: int, *, groups: int, expansion: float, bias: bool, act: str) -> None:
        super().__init__()
        inner = int(channels * expansion)
        self.act = activation(act)
        self.net1 = nn.Sequential(
            PointConv(channels, inner, groups=groups, bias=bias), PointNorm(inner), activation(act)
        )
        if groups > 1:
            self.net2 = nn.Sequential(
                PointConv(inner, channels, groups=groups, bias=bias),
                PointNorm(channels),
                activation(act),
                PointConv(channels, channels, bias=bias),
                PointNorm(channels),
            )
        else:
            self.net2 = nn.Sequential(PointConv(inner, channels, bias=bias), PointNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net2(self.net1(x)) + x)


class ResidualStack(nn.Module):
    """``count`` residual blocks, one after the other."""

    def __init__(self, channels: int, count: int, *, groups: int, expansion: float, bias: bool, act: str) -> None:
        super().__init__()
        self.operation = nn.Sequential(
            *(ResidualMLP(channels, groups=groups, expansion=expansion, bias=bias, act=act) for _ in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


class BiMamba(nn.Module):
    """A Mamba-1 mixer that walks a sequence both ways; the directions share x, z and the output projection.

    ``x, z = in_proj(u)``; each direction has its own convolution and scan parameters and is gated by ``silu(z)``;
    ``out = out_proj(forward + backward)``, the sum, not the mean. E = expand * dim.
    Parameters: ``conv_weight`` (2, E, conv), ``conv_bias`` (2, E), ``scan`` (see :class:`zoo.layers.PathScan`).
    Source: arXiv 2401.09417, algorithm 1; SkyworkAI/PointCloudMamba ``mamba_ssm/modules/mamba_simple.py`` ("v2").
    """

    def __init__(self, dim: int, state: int = 16, conv: int = 4, expand: int = 2, dt_rank: int | None = None) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, conv))
        self.conv_bias = nn.Parameter(torch.empty(2, inner))
        self.scan = PathScan(inner, state, math.ceil(dim / 16) if dt_rank is None else dt_rank, paths=2)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        bound = conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, length, dim) to (batch, length, dim)."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        walked = [
            causal_conv1d(x, self.conv_weight[k], self.conv_bias[k], activation="silu", reverse=bool(k))[0]
            for k in range(2)
        ]
        return self.out_proj(self.scan(torch.stack(walked, dim=2), z=z, reverse=[False, True]))


def make_norm(dim: int, rms: bool, eps: float = 1e-5) -> nn.Module:
    return RMSNorm(dim, eps=eps) if rms else nn.LayerNorm(dim, eps=eps)


class MambaLayer(nn.Module):
    """Add, norm, mix: ``r = drop_path(x) + r; x = mixer(norm(r))``; x is added by the next layer.

    ``two_way``: the mixer is :class:`BiMamba`, otherwise one causal :class:`zoo.layers.Mamba`.
    """

    def __init__(
        self,
        dim: int,
        *,
        rms: bool = True,
        two_way: bool = True,
        drop_path: float = 0.0,
        depth: int = 1,
        expand: int = 2,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = make_norm(dim, rms)
        self.mixer: nn.Module = BiMamba(dim, expand=expand) if two_way else Mamba(dim, expand=expand)
        with torch.no_grad():
            out: Any = self.mixer.out_proj
            nn.init.kaiming_uniform_(out.weight, a=math.sqrt(5))
            out.weight /= math.sqrt(depth)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: (batch, length, dim) -> the mixer's output and the stream before it."""
        residual = x if residual is None else self.drop_path(x) + residual
        return self.mixer(self.norm(residual)), residual


# -- the same parts in the originals' format --------------------------------------------------------------------------


def bimamba_rules() -> Any:
    """The originals' two-way mixer ("v2": x_proj and x_proj_b ...) as our stacked parameters, below any ``mixer``."""
    from zoo.rules import Rules, Squeeze, Stack

    def pair(first: str, second: str, ours: str, *ops: Any) -> Stack:
        return Stack([f"{{p:*}}.mixer.{first}", f"{{p:*}}.mixer.{second}"], f"{{p:*}}.mixer.{ours}", *ops)

    return Rules(
        pair("conv1d.weight", "conv1d_b.weight", "conv_weight", Squeeze(1)),
        pair("conv1d.bias", "conv1d_b.bias", "conv_bias"),
        pair("x_proj.weight", "x_proj_b.weight", "scan.x_proj"),
        pair("dt_proj.weight", "dt_proj_b.weight", "scan.dt_proj"),
        pair("dt_proj.bias", "dt_proj_b.bias", "scan.dt_bias"),
        pair("A_log", "A_b_log", "scan.A_log"),
        pair("D", "D_b", "scan.D"),
    )
