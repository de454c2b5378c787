"""Several paths for implementations that walk one: each in turn, the results side by side on an axis of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _of_path(k: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of path k alone."""
    x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths = arguments
    return (
        x, weight[k], None if bias is None else bias[k], silu, None if path is None else path[:, k : k + 1],
        reverse[k : k + 1], None if initial_state is None else initial_state[:, k], return_final_state, resets, lengths,
    )  # fmt: skip


def forward(one: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``one`` takes weight (channels, width); the result takes (paths, channels, width) as well."""

    @functools.wraps(one)
    def call(*arguments: Any, save: bool = False) -> tuple[Tensor, Tensor]:
        weight, wants_final = arguments[1], arguments[7]
        if weight.dim() == 2:
            return one(*arguments, save=save)
        found = [one(*_of_path(k, arguments), save=save) for k in range(weight.shape[0])]
        final = torch.stack([f for _, f in found], dim=1) if wants_final else found[0][1]
        return torch.stack([y for y, _ in found], dim=2), final

    return call


def backward(one: Callable[..., list[Tensor | None]]) -> Callable[..., list[Tensor | None]]:
    """As :func:`forward`, for gradients."""

    @functools.wraps(one)
    def call(grads: Any, arguments: Any, saved: Any, needs: Any) -> list[Tensor | None]:
        weight, wants_final = arguments[1], arguments[7]
        if weight.dim() == 2:
            return one(grads, arguments, saved, needs)
        found = [
            one(
                (grads[0][:, :, k], grads[1][:, k] if wants_final else grads[1]),
                _of_path(k, tuple(arguments)), saved, needs,
            )
            for k in range(weight.shape[0])
        ]  # fmt: skip
        dx, dweight, dbias, dstate = zip(*found, strict=True)
        return [
            torch.stack(dx).sum(0), torch.stack(dweight), None if dbias[0] is None else torch.stack(dbias),
            None if dstate[0] is None else torch.stack(dstate, dim=1),
        ]  # fmt: skip

    return call
