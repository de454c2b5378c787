"""Groups of points through a residual network, and the maximum over each group: PointMLP and its descendants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["grouped_mlp"]

NAME = "grouped_mlp"


def _fake(table, base, index, first, first_bias, second, second_bias, anchor, scale, *, save):
    return (torch.empty_like(base, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for (batch, points, centres, k), (channels, inner), blocks in (
        ((2, 20, 9, 4), (16, 24), 2),
        ((1, 7, 7, 3), (5, 3), 1),
    ):
        index = torch.randint(points, (batch, centres, k), device=device)
        weights = (
            some(blocks, inner, channels),
            some(blocks, inner),
            some(blocks, channels, inner),
            some(blocks, channels),
        )
        given = some(batch, points, channels), some(batch, centres, channels), index, *weights
        yield *given, None, None
        yield *given, index[..., 0].contiguous(), some(batch)


def _validate(table, base, index, first, first_bias, second, second_bias, anchor, scale) -> None:
    for name, numbers in (("index", index), ("anchor", anchor)):
        if numbers is not None and numbers.device.type == "cpu" and numbers.numel():
            low, high = (int(v) for v in torch.aminmax(numbers))
            if low < 0 or high >= table.shape[1]:
                raise ValueError(
                    f"{NAME}: {name} has points {low} to {high}; they must be within 0 to {table.shape[1] - 1}"
                )


_grouped = Operator(
    NAME,
    package=__name__,
    arguments=(
        "Tensor table, Tensor base, Tensor index, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, "
        "Tensor? anchor, Tensor? scale"
    ),
    outputs=("y",),
    backends={"reference": ".reference", "native": ".native"},
    fake=_fake,
    cases=_cases,
    validate=_validate,
)


def grouped_mlp(
    table: Tensor,
    base: Tensor,
    index: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    *,
    anchor: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """What a network makes of every group of neighbours: (batch, centres, channels). For inference; no gradient.

    The rows of a group are ``x = relu(scale (table[index] - table[anchor]) + base)``: a layer that is linear in a
    neighbour (``table``), or in how it differs from the group's anchor, and in the centre (``base``), made before the
    neighbours are gathered. Every block then is ``x = relu(second relu(first x +
    first_bias) + second_bias + x)``, and the result is the maximum of a group's rows. Batch norms with fixed statistics
    belong into the weights.

    table: (batch, points, channels); base: (batch, centres, channels); index: (batch, centres, neighbours), integers;
    first: (blocks, inner, channels), first_bias: (blocks, inner), second: (blocks, channels, inner), second_bias:
    (blocks, channels); anchor: (batch, centres), integers, nothing is subtracted without it; scale: (batch,), of a
    cloud, 1 without it. Returns ``base``'s dtype; sums are in float32 or better.
    On a CPU the rows of few groups at a time pass through the whole network and stay in a core's cache.
    Raises ValueError naming the argument, what it is and what it must be, and where gradients are needed.
    Source: Ma et al., "PointMLP", arXiv 2202.07123, section 3.2.
    """
    checks.has_shape(NAME, "table", table, [("batch", None), ("points", None), ("channels", None)])
    batch, _, channels = table.shape
    checks.has_shape(NAME, "base", base, [("batch", batch), ("centres", None), ("channels", channels)], table)
    centres = base.shape[1]
    checks.has_shape(NAME, "index", index, [("batch", batch), ("centres", centres), ("neighbours", None)], table)
    checks.has_dtype(NAME, "index", index, checks.INTEGERS)
    if index.shape[2] < 1:
        raise ValueError(f"{NAME}: index has shape {tuple(index.shape)}; a group must have at least one neighbour")
    checks.has_shape(NAME, "first", first, [("blocks", None), ("inner", None), ("channels", channels)], table)
    blocks, inner, _ = first.shape
    checks.has_shape(NAME, "first_bias", first_bias, [("blocks", blocks), ("inner", inner)], table)
    checks.has_shape(NAME, "second", second, [("blocks", blocks), ("channels", channels), ("inner", inner)], table)
    checks.has_shape(NAME, "second_bias", second_bias, [("blocks", blocks), ("channels", channels)], table)
    if anchor is not None:
        checks.has_shape(NAME, "anchor", anchor, [("batch", batch), ("centres", centres)], table)
        checks.has_dtype(NAME, "anchor", anchor, checks.INTEGERS)
        anchor = anchor.to(torch.int64)
    floats: dict[str, Tensor] = {
        "table": table, "base": base, "first": first, "first_bias": first_bias, "second": second,
        "second_bias": second_bias,
    }  # fmt: skip
    if scale is not None:
        floats["scale"] = checks.has_shape(NAME, "scale", scale, [("batch", batch)], table)
    for name, value in floats.items():
        checks.has_dtype(NAME, name, value)
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(
                f"{NAME}: {name} needs a gradient, which this operator has not; call it under torch.no_grad()"
            )
    return _grouped(table, base, index.to(torch.int64), first, first_bias, second, second_bias, anchor, scale)
