"""The toy model with fixed weights, and the state dict that its original would have written."""

from __future__ import annotations

import torch


def toy(**config):
    import zoo_toys.models

    torch.manual_seed(7)
    return zoo_toys.models.Toy(**config).eval()


def original(model) -> dict[str, torch.Tensor]:
    """The state dict that the toy's original would have written."""
    state = model.state_dict()
    return {
        "conv.weight": state["stem.weight"],
        "conv.bias": state["stem.bias"],
        "first": state["pair"][0].clone(),
        "second": state["pair"][1].clone(),
        "up.w": state["up.weight"],
        "down.w": state["up.weight"].clone(),
        "seen": state["seen"],
        "counter": torch.tensor(3),
        "classifier.weight": state["head.weight"],
        "classifier.bias": state["head.bias"],
    }
