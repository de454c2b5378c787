"""One decoding step of the causal convolution, the window of rows updated in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

NAME = "causal_conv1d_step"


def _fake(x, weight, bias, state, silu, *, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype):
    for channels, width in ((24, 4), (7, 2)):
        yield (
            torch.randn(2, channels, device=device).to(dtype), torch.randn(channels, width, device=device).to(dtype),
            torch.randn(channels, device=device).to(dtype),
            torch.randn(2, width, channels, device=device, dtype=checks.state_dtype(dtype)), True,
        )  # fmt: skip


_step = Operator(
    NAME,
    package=__package__,
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor state, bool silu",
    outputs=("y",),
    mutates=("state",),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


def step(x, weight, bias, state, silu: bool) -> Tensor:
    """See :func:`zoo_kernels.causal_conv1d_step`."""
    from . import checked_weight

    checks.has_shape(NAME, "x", x, [("batch", None), ("channels", None)])
    checked_weight(NAME, weight, x.shape[1], x)
    if bias is not None:
        checks.has_shape(NAME, "bias", bias, [("channels", x.shape[1])], x)
    checks.has_shape(
        NAME, "state", state, [("batch", x.shape[0]), ("width", weight.shape[1]), ("channels", x.shape[1])], x
    )
    result: Any = _step(x, weight, bias, state, silu)
    return result
