"""Parity with an original at its published size: weights and inputs computed from their names, outputs sampled.

A full-size card (JSON) gives the original's constructor arguments, its keys and shapes, its exact number of parameters,
and statistics with sampled values of its outputs. Nothing is stored but the card.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .procedural import procedural_inputs, procedural_state

#: Above this, a forward pass is only run when ZOO_TEST_FULLSIZE=1 is set; keys and counts are always checked.
FORWARD_LIMIT = 200_000_000


class _Watched(Mapping[str, Tensor]):
    """A state dict that knows which of its tensors were read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.read = state, set[str]()

    def __getitem__(self, key: str) -> Tensor:
        value = self.state[key]
        self.read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def count(model: nn.Module) -> int:
    """Parameters of a model as papers count them: each tied tensor once, a complex number as two."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


def check_fullsize(
    path: str | Path,
    *,
    forward: bool | None = None,
    created: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Build the original's published variant with our code and compare it with the card.

    Checks that every key is read, that the number of parameters is exact, of the adapter's model and (``created``) of
    ``zoo.create(zoo_name, **arguments)``, and that every output has the card's shape, statistics and sampled values
    within its tolerance (relative l2). ``forward=None``: run the model when it has at most 200 million parameters or
    ``ZOO_TEST_FULLSIZE=1`` is set; without it the model is built on the meta device, which needs no memory.
    ``arguments``: what makes the named model the card's form of it (a card may be the backbone of a named
    classifier). A card may be gzipped (``.json.gz``). Returns the error of each output.
    """
    import zoo

    data = Path(path).read_bytes()
    card = json.loads(gzip.decompress(data) if Path(path).suffix == ".gz" else data)
    adapter = zoo.reference(card["system"])
    outputs = card["outputs"]
    if forward is None:
        forward = card["params"] <= FORWARD_LIMIT or os.environ.get("ZOO_TEST_FULLSIZE") == "1"
    forward = forward and outputs is not None

    state = _Watched(procedural_state(card, meta=not forward))
    if forward:
        model = adapter.build(card["config"], state, source=card["source"])
    else:
        with torch.device("meta"):
            model = adapter.build(card["config"], state, source=card["source"])
    copies = {copy for _, copy in card.get("tied") or ()}
    unread = [k for k in state if k not in state.read and k in card["keys"] and k not in copies]
    assert not unread, f"{len(unread)} of {len(card['keys'])} keys were never read: {unread[:5]}"
    assert count(model) == card["params"], (
        f"{card['variant']}: the adapter's model has {count(model):,} parameters, the original {card['params']:,}"
    )
    if created:
        own = count(zoo.create(card["zoo_name"], device="meta", **(arguments or {})))
        assert own == card["params"], f"{card['zoo_name']} has {own:,} parameters, the original {card['params']:,}"
    if not forward:
        return {}
    with torch.no_grad():
        found = adapter.run(model, procedural_inputs(card), call=card["call"])
    found = {k.removeprefix("out/"): v for k, v in found.items()}
    missing = [k for k in outputs if k not in found]
    assert not missing, f"outputs {missing} were not computed; found {sorted(found)}"
    return {name: _compare(found[name], expected, card["tolerance"], name) for name, expected in outputs.items()}


def _compare(found: Tensor, expected: dict[str, Any], tolerance: float, what: str) -> float:
    assert list(found.shape) == expected["shape"], f"{what}: shape {list(found.shape)}, expected {expected['shape']}"
    flat = (torch.view_as_real(found) if found.is_complex() else found).detach().double().flatten()
    where = torch.tensor([int(i) for i, _ in expected["at"]])
    values = torch.tensor([float(v) for _, v in expected["at"]], dtype=torch.float64)
    size = max(values.norm().item(), 1e-30)
    error = (flat[where] - values).norm().item() / size
    assert error <= tolerance, f"{what}: relative l2 {error:.3g} over {len(where)} samples, allowed {tolerance:.3g}"
    # Statistics cover what was not sampled; the card writes nine digits.
    scale = expected["l2"] / max(flat.numel(), 1) ** 0.5
    for name, value in (("l2", flat.norm().item()), ("mean", flat.mean().item())):
        allowed = tolerance * (expected["l2"] if name == "l2" else scale) + 1e-8 * abs(expected[name])
        assert abs(value - expected[name]) <= allowed, f"{what}: {name} {value:.9g}, expected {expected[name]:.9g}"
    return error
