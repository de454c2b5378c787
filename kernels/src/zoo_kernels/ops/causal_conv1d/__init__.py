"""Causal depthwise convolution of short width, along a path, with a decoding step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

from .step import step as _step

__all__ = ["causal_conv1d", "causal_conv1d_step"]

NAME = "causal_conv1d"


def _fake(x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths, *, save):
    paths = weight.shape[:-2]  # () for one path, (K,) for several
    shape = (x.shape[0], *paths, weight.shape[-1], x.shape[2]) if return_final_state else (0,)
    final = x.new_empty(shape, dtype=checks.state_dtype(x.dtype))
    return x.new_empty((x.shape[0], x.shape[1], *paths, x.shape[2])), final


def _validate(x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths) -> None:
    checks.check_values(NAME, path, lengths, length=x.shape[1])


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for channels, width, length in ((24, 4, 37), (7, 3, 5)):
        path = torch.randperm(length, device=device)[None, None] if width == 3 else None
        yield (
            r(2, length, channels),
            r(channels, width),
            r(channels),
            True,
            path,
            [width == 4],
            None,
            False,
            None,
            None,
        )
    yield r(2, 9, 6), r(2, 6, 4), r(2, 6), True, None, [False, True], None, True, None, None


_conv = Operator(
    NAME,
    package=__name__,
    arguments=(
        "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? path, bool[] reverse, Tensor? initial_state, "
        "bool return_final_state, Tensor? resets, Tensor? lengths"
    ),
    outputs=("y", "final"),
    differentiable=("x", "weight", "bias", "initial_state"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
    validate=_validate,
)


def checked_weight(
    operator: str, weight: Any, channels: int, like: Tensor, paths: Sequence[tuple[str, int | None]] = ()
) -> None:
    checks.has_shape(operator, "weight", weight, [*paths, ("channels", channels), ("width", None)], like)
    checks.has_dtype(operator, "weight", weight)
    if not 1 <= weight.shape[-1] <= 8:
        raise ValueError(
            f"{operator}: weight has width {weight.shape[-1]}; it must be 1 to 8 (longer: zoo_kernels.long_conv)"
        )


def checked_activation(operator: str, activation: str | None) -> bool:
    """Whether to apply SiLU."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{operator}: activation is {activation!r}; it must be None or 'silu'")
    return activation is not None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    path: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolution that looks only backwards along the walk.

    ``y_t = act(bias + sum_w weight[:, w] * x_{t - (W - 1) + w})``; rows before the start are ``initial_state`` or 0.

    x: (batch, length, channels); weight: (channels, width), width 1 to 8, the last column meets the newest row;
    bias: (channels,); activation: None or "silu"; path: (steps,) or (batch, steps); reverse: walk from the end;
    initial_state, final state: (batch, width, channels): the last ``width`` rows of the walk, newest last (one more
    than a step needs, so that the originals' caches convert without loss). resets: (batch, length) bool, rows before a
    reset are not seen. lengths: (batch,) steps to walk; rows not visited give 0.

    Several paths over the same rows, K parameter sets, results side by side (weight has 3 axes): weight: (K, channels,
    width); bias: (K, channels); path: (K, steps) or (batch, K, steps); reverse: one bool or K of them; initial_state,
    final state: (batch, K, width, channels); y: (batch, length, K, channels), as ``selective_scan`` takes it.

    Returns ``(y, final_state)``, y like x (with the K axis, if several).
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Dao-AILab/causal-conv1d ``causal_conv1d_ref``.
    """
    checks.has_shape(NAME, "x", x, [("batch", None), ("length", None), ("channels", None)])
    checks.has_dtype(NAME, "x", x)
    batch, length, channels = x.shape
    K = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 3 else None
    paths: list[tuple[str, int | None]] = [] if K is None else [("paths", K)]
    checked_weight(NAME, weight, channels, x, paths)
    if bias is not None:
        checks.has_shape(NAME, "bias", bias, [*paths, ("channels", channels)], x)
    if initial_state is not None:
        axes = [("batch", batch), *paths, ("width", weight.shape[-1]), ("channels", channels)]
        checks.has_shape(NAME, "initial_state", initial_state, axes, x)
    args = (
        x, weight, bias, checked_activation(NAME, activation),
        checks.canonical_path(NAME, path, batch=batch, length=length, paths=K, like=x),
        checks.canonical_reverse(NAME, reverse, paths=1 if K is None else K), initial_state, bool(return_final_state),
        checks.canonical_resets(NAME, resets, batch=batch, length=length, like=x),
        checks.canonical_lengths(NAME, lengths, batch=batch, like=x),
    )  # fmt: skip
    if _conv.exporting():  # the reference has no loop over time: it is the export form too
        from .reference import forward

        y, final = forward(*args)
    else:
        y, final = _conv(*args)
    return y, final if return_final_state else None


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor, activation: str | None = None
) -> Tensor:
    """One step of :func:`causal_conv1d`: x (batch, channels); ``state`` (batch, width, channels) updated in place.

    The state is that of :func:`causal_conv1d`: the last ``width`` rows, newest last. Returns y: (batch, channels).
    """
    return _step(x, weight, bias, state, checked_activation("causal_conv1d_step", activation))
