"""When nothing but the result is wanted on a CPU, and what may be done then that is slower or impossible otherwise.

Order of reading: the questions (:func:`results_only`, :func:`untouched`, :func:`settled`), then :func:`by_rows`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zoo_kernels import runtime
from zoo_kernels.runtime import empty, reusing

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
        runtime.forced_backend() in ("", "native")
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


def settled(*modules: nn.Module) -> bool:
    """Whether these and all inside them are in evaluation mode and :func:`untouched`: then the rows of a map do not
    depend on how many there are in a call, and no one counts the calls."""
    inside = [child for module in modules for child in module.modules()]
    return untouched(*inside) and not any(child.training for child in inside)


def reusing_memory(*tensors: Tensor) -> contextlib.AbstractContextManager[None]:
    """``with reusing_memory(x): ...`` around a network's pass over x: in inference (:func:`results_only`) large maps
    lie where earlier ones of the pass lay."""
    if torch.is_grad_enabled() or not results_only(*tensors):
        return contextlib.nullcontext()
    return reusing()


def _in_blocks(inputs: Sequence[Tensor | None], module: nn.Module | None, out: Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and results_only(*inputs, out)
        and next(t.shape[:-1].numel() for t in inputs if t is not None) >= 2 * BLOCK
        and (module is None or settled(module))
    )


def by_rows(
    function: Callable[..., Tensor], *inputs: Tensor | None, module: nn.Module | None = None, out: Tensor | None = None
) -> Tensor:
    """``function(*inputs)`` for a function that treats every row (..., width) by itself, such as norm, linear, MLP.

    In inference on a CPU (:func:`results_only`) the function gets some rows at a time, so that what lies between its
    layers stays in cache and never takes memory: about twice as fast for an MLP over a large image. Else it is called
    once, as it also is where ``module``, which holds the layers that the function calls, is not :func:`settled`.

    inputs: tensors (..., width_i) of one leading shape, or None, handed on. out: where the result is written; it may be
    one of the inputs. Returns (..., width), in the dtype the function gives.

    Example::

        y = by_rows(lambda x: x + mlp(norm(x)), x, module=block)
    """
    if not _in_blocks(inputs, module, out):
        y = function(*inputs)
        return y if out is None else out.copy_(y)
    lead = next(t.shape[:-1] for t in inputs if t is not None)
    if len(lead) > 1 and all(_joins(t) for t in (*inputs, out)):  # as one long list of rows
        ones = (1,) * (len(lead) - 1)
        views = [None if t is None else t.view(*ones, lead.numel(), t.shape[-1]) for t in (*inputs, out)]
        y = _walk(function, views[:-1], views[-1], len(lead) - 1)
        return y.view(*lead, y.shape[-1]) if out is None else out
    return _walk(function, inputs, out, 0)


def _joins(t: Tensor | None) -> bool:
    """Whether all axes but the last can be taken as one without a copy."""
    if t is None:
        return True
    axes = [(n, s) for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    return all(s == n2 * s2 for (_, s), (n2, s2) in itertools.pairwise(axes))


def _walk(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], out: Tensor | None, axis: int) -> Tensor:
    """Blocks along ``axis``; where one index of it holds more rows than a block, along the next axis inside it."""
    lead = next(t.shape[:-1] for t in inputs if t is not None)
    inside = lead[axis + 1 :].numel()
    deeper = inside > BLOCK and axis + 1 < len(lead)
    step = 1 if deeper else max(BLOCK // max(inside, 1), 1)
    for start in range(0, lead[axis], step):
        where = (slice(None),) * axis + (slice(start, start + step),)
        parts = [None if t is None else t[where] for t in inputs]
        if not deeper:
            y = function(*parts)
        elif out is not None:
            _walk(function, parts, out[where], axis + 1)
            continue
        else:
            y = _walk(function, parts, None, axis + 1)
            if lead[axis] == 1:
                return y
        if out is None:
            out = empty(*lead, y.shape[-1], dtype=y.dtype)
        out[where] = y
    assert out is not None
    return out
