"""SegMamba: segmentation of volumes with a Mamba that reads every feature map in three orders.

Paper: Xing et al., "SegMamba", arXiv 2401.13560 (MICCAI 2024). Original: ge-xing/SegMamba @ cff3597
(``model_segmamba/segmamba.py``; ``Mamba`` with ``bimamba_type="v3"`` of its mamba_ssm). Differs: the three orders are
paths that the kernel walks, so nothing is flipped or re-cut in memory; the head reads ``feat_size[0]`` channels
(the original's 48 is a constant).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Recomputed
from zoo.layers.inference import by_rows
from zoo.layers.linear import linear
from zoo.layers.path_scan import PathScan
from zoo.rules import Rename, Rules, Squeeze, Stack
from zoo_kernels import causal_conv1d, selective_scan
from zoo_kernels import paths as grid_paths

from . import lean
from ._base import MedicalAdapter, Undecayed, check_input, take
from .unetr_blocks import BasicBlock, NormName, OutBlock, UpBlock


class TriMamba(nn.Module):
    """Tri-orientated Mamba: forwards, backwards, and across ``slices`` equal chunks of the sequence.

    ``x, z = in_proj(u)``; for each order its own causal depthwise convolution, SiLU and selective scan; the sum of the
    three, times SiLU(z), through ``out_proj``. (batch, length, dim) to the same; ``slices`` divides the length.
    Arguments: ``dim``, ``state`` N, ``conv`` width, ``expand`` (E = int(expand * dim)), ``slices``, ``dt_rank`` (None:
    dim / 16, rounded up), ``conv_bias``, ``bias`` of the projections. Parameters of the orders are stacked:
    ``conv_weight`` (3, E, conv), ``conv_bias`` (3, E) or None, ``scan`` see :class:`zoo.layers.PathScan`.
    Source: arXiv 2401.13560, section 2.2 (ToM, equations 2 and 3).
    """

    def __init__(
        self,
        dim: int,
        state: int = 16,
        conv: int = 4,
        expand: float = 2,
        slices: int = 5,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        channels = int(expand * dim)
        self.slices = slices
        self.in_proj = nn.Linear(dim, 2 * channels, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(3, channels, conv).uniform_(-(conv**-0.5), conv**-0.5))
        self.conv_bias = None
        if conv_bias:
            self.conv_bias = nn.Parameter(torch.empty(3, channels).uniform_(-(conv**-0.5), conv**-0.5))
        self.scan = PathScan(channels, state, math.ceil(dim / 16) if dt_rank is None else dt_rank, 3)
        self.out_proj = nn.Linear(channels, dim, bias=bias)

    def _conv_bias(self, order: int) -> Tensor | None:
        return None if self.conv_bias is None else self.conv_bias[order]

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[1]
        if length % self.slices:
            raise ValueError(
                f"a feature map of {length} positions does not divide into {self.slices} slices; choose sides that are "
                "multiples of 32, or another slices="
            )
        order = grid_paths.get(f"tri_orientated(slices={self.slices})", (length,), device=u.device)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        ways = [
            causal_conv1d(x, self.conv_weight[k], self._conv_bias(k), activation="silu", path=order[k : k + 1])[0]
            for k in range(3)
        ]
        return self.out_proj(self.scan(torch.stack(ways, dim=2), z=z, path=order))

    def lean(self, u: Tensor, norm: nn.Module) -> Tensor:
        """``self(norm(u))`` for inference: one order after the other, in pieces that hand on their state.

        Across slices the sequence is read as (slices, steps) by columns, so that a piece is a block of columns.
        """
        batch, length, _ = u.shape
        width = self.out_proj.in_features
        weight, scan = self.in_proj.weight, self.scan
        bias_x, bias_z = (None, None) if self.in_proj.bias is None else self.in_proj.bias.split(width)
        A = -torch.exp(scan.A_log)
        x, y = u.new_empty(batch, length, width), u.new_empty(batch, length, width)
        for rows in lean.pieces(length, width):
            x[:, rows] = linear(norm(u[:, rows]), weight[:width], bias_x)
        for k in range(3):
            across = self.slices if k == 2 else 1
            read, written = (t.unflatten(1, (across, -1)).transpose(1, 2) for t in (x, y))
            conv = ssm = None
            cut = lean.pieces(length // across, width * across)
            for rows in cut[::-1] if k == 1 else cut:
                part = read[:, rows].flatten(1, 2)
                part, conv = causal_conv1d(
                    part, self.conv_weight[k], self._conv_bias(k), activation="silu", reverse=k == 1,
                    initial_state=conv, return_final_state=True,
                )  # fmt: skip
                dt, B, C = linear(part, scan.x_proj[k]).split([scan.dt_rank, scan.state, scan.state], dim=-1)
                part, ssm = selective_scan(
                    part, dt, A[k], B, C, scan.D[k], None, scan.dt_bias[k], dt_proj=scan.dt_proj[k],
                    dt_softplus=True, reverse=k == 1, initial_state=ssm, return_final_state=True,
                )  # fmt: skip
                part = part.unflatten(1, (-1, across))
                if k == 0:
                    written[:, rows] = part
                else:
                    written[:, rows] += part
        del x
        answer = torch.empty_like(u)
        for rows in lean.pieces(length, width):
            z = linear(norm(u[:, rows]), weight[width:], bias_z, act="silu")
            answer[:, rows] = linear(y[:, rows].mul_(z), self.out_proj.weight, self.out_proj.bias)
        return answer


class MambaLayer(Recomputed):
    """``x + mamba(norm x)`` over the positions of (batch, dim, X, Y, Z) in raster order."""

    def __init__(self, dim: int, slices: int, state: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = TriMamba(dim, state, slices=slices)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            tokens = lean.rows(lean.channel_last(x))
            return self.mamba.lean(tokens, self.norm).add_(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.mamba(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


class GatedSpatialConv(Recomputed):
    """Two 3x3x3 convolutions beside one 1x1x1, added, one more 1x1x1, residual; norm and ReLU after each.

    The paper multiplies the branches (equation 1); the authors' code adds them, and so does this.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(dim, dim, 3, padding=1)
        self.proj2 = nn.Conv3d(dim, dim, 3, padding=1)
        self.proj3 = nn.Conv3d(dim, dim, 1)
        self.proj4 = nn.Conv3d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            norm, x = lean.Norm(), lean.channel_last(x)
            y = lean.normalise(lean.convolve(x, self.proj), norm, slope=0.0)
            lean.convolve_onto([y], [self.proj2], [y])
            z = lean.normalise(lean.convolve(x, self.proj3), norm, slope=0.0)
            y = lean.normalise(y, norm, slope=0.0).add_(z)
            lean.convolve_onto([y], [self.proj4], [y])
            return lean.normalise(y, norm, slope=0.0).add_(x)

        def act(conv: nn.Conv3d, y: Tensor) -> Tensor:
            return F.relu(F.instance_norm(conv(y)))

        return act(self.proj4, act(self.proj2, act(self.proj, x)) + act(self.proj3, x)) + x


class ChannelMlp(Recomputed):
    """1x1x1 convolution to twice the channels, GELU, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, 2 * dim, 1)
        self.fc2 = nn.Conv3d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            x = lean.channel_last(x)
            one, two = ((conv.weight.flatten(1), conv.bias) for conv in (self.fc1, self.fc2))
            tokens = by_rows(lambda rows: linear(linear(rows, *one, act="gelu"), *two), lean.rows(x))
            return tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.fc2(F.gelu(self.fc1(x)))


class MambaEncoder(nn.Module):
    """Four stages at strides 2 to 16: downsample, gated convolution, Mamba layers; each output through norm and MLP."""

    def __init__(
        self, in_chans: int, depths: Sequence[int], dims: Sequence[int], slices: Sequence[int], state: int
    ) -> None:
        super().__init__()
        down: list[nn.Module] = [nn.Sequential(nn.Conv3d(in_chans, dims[0], 7, stride=2, padding=3))]
        for a, b in itertools.pairwise(dims):
            down.append(nn.Sequential(nn.InstanceNorm3d(a), nn.Conv3d(a, b, 2, stride=2)))
        self.downsample_layers = nn.ModuleList(down)
        self.gscs = nn.ModuleList(GatedSpatialConv(d) for d in dims)
        self.stages = nn.ModuleList(
            nn.Sequential(*(MambaLayer(d, s, state) for _ in range(n)))
            for d, n, s in zip(dims, depths, slices, strict=True)
        )
        self.mlps = nn.ModuleList(ChannelMlp(d) for d in dims)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        if lean.lean(self, x):
            for down, gsc, stage, mlp in zip(self.downsample_layers, self.gscs, self.stages, self.mlps, strict=True):
                # the norm of a stage's end, which the MLP and the way down both begin with, is taken where it lies
                x = lean.normalise(stage(gsc(lean.convolve(x, down[-1]))), lean.Norm())
                maps.append(mlp(x))
            return maps
        for down, gsc, stage, mlp in zip(self.downsample_layers, self.gscs, self.stages, self.mlps, strict=True):
            x = stage(gsc(down(x)))
            maps.append(mlp(F.instance_norm(x)))
        return maps


class SegMamba(Undecayed, GradCheckpointing, nn.Module):
    """Mamba encoder, convolutional decoder with a residual block on every skip.

    Arguments: ``in_chans``, ``num_classes``, ``depths`` (Mamba layers of the four stages), ``feat_size`` (their
    widths), ``hidden_size`` (at the bottom), ``slices`` of the across-slice order in each stage (the authors' are the
    numbers of slices of a 128^3 input), ``state`` N; ``norm`` and ``residual`` of the convolutional blocks, see
    :mod:`zoo_medical.unetr_blocks`. Input (batch, in_chans, X, Y, Z), sides multiples of 16 whose
    feature maps divide into the slices. Output: logits (batch, num_classes, X, Y, Z).
    Source: arXiv 2401.13560, section 2.
    """

    multiple: ClassVar[int] = 16  # of every side

    ends: ClassVar[dict[str, Any]] = {
        "num_classes": NewHead("out"),
        # the shortcut of the first block exists only where the channels differ
        "in_chans": (
            InputChannels("vit.downsample_layers.0.0.weight", "encoder1.layer.conv1.conv.weight"),
            NewHead("encoder1.layer.conv3"),
        ),
    }

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 13,
        depths: Sequence[int] = (2, 2, 2, 2),
        feat_size: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        slices: Sequence[int] = (64, 32, 16, 8),
        state: int = 16,
        norm: NormName = "instance",
        residual: bool = True,
    ) -> None:
        super().__init__()
        for name, given in (("depths", depths), ("feat_size", feat_size), ("slices", slices)):
            if len(given) != 4:
                raise ValueError(f"{name} is {tuple(given)}; SegMamba has four stages")
        f = list(feat_size)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.vit = MambaEncoder(in_chans, depths, f, slices, state)
        self.encoder1 = BasicBlock(3, in_chans, f[0], norm, residual)
        self.encoder2 = BasicBlock(3, f[0], f[1], norm, residual)
        self.encoder3 = BasicBlock(3, f[1], f[2], norm, residual)
        self.encoder4 = BasicBlock(3, f[2], f[3], norm, residual)
        self.encoder5 = BasicBlock(3, f[3], hidden_size, norm, residual)
        self.decoder5 = UpBlock(3, hidden_size, f[3], norm, residual)
        self.decoder4 = UpBlock(3, f[3], f[2], norm, residual)
        self.decoder3 = UpBlock(3, f[2], f[1], norm, residual)
        self.decoder2 = UpBlock(3, f[1], f[0], norm, residual)
        self.decoder1 = BasicBlock(3, f[0], f[0], norm, residual)
        self.out = OutBlock(3, f[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = check_input("SegMamba", x, self.in_chans, 3, self.multiple)
        owned = lean.lean(self, x)  # nothing but the decoder sees the skips, which it may write over
        maps = self.vit(x)
        y = self.decoder5(self.encoder5(maps.pop()), self.encoder4(maps.pop()), owned)
        y = self.decoder4(y, self.encoder3(maps.pop()), owned)
        y = self.decoder3(y, self.encoder2(maps.pop()), owned)
        y = self.decoder2(y, self.encoder1(x), owned)
        y = self.decoder1(y)
        return self.out(y)


# -- the original's format --------------------------------------------------------------------------------------------

_CONFIG = {
    "in_chans": "in_chans",
    "out_chans": "num_classes",
    "depths": "depths",
    "feat_size": "feat_size",
    "hidden_size": "hidden_size",
    "norm_name": "norm",
    "res_block": "residual",
}
_IGNORED = ("drop_path_rate", "layer_scale_init_value", "out_indices", "conv_block")
_FIXED = {"spatial_dims": 3}
_MIXER = {
    "d_model": "dim",
    "d_state": "state",
    "d_conv": "conv",
    "expand": "expand",
    "nslices": "slices",
    "dt_rank": "dt_rank",
    "conv_bias": "conv_bias",
    "bias": "bias",
}


def _mixer_rules(at: str) -> Rules:
    def three(name: str, leaf: str = "") -> list[str]:
        return [f"{at}{name}{suffix}{leaf}" for suffix in ("", "_b", "_s")]

    return Rules(
        Stack([at + "A_log", at + "A_b_log", at + "A_s_log"], at + "scan.A_log"),
        Stack(three("D"), at + "scan.D"),
        Stack(three("conv1d", ".weight"), at + "conv_weight", Squeeze(1)),
        Stack(three("conv1d", ".bias"), at + "conv_bias"),
        Stack(three("x_proj", ".weight"), at + "scan.x_proj"),
        Stack(three("dt_proj", ".weight"), at + "scan.dt_proj"),
        Stack(three("dt_proj", ".bias"), at + "scan.dt_bias"),
    )


class SegMambaAdapter(MedicalAdapter):
    """ge-xing/SegMamba: ``SegMamba`` and, where the arguments name ``d_model``, its mixer alone."""

    system = "segmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "d_model" in config:
            # the library's defaults, which only say how new weights are drawn, or which kernel runs
            ignored = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "layer_idx", "device", "dtype")
            # without the fast path the original walks the first order alone
            fixed = {"bimamba_type": "v3", "use_fast_path": True}
            arguments = take("the tri-orientated mixer", config, _MIXER, ignored, fixed)
            if arguments.get("dt_rank") == "auto":
                del arguments["dt_rank"]
            return self.load(TriMamba(**arguments), state)
        return self.load(SegMamba(**take("SegMamba", config, _CONFIG, _IGNORED, _FIXED)), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(
            _mixer_rules("vit.stages.{i:d}.{j:d}.mamba."),
            _mixer_rules(""),
            Rename("{rest:*}", "{rest:*}"),
        )

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, TriMamba):
            return {"y": model(inputs["x"])}
        return super().run(model, inputs, call=call)
