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
    step: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    state: Sequence[Tensor],
    rows: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    *,
    axis: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``state, y_t = step(state, rows_t, constants)`` along ``axis`` of every tensor of ``rows``, of one step or more.

    Returns the last state and y, its steps along ``axis``. ``step`` sees no other tensor. It must not return one that
    it was given, nor one twice, and the state keeps its shapes and dtypes.
    """
    # The operator itself: the function around it compiles, which takes long and leaves its own guards in a program.
    from torch._higher_order_ops.scan import scan_op

    count, length = len(state), len(rows)

    def flat(*tensors: Tensor) -> list[Tensor]:
        new, y = step(tensors[:count], tensors[count : count + length], tensors[count + length :])
        return [*new, y]

    # Contiguous: the operator asks the state for the same strides after each step. Copies: what a tracer has not made
    # itself it does not take.
    start = [part.contiguous().clone() for part in state]
    found = scan_op(flat, start, [row.movedim(axis, 0) for row in rows], tuple(one.clone() for one in constants))
    return tuple(found[:count]), found[count].movedim(0, axis)
