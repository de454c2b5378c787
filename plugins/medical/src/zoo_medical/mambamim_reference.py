"""MambaMIM's own format: the segmentation network, the pre-training model, and its token interpolation alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import Golden, unwrapped
from zoo.rules import Rules

from ._base import MedicalAdapter, take
from .mambamim import CHANNELS, Hybird
from .mambamim_pretrain import MambaMIM, toki

_ENCODER = {
    "in_channel": "in_chans",
    "channels": "channels",
    "depths": "depths",
    "kernels": "kernels",
    "exp_r": "expansion",
    "img_size": "img_size",
    "depth": "depth",
}
_SEGMENTATION = {**_ENCODER, "n_classes": "num_classes"}
#: the original's own defaults of ``Hybird``, which are not what it builds for the paper
_DEFAULTS = {
    "in_channel": 3,
    "n_classes": 3,
    "channels": (32, 64, 96, 128, 192),
    "depths": (1, 1, 3, 3, 1),
    "kernels": (3, 3, 3, 3, 3),
    "exp_r": (2, 4, 4, 4, 2),
    "img_size": 96,
    "depth": 3,
}


class Interpolation(nn.Module):
    """:func:`~zoo_medical.mambamim_pretrain.toki` with its matrix ``A_interpolation`` (1, C, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.A_interpolation = nn.Parameter(torch.zeros(1, channels, channels))

    def forward(self, features: Tensor, active: Tensor) -> Tensor:
        return toki(features, active, self.A_interpolation)


class MambaMIMAdapter(MedicalAdapter):
    """FengheTan9/MambaMIM: ``Hybird`` (output ``logits``), ``MambaMIM`` (``loss``, ``rec_or_inp``) where the arguments
    have an ``encoder``, and ``manba_mask`` alone (``mask_token``) where they name ``C``."""

    system = "mambamim"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "C" in config:
            return self.load(Interpolation(config["C"]), state)
        if "encoder" in config:
            return self.load(MambaMIM(**_pretraining(config)), state)
        defaults = {} if _from_the_paper(config, unwrapped(state), source) else _DEFAULTS
        return self.load(Hybird(**take("Hybird", {**defaults, **config}, _SEGMENTATION, ["norm_layer"])), state)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        # the whole-model file keeps its configuration, which is no tensor, beside the weights
        state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        return super().to_zoo(state, model=model)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, Interpolation):
            return {"mask_token": model(inputs["features"], inputs["active"])}
        if isinstance(model, MambaMIM):
            image, active = inputs["image"], inputs["active"]
            parts: dict[str, Any] = {}
            loss = model.loss(image, model.reconstruct(image, active, parts=parts), active)
            found = {f"mid/{k}": v for k, v in parts.items() if isinstance(v, Tensor)}
            if "n_kept" in parts:
                found["mid/n_kept"] = torch.tensor([parts["n_kept"]])
            return {"loss": loss.reshape(1), "rec_or_inp": model.visualise(image, active)[2], **found}
        return super().run(model, inputs, call=call)

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        if "out/loss" in named:
            return named["out/loss"].pow(2).sum()
        return super().loss(golden, named)


def _from_the_paper(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> bool:
    """Whether the arguments are those of ``build_hybird``, which fixes all others to the paper's (our defaults)."""
    widest = state.get("embeddings.expend4.weight")
    fits = widest is not None and widest.shape[0] == CHANNELS[-1]
    return source.endswith(":build_hybird") or ("channels" not in config and fits)


def _pretraining(config: Mapping[str, Any]) -> dict[str, Any]:
    outer = {
        "encoder": "encoder",
        "input_size": "img_size",
        "decoder_width": "decoder_width",
        "mask_ratio": "mask_ratio",
    }
    found = take("MambaMIM", config, outer, ignored=["sbn", "densify_norm"])  # neither is read by the original's layers
    inner = take(
        "the encoder of MambaMIM", {"sparse": False, **found.pop("encoder")}, _ENCODER | {"sparse": "sparse"},
        ["norm_layer"],
    )  # fmt: skip
    size = inner.pop("img_size", found.get("img_size", 96))
    if found.get("img_size", size) != size:
        raise ValueError(f"input_size is {found['img_size']} and the encoder's img_size {size}; they are the same")
    return {"mask_ratio": 0.6, **inner, **found, "img_size": size}
