"""Flow matching between noise and data: the path, its loss, guidance, and integration from noise to images.

Time runs from 0 (noise) to 1 (data). Order of reading: the path (:func:`position`, :func:`velocity`), training
(:func:`loss`), guidance (:func:`guided`), sampling (:func:`sample`).

Source: arXiv 2411.04168, section 3.1; VinAIResearch/DiMSUM ``dimsum/transport`` (after SiT, arXiv 2401.08740), path
"GVP", velocity prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import solvers

#: (x, t, y) -> velocity: a DiMSUM, or what stands for one
Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
METHODS = ("dopri5", "heun", "euler")


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 1))


# -- the path ----------------------------------------------------------------------------------------------------------


def position(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """``sin(pi t / 2) data + cos(pi t / 2) noise``: noise and data (batch, ...), t (batch,)."""
    angle = _like(t, data) * (math.pi / 2)
    return angle.sin() * data + angle.cos() * noise


def velocity(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The time derivative of :func:`position`, what the model learns."""
    angle = _like(t, data) * (math.pi / 2)
    return (math.pi / 2) * (angle.cos() * data - angle.sin() * noise)


def loss(
    model: nn.Module,
    data: Tensor,
    labels: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> Tensor:
    """The mean squared error of the velocity of every sample, (batch,). Noise and times (uniform) are drawn if None."""
    noise = torch.randn_like(data) if noise is None else noise
    t = torch.rand(data.shape[0], device=data.device, dtype=data.dtype) if t is None else t
    error = model(position(noise, data, t), t, labels) - velocity(noise, data, t)
    return error.square().flatten(1).mean(1)


# -- guidance ----------------------------------------------------------------------------------------------------------


def adaptive_scale(t: Tensor, scale: float, power: float) -> Tensor:
    """``(scale - 1) (1 - cos(pi (1 - t)^power)) / 2 + 1``: full strength at t = 0, none at t = 1."""
    return (scale - 1) * (1 - torch.cos(math.pi * (1 - t) ** power)) / 2 + 1


def guided(
    model: Model, x: Tensor, t: Tensor, y: Tensor, scale: float, power: float | None = None, channels: int | None = None
) -> Tensor:
    """Classifier-free guidance: ``u + s (v - u)`` of the velocities v with and u without labels.

    x and t: (2 n, ...), of which the first half is used twice; y: (2 n,), n labels, then n times "no label".
    ``power``: s is :func:`adaptive_scale` of the first half of t instead of ``scale``. ``channels``: how many channels
    are guided (default all); the others pass. Both halves of what is guided are the same. Returns the model's shape.
    """
    if x.shape[0] % 2 or y.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} samples and y {y.shape[0]}; expected twice as many of both as wanted")
    n = x.shape[0] // 2
    out = model(torch.cat([x[:n], x[:n]]), t, y)
    v, u = out[:n, :channels], out[n:, :channels]
    s: float | Tensor = scale if power is None else _like(adaptive_scale(t, scale, power)[:n], v)
    half = u + s * (v - u)
    both = torch.cat([half, half])
    return both if both.shape == out.shape else torch.cat([both, out[:, channels:]], dim=1)


# -- sampling ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    null: int | None = None,
    method: str = "dopri5",
    steps: int = 250,
    cfg: float = 1.0,
    power: float | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    trace: list[float] | None = None,
) -> Tensor:
    """Data from ``noise`` (batch, C, R, R): the flow's end at t = 1.

    labels: (batch,) or None, for images without a label; null: the row of "no label", which guidance needs.
    cfg: strength of guidance, 1 for none; power: make it adaptive (the authors' value is 4, with cfg 3.8).
    method: "dopri5" (Dormand and Prince's pair with torchdiffeq's step control, to ``atol`` and ``rtol``; ``steps``
    does not matter), "heun" or "euler", in ``steps`` steps of one length. trace: is given the time of every evaluation.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    count = noise.shape[0]
    guide = cfg != 1.0
    if guide and (labels is None or null is None):
        raise ValueError(f"cfg is {cfg}, which needs labels, and the row of 'no label' as null; one of them is missing")

    def field(t: Tensor, x: Tensor) -> Tensor:
        if trace is not None:
            trace.append(float(t))
        times = t.to(x).expand(count)
        if not guide:
            return model(x, times, labels)
        assert labels is not None
        twice = torch.cat([labels, torch.full_like(labels, null)])  # type: ignore[arg-type]
        return guided(model, torch.cat([x, x]), torch.cat([times, times]), twice, cfg, power)[:count]

    if method == "dopri5":
        return solvers.dopri5(field, noise, torch.tensor([0.0, 1.0]), atol=atol, rtol=rtol)[-1]
    return solvers.fixed(field, noise, torch.linspace(0, 1, steps + 1), method)[-1]
