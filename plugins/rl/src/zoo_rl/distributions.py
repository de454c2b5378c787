"""What an actor-critic's outputs mean: a categorical ("logits") or a diagonal Gaussian ("mean", "std")."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]


def sample(outputs: Outputs, generator: torch.Generator | None = None) -> Tensor:
    """Draw actions: (...) integers, or (..., actions) floats."""
    if "logits" in outputs:
        chances = outputs["logits"].float().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        return drawn.reshape(chances.shape[:-1])
    mean = outputs["mean"]
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + outputs["std"] * noise


def mode(outputs: Outputs) -> Tensor:
    """The most likely actions."""
    return outputs["logits"].argmax(-1) if "logits" in outputs else outputs["mean"]


def log_prob(outputs: Outputs, action: Tensor) -> Tensor:
    """Log-probability (density, if continuous) of actions: (...)."""
    if "logits" in outputs:
        return outputs["logits"].log_softmax(-1).gather(-1, action.long()[..., None])[..., 0]
    z = (action - outputs["mean"]) / outputs["std"]
    return (-0.5 * z.square() - outputs["std"].log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(outputs: Outputs) -> Tensor:
    """In nats: (...)."""
    if "logits" in outputs:
        log = outputs["logits"].log_softmax(-1)
        return -(log.exp() * log).sum(-1)
    return (outputs["std"].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
