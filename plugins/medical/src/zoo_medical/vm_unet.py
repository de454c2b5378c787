"""VM-UNet: a U-shaped network of VMamba blocks for images.

Paper: Ruan and Xiang, "VM-UNet", arXiv 2402.02491. Original: JCruan519/VM-UNet @ 43c495b, Apache-2.0
(``models/vmunet``). Differs: sides that are no multiple of 32 are refused with a sentence (the original crops, warns,
and then fails at the first skip).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo.layers.vss import PatchEmbed, PatchExpanding, PatchMerging
from zoo.rules import Rules

from ._base import MedicalAdapter, Undecayed, check_input, take
from .vss_unet import VSSLayer, block_path, doubling, init_linear, rules_for, states


class VMUNet(Undecayed, GradCheckpointing, nn.Module):
    """Encoder and decoder of VSS blocks; each decoder level adds its skip *before* it doubles the sides.

    Arguments: ``depths``, ``dims`` of the encoder's levels (four in the paper; one number for ``dims`` doubles from
    level to level), ``depths_decoder``, ``dims_decoder`` of the decoder's (bottom first), ``state`` N of the scans
    (None: ``dims[0]`` / 6, rounded up), ``drop_path_rate``, ``in_chans`` (an image of one channel is repeated to 3),
    ``num_classes``. Input (batch, in_chans, H, W), sides multiples of 32 (of 4 * 2^(levels - 1)). Output (batch,
    num_classes, H, W): logits, or with one class its probability.
    Source: arXiv 2402.02491, section 3; ``VSSM`` and ``VMUNet`` of the original.
    """

    ends: ClassVar[dict[str, Any]] = {
        "num_classes": NewHead("final_conv"),
        "in_chans": InputChannels("patch_embed.conv1.weight"),
    }

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        depths: Sequence[int] = (2, 2, 9, 2),
        depths_decoder: Sequence[int] = (2, 9, 2, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        dims_decoder: Sequence[int] = (768, 384, 192, 96),
        state: int | None = 16,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        levels = len(depths)
        if len(depths_decoder) != levels:
            raise ValueError(
                f"depths is {tuple(depths)} and depths_decoder {tuple(depths_decoder)}; expected as many levels in both"
            )
        dims = doubling(dims, levels)
        width = states(state, dims)
        if list(dims_decoder) != list(reversed(dims)) or any(2 * a != b for a, b in itertools.pairwise(dims)):
            raise ValueError(
                f"dims is {tuple(dims)} and dims_decoder {tuple(dims_decoder)}; each level doubles the one before, and "
                "the decoder mirrors the encoder"
            )
        self.in_chans, self.num_classes, self.multiple = in_chans, num_classes, 4 * 2 ** (levels - 1)
        self.gives_probability = num_classes == 1
        self.accepted_channels = [3, 1] if in_chans == 3 else [in_chans]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        rates_up = torch.linspace(0, drop_path_rate, sum(depths_decoder), device="cpu").tolist()[::-1]
        self.patch_embed = PatchEmbed(in_chans, dims[0], 4)
        self.layers = nn.ModuleList(
            VSSLayer(
                dims[i],
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                width,
                down=PatchMerging(dims[i], dims[i + 1]) if i < levels - 1 else None,
            )
            for i in range(levels)
        )
        self.layers_up = nn.ModuleList(
            VSSLayer(
                dims_decoder[i],
                rates_up[sum(depths_decoder[:i]) : sum(depths_decoder[: i + 1])],
                width,
                up=PatchExpanding(dims_decoder[i - 1], dims_decoder[i]) if i else None,
            )
            for i in range(levels)
        )
        self.final_up = PatchExpanding(dims_decoder[-1], dims_decoder[-1] // 4, 4)
        self.final_conv = nn.Conv2d(dims_decoder[-1] // 4, num_classes, 1)
        init_linear(self)

    @property
    def preparation(self) -> dict[str, Any]:
        """How the authors bring photographs of lesions (one class) to the network; a pipeline's defaults.

        Source: the transforms of the original's test data: a photograph's own range is mapped to 0..255, and it is
        resized to the network's sides.
        """
        return {"normalisation": "min-max", "fit": True} if self.num_classes == 1 else {}

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.shape[1] == 1 and self.in_chans == 3:
            x = x.expand(-1, 3, -1, -1)
        x = check_input("VM-UNet", x, self.in_chans, 2, self.multiple)
        x = self.patch_embed(x)
        skips = []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x + skips[-i] if i else x)
        x = self.final_conv(self.final_up(x).permute(0, 3, 1, 2))
        return x.sigmoid() if self.gives_probability else x


# -- the original's format --------------------------------------------------------------------------------------------

_CONFIG = {
    "input_channels": "in_chans",
    "num_classes": "num_classes",
    "depths": "depths",
    "depths_decoder": "depths_decoder",
    "drop_path_rate": "drop_path_rate",
    "dims": "dims",
    "dims_decoder": "dims_decoder",
    "d_state": "state",
}


class VMUNetAdapter(MedicalAdapter):
    """JCruan519/VM-UNet: ``VMUNet``; outputs ``logits``, with one class ``prob``."""

    system = "vm_unet"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(VMUNet(**take("VM-UNet", config, _CONFIG, ignored=["load_ckpt_path"])), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return rules_for("vmunet.", "")

    def our_path(self, path: str) -> str:
        return block_path(path.removeprefix("vmunet."))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, VMUNet)
        output, mids = self.call(model, inputs["image"])
        return {"prob" if model.num_classes == 1 else "logits": output, **mids}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ImageNet checkpoint of VMamba v0 (its ``model`` entry) as a start for both halves, under the original's keys.

    Blocks go to the encoder and, mirrored (layers 0..3 to layers_up 3..0), to the decoder, as ``load_from`` of the
    original does; use it with ``model.load_state_dict(VMUNetAdapter().to_zoo(...), strict=False)``.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] in ("norm", "head", "classifier"):
            continue
        found[f"vmunet.{key}"] = value
        if parts[0] == "layers" and "downsample" not in parts:
            found[".".join(["vmunet", "layers_up", str(3 - int(parts[1])), *parts[2:]])] = value
    return found
