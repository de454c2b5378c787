"""Reads HazyResearch/spacetime: the network with all its flags, and the functions that make companion kernels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.reference import Golden, ReferenceAdapter
from zoo.rules import Rules

from ._base import affine_of, call_with
from .companion import companion_krylov, companion_matrix, krylov
from .spacetime import SpaceTime


class KrylovFunctions(nn.Module):
    """The original's two ways to ``c^T A^i b``, for the lengths of a configuration; a module without parameters."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths

    def forward(self, p: Tensor, b: Tensor, c: Tensor) -> dict[str, Tensor]:
        A = companion_matrix(p)
        found = {}
        for length in self.lengths:
            found[f"kernel_L{length}"] = krylov(length, A, b, c)
            found[f"fast_L{length}"] = companion_krylov(length, p, b, c)
            found[f"fast_ctilde_L{length}"] = companion_krylov(length, p, b, c_tilde=c)
        return found


class SpaceTimeAdapter(ReferenceAdapter):
    """Configurations are ``SpaceTime``'s arguments, and ``data_transform``; or ``{"L": [lengths]}`` for the functions.

    Outputs: ``y_closed``, ``y_open``, ``z_pred``, ``z_true``; ``forecast`` from an input ``raw``; the forecast of
    another horizon where the call names one; ``loss`` where ``target`` is an input too. ``mid/embedding``, and of each
    encoder block ``mid/pre{i}``, ``mid/ssm{i}``, ``mid/block{i}``.
    """

    system = "spacetime"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "L" in config and "encoder_config" not in config:
            lengths = config["L"] if isinstance(config["L"], list) else [config["L"]]
            return KrylovFunctions(lengths).eval()
        return self.load(call_with(SpaceTime, config, "SpaceTime"), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, KrylovFunctions):
            return model(inputs["p"], inputs["b"], inputs["c"])
        assert isinstance(model, SpaceTime)
        raw = inputs.get("raw")
        affine = None if raw is None else affine_of(raw, model.data_transform, model.lag)
        u = inputs.get("u")
        if u is None:
            if raw is None or affine is None:
                raise ValueError(f"inputs are {sorted(inputs)}; expected u, the transformed window, or raw")
            u = affine(raw[:, : model.lag])
        found = self._middle(model, u)
        made = model.predictions(u)
        found["y_closed"] = made.y_closed
        if made.y_open is not None and made.z_pred is not None and made.z_true is not None:
            found |= {"y_open": made.y_open, "z_pred": made.z_pred, "z_true": made.z_true}
        if affine is not None and raw is not None and made.y_closed.shape[-1] in (1, raw.shape[-1]):
            found["forecast"] = affine.back(made.y_closed)
            target = next((inputs[k] for k in ("target", "y") if k in inputs), None)
            if target is not None:
                found["loss"] = model.loss(raw[:, : model.lag], target)
        for name, horizon in self._horizons(model, call).items():
            found[name] = model.predictions(u, horizon, open_loop=False).y_closed
        return found

    def _middle(self, model: SpaceTime, u: Tensor) -> dict[str, Tensor]:
        """What lies between: after the embedding and in every encoder block."""
        z = model.embedding(u)
        found = {"mid/embedding": z}
        for i, block in enumerate(model.encoder.blocks):
            filtered = block.pre(z)
            y = block.ssm(filtered)
            z = block.finish(y, filtered, z)
            found |= {f"mid/pre{i}": filtered, f"mid/ssm{i}": y, f"mid/block{i}": z}
        return found

    def _horizons(self, model: SpaceTime, call: Any) -> dict[str, int]:
        """Other horizons that a call asks for, as "horizon+5" in its words, by the name of their output."""
        text = call if isinstance(call, str) else json.dumps(call or {})
        more = re.search(r"horizon\s*([+-])\s*(\d+)", text)
        if more is None:
            return {}
        change = int(more[2]) * (1 if more[1] == "+" else -1)
        return {f"y_closed_{'longer' if change > 0 else 'shorter'}_horizon": model.horizon + change}

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        name = "out/y_closed" if "out/y_closed" in named else next(k for k in named if k.startswith("out/"))
        said = re.search(r"mean\((?:float\()?(?:out/)?(\w+)\)?\^2\)", golden.notes)
        if said and f"out/{said[1]}" in named:
            name = f"out/{said[1]}"
        return named[name].float().pow(2).mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()  # the keys are the original's
