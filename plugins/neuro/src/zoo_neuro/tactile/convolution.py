"""A 2D convolution over small maps whose input channels can be taken in parts, for cells that convolve (input, state).

Maps of whiskers have a few dozen places and hundreds of channels, so in inference on a CPU the convolution is one
product of gathered neighbours (rows) with the weights, which :func:`zoo.layers.linear.linear` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.inference import results_only
from zoo.layers.linear import linear
from zoo.layers.ssm_kernel import Kept


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


class Part(NamedTuple):
    """The convolution of some of the input channels: ``part(x, add=None)`` is conv(x) [+ add]."""

    layer: Conv2d
    weight: Tensor  #: (out, in, kh, kw), or (out, kh * kw * in) for a product of rows
    bias: Tensor | None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        layer = self.layer
        if self.weight.dim() == 4:
            x = F.pad(x, layer.margins) if any(layer.margins) else x
            y = F.conv2d(x, self.weight, self.bias, layer.stride, 0, layer.dilation, layer.groups)
            return y if add is None else y + add
        kh, kw = layer.kernel_size
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, *layer.margins))  # places last: rows are places
        high, broad = x.shape[1] - kh + 1, x.shape[2] - kw + 1
        rows = torch.cat([x[:, i : i + high, j : j + broad] for i in range(kh) for j in range(kw)], dim=-1)
        add = None if add is None else add.permute(0, 2, 3, 1)
        return linear(rows, self.weight, self.bias, add=add).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d, Kept):
    """``nn.Conv2d`` with zero padding: a number, a pair, "valid" or "same" (the odd zero right and below)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ksize: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
    ) -> None:
        kernel, spread = pair(ksize), pair(dilation)
        super().__init__(  # type: ignore[call-arg]
            in_channels, out_channels, kernel, stride=pair(stride), dilation=spread, groups=groups, bias=use_bias
        )
        if padding == "same":
            if pair(stride) != (1, 1):
                raise ValueError(f"padding is 'same' and stride {stride}; expected stride 1 with it")
            total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
            high, broad = ((n // 2, n - n // 2) for n in total)
        elif isinstance(padding, str):
            if padding != "valid":
                raise ValueError(f"padding is {padding!r}; expected a number, a pair, 'valid' or 'same'")
            high, broad = (0, 0), (0, 0)
        else:
            high, broad = ((n, n) for n in pair(padding))
        #: zeros left, right, above and below, as F.pad takes them
        self.margins = (*broad, *high)

    def out_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) of the output for an input of that size."""
        left, right, above, below = self.margins
        padded = (size[0] + above + below, size[1] + left + right)
        found = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        if min(found) < 1:
            raise ValueError(f"a map of {tuple(size)} is too small for a kernel of {self.kernel_size}")
        return found[0], found[1]

    def parts(self, x: Tensor, widths: Sequence[int] | None = None) -> list[Part]:
        """The convolution cut along its input channels, for inputs like ``x``; the first part adds the bias.

        What is prepared for it is kept in inference until the weights change.
        """
        widths = (self.in_channels,) if widths is None else tuple(widths)
        plain = self.stride == (1, 1) and self.dilation == (1, 1) and self.groups == 1
        rows = plain and results_only(x, self.weight, self.bias)

        def make() -> list[Tensor]:
            pieces = list(self.weight.split(widths, dim=1)) if len(widths) > 1 else [self.weight]
            if rows:
                pieces = [p.permute(0, 2, 3, 1).flatten(1) for p in pieces]
            return [p.contiguous() for p in pieces]  # once here, not in every time step

        weights: list[Tensor] = self.kept(("parts", widths), make) if rows else make()
        return [Part(self, w, None if i else self.bias) for i, w in enumerate(weights)]

    def forward(self, input: Tensor) -> Tensor:
        return self.parts(input)[0](input)


def start(layer: nn.Module, init_dict: Any, bias: float | None) -> None:
    """The original's initial values: ``init_dict`` {"method": name in torch.nn.init, ...} for weights, a constant bias.

    Raises ValueError for a method that torch does not have.
    """
    if init_dict is not None:
        options = dict(init_dict)
        method = getattr(nn.init, str(options.pop("method", "")), None)
        if method is None:
            raise ValueError(f"init_dict is {init_dict!r}; expected method = the name of a function of torch.nn.init")
        method(layer.weight, **options)
    if bias is not None and layer.bias is not None:
        nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
