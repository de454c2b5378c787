"""Ordinary differential equations dx/dt = f(t, x): fixed steps, and Dormand and Prince's pair with adaptive ones.

The step control is torchdiffeq's, on which published samples rest: one error norm over the whole batch, Hairer's
first step, no step cut short to meet an output time (outputs come from a quartic between steps). The times are kept
in float64, as there. Sources: Dormand and Prince, J. Comput. Appl. Math. 6 (1980); Shampine, Math. Comput. 46 (1986),
for the middle of a step; Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section II.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

#: (t, x) -> dx/dt; t is a tensor without axes, in float64
Field = Callable[[Tensor, Tensor], Tensor]

# -- fixed steps -------------------------------------------------------------------------------------------------------


def fixed(f: Field, x: Tensor, times: Tensor, method: str) -> Tensor:
    """x at every one of ``times`` (n,), the first of them x itself: (n, *x.shape). One step lies between two times.

    method: "euler", or "heun", the explicit trapezoid (two evaluations a step, second order).
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method is {method!r}; expected 'euler' or 'heun'")
    times = times.to(torch.float64)
    found = [x]
    for t, then in itertools.pairwise(times):
        h = float(then - t)
        slope = f(t, x)
        if method == "heun":
            slope = (slope + f(then, x + h * slope)) / 2
        x = x + h * slope
        found.append(x)
    return torch.stack(found)


# -- Dormand and Prince ------------------------------------------------------------------------------------------------

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: what the fifth and the fourth order differ by
_ERROR = (
    35 / 384 - 1951 / 21600, 0.0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300, -1 / 60,
)  # fmt: skip
#: the solution at the middle of a step
_MIDDLE = (
    6025192743 / 30085553152 / 2, 0.0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2,
)  # fmt: skip
_SAFETY, _GROW, _SHRINK = 0.9, 10.0, 0.2


def dopri5(f: Field, x: Tensor, times: Tensor, *, atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """x at every one of the increasing ``times`` (n,), the first of them x itself: (n, *x.shape).

    A step's error, of order 4, is measured as the root mean square of error / (atol + rtol max(|x|, |x after|)) over
    all of x, and must be at most 1. Raises RuntimeError when steps vanish, as where f is not finite.
    """
    times = times.to(torch.float64)
    t = times[0]
    slope = f(t, x)
    h = _first_step(f, t, x, slope, atol, rtol)
    found = [x]
    before, curve = t, (x,) * 5  # the last accepted step: where it began, and the quartic along it
    for wanted in times[1:]:
        while t < wanted:
            after, slope_after, stages = _step(f, t, x, slope, h)
            error = _combine(stages, _ERROR) * h.to(x.dtype)
            ratio = _norm(error / (atol + rtol * torch.maximum(x.abs(), after.abs())))
            if not bool(torch.isfinite(ratio)) or float(t + h) == float(t):
                raise RuntimeError(f"the solution is lost at t = {float(t):.6g}: the error is {float(ratio)}")
            accepted = bool(ratio <= 1)
            if accepted:
                curve = _quartic(x, after, stages, h.to(x.dtype))
                before, t, x, slope = t, t + h, after, slope_after
            h = h * _factor(float(ratio))
        found.append(_along(curve, float((wanted - before) / (t - before))))
    return torch.stack(found)


def _norm(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _combine(stages: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = torch.zeros_like(stages[0])
    for stage, weight in zip(stages, weights, strict=False):
        if weight:
            total = torch.add(total, stage, alpha=weight)
    return total


def _step(f: Field, t: Tensor, x: Tensor, slope: Tensor, h: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x after one step, the slope there, and the slopes of all stages."""
    stages = [slope]
    after = x
    for node, weights in zip(_NODES, _STAGES, strict=True):
        after = x + h.to(x.dtype) * _combine(stages, weights)
        stages.append(f(t + node * h, after))
    return after, stages[-1], stages


def _factor(ratio: float) -> float:
    """How much longer the next step is."""
    if ratio == 0:
        return _GROW
    least = 1.0 if ratio < 1 else _SHRINK
    return min(_GROW, max(_SAFETY / ratio**0.2, least))


def _first_step(f: Field, t: Tensor, x: Tensor, slope: Tensor, atol: float, rtol: float) -> Tensor:
    scale = atol + x.abs() * rtol
    size, speed = float(_norm(x / scale)), float(_norm(slope / scale))
    h = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    bend = float(_norm((f(t + h, x + h * slope) - slope) / scale)) / h
    longer = max(1e-6, h * 1e-3) if speed <= 1e-15 and bend <= 1e-15 else (0.01 / max(speed, bend)) ** 0.2
    return torch.full_like(t, min(100 * h, longer))


def _quartic(x: Tensor, after: Tensor, stages: list[Tensor], h: Tensor) -> tuple[Tensor, ...]:
    """Coefficients, highest power first, through both ends with their slopes and the middle."""
    middle = x + h * _combine(stages, _MIDDLE)
    first, last = stages[0], stages[-1]
    return (
        2 * h * (last - first) - 8 * (after + x) + 16 * middle,
        h * (5 * first - 3 * last) + 18 * x + 14 * after - 32 * middle,
        h * (last - 4 * first) - 11 * x - 5 * after + 16 * middle,
        h * first,
        x,
    )


def _along(curve: tuple[Tensor, ...], part: float) -> Tensor:
    found = curve[0]
    for coefficient in curve[1:]:
        found = found * part + coefficient
    return found
