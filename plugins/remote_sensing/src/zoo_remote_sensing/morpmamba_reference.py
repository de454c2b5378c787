"""MorpMamba in the names and shapes of its Keras layers: kernels are (in, out), one depthwise kernel a plane."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.reference import unwrapped
from zoo.rules import Apply, Rename, Rules, Stack, Transpose

from ._replay import PathAdapter, Place, same
from .morpmamba import KERNEL, MorpMamba

_PLANES = re.compile(r"token_generation\.erosion_layer_(spatial|spectral)\.depthwise_conv\.(\d+)\.depthwise_kernel")
#: (5, 5, 1, 1) of Keras to (1, 5, 5), one plane of ours
_PLANE = Apply(lambda x: _plane(x), lambda x: x.reshape(KERNEL, KERNEL, 1, 1))
#: a 1x1 convolution (1, 1, in, out) to a linear layer (out, in)
_POINTWISE = Apply(lambda x: x[0, 0].t(), lambda x: x.t()[None, None])
_DENSE = {
    "feature_enhancement.spatial_gate.0": "enhance.spatial_gate",
    "feature_enhancement.spectral_gate.0": "enhance.spectral_gate",
    "multi_head_attention.query": "attention.query",
    "multi_head_attention.key": "attention.key",
    "multi_head_attention.value": "attention.value",
    "state_space_model.state_transition": "state_space.transition",
    "state_space_model.state_update": "state_space.update",
    "dense": "hidden",
    "classifier": "head",
}
_MODULES = {
    "token_generation": "tokens",
    "token_generation.conv": "tokens.proj",
    "feature_enhancement": "enhance",
    "multi_head_attention": "attention",
    "state_space_model": "state_space",
    "feature_enhancement.spatial_gate": "enhance.spatial_gate",
    "feature_enhancement.spectral_gate": "enhance.spectral_gate",
} | _DENSE


def _window(x: Tensor) -> Tensor:
    """(batch, W * W, width) to (batch, W, W, width)."""
    side = math.isqrt(x.shape[1])
    return x.unflatten(1, (side, side))


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": F.relu, "classifier": lambda x: x.softmax(-1),
    **{f"multi_head_attention.{name}": _window for name in ("query", "key", "value")},
    **{f"feature_enhancement.{kind}_gate": torch.sigmoid for kind in ("spatial", "spectral")},
}  # fmt: skip
_ARGUMENTS = {
    "out_channels": "dim", "num_heads": "heads", "state_dim": "state", "dropout": "drop", "num_classes": "num_classes",
    "window": "window", "bands": "bands",
}  # fmt: skip


def _plane(kernel: Tensor) -> Tensor:
    if tuple(kernel.shape) != (KERNEL, KERNEL, 1, 1):
        raise ValueError(
            f"a depthwise kernel has shape {tuple(kernel.shape)}; expected ({KERNEL}, {KERNEL}, 1, 1), one a plane"
        )
    return kernel.reshape(1, KERNEL, KERNEL)


def _planes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many planes each kind of kernel has, from a state dict of either format."""
    counts = {"spatial": 0, "spectral": 0}
    for key in state:
        if match := _PLANES.fullmatch(key):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
        elif match := re.fullmatch(r"tokens\.(?:erosion|dilation)_(spatial|spectral)\.weight", key):
            counts[match[1]] = state[key].shape[0]
    return counts


class MorpMambaAdapter(PathAdapter):
    """``SSMambaModel``; input ``patch`` (batch, W, W, bands), output ``probabilities``."""

    system = "morpmamba"
    mids: ClassVar[Mapping[str, str]] = {
        "token_generation": "token_generation", "feature_enhancement": "feature_enhancement",
        "attention": "multi_head_attention", "state": "state_space_model",
    }  # fmt: skip

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        for key, value in config.items():
            if key not in _ARGUMENTS:
                raise ValueError(
                    f"the original MorpMamba has no argument {key!r} (received {value!r}); it has: "
                    f"{', '.join(_ARGUMENTS)}"
                )
        arguments = {_ARGUMENTS[k]: v for k, v in config.items()}
        state = unwrapped(state)
        planes = _planes(state)  # Keras finds these sizes at the first call
        arguments.setdefault("bands", planes["spatial"])
        arguments.setdefault("window", planes["spectral"])
        return self.load(MorpMamba(**arguments), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        counts = _planes(state)
        if isinstance(model, MorpMamba):
            counts = {"spatial": model.bands, "spectral": model.window}
        stacks = [
            Stack(
                f"token_generation.{kind}_layer_{axis}.depthwise_conv.{{i}}.depthwise_kernel",
                f"tokens.{kind}_{axis}.weight",
                _PLANE,
                over="i",
                count=count,
            )
            for axis, count in counts.items()
            if count
            for kind in ("erosion", "dilation")
        ]
        return Rules(
            *stacks,
            Rename("token_generation.conv.kernel", "tokens.proj.weight", _POINTWISE),
            Rename("token_generation.conv.bias", "tokens.proj.bias"),
            *(Rename(f"{theirs}.kernel", f"{ours}.weight", Transpose(0, 1)) for theirs, ours in _DENSE.items()),
            *(Rename(f"{theirs}.bias", f"{ours}.bias") for theirs, ours in _DENSE.items()),
        )

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"probabilities": model(inputs["patch"]).softmax(-1)}

    def place(self, model: nn.Module, path: str) -> Place:
        """Keras layers hold their activation, keep the window's two axes in the attention, and planes come last."""
        if path in _LAYOUTS:
            return _MODULES[path], _LAYOUTS[path]
        if path in _MODULES:
            return _MODULES[path], same
        if match := re.fullmatch(r"token_generation\.(erosion|dilation)_layer_(spatial|spectral)", path):
            return f"tokens.{match[1]}_{match[2]}", lambda x: x.permute(0, 2, 3, 1)
        return super().place(model, path)
