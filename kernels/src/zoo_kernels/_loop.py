"""A loop over steps as exporters write it: torch's ``scan`` operator, which ONNX has too.

Its body is written once whatever the number of steps, which may then differ from run to run, and it holds one state at
a time. Outside of a tracer torch offers it through compilation alone, so there the export forms have no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def traced() -> bool:
    """Whether torch.export or torch.compile writes down what is called now."""
    return torch.compiler.is_compiling()


def loop(
    step: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[tuple[Tensor, ...], Tensor]],
    state: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    axis: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``state, y_t = step(state, rows_t)`` along ``axis`` of every tensor of ``rows``, of one step or more.

    Returns the last state and y, its steps along ``axis``. ``step`` must not return a tensor that it was given, nor one
    twice, and the state keeps its shapes and dtypes.
    """
    from torch._higher_order_ops.scan import scan

    # Contiguous: the operator asks the state for the same strides after each step.
    start = tuple(part.contiguous().clone() for part in state)
    last, y = scan(step, start, tuple(row.movedim(axis, 0) for row in rows), dim=0)
    return tuple(last), y.movedim(0, axis)
