"""Parts that the point networks share: pointwise layers on (..., channels), the two-way Mamba mixer and its block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Mamba, PathScan, Recomputed, RMSNorm
from zoo.layers.inference import by_rows, results_only, untouched
from zoo.layers.linear import activation_name, linear
from zoo_kernels import causal_conv1d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "hardswish": nn.Hardswish,
    "leakyrelu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
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


def folds(conv: nn.Module, norm: nn.Module, *others: nn.Module, x: Tensor) -> bool:
    """Whether ``norm(conv(x))`` may be one product: inference on a CPU, statistics that are fixed, nobody watching."""
    return (
        type(conv) is PointConv
        and type(norm) is PointNorm
        and conv.groups == 1
        and not norm.training
        and norm.running_mean is not None
        and norm.affine
        and x.dtype == conv.weight.dtype == norm.running_mean.dtype
        and results_only(x, conv.weight, conv.bias, norm.weight, norm.bias)
        and untouched(conv, norm, *others)
    )


def folded(conv: PointConv, norm: PointNorm) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out) of ``norm(conv(x))``, whose statistics are fixed.

    Computed at every call: it costs what a few rows of the product cost, and nothing can grow stale.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt() * norm.weight
    shift = norm.running_mean.to(wide).neg() if conv.bias is None else conv.bias - norm.running_mean.to(wide)
    return (conv.weight * scale.unsqueeze(1)).to(dtype), (shift * scale + norm.bias).to(dtype)


def activate(x: Tensor, act: nn.Module) -> Tensor:
    """``act(x)`` for an x that nobody else reads."""
    return x.relu_() if type(act) is nn.ReLU else act(x)


Rows = Callable[[Tensor], Tensor]


def rowwise(module: nn.Module) -> bool:
    """Whether ``module``, of pointwise layers, gives each row its own result: nothing in it trains, and no batch norm
    takes its statistics from the batch."""
    return not torch.is_grad_enabled() and not any(
        m.training or (isinstance(m, nn.BatchNorm1d) and m.running_mean is None) for m in module.modules()
    )


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor, act: nn.Module | None = None) -> Callable[..., Tensor]:
    """The function ``(rows, add=None) -> act(norm(conv(rows)) + add)`` for rows such as x, folded where it may be."""
    others = () if act is None else (act,)
    if not folds(conv, norm, *others, x=x):

        def called(rows: Tensor, add: Tensor | None = None) -> Tensor:
            y = norm(conv(rows))
            y = y if add is None else y + add
            return y if act is None else act(y)

        return called
    weight, bias = folded(conv, norm)  # type: ignore[arg-type]
    name = None if act is None else activation_name(act)

    def product(rows: Tensor, add: Tensor | None = None) -> Tensor:
        if add is None and name is not None:
            return linear(rows, weight, bias, act=name)
        y = linear(rows, weight, bias, add=add)
        return y if act is None else activate(y, act)

    return product


class ConvNormAct(nn.Module):
    """Pointwise convolution, batch norm, activation."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False, act: str = "relu") -> None:
        super().__init__()
        self.net = nn.Sequential(
            PointConv(in_channels, out_channels, bias=bias), PointNorm(out_channels), activation(act)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not rowwise(self) or not untouched(*self.modules()):
            return self.net(x)
        conv, norm, act = self.net
        return by_rows(conv_norm(conv, norm, x, act), x)


class ResidualMLP(Recomputed):
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

    def rows(self, x: Tensor) -> Rows:
        """The same as a function of rows such as x, batch norms folded where they may be."""
        if not untouched(*self.modules()) or len(self.net2) > 2:
            return self
        (conv1, norm1, act1), (conv2, norm2) = self.net1, self.net2
        first, second = conv_norm(conv1, norm1, x, act1), conv_norm(conv2, norm2, x, self.act)
        return lambda rows: second(first(rows), add=rows)


class ResidualStack(nn.Module):
    """``count`` residual blocks, one after the other."""

    def __init__(self, channels: int, count: int, *, groups: int, expansion: float, bias: bool, act: str) -> None:
        super().__init__()
        self.operation = nn.Sequential(
            *(ResidualMLP(channels, groups=groups, expansion=expansion, bias=bias, act=act) for _ in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        if not rowwise(self) or not untouched(*self.modules()):
            return self.operation(x)
        return by_rows(stack_rows(self.operation, x), x)


def stack_rows(operation: nn.Module, x: Tensor) -> Rows:
    """Residual blocks one after the other as a function of rows such as x; x may have another width, not dtype."""
    if not isinstance(operation, nn.Sequential) or not untouched(operation):
        return operation
    blocks = [block.rows(x) if isinstance(block, ResidualMLP) else block for block in operation]

    def run(rows: Tensor) -> Tensor:
        for block in blocks:
            rows = block(rows)
        return rows

    return run


def stacked_weights(operation: nn.Module, x: Tensor) -> list[Tensor] | None:
    """``first, first_bias, second, second_bias`` of residual blocks with ReLUs, batch norms folded, one block after the
    other along the first axis (see :func:`zoo_kernels.grouped_mlp`). None where they are something else, or watched."""
    if not isinstance(operation, nn.Sequential) or not len(operation) or not untouched(*operation.modules()):
        return None
    parts = []
    for block in operation:
        if not isinstance(block, ResidualMLP) or len(block.net2) > 2:
            return None
        (conv1, norm1, act1), (conv2, norm2) = block.net1, block.net2
        relus = type(act1) is nn.ReLU and type(block.act) is nn.ReLU
        if not relus or not folds(conv1, norm1, x=x) or not folds(conv2, norm2, x=x):
            return None
        parts.append((*folded(conv1, norm1), *folded(conv2, norm2)))
    return [torch.stack(part) for part in zip(*parts, strict=True)]


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
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, conv))
        self.conv_bias = nn.Parameter(torch.empty(2, inner))
        self.scan = PathScan(inner, state, math.ceil(dim / 16) if dt_rank is None else dt_rank, paths=2)
        self.out_proj = Linear(inner, dim, bias=False)
        bound = conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, length, dim) to (batch, length, dim)."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        both = [False, True]
        x, _ = causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu", reverse=both)
        return self.out_proj(self.scan(x, z=z, reverse=both))


def make_norm(dim: int, rms: bool, eps: float = 1e-5) -> nn.Module:
    return RMSNorm(dim, eps=eps) if rms else nn.LayerNorm(dim, eps=eps)


#: Numbers that a mixer gets at once in inference on a CPU: what it makes of them stays in the cache.
MIXED = 1 << 20


def by_clouds(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for a function of (batch, length, channels) that treats every cloud by itself.

    In inference on a CPU it gets some clouds at a time, so that what lies inside it never takes memory.
    """
    batch = len(x)
    parts = math.ceil(batch / max(1, MIXED // max(1, x[0].numel()))) if batch else 1
    if parts == 1 or torch.is_grad_enabled() or not results_only(x):
        return function(x)
    step = math.ceil(batch / parts)
    y = torch.empty_like(x)
    for start in range(0, batch, step):
        y[start : start + step] = function(x[start : start + step])
    return y


class MambaLayer(Recomputed):
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
        return by_clouds(lambda r: self.mixer(self.norm(r)), residual), residual


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
