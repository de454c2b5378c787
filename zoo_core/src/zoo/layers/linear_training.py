"""The matrix products of training by oneDNN: a linear layer's output and all three of its gradients.

torch's own choice for float32 on a CPU is MKL, which leaves the AVX-512 of AMD's processors unused (see
:mod:`.linear`). Seen there, one thread, 12800 rows of 64 numbers to 324: 184 GFLOP/s for the gradient of x where MKL
reaches 86, and about 140 where MKL reaches 85 for that of the weight, a sum over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zoo_kernels import runtime

PRODUCTS = 1 << 22  # multiplications; below, calling is what takes the time


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`product` can stand for ``F.linear`` here: a large float32 product on the CPU, with gradients in
    reverse mode and outside of every transform, tracer and autocast.
    """
    return (
        not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and runtime.forced_backend() in ("", "native")  # under a forced reference everything is torch's own
        and x.dim() >= 2
        and x.numel() * weight.shape[0] >= PRODUCTS
        and _ordinary(x)
        and _ordinary(weight)
        and (bias is None or _ordinary(bias))
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
        and not _is_transformed(x)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., in) times (out, in) to (..., out), the same numbers to rounding, gradients of any order.

    The gradients of a first backward pass are oneDNN's too; a pass that is to be differentiated itself
    (``create_graph``) or batched (``is_grads_batched``) takes torch's operators. Call it where :func:`serves` says so.
    """
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() or _is_transformed(gradient) else _onednn
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = multiply(gradient, weight.t())
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            # The sum over the rows is long; oneDNN is faster with the shorter side first.
            left, right = rows.t(), x.reshape(-1, x.shape[-1]).t()
            wide = len(left) > len(right)
            of_weight = multiply(right, left).t() if wide else multiply(left, right)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _ordinary(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


def _is_transformed(x: Tensor) -> bool:
    """Whether vmap, another functorch transform or a dispatch mode is at work: oneDNN has no rule for those."""
    functorch = torch._C._functorch
    return (
        functorch.peek_interpreter_stack() is not None
        or functorch.is_legacy_batchedtensor(x)  # torch.autograd.grad(is_grads_batched=True)
        or bool(_get_current_dispatch_mode_stack())
    )
