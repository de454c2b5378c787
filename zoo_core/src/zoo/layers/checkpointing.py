"""Gradient checkpointing: a block's activations are made again in the backward pass instead of being kept.

Three parts. A repeated block is a :class:`Recomputed` module in place of an ``nn.Module``; a model that has such blocks
is a :class:`GradCheckpointing` and so has timm's ``set_grad_checkpointing``; :func:`recompute` is what both rest on,
for blocks of another library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # what batch and instance norms have in common
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A block that keeps only its inputs for the backward pass while ``grad_checkpointing`` is on.

    It is on only where gradients are enabled, in training and in evaluation mode. A call with ``state=`` (by keyword)
    runs as ever: such a block moves its state on in place, and a second run would start from the moved one. Arguments
    may be tensors or anything that holds them; like any input of autograd, they must not be changed afterwards.
    """

    grad_checkpointing: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recomputed(super().__call__, *args, **kwargs)

    def recomputed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``method`` of this block, recomputed as the block itself is."""
        if self.grad_checkpointing and torch.is_grad_enabled() and kwargs.get("state") is None:
            return recompute(method, *args, norms=self, **kwargs)
        return method(*args, **kwargs)


class GradCheckpointing:
    """Mixin of models whose blocks, or those of models inside them, are :class:`Recomputed`."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, the same
        gradients, one more forward pass of the blocks. timm's name and signature; nothing changes where gradients are
        off."""
        _switch(self, enable)  # type: ignore[arg-type]


def _switch(module: nn.Module, enable: bool) -> None:
    """Blocks below ``module``, but not those inside a block, which are recomputed with it."""
    for child in module.children():
        if isinstance(child, Recomputed):
            child.grad_checkpointing = enable
        elif hasattr(child, "set_grad_checkpointing"):  # a model of its own, ours or another library's
            child.set_grad_checkpointing(enable)
        else:
            _switch(child, enable)


def recompute(function: Callable[..., Any], *args: Any, norms: nn.Module | None = None, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, run again in the backward pass instead of keeping what it computes.

    The second run draws the same random numbers under the same autocast. Norms in ``norms`` that follow running
    statistics count the first run alone. ``torch.utils.checkpoint.checkpoint``, which does the work, leaves that to
    its caller. Under ``torch.compile`` the graph's compiler sees to all this, but for torch's ``backend="eager"``: it
    draws new numbers, and takes no running statistics.
    """
    if norms is None or torch.compiler.is_compiling():  # a compiled graph recomputes values, it repeats no side effect
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    following = [m for m in norms.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    if not following:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _counted_once(following)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextlib.contextmanager
def _counted_once(norms: list[_NormBase]) -> Iterator[None]:
    """Within it, ``norms`` normalise by their batch as before but leave their running statistics as they are."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
