"""When nothing but the result is wanted on a CPU, and what may be done then that is slower or impossible otherwise.

Order of reading: the two questions (:func:`results_only`, :func:`untouched`), then :func:`by_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zoo_kernels import _backends

#: Rows in a block. With the widths of the models here (96 to 3072) what a chain of layers makes of them stays in a
#: core's own cache or the one behind it, and the calls cost little; 512 to 4096 rows are within 5 % of each other.
BLOCK = 1024


def results_only(*tensors: Tensor | None) -> bool:
    """Whether these are plain CPU tensors in eager inference.

    No gradient to them, no tracing, compiling, exporting, autocast, transform of functions or dispatch mode is under
    way, and no back end is forced under which everything must be torch's own (``zoo_kernels.backend("reference")``).
    """
    grad = torch.is_grad_enabled()
    return (
        _backends.forced() in ("", "native")
        and all(
            t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu and not (grad and t.requires_grad))
            for t in tensors
        )
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not _get_current_dispatch_mode_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def untouched(*modules: nn.Module) -> bool:
    """Whether no one watches or replaces a call of these modules: no forward hook, no ``forward`` of the instance."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def _in_blocks(inputs: Sequence[Tensor | None], module: nn.Module | None, out: Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and results_only(*inputs, out)
        and next(t.shape[:-1].numel() for t in inputs if t is not None) >= 2 * BLOCK
        and (module is None or untouched(*module.modules()))
    )


def by_rows(
    function: Callable[..., Tensor], *inputs: Tensor | None, module: nn.Module | None = None, out: Tensor | None = None
) -> Tensor:
    """``function(*inputs)`` for a function that treats every row (..., width) by itself, such as norm, linear, MLP.

    In inference on a CPU (:func:`results_only`) the function gets some rows at a time, so that what lies between its
    layers stays in cache and never takes memory: about twice as fast for an MLP over a large image. Else it is called
    once, as it also is where ``module``, which holds the layers that the function calls, has hooks inside.

    inputs: tensors (..., width_i) of one leading shape, or None, handed on. out: where the result is written; it may be
    one of the inputs. Returns (..., width), in the dtype the function gives.

    Example::

        y = by_rows(lambda x: x + mlp(norm(x)), x, module=block)
    """
    if not _in_blocks(inputs, module, out):
        y = function(*inputs)
        return y if out is None else out.copy_(y)
    lead = next(t.shape[:-1] for t in inputs if t is not None)
    total = lead.numel()
    ones = (1,) * (len(lead) - 1)
    rows = [None if t is None else t.reshape(*ones, total, t.shape[-1]) for t in inputs]
    flat: Tensor | None = None
    if out is not None and out.is_contiguous():
        flat = out.view(*ones, total, out.shape[-1])
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        y = function(*(None if t is None else t[..., start:stop, :] for t in rows))
        if flat is None:
            flat = y.new_empty(*ones, total, y.shape[-1])
        flat[..., start:stop, :] = y
    assert flat is not None
    y = flat.view(*lead, flat.shape[-1])
    return y if out is None or y.data_ptr() == out.data_ptr() else out.copy_(y)
