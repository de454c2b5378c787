"""U-Mamba's own format: the arguments and state dicts of ``UMambaBot`` and ``UMambaEnc``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import unwrapped
from zoo.rules import Drop, Rules

from ._base import MedicalAdapter
from .umamba import UMamba

_CONFIG = {
    "input_channels": "in_chans",
    "num_classes": "num_classes",
    "features_per_stage": "features",
    "kernel_sizes": "kernels",
    "strides": "strides",
    "n_conv_per_stage": "blocks",
    "n_conv_per_stage_decoder": "decoder_blocks",
    "conv_bias": "conv_bias",
    "deep_supervision": "deep_supervision",
    "input_size": "input_size",
}
#: arguments that change nothing in the original, and those read below
_IGNORED = {"dropout_op", "dropout_op_kwargs", "stem_channels"}
_READ = {"n_stages", "conv_op", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "block"}


class UMambaAdapter(MedicalAdapter):
    """bowang-lab/U-Mamba: ``UMambaBot`` and ``UMambaEnc`` of two and three dimensions.

    Operators are given by name as nnU-Net's plans do: ``conv_op`` "Conv2d" or "torch.nn.modules.conv.Conv3d",
    ``nonlin`` "LeakyReLU(0.01)" or "LeakyReLU" with ``nonlin_kwargs``.
    """

    system = "umamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = unwrapped(state)
        return self.load(UMamba(**translate(config, state, source)), state)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        state = unwrapped(state)
        check_copies(state)
        return super().to_zoo(state, model=model)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(
            Drop("decoder.encoder.{rest:*}"),
            Drop("{rest:*}.all_modules.{i:d}.{leaf}"),
        )

    def to_reference(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """With the copies that the original's file holds: blocks under ``all_modules``, the encoder in the decoder."""
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            names = [key]
            parts = key.split(".")
            if len(parts) > 3 and parts[-3] in ("conv1", "conv2") and parts[-2] in ("conv", "norm"):
                index = str(("conv", "norm").index(parts[-2]))
                names.append(".".join([*parts[:-2], "all_modules", index, parts[-1]]))
            if parts[0] == "encoder":
                names += [f"decoder.{name}" for name in names]
            found.update(dict.fromkeys(names, value))
        return found


def check_copies(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError when a copy in the original's state dict differs from what it is a copy of."""
    for key, value in state.items():
        kept = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
        kept = kept.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
        if kept == key:
            continue
        if kept not in state:
            raise ValueError(f"{key!r} is a copy of {kept!r}, which is not in the state dict")
        if value.device.type != "meta" and value is not state[kept] and not torch.equal(value, state[kept]):
            raise ValueError(f"{key!r} differs from {kept!r}; in U-Mamba they are one tensor")


def translate(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str = "") -> dict[str, Any]:
    """Our constructor's arguments for those of the original's four classes."""
    unknown = sorted(set(config) - set(_CONFIG) - _IGNORED - _READ)
    if unknown:
        known = ", ".join(sorted({*_CONFIG, *_IGNORED, *_READ}))
        raise ValueError(f"U-Mamba has no argument {', '.join(map(repr, unknown))}; known: {known}")
    found: dict[str, Any] = {ours: config[theirs] for theirs, ours in _CONFIG.items() if config.get(theirs) is not None}
    found.setdefault("conv_bias", False)  # the original's default, which its trainers override
    weight = state.get("encoder.stem.0.conv1.weight")
    if weight is None:
        first = ", ".join([*state][:3])
        raise ValueError(
            f"the weights are none of U-Mamba's: 'encoder.stem.0.conv1.weight' is not among their {len(state)} keys "
            f"({first} ...)"
        )
    found["dims"] = weight.dim() - 2
    conv = str(config.get("conv_op") or "").rpartition(".")[2]
    if conv and conv != f"Conv{found['dims']}d":
        raise ValueError(f"conv_op is {config['conv_op']!r}, but the weights are of {found['dims']} dimensions")
    found["mamba"] = "bot" if any(k.startswith("mamba_layer.") for k in state) else "enc"
    named = source.rpartition(":")[2]
    if named in ("UMambaBot", "UMambaEnc") and named[-3:].lower() != found["mamba"]:
        raise ValueError(f"{named} was named, but the weights are of U-Mamba {found['mamba'].capitalize()}")
    if missing := [k for k in ("features_per_stage", "kernel_sizes", "strides") if config.get(k) is None]:
        raise ValueError(f"U-Mamba needs {', '.join(missing)}, the plan's values for each stage")
    lengths = [len(found[k]) for k in ("features", "kernels", "strides") if not isinstance(found[k], int)]
    n = config.get("n_stages", max(lengths, default=1))
    for ours, theirs in (("features", "features_per_stage"), ("kernels", "kernel_sizes"), ("strides", "strides")):
        if isinstance(found[ours], int):
            found[ours] = [found[ours]] * n
        if len(found[ours]) != n:
            raise ValueError(f"n_stages is {n}, but {theirs} has {len(found[ours])} entries")
    norm = str(config.get("norm_op") or "").rpartition(".")[2]
    if norm and norm != f"InstanceNorm{found['dims']}d":
        raise ValueError(f"norm_op is {config['norm_op']!r}; only InstanceNorm{found['dims']}d is built here")
    options = dict(config.get("norm_op_kwargs") or {})
    found["norm_eps"] = options.pop("eps", 1e-5)
    found["norm_affine"] = options.pop("affine", False)
    options.pop("momentum", None)  # of running statistics, which are not kept
    found["slope"] = _slope(config)
    if options.pop("track_running_stats", False) or options:
        raise ValueError(
            f"norm_op_kwargs is {config['norm_op_kwargs']}; only eps, affine and momentum are read here, and "
            "statistics are not tracked"
        )
    return found


def _slope(config: Mapping[str, Any]) -> float:
    """The slope in "LeakyReLU(0.01)", in ``nonlin_kwargs``, or LeakyReLU's own 0.01; of ReLU 0."""
    text = str(config.get("nonlin") or "LeakyReLU").rpartition("modules.activation.")[2].removeprefix("torch.nn.")
    name, _, inside = text.partition("(")
    if name not in ("LeakyReLU", "ReLU"):
        raise ValueError(f"nonlin is {config['nonlin']!r}; expected LeakyReLU or ReLU")
    options = dict(config.get("nonlin_kwargs") or {})
    options.pop("inplace", None)
    slope = options.pop("negative_slope", None)
    if options:
        raise ValueError(f"nonlin_kwargs holds {', '.join(options)}; only negative_slope and inplace are read here")
    if name == "ReLU":
        return 0.0
    if slope is None:
        slope = inside.rstrip(")").partition(",")[0].partition("=")[2] or inside.rstrip(")").partition(",")[0] or 0.01
    return float(slope)
