"""``nn.Linear`` whose matrix product is taken from the faster of torch's two CPU libraries."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zoo_kernels import _backends

from . import linear_training

ROWS, WEIGHTS = 8, 1 << 16  # below, calling is what takes the time


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products are oneDNN's: torch asks MKL, which leaves AVX-512 unused on processors of AMD.

    Seen there: 2.2 times MKL's rate for (512, 768) x (768, 3072). Elsewhere MKL is as good, and torch's choice stays.
    """
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and info.exists()
        and "AuthenticAMD" in info.read_text(errors="replace")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., in) times (out, in) to (..., out), the same numbers to rounding."""
    if _plain(x, weight, bias) and _wanted():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if linear_training.serves(x, weight, bias) and _wanted():
        return linear_training.product(x, weight, bias)
    return F.linear(x, weight, bias)


def _wanted() -> bool:
    """Whether oneDNN is to serve: forcing the reference back end takes torch's own product too."""
    return onednn_is_faster() and _backends.forced() != "reference"


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a large float32 product on the CPU that nothing but its result is wanted of.

    The operator has no gradient, no batching rule and no place in a traced program.
    """
    return (
        weight.numel() >= WEIGHTS
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and (bias is None or (bias.dtype == torch.float32 and not (torch.is_grad_enabled() and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not _get_current_dispatch_mode_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
