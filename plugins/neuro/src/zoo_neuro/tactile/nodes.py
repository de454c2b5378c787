"""The operations before and after a cell, and the node that puts them together: one area of a ConvRNN.

Source: neuroagents-lab/PyTorchTNN ``pt_tnn/pre_post_memory``, ``pt_tnn/harbor_policy``, ``pt_tnn/recurrent_module.py``.
Every operation is ``op(x, t, residual)``: t is the time step (BatchNorm may have one set a step), residual what the
node read, for :class:`ResidualAdd`. ``out_shape`` is (channels, height, width), or (channels,) for flat outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo.layers.linear import Linear

from .cells import Cell, activation, make_cell
from .convolution import Conv2d, pair, start

Shape = tuple[int, ...]


class Operation(nn.Module):
    """What all operations share."""

    out_shape: Shape

    def normed(self, norm: type[nn.Module], width: int | None, timevary: bool, n_times: int | None) -> None:
        """The original's ``bn``, or ``bns`` for one a step. Raises ValueError where the number of steps is unknown."""
        self.timevary = timevary
        make = lambda: nn.Identity() if width is None else norm(width)  # noqa: E731
        if timevary:
            if n_times is None:
                raise ValueError("batchnorm_timevary needs the number of steps; give num_timesteps")
            self.bns = nn.ModuleList(make() for _ in range(n_times))
        else:
            self.bn = make()

    def norm(self, x: Tensor, t: int) -> Tensor:
        if not self.timevary:
            return self.bn(x)  # type: ignore[no-any-return]
        if t >= len(self.bns):
            raise ValueError(f"step {t}, but BatchNorm has {len(self.bns)} sets, one a step; give at most that many")
        return self.bns[t](x)  # type: ignore[no-any-return]


class Convolution(Operation):
    """Dropout, convolution, BatchNorm, activation."""

    def __init__(
        self,
        shape: Shape,
        n_times: int | None,
        out_channels: int,
        ksize: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        use_bias: bool = True,
        bias: float | None = None,
        init_dict: Any = None,
        dropout: float = 0.0,
        batchnorm: int | None = None,
        batchnorm_timevary: bool = False,
        activation_name: str | None = None,
        activation_options: Any = None,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise ValueError(f"Conv2dCell: padding_mode is {padding_mode!r}; expected 'zeros'")
        if len(shape) != 3:
            raise ValueError("Conv2dCell reads a map, but its input is flat")
        self.conv = Conv2d(shape[0], out_channels, ksize, stride, padding, dilation, groups, use_bias)
        start(self.conv, init_dict, bias)
        self.dropout = nn.Dropout(dropout)
        self.normed(nn.BatchNorm2d, batchnorm, batchnorm_timevary, n_times)
        self.activation = activation(activation_name, activation_options)
        self.out_shape = (out_channels, *self.conv.out_size(shape[1:]))

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        return self.activation(self.norm(self.conv(self.dropout(x)), t))


class FullyConnected(Operation):
    """Flatten (channels, height, width), dropout, linear, BatchNorm, activation."""

    def __init__(
        self,
        shape: Shape,
        n_times: int | None,
        out_channels: int,
        init_dict: Any = None,
        use_bias: bool = True,
        bias: float | None = None,
        dropout: float = 0.0,
        batchnorm: Any = None,
        batchnorm_timevary: bool = False,
        activation_name: str | None = "ReLU",
        activation_options: Any = None,
    ) -> None:
        super().__init__()
        self.lin = Linear(torch.Size(shape).numel(), out_channels, bias=use_bias)
        start(self.lin, init_dict, bias)
        self.dropout = nn.Dropout(dropout)
        self.normed(nn.BatchNorm1d, None if batchnorm is None else out_channels, batchnorm_timevary, n_times)
        self.activation = activation(activation_name, activation_options)
        self.out_shape = (out_channels,)

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        return self.activation(self.norm(self.lin(self.dropout(x.flatten(1))), t))


class Activation(Operation):
    def __init__(
        self, shape: Shape, n_times: int | None, activation_name: str | None = "ReLU", activation_options: Any = None
    ) -> None:
        super().__init__()
        self.activation, self.out_shape = activation(activation_name, activation_options), shape

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        return self.activation(x)  # type: ignore[no-any-return]


class Identity(Operation):
    def __init__(self, shape: Shape, n_times: int | None) -> None:
        super().__init__()
        self.out_shape = shape

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        return x


class MaxPool(Operation):
    def __init__(
        self,
        shape: Shape,
        n_times: int | None,
        ksize: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.maxpool = nn.MaxPool2d(pair(ksize), None if stride is None else pair(stride), padding, dilation,
                                    ceil_mode=ceil_mode)  # fmt: skip
        with torch.device("meta"):
            self.out_shape = (shape[0], *self.maxpool(torch.empty(1, *shape)).shape[2:])

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        return self.maxpool(x)  # type: ignore[no-any-return]


class AdaptiveAvgPool(Operation):
    def __init__(self, shape: Shape, n_times: int | None, output_size: Any = (6, 6), flatten: bool = False) -> None:
        super().__init__()
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(output_size), flatten
        self.out_shape = (shape[0], *pair(output_size))
        if flatten:
            self.out_shape = (torch.Size(self.out_shape).numel(),)

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        x = self.avgpool(x)
        return x.flatten(1) if self.flatten else x


class Chain(Operation):
    """Operations one after the other."""

    def __init__(self, shape: Shape, n_times: int | None, list_of_func_kwargs: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.sequential_mem = nn.ModuleList()
        for description in list_of_func_kwargs:
            self.sequential_mem.append(make_operation(description, shape, n_times))
            shape = self.sequential_mem[-1].out_shape  # type: ignore[assignment]
        self.out_shape = shape

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        for operation in self.sequential_mem:
            x = operation(x, t, residual)
        return x


class ResidualAdd(Operation):
    """``act(feedforward(x) + residual(what the node read))``."""

    def __init__(
        self,
        shape: Shape,
        n_times: int | None,
        read: Shape,
        feedforward_func_kwargs: Mapping[str, Any],
        residual_func_kwargs: Mapping[str, Any] | None = None,
        activation_name: str | None = None,
        activation_options: Any = None,
    ) -> None:
        super().__init__()
        self.feedforward = make_operation(feedforward_func_kwargs, shape, n_times)
        self.residual = make_operation(residual_func_kwargs or {"name": "Identity"}, read, n_times)
        self.activation = activation(activation_name, activation_options)
        self.out_shape = self.feedforward.out_shape

    def forward(self, x: Tensor, t: int = 0, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            raise ValueError("ResidualAdd adds what its node read; its node needs residual = true")
        return self.activation(self.feedforward(x, t) + self.residual(residual, t))  # type: ignore[no-any-return]


OPERATIONS: dict[str, type[Operation]] = {
    "Conv2dCell": Convolution,
    "FullyConnected": FullyConnected,
    "ActivationLayer": Activation,
    "Identity": Identity,
    "MaxPool": MaxPool,
    "AdaptiveAvgPool": AdaptiveAvgPool,
    "Sequential": Chain,
    "ResidualAdd": ResidualAdd,
}
_CONVOLUTION = {"ksize", "stride", "padding", "dilation", "groups", "padding_mode"}
_LEARNT = {"out_channels", "init_dict", "use_bias", "bias", "dropout", "batchnorm", "batchnorm_timevary"}
_ACTIVATION = {"activation", "activation_func_kwargs"}
_ARGUMENTS: dict[str, set[str]] = {
    "Conv2dCell": _CONVOLUTION | _LEARNT | _ACTIVATION,
    "FullyConnected": _LEARNT | _ACTIVATION,
    "ActivationLayer": _ACTIVATION,
    "Identity": set(),
    "MaxPool": {"ksize", "stride", "padding", "dilation", "ceil_mode"},
    "AdaptiveAvgPool": {"output_size", "flatten"},
    "Sequential": {"list_of_func_kwargs"},
    "ResidualAdd": {"feedforward_func_kwargs", "residual_func_kwargs"} | _ACTIVATION,
}
#: Written by the original itself, or without effect on these operations.
_FOLLOWS = {"name", "in_channels", "out_channels", "num_timesteps"}


def make_operation(
    description: Mapping[str, Any], shape: Shape, n_times: int | None, read: Shape | None = None
) -> Operation:
    """An operation on inputs of ``shape`` from the original's description {"name": "Conv2dCell", ...}.

    Raises ValueError for an operation or argument that there is not, naming it.
    """
    name = description.get("name")
    if name not in OPERATIONS:
        raise ValueError(f"the operation is {name!r}; expected one of {', '.join(OPERATIONS)}")
    known = _ARGUMENTS[name]
    unknown = sorted(set(description) - known - _FOLLOWS)
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")
    options: dict[str, Any] = {k: v for k, v in description.items() if k in known}
    for theirs, ours in (("activation", "activation_name"), ("activation_func_kwargs", "activation_options")):
        if theirs in options:
            options[ours] = options.pop(theirs)
    if name == "ResidualAdd":
        options["read"] = shape if read is None else read
    return OPERATIONS[name](shape, n_times, **options)


class Node(Recomputed):
    """Inputs together (``harbor``), then ``pre``, the recurrent ``cell``, ``post``.

    ``resize``: maps are brought to ``size`` (bilinear, antialiased when they shrink) before they are concatenated.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        sources: Sequence[Shape],
        size: tuple[int, ...],
        n_times: int | None,
    ) -> None:
        super().__init__()
        self.name = str(description["name"])
        harbor = dict(description["harbor_policy"])
        kind = harbor.pop("name", None)
        for key in ("input_shape", "in_channels"):
            harbor.pop(key, None)
        if kind not in ("ResizeConcat", "Identity") or harbor:
            raise ValueError(
                f"node {self.name!r}: harbor_policy is {description['harbor_policy']!r}; "
                "expected the name ResizeConcat or Identity alone"
            )
        self.resize, self.size = kind == "ResizeConcat", size
        flat = {len(shape) == 1 for shape in sources}
        if len(flat) > 1:
            raise ValueError(f"node {self.name!r} reads maps and flat vectors; expected one kind")
        where = sources[0][1:]
        if not flat.pop():
            where = size if self.resize else where
            if not self.resize and len({shape[1:] for shape in sources}) > 1:
                raise ValueError(f"node {self.name!r} reads maps of several sizes; expected ResizeConcat")
        read = (sum(shape[0] for shape in sources), *where)
        self.pre = make_operation(description["pre_memory"], read, n_times)
        self.cell: Cell = make_cell(description["recurrent_cell"], self.pre.out_shape[0])
        inside = (getattr(self.cell, "out_channels", self.pre.out_shape[0]), *self.pre.out_shape[1:])
        self.residual = bool(description.get("residual"))
        self.post = make_operation(description["post_memory"], inside, n_times, read)
        self.out_shape = self.post.out_shape
        if self.out_shape[0] != description["out_channels"]:
            raise ValueError(
                f"node {self.name!r}: out_channels is {description['out_channels']}, its operations give "
                f"{self.out_shape[0]}"
            )
        norms = [m for m in self.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        self.has_norms = bool(norms)
        self.by_step = any(getattr(m, "timevary", False) for m in self.modules())

    @property
    def batches_steps(self) -> bool:
        """Whether many steps at once are the same as one after the other: BatchNorm may count or mix them."""
        return not self.by_step and not (self.has_norms and self.training)

    def combine(self, inputs: Sequence[Tensor]) -> Tensor:
        if self.resize:
            inputs = [self._resized(x) for x in inputs]
        return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=1)

    def _resized(self, x: Tensor) -> Tensor:
        if x.dim() == 2 or tuple(x.shape[2:]) == self.size:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        return F.interpolate(wide, self.size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)

    def forward(self, inputs: Sequence[Tensor], state: Any, t: int = 0, begun: Any = None) -> tuple[Tensor, Any]:
        """One step: the inputs' (batch, ...) to (output, the cell's new state)."""
        read = self.combine(inputs)
        y, state = self.cell(self.pre(read, t), state, begun)
        return self.post(y, t, read if self.residual else None), state

    def series(self, inputs: Sequence[Tensor], steps: int) -> Tensor:
        """All steps from rest: the inputs' (batch * steps, ...), steps within a row, to outputs of that kind."""
        read = self.combine(inputs)
        return self.post(self.cell.series(self.pre(read), steps), 0, read if self.residual else None)
