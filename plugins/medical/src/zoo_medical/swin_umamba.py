"""Swin-UMamba and Swin-UMamba-D: VMamba's encoder with a convolutional or a Mamba decoder, for images.

Paper: Liu et al., "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", arXiv 2402.03302 (MICCAI 2024).
Original: JiarunLiu/Swin-UMamba @ 2c1f72e, Apache-2.0 (``nnunetv2/nets/SwinUMamba.py``, ``SwinUMambaD.py``).
Differs: the encoder's widths, depths and states are arguments of both networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo.layers.vss import PatchExpanding
from zoo.rules import Rules

from ._base import MedicalAdapter, Undecayed, check_input, take
from .unetr_blocks import BasicBlock, NormName, OutBlock, UpBlock
from .vss_unet import VSSLayer, VSSMEncoder, block_path, doubling, init_linear, rules_for, states


def _encoder(
    in_chans: int, patch: int, depths: Sequence[int], dims: Sequence[int], state: int | None, rate: float,
    **more: Any,
) -> VSSMEncoder:  # fmt: skip
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    return VSSMEncoder(in_chans, patch, depths, dims, states(state, dims), rates, **more)


class SwinUMamba(Undecayed, GradCheckpointing, nn.Module):
    """Strided stem, VMamba encoder, convolutional decoder with a residual block on every skip.

    Arguments: ``in_chans``, ``num_classes``, ``feat_size`` (widths of the decoder at strides 1, 2, 4, 8, 16),
    ``hidden_size`` (width of the encoder's last map), ``dims``, ``depths``, ``state`` (None: ``dims[0]`` / 6, rounded
    up), ``drop_path_rate`` of the encoder, ``deep_supervision``, ``norm`` and ``residual`` of the convolutional blocks,
    see :mod:`zoo_medical.unetr_blocks`. Input (batch, in_chans, H, W), sides multiples of 32. Output: logits (batch,
    num_classes, H, W); with deep supervision a list at scales 1, 1/2, 1/4, 1/8.
    Source: arXiv 2402.03302, section 2.
    """

    multiple: ClassVar[int] = 32  # of every side

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 13,
        feat_size: Sequence[int] = (48, 96, 192, 384, 768),
        hidden_size: int = 768,
        deep_supervision: bool = False,
        dims: int | Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        state: int | None = 16,
        drop_path_rate: float = 0.2,
        norm: NormName = "instance",
        residual: bool = True,
    ) -> None:
        super().__init__()
        if len(feat_size) != 5:
            raise ValueError(f"feat_size is {tuple(feat_size)}; expected five widths, for strides 1, 2, 4, 8 and 16")
        if len(depths) != 4:
            raise ValueError(f"depths is {tuple(depths)}; expected the number of blocks of four stages")
        f, widths = list(feat_size), doubling(dims, 4)
        if f[1:4] != widths[:3] or hidden_size != widths[3]:
            raise ValueError(
                f"feat_size is {f} and hidden_size {hidden_size}; feat_size[1:4] and hidden_size are the encoder's "
                f"widths, {widths}"
            )
        self.in_chans, self.num_classes, self.deep_supervision = in_chans, num_classes, deep_supervision
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, f[0], 7, stride=2, padding=3), nn.InstanceNorm2d(f[0], eps=1e-5, affine=True)
        )
        self.vssm_encoder = _encoder(f[0], 2, depths, widths, state, drop_path_rate)
        self.encoder1 = BasicBlock(2, in_chans, f[0], norm, residual)
        self.encoder2 = BasicBlock(2, f[0], f[1], norm, residual)
        self.encoder3 = BasicBlock(2, f[1], f[2], norm, residual)
        self.encoder4 = BasicBlock(2, f[2], f[3], norm, residual)
        self.encoder5 = BasicBlock(2, f[3], f[4], norm, residual)
        self.decoder6 = UpBlock(2, hidden_size, f[4], norm, residual)
        self.decoder5 = UpBlock(2, f[4], f[3], norm, residual)
        self.decoder4 = UpBlock(2, f[3], f[2], norm, residual)
        self.decoder3 = UpBlock(2, f[2], f[1], norm, residual)
        self.decoder2 = UpBlock(2, f[1], f[0], norm, residual)
        self.decoder1 = BasicBlock(2, f[0], f[0], norm, residual)
        self.out_layers = nn.ModuleList(OutBlock(2, width, num_classes) for width in f[:4])
        init_linear(self)

    @property
    def ends(self) -> dict[str, Any]:
        return {
            "num_classes": NewHead("out_layers"),
            # the shortcut of the first block exists only where the channels differ
            "in_chans": (
                InputChannels("stem.0.weight", "encoder1.layer.conv1.conv.weight"),
                NewHead("encoder1.layer.conv3"),
            ),
        }

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        return () if self.deep_supervision else tuple(f"out_layers.{i}." for i in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = check_input("Swin-UMamba", x, self.in_chans, 2, self.multiple)
        maps = self.vssm_encoder(self.stem(x))
        y5 = self.decoder6(maps[4], self.encoder5(maps[3]))
        y4 = self.decoder5(y5, self.encoder4(maps[2]))
        y3 = self.decoder4(y4, self.encoder3(maps[1]))
        y2 = self.decoder3(y3, self.encoder2(maps[0]))
        y1 = self.decoder1(self.decoder2(y2, self.encoder1(x)))
        if not self.deep_supervision:
            return self.out_layers[0](y1)
        return [head(y) for head, y in zip(self.out_layers, (y1, y2, y3, y4), strict=True)]


class MambaDecoder(nn.Module):
    """Expand, put the skip beside it, project back, two VSS blocks; at the end expand four times to full size."""

    def __init__(self, widths: Sequence[int], classes: int, state: int | None, drop_path_rate: float) -> None:
        super().__init__()
        down = list(reversed(widths))
        wide = [math.ceil(2 * d / 6) if state is None else state for d in down[1:]]
        rates = torch.linspace(drop_path_rate, 0, 2 * (len(down) - 1), device="cpu").tolist()
        self.expand_layers = nn.ModuleList(PatchExpanding(a, b) for a, b in itertools.pairwise(down))
        self.expand_layers.append(PatchExpanding(down[-1], down[-1], 4))
        self.stages = nn.ModuleList(VSSLayer(d, rates[2 * i : 2 * i + 2], wide[i]) for i, d in enumerate(down[1:]))
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * d, d) for d in down[1:])
        self.seg_layers = nn.ModuleList(nn.Conv2d(d, classes, 1) for d in [*down[1:], down[-1]])

    def forward(self, maps: Sequence[Tensor], every: bool) -> Tensor | list[Tensor]:
        """``maps``: the encoder's, (batch, C, h, w), finest first. Full-size logits, or all four, full size first."""
        x = maps[-1].permute(0, 2, 3, 1)
        outputs = []
        for i, stage in enumerate(self.stages):
            skip = maps[-(i + 2)].permute(0, 2, 3, 1)
            x = stage(self.concat_back_dim[i](torch.cat([self.expand_layers[i](x), skip], dim=-1)))
            if every:
                outputs.append(self.seg_layers[i](x.permute(0, 3, 1, 2)))
        full = self.seg_layers[-1](self.expand_layers[-1](x).permute(0, 3, 1, 2))
        return [full, *reversed(outputs)] if every else full


class SwinUMambaD(Undecayed, GradCheckpointing, nn.Module):
    """VMamba encoder on the image, and a decoder of VSS blocks ("dagger" in the paper).

    Arguments as :class:`SwinUMamba`'s; ``dims`` and ``depths`` of any number of stages; ``patch_size`` and
    ``patch_norm`` of the encoder's patch embedding (the decoder ends at 4 times the size of the first map, which is the
    image's for patches of 4), ``drop_rate`` behind it, ``attn_drop_rate`` behind each mixer of the encoder;
    ``decoder_state`` (None: a third of a stage's width, rounded up) and ``decoder_drop_path_rate`` of the decoder.
    With deep supervision a list at scales 1, 1/4, 1/8, 1/16.
    Source: arXiv 2402.03302, section 2.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 8,
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        state: int | None = 16,
        decoder_state: int | None = 16,
        drop_path_rate: float = 0.2,
        decoder_drop_path_rate: float = 0.2,
        deep_supervision: bool = False,
        patch_size: int = 4,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        widths = doubling(dims, len(depths))
        if len(widths) < 2:
            raise ValueError(f"depths is {tuple(depths)}; expected the numbers of blocks of two stages or more")
        self.multiple = patch_size * 2 ** (len(widths) - 1)
        self.in_chans, self.num_classes, self.deep_supervision = in_chans, num_classes, deep_supervision
        self.vssm_encoder = _encoder(
            in_chans, patch_size, depths, widths, state, drop_path_rate,
            patch_norm=patch_norm, drop=drop_rate, mixer_drop=attn_drop_rate,
        )  # fmt: skip
        self.decoder = MambaDecoder(widths, num_classes, decoder_state, decoder_drop_path_rate)
        init_linear(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    ends: ClassVar[dict[str, Any]] = {
        "num_classes": NewHead("decoder.seg_layers"),
        "in_chans": InputChannels("vssm_encoder.patch_embed.conv1.weight"),
    }

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        heads = len(self.decoder.seg_layers)
        return () if self.deep_supervision else tuple(f"decoder.seg_layers.{i}." for i in range(heads - 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = check_input("Swin-UMamba-D", x, self.in_chans, 2, self.multiple)
        return self.decoder(self.vssm_encoder(x)[1:], self.deep_supervision)


# -- the original's format --------------------------------------------------------------------------------------------

_CONFIG = {
    "in_chans": "in_chans",
    "out_chans": "num_classes",
    "feat_size": "feat_size",
    "hidden_size": "hidden_size",
    "deep_supervision": "deep_supervision",
    "norm_name": "norm",
    "res_block": "residual",
}
#: ``drop_path_rate`` is not handed on to the encoder, which keeps its own 0.2
_IGNORED = ("layer_scale_init_value", "drop_path_rate")
_FIXED = {"spatial_dims": 2}
_ENCODER = {"dims": "dims", "depths": "depths", "d_state": "state", "drop_path_rate": "drop_path_rate"}
_VSS = {
    **_ENCODER,
    **{k: k for k in ("in_chans", "patch_size", "patch_norm", "drop_rate", "attn_drop_rate")},
}
_DECODER = {
    "num_classes": "num_classes",
    "deep_supervision": "deep_supervision",
    "drop_path_rate": "decoder_drop_path_rate",
    "d_state": "decoder_state",
}


class SwinUMambaAdapter(MedicalAdapter):
    """JiarunLiu/Swin-UMamba: ``SwinUMamba`` and, where the arguments are ``vss_args``, ``SwinUMambaD``."""

    system = "swin_umamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "vss_args" in config:
            unknown = sorted(set(config) - {"vss_args", "decoder_args"})
            if unknown:
                raise ValueError(f"SwinUMambaD has no argument {', '.join(unknown)}; known: decoder_args, vss_args")
            vss, decoder = dict(config["vss_args"]), dict(config["decoder_args"])
            features = decoder.pop("features_per_stage", None)
            widths = doubling(vss.get("dims", 96), len(vss.get("depths", range(4))))
            if features is not None and list(features) != widths:
                raise ValueError(f"features_per_stage is {list(features)}; expected the encoder's widths {widths}")
            arguments = take("SwinUMambaD (vss_args)", {"drop_path_rate": 0.1, **vss}, _VSS, ["use_checkpoint"])
            arguments |= take("SwinUMambaD (decoder_args)", decoder, _DECODER)
            return self.load(SwinUMambaD(**arguments), state)
        outer = {k: v for k, v in config.items() if k != "encoder"}
        arguments = take("SwinUMamba", outer, _CONFIG, _IGNORED, _FIXED)
        arguments |= take("SwinUMamba (encoder)", config.get("encoder") or {}, _ENCODER)
        return self.load(SwinUMamba(**arguments), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return rules_for()

    def our_path(self, path: str) -> str:
        return block_path(path)


def encoder_state(state: Mapping[str, Tensor], *, in_chans: int | None = None) -> dict[str, Tensor]:
    """VMamba-T's ImageNet checkpoint (its ``model`` entry) as a start for ``vssm_encoder``, under the original's keys.

    ``in_chans=None``: for :class:`SwinUMamba`, whose patch embedding reads the stem (only ``patch_embed.norm.bias`` is
    taken, as the original's list does); a number: for :class:`SwinUMambaD`, which takes the patch embedding where it
    reads as many channels. Use it with ``model.load_state_dict(adapter.to_zoo(...), strict=False)``.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("norm.", "head.", "classifier.")):
            continue
        if key.startswith("patch_embed."):
            wanted = key == "patch_embed.norm.bias" if in_chans is None else True
            if in_chans is not None and state["patch_embed.proj.weight"].shape[1] != in_chans:
                wanted = False
            if not wanted:
                continue
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            key = ".".join(["downsamples", parts[1], *parts[3:]])
        found[f"vssm_encoder.{key}"] = value
    return found
