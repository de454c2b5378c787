"""The linear scan ``h_t = a_t h_{t-1} + x_t``: the recurrence of diagonal state-space models, real or complex."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

__all__ = ["linear_scan", "linear_scan_step"]

NAME = "linear_scan"
COMPLEX = (torch.complex64, torch.complex128)
# Steps between the states that forward keeps for backward, which replays one such chunk at a time.
CHUNK = 64


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def empty_borders(x: Tensor, path: Tensor | None, save: bool) -> Tensor:
    """The states before each chunk of ``CHUNK`` steps: (batch, chunks, channels)."""
    if not save:
        return x.new_empty(0, dtype=state_dtype(x))
    steps = x.shape[1] if path is None else path.shape[-1]
    return x.new_empty(x.shape[0], -(-steps // CHUNK), x.shape[2], dtype=state_dtype(x))


def _fake(x, a, path, reverse, initial_state, return_final_state, resets, lengths, *, save):
    final = x.new_empty((x.shape[0], x.shape[2]) if return_final_state else (0,), dtype=state_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), final, empty_borders(x, path, save)


def _validate(x, a, path, reverse, initial_state, return_final_state, resets, lengths) -> None:
    checks.check_values(NAME, path, lengths, length=x.shape[1])


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    path = torch.randperm(75, device=device)[None]
    yield r(2, 75, 37), r(2, 75, 37).sigmoid(), path, True, r(2, 37), True, None, None
    yield r(3, 70, 16), r(1, 1, 16).sigmoid(), None, False, None, True, r(3, 70) > 1.5, None
    yield r(2, 65, 5), r(1, 65, 5).tanh(), None, False, None, False, None, torch.tensor([65, 3], device=device)


_scan = Operator(
    NAME,
    package=__name__,
    arguments=(
        "Tensor x, Tensor a, Tensor? path, bool reverse, Tensor? initial_state, bool return_final_state, "
        "Tensor? resets, Tensor? lengths"
    ),
    outputs=("h", "final"),
    saved=("borders",),
    differentiable=("x", "a", "initial_state"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
    validate=_validate,
)


def linear_scan(
    x: Tensor,
    a: Tensor,
    *,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear scan: ``h_t = a_t * h_{t-1} + x_t`` in every channel by itself.

    x: (batch, length, *channels), real or complex.
    a: (batch, length, *channels), or shared by the batch (length, *channels), or by batch and steps (*channels); its
        axes of size 1 are broadcast. Real or complex: a complex a with a real x gives a complex h.
    path: None, (steps,) or (batch, steps) integer rows in visiting order, no row twice; reverse: walk it from its end.
    initial_state, final state: (batch, *channels), float32 (float64 if x is), complex if h is.
    resets: (batch, length) bool, by row: the old state is dropped before that row is added.
    lengths: (batch,) int: only the first ``lengths[b]`` steps of the path are walked (in reverse: from step
        ``lengths[b] - 1``); rows not visited give 0.

    Returns ``(h, final_state)``: every state, by row, in x's dtype (promoted to complex if a is), and the last state
    of the walk or None. Accumulates in float32 or better. Raises ValueError naming the argument, what it is and what it
    must be.
    Source: the diagonal recurrence of S5 (arXiv 2208.04933, section 3.2), LRU (arXiv 2303.06349), Griffin's RG-LRU
    (arXiv 2402.19427); resets as in arXiv 2303.03982, section 3.

    Example::

        h, _ = linear_scan(x, torch.sigmoid(gate))
    """
    args, channels = _canonical(x, a, path, reverse, initial_state, return_final_state, resets, lengths)
    if _scan.exporting():
        from .export import linear_scan_export

        h, final = linear_scan_export(*args)
    else:
        h, final = _scan(*args)
    h = h.reshape(*h.shape[:2], *channels)
    return h, final.reshape(h.shape[0], *channels) if return_final_state else None


def _canonical(
    x, a, path, reverse, initial_state, return_final_state, resets, lengths
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Check everything; x becomes (batch, length, channels), a (batch or 1, length or 1, channels)."""
    allowed = (*checks.FLOATS, *COMPLEX)
    checks.is_tensor(NAME, "x", x)
    checks.has_dtype(NAME, "x", x, allowed)
    if x.dim() < 3:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; it must be (batch, length, *channels)")
    checks.is_tensor(NAME, "a", a, x)
    checks.has_dtype(NAME, "a", a, allowed)
    batch, length, *channels = x.shape
    inner, width = len(channels), math.prod(channels)
    lead = a.dim() - inner
    wanted = (batch, length, *channels)[2 - lead :] if 0 <= lead <= 2 else None
    if wanted is None or any(n not in (1, w) for n, w in zip(a.shape, wanted, strict=True)):
        raise ValueError(
            f"{NAME}: a has shape {tuple(a.shape)}; it must be {(batch, length, *channels)}, {(length, *channels)} or "
            f"{tuple(channels)}, where any size may be 1"
        )
    if initial_state is not None:
        checks.is_tensor(NAME, "initial_state", initial_state, x)
        checks.has_dtype(NAME, "initial_state", initial_state, allowed)
        if initial_state.shape != (batch, *channels):
            raise ValueError(
                f"{NAME}: initial_state has shape {tuple(initial_state.shape)}; it must be {(batch, *channels)}"
            )
    if a.is_complex() or (initial_state is not None and initial_state.is_complex()):
        x = x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.complex64))
    work = checks.state_dtype(x.dtype)
    if x.is_complex():
        a = a.to(work)
    if initial_state is not None:
        initial_state = initial_state.to(work).reshape(batch, width)
    a = a.reshape([1] * (2 - lead) + list(a.shape))
    a = a.expand(*a.shape[:2], *channels).reshape(*a.shape[:2], width)
    path = checks.canonical_path(NAME, path, batch=batch, length=length, paths=None, like=x)
    path = None if path is None else path[:, 0]
    resets = checks.canonical_resets(NAME, resets, batch=batch, length=length, like=x)
    lengths = checks.canonical_lengths(NAME, lengths, batch=batch, like=x)
    if not isinstance(reverse, bool):
        raise ValueError(f"{NAME}: reverse is {reverse!r}; it must be True or False")
    x = x.reshape(batch, length, width)
    return (x, a, path, reverse, initial_state, bool(return_final_state), resets, lengths), tuple(channels)


def linear_scan_step(x: Tensor, a: Tensor, *, state: Tensor) -> Tensor:
    """One step of :func:`linear_scan`: x (batch, *channels), a (batch, *channels) or (*channels).

    ``state`` (batch, *channels) becomes ``a * state + x`` in place. Returns it in x's dtype.
    """
    from .step import step

    return step(x, a, state)
