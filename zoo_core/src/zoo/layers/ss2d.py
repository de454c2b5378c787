"""SS2D: the two-dimensional selective-scan mixer of VMamba and of everything built on it.

Order of reading: the scans over a grid (:class:`GridScan` with Mamba-1's recurrence, :class:`GridSSD` with
Mamba-2's), the parts around them, and the mixer :class:`SS2D`. A scan strategy is the *name* of its paths
(see ``zoo_kernels.paths``): nothing here permutes, flips or repeats an image. Layout is (batch, height, width,
channels).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo_kernels
from zoo_kernels import paths as grid_paths
from zoo_kernels import selective_scan

from . import bands
from .inference import by_rows
from .linear import Linear, call, linear
from .path_scan import PathScan

#: VMamba's four directions, in the order of its weights: rows, columns, and both from their ends.
CROSS = "cross"
Init = Literal["mamba", "random", "flat"]
Core = Literal["scan", "cascade", "ssd"]
OutNorm = Literal["norm", "none", "conv", "norm_conv", "softmax", "sigmoid"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}


def count_paths(names: str) -> int:
    """How many paths an expression such as ``"row+reverse(row)"`` names."""
    return grid_paths.get(names, (16, 16)).shape[0]


def activation(name: str) -> nn.Module:
    """The activation of that name (silu, gelu with the exact erf, relu, sigmoid)."""
    if name.lower() not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name.lower()]()


class GridScan(PathScan):
    """A :class:`PathScan` whose paths over an image are given by name.

    ``paths``: names joined by ``+`` (``"cross"``, ``"row+column"``, ``"hilbert+reverse(hilbert)"``); one parameter set
    a path, outputs summed in place. ``init``: ``"mamba"`` (A = -(1..N), dt in [1e-3, 0.1]), ``"random"`` (A_log normal,
    dt weights and bias 0.1 times normal) or ``"flat"`` (A = -1, dt weights and bias uniform in [0, 0.1)).
    Source: Liu et al., "VMamba", arXiv 2401.10166, section 4; MzeroMiko/VMamba ``SS2Dv2`` (``ssm_init`` v0, v1, v2).
    """

    def __init__(
        self, channels: int, state: int = 16, dt_rank: int | None = None, paths: str = CROSS, *, init: Init = "mamba"
    ) -> None:
        self.path_names, self.init = paths, init
        super().__init__(channels, state, dt_rank, count_paths(paths))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_scan(self.init, self.A_log, self.dt_bias, self.dt_proj)

    def forward(  # type: ignore[override]
        self, x: Tensor, z: Tensor | None = None, *, projected: Tensor | None = None
    ) -> Tensor:
        """x, z: (batch, height, width, channels); projected: see :class:`PathScan`. Returns the same shape."""
        order = grid_paths.get(self.path_names, x.shape[1:3], device=x.device)
        z, projected = (None if t is None else t.flatten(1, 2) for t in (z, projected))
        return super().forward(x.flatten(1, 2), z=z, path=order, projected=projected).view(x.shape)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, state={self.state}, dt_rank={self.dt_rank}, paths={self.path_names!r}"


def reset_scan(init: Init, A_log: Tensor, *dt: Tensor) -> None:
    """The two alternatives to Mamba's initialisation, in place ("mamba" leaves everything as it is)."""
    if init not in ("mamba", "random", "flat"):
        raise ValueError(f"init is {init!r}; expected 'mamba', 'random' or 'flat'")
    if init == "mamba":
        return
    with torch.no_grad():
        if init == "random":
            A_log.normal_()
        else:
            A_log.zero_()
        for t in dt:
            (t.normal_() if init == "random" else t.uniform_(0.0, 1.0)).mul_(0.1)


class CascadeScan(GridScan):
    """Rows first, then columns of the result: VMamba's cascade (``v052dc``), not a sum over paths.

    Every row is a sequence of its own, walked forwards with parameter set 0 and backwards with set 1; the two are
    added *as walked*: the backward output stays in its reversed order. Then the columns likewise with sets 2 and 3.
    A LayerNorm without parameters stands before each of the two. Source: MzeroMiko/VMamba ``SS2Dv2``, scan mode
    ``cascade2d``.
    """

    def __init__(self, channels: int, state: int = 16, dt_rank: int | None = None, *, init: Init = "mamba") -> None:
        super().__init__(channels, state, dt_rank, CROSS, init=init)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x, z: (batch, height, width, channels). Returns the same shape."""
        y = self._lines(x, 0)
        y = self._lines(y.transpose(1, 2), 2).transpose(1, 2)
        return y if z is None else y * F.silu(z)

    def _lines(self, x: Tensor, first: int) -> Tensor:
        """Both directions along axis 2 of (batch, lines, length, channels) with sets ``first`` and ``first + 1``."""
        rows = F.layer_norm(x, x.shape[-1:]).flatten(0, 1)
        total = torch.zeros_like(rows)
        for backwards in (False, True):
            k = first + int(backwards)
            dt_r, B, C = F.linear(rows, self.x_proj[k]).split([self.dt_rank, self.state, self.state], dim=-1)
            y, _ = selective_scan(
                rows, dt_r, -torch.exp(self.A_log[k].float()), B, C, self.D[k], dt_bias=self.dt_bias[k],
                dt_proj=self.dt_proj[k], dt_softplus=True, reverse=backwards,
            )  # fmt: skip
            total = total + (y.flip(1) if backwards else y)
        return total.view(x.shape)


class GridSSD(nn.Module):
    """Mamba-2's recurrence along named paths: scalar A and dt per head, B and C shared by the heads of a path.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``, dt = softplus(projection + bias).
    Parameters, K paths, R heads of width E/R: ``x_proj`` (K, R + 2N, E), ``dt_bias`` (K, R), ``A_log`` (K, R),
    ``D`` (K, R, E/R). Source: MzeroMiko/VMamba ``SS2Dm0``; Dao and Gu, arXiv 2405.21060.
    """

    def __init__(
        self, channels: int, state: int = 64, heads: int = 1, paths: str = CROSS, *, init: Init = "flat"
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels is {channels} and heads {heads}; the heads must divide the channels")
        K = count_paths(paths)
        self.channels, self.state, self.heads, self.path_names, self.init = channels, state, heads, paths, init
        self.x_proj = nn.Parameter(torch.empty(K, heads + 2 * state, channels))
        self.dt_bias = nn.Parameter(torch.empty(K, heads))
        self.A_log = nn.Parameter(torch.empty(K, heads))
        self.D = nn.Parameter(torch.empty(K, heads, channels // heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.x_proj.uniform_(-(self.channels**-0.5), self.channels**-0.5)
            dt = torch.exp(torch.rand_like(self.dt_bias) * math.log(100.0) + math.log(1e-3))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.copy_(torch.arange(1, self.heads + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)
        reset_scan(self.init, self.A_log, self.dt_bias)

    def project(self, x: Tensor) -> Tensor:
        """Of x (..., E): dt, B and C of all paths side by side, (..., K (R + 2N))."""
        return linear(x, self.x_proj.flatten(0, 1))

    def forward(self, x: Tensor, z: Tensor | None = None, *, projected: Tensor | None = None) -> Tensor:
        """x, z: (batch, height, width, channels); projected: :meth:`project` of x, where it is known already.

        Returns the same shape.
        """
        order = grid_paths.get(self.path_names, x.shape[1:3], device=x.device)
        R, N = self.heads, self.state
        projected = self.project(x) if projected is None else projected
        rows = x.flatten(1, 2)
        dt, B, C = projected.flatten(1, 2).unflatten(-1, (-1, R + 2 * N)).split([R, N, N], dim=-1)
        y, _ = zoo_kernels.ssd(
            rows.unflatten(-1, (R, -1)), dt, -torch.exp(self.A_log.float()), B, C, self.D,
            None if z is None else z.flatten(1, 2).unflatten(-1, (R, -1)), self.dt_bias,
            dt_softplus=True, path=order,
        )  # fmt: skip
        return y.reshape(x.shape)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution on (batch, height, width, channels); odd kernel, same size out."""

    def __init__(self, channels: int, kernel: int = 3, bias: bool = True) -> None:
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; a depthwise convolution that keeps the size needs an odd one")
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of (batch, height, width, channels), channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(1).view(x.shape)


def output_norm(kind: OutNorm, channels: int) -> nn.Module:
    """What stands between the scan and the output projection (VMamba's ``_on...`` tags)."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: nn.LayerNorm(channels),
        "none": nn.Identity,
        "conv": lambda: nn.Sequential(OrderedDict(conv=DepthwiseConv2d(channels, 3, bias=False))),
        "norm_conv": lambda: nn.Sequential(
            OrderedDict(norm=nn.LayerNorm(channels), conv=DepthwiseConv2d(channels, 3, bias=False))
        ),
        "softmax": SpatialSoftmax,
        "sigmoid": nn.Sigmoid,
    }
    if kind not in makers:
        raise ValueError(f"out_norm is {kind!r}; expected one of {', '.join(makers)}")
    return makers[kind]()


class SS2D(nn.Module):
    """Project in, depthwise 3x3, scan an image along its paths, norm, optional gate, project out.

    ``x[, z] = in_proj(u)``; ``y = out_norm(scan(act(conv(x))))``; ``y = y * act(z)``; ``out_proj(y)``. No projection
    has a bias. Input and output are (batch, height, width, dim).

    Arguments: ``dim`` C; ``expand``: the scan has E = int(expand * C) channels; ``state`` N, None for ceil(C / 6) (the
    first release's "auto"); ``dt_rank`` R, by default ceil(C / 16) (in an ``"ssd"`` core it is the number of heads);
    ``paths``: names of the visiting orders, see :class:`GridScan`; ``core``: ``"scan"``, ``"cascade"`` (its paths are
    fixed) or ``"ssd"``; ``init``: see :class:`GridScan`; ``gate``: with the branch z; ``gate_act``: z goes through the
    activation; ``act``: after the convolution; ``conv``: its odd kernel size, below 2 for none; ``out_norm``: see
    :func:`output_norm`; ``out_act``: GELU after it; ``drop``: dropout after ``out_proj``.
    Source: MzeroMiko/VMamba ``classification/models/vmamba.py`` ``SS2Dv0``, ``SS2Dv2`` (``forwardv2``), ``SS2Dm0``.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state: int | None = 16,
        dt_rank: int | None = None,
        paths: str = CROSS,
        core: Core = "scan",
        init: Init = "mamba",
        gate: bool = True,
        gate_act: bool = True,
        act: str = "silu",
        conv: int = 3,
        conv_bias: bool = True,
        out_norm: OutNorm = "norm",
        out_act: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        channels = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        state = math.ceil(dim / 6) if state is None else state
        self.dim, self.channels, self.gate, self.gate_act = dim, channels, gate, gate_act
        self.in_proj = Linear(dim, channels * (2 if gate else 1), bias=False)
        self.conv = DepthwiseConv2d(channels, conv, conv_bias) if conv > 1 else nn.Identity()
        self.act = activation(act)
        self.scan: nn.Module
        if core == "scan":
            self.scan = GridScan(channels, state, rank, paths, init=init)
        elif core == "ssd":
            self.scan = GridSSD(channels, state, rank, paths, init=init)
        elif core == "cascade":
            if paths != CROSS:
                raise ValueError(f"paths is {paths!r}; the cascade walks rows, then columns, and takes no other paths")
            self.scan = CascadeScan(channels, state, rank, init=init)
        else:
            raise ValueError(f"core is {core!r}; expected 'scan', 'cascade' or 'ssd'")
        self.out_norm = output_norm(out_norm, channels)
        self.norm_by_rows = out_norm in ("norm", "none", "sigmoid")
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = Linear(channels, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, u: Tensor) -> Tensor:
        """u: (batch, height, width, dim). Returns the same shape."""
        if self.gate:
            x, z = self.in_proj(u).chunk(2, dim=-1)
        else:
            x, z = self.in_proj(u), None
        y = self.scan(self.act(self.conv(x)))
        y = y if self.norm_by_rows else self.out_norm(y)
        return self.drop(by_rows(self.leave, y, z, module=self))

    def leave(self, y: Tensor, z: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """What follows the scan, row by row: y and the gate z (..., E) to (..., dim), ``add`` (..., dim) added."""
        y = self.out_act(self.out_norm(y) if self.norm_by_rows else y)
        if z is not None:
            y = y * (self.act(z) if self.gate_act else z)
        return call(self.out_proj, y, add=add)

    # -- by bands: for a block in inference, which has checked that nothing here is watched

    @property
    def has_bands(self) -> bool:
        """Whether :meth:`scanned` and :meth:`gate_of` can stand for :meth:`forward`."""
        return type(self.in_proj) in (nn.Linear, Linear) or not self.gate

    def _half(self, rows: Tensor, which: int) -> Tensor:
        """One half of ``in_proj``: 0 for what is scanned, 1 for the gate."""
        if not self.gate:
            return call(self.in_proj, rows)
        return linear(rows, self.in_proj.weight.chunk(2)[which])

    def gate_of(self, rows: Tensor) -> Tensor | None:
        """z of rows (..., dim), for :meth:`leave`; made where it is used, it never is a map."""
        return self._half(rows, 1) if self.gate else None

    def scanned(self, u: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor:
        """What the scan gives for ``before(u)``, (batch, height, width, dim) to (batch, height, width, E).

        Projection in, convolution and the scan's own projections pass over the image together, so that only what the
        scan reads is written.
        """

        def enter(rows: Tensor) -> Tensor:
            return self._half(before(rows), 0)

        project = None if isinstance(self.scan, CascadeScan) else self.scan.project
        if bands.plain(self.conv, u):
            y, *rest = bands.by_bands(
                self.conv, u, before=enter, act=self.act,
                after=None if project is None else lambda rows: (rows, project(rows)),
            )  # fmt: skip
            y = self.scan(y, projected=rest[0]) if rest else self.scan(y)
        else:
            y = self.scan(self.act(self.conv(by_rows(enter, u))))
        return y if self.norm_by_rows else self.out_norm(y)
