"""U-Mamba: nnU-Net's residual U-Net with Mamba layers, in two and three dimensions.

Paper: Ma et al., "U-Mamba", arXiv 2401.04722. Original: bowang-lab/U-Mamba @ 28459e3, Apache-2.0
(``nnunetv2/nets/UMamba{Bot,Enc}_{2d,3d}.py``); ``BasicBlockD`` of dynamic-network-architectures. Differs: the encoder
is registered once (the original's state dict holds it twice), and one class serves the four networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Mamba, Recomputed

from . import lean
from ._base import Undecayed, check_input
from .unetr_blocks import CONV

#: one number for every axis, or one for each
Axes = int | Sequence[int]
NORM: dict[int, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _axes(value: Axes, dims: int) -> tuple[int, ...]:
    found = (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(found) != dims:
        raise ValueError(f"{value} has {len(found)} entries; expected one for each of {dims} axes")
    return found


class Plan:
    """What nnU-Net plans fix for all blocks: the number of axes, the norm's options, the activation's slope."""

    def __init__(self, dims: int, eps: float, affine: bool, slope: float, conv_bias: bool) -> None:
        self.dims, self.eps, self.affine, self.slope, self.conv_bias = dims, eps, affine, slope, conv_bias

    def conv(self, cin: int, cout: int, kernel: Axes, stride: Axes = 1, bias: bool = True) -> nn.Module:
        k = _axes(kernel, self.dims)
        return CONV[self.dims](cin, cout, k, _axes(stride, self.dims), tuple(i // 2 for i in k), bias=bias)

    def norm(self, channels: int) -> nn.Module:
        return NORM[self.dims](channels, eps=self.eps, affine=self.affine)


class ResidualBlock(Recomputed):
    """``act(norm(conv(act(norm(conv x)))) + conv1x1 x)``, the stride in the first convolution and the shortcut."""

    def __init__(self, plan: Plan, cin: int, cout: int, kernel: Axes, stride: Axes = 1) -> None:
        super().__init__()
        self.slope = plan.slope
        self.conv1 = plan.conv(cin, cout, kernel, stride)
        self.norm1 = plan.norm(cout)
        self.conv2 = plan.conv(cout, cout, kernel)
        self.norm2 = plan.norm(cout)
        self.conv3 = plan.conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            return self.lean([x], owned=[False])
        y = F.leaky_relu(self.norm1(self.conv1(x)), self.slope)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.conv3(x), self.slope)

    def lean(self, maps: Sequence[Tensor], *, owned: Sequence[bool]) -> Tensor:
        """The same for maps side by side, see :func:`zoo_medical.lean.residual`."""
        convs = (self.conv1, self.conv2, self.conv3)
        norms = (lean.norm_of(self.norm1), lean.norm_of(self.norm2), None)
        return lean.residual(maps, convs, norms, self.slope, owned=owned)


class ConvNorm(nn.Module):
    """A convolution and its norm."""

    def __init__(self, plan: Plan, channels: int, kernel: Axes) -> None:
        super().__init__()
        self.conv = plan.conv(channels, channels, kernel, bias=plan.conv_bias)
        self.norm = plan.norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PlainBlock(Recomputed):
    """``act(norm(conv(act(norm(conv x)))) + x)``: nnU-Net's ``BasicBlockD`` at stride 1."""

    def __init__(self, plan: Plan, channels: int, kernel: Axes) -> None:
        super().__init__()
        self.slope = plan.slope
        self.conv1 = ConvNorm(plan, channels, kernel)
        self.conv2 = ConvNorm(plan, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):
            convs = (self.conv1.conv, self.conv2.conv, None)
            norms = (lean.norm_of(self.conv1.norm), lean.norm_of(self.conv2.norm), None)
            return lean.residual([lean.channel_last(x)], convs, norms, self.slope, owned=[False])
        return F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), self.slope)) + x, self.slope)


def stage(plan: Plan, cin: int, cout: int, kernel: Axes, stride: Axes, blocks: int) -> nn.Sequential:
    """A residual block that changes channels and size, and ``blocks - 1`` that keep them."""
    rest = (PlainBlock(plan, cout, kernel) for _ in range(blocks - 1))
    return nn.Sequential(ResidualBlock(plan, cin, cout, kernel, stride), *rest)


class MambaLayer(Recomputed):
    """``mamba(norm x)``, without a residual. (batch, C, *size) to the same, in float32 under autocast.

    Tokens are positions in raster order; with ``channel_tokens`` they are channels, and ``dim`` is the number of
    positions.
    """

    def __init__(self, dim: int, *, channel_tokens: bool = False, state: int = 16, conv: int = 4, expand: int = 2):
        super().__init__()
        self.dim, self.channel_tokens = dim, channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, state, conv, expand)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._mix(x.float())
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.channel_tokens:
            if tokens.shape[-1] != self.dim:
                raise ValueError(
                    f"U-Mamba: a feature map of {tuple(x.shape[2:])} has {tokens.shape[-1]} positions, this network "
                    f"was built for {self.dim}; give it patches of its input_size, or build it with another input_size"
                )
            return self.mamba(self.norm(tokens)).view(x.shape)
        if lean.lean(self, x):
            return self._in_pieces(lean.rows(lean.channel_last(x))).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.mamba(self.norm(tokens.transpose(1, 2))).transpose(1, 2).reshape(x.shape)

    def _in_pieces(self, tokens: Tensor) -> Tensor:
        """``mamba(norm(tokens))``, piece after piece with the state handed on, so that only the result is as long."""
        state = self.mamba.init_state(tokens.shape[0])
        answer = torch.empty_like(tokens)
        for rows in lean.pieces(tokens.shape[1], self.mamba.d_inner):
            answer[:, rows] = self.mamba(self.norm(tokens[:, rows]), state=state)
        return answer


class Encoder(nn.Module):
    """Stem and stages; in the Enc networks a Mamba layer follows stages and its output is the skip."""

    def __init__(
        self,
        plan: Plan,
        in_chans: int,
        features: Sequence[int],
        kernels: Sequence[Axes],
        strides: Sequence[Axes],
        blocks: Sequence[int],
        input_size: Sequence[int] | None,
    ) -> None:
        super().__init__()
        n = len(features)
        self.stem = stage(plan, in_chans, features[0], kernels[0], 1, blocks[0])
        before = [features[0], *features[:-1]]
        self.stages = nn.ModuleList(
            stage(plan, a, f, k, t, b) for a, f, k, t, b in zip(before, features, kernels, strides, blocks, strict=True)
        )
        self.mamba_layers = nn.ModuleList()
        if input_size is None:
            return
        size = list(_axes(input_size, plan.dims))
        for s, width in enumerate(features):
            size = [a // t for a, t in zip(size, _axes(strides[s], plan.dims), strict=True)]
            positions = math.prod(size)
            if positions == 0:
                raise ValueError(f"input_size {tuple(input_size)} is used up at stage {s} by the strides {strides}")
            swap = positions <= width
            # in two dimensions every second stage, counted so that the last has one
            here = plan.dims == 3 or (s % 2 == 1) != (n % 2 == 1)
            layer = MambaLayer(positions if swap else width, channel_tokens=swap) if here else nn.Identity()
            self.mamba_layers.append(layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for s, block in enumerate(self.stages):
            x = block(x)
            if len(self.mamba_layers):
                x = self.mamba_layers[s](x)
            maps.append(x)
        return maps


class Upsample(nn.Module):
    """Nearest interpolation by the stride, then a 1x1 convolution."""

    def __init__(self, plan: Plan, cin: int, cout: int, stride: Axes) -> None:
        super().__init__()
        self.scale = [float(t) for t in _axes(stride, plan.dims)]
        self.conv = plan.conv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        if lean.lean(self, x):  # the convolution acts on each position by itself: once for all that are the same
            return F.interpolate(lean.convolve(x, self.conv), scale_factor=self.scale, mode="nearest")
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode="nearest"))


class Decoder(nn.Module):
    """From the bottom up: upsample, put the skip beside it, blocks, and a 1x1 convolution to logits.

    It ends at the size of the first stage: the first stride is not undone. In two dimensions the last stage takes no
    skip (as in the original).
    """

    def __init__(
        self,
        plan: Plan,
        features: Sequence[int],
        kernels: Sequence[Axes],
        strides: Sequence[Axes],
        blocks: Sequence[int],
        classes: int,
    ) -> None:
        super().__init__()
        n = len(features)
        stages, ups, heads = [], [], []
        for s in range(1, n):
            width = features[-s - 1]
            skip = 0 if plan.dims == 2 and s == n - 1 else width
            ups.append(Upsample(plan, features[-s], width, strides[-s]))
            stages.append(stage(plan, width + skip, width, kernels[-s - 1], 1, blocks[s - 1]))
            heads.append(plan.conv(width, classes, 1))
        self.stages, self.upsample_layers = nn.ModuleList(stages), nn.ModuleList(ups)
        self.seg_layers = nn.ModuleList(heads)
        self.last_skip = plan.dims == 3

    def forward(self, maps: list[Tensor], every: bool, owned: bool = False) -> Tensor | list[Tensor]:
        """``maps`` of the encoder, which are taken from the list; ``owned``: nobody else reads them, so that inference
        may write over them."""
        x, outputs = maps.pop(), []
        last = len(self.stages) - 1
        for s, (up, block, head) in enumerate(zip(self.upsample_layers, self.stages, self.seg_layers, strict=True)):
            x = up(x)
            skip = maps.pop() if s < last or self.last_skip else None
            if skip is not None and lean.lean(block, x):
                x = block[0].lean([x, skip], owned=[True, owned])
                del skip
                x = block[1:](x)
            else:
                x = block(x if skip is None else torch.cat([x, skip], dim=1))
            if every or s == last:
                outputs.append(lean.convolve(x, head).contiguous() if lean.lean(head, x) else head(x))
        return outputs[::-1] if every else outputs[0]


class UMamba(Undecayed, GradCheckpointing, nn.Module):
    """U-Mamba with a Mamba layer at the bottom (``mamba="bot"``) or after the encoder's stages (``mamba="enc"``).

    Arguments (nnU-Net plans): ``dims`` 2 or 3; ``features``, ``kernels``, ``strides`` of the stages (a kernel or stride
    is a number or one an axis; plans begin with the stride 1); ``blocks``, ``decoder_blocks``: convolution blocks a
    stage, one number or a list, of which the deeper half is reduced to 1 as the original does; ``input_size``: the
    plan's patch size, which an Enc network is tied to; ``conv_bias`` of the plain blocks; ``norm_eps``,
    ``norm_affine``; ``slope`` of LeakyReLU (0: ReLU); ``deep_supervision``.

    Input (batch, in_chans, *size), sides multiples of the product of the strides. Output: logits (batch, num_classes,
    *size) (size / strides[0], where that is not 1); with deep supervision a list, largest first, one for each decoder
    stage.
    Source: arXiv 2401.04722, section 3 and figure 1.
    """

    ends: ClassVar[dict[str, Any]] = {
        "num_classes": NewHead("decoder.seg_layers"),
        "in_chans": InputChannels("encoder.stem.0.conv1.weight", "encoder.stem.0.conv3.weight"),
    }

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 2,
        dims: int = 3,
        mamba: str = "bot",
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        kernels: Axes | Sequence[Axes] = 3,
        strides: Sequence[Axes] = (1, 2, 2, 2, 2, 2),
        blocks: int | Sequence[int] = 2,
        decoder_blocks: int | Sequence[int] = 2,
        input_size: Sequence[int] | None = None,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        slope: float = 0.01,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if dims not in CONV:
            raise ValueError(f"dims is {dims}; expected 2 (images) or 3 (volumes)")
        if mamba not in ("bot", "enc"):
            raise ValueError(f"mamba is {mamba!r}; expected 'bot' (at the bottom) or 'enc' (in the encoder)")
        if mamba == "enc" and input_size is None:
            raise ValueError("an Enc network needs input_size, the plan's patch size")
        n = len(features)
        kernels = [kernels] * n if isinstance(kernels, int) else list(kernels)
        if n < 2 or len(kernels) != n or len(strides) != n:
            raise ValueError(
                f"{n} features, {len(kernels)} kernels and {len(strides)} strides; expected two stages or more, and "
                "one of each for every stage"
            )
        counts = _counts("blocks", blocks, n)
        counts_up = _counts("decoder_blocks", decoder_blocks, n - 1)
        for s in range(math.ceil(n / 2), n):
            counts[s] = 1
        for s in range(math.ceil((n - 1) / 2 + 0.5), n - 1):
            counts_up[s] = 1
        plan = Plan(dims, norm_eps, norm_affine, slope, conv_bias)
        self.in_chans, self.num_classes, self.dims, self.deep_supervision = (
            in_chans,
            num_classes,
            dims,
            deep_supervision,
        )
        self.reduction = tuple(math.prod(_axes(t, dims)[a] for t in strides) for a in range(dims))
        size = input_size if mamba == "enc" else None
        self.input_size = None if size is None else _axes(size, dims)
        self.encoder = Encoder(plan, in_chans, features, kernels, strides, counts, size)
        self.mamba_layer = MambaLayer(features[-1]) if mamba == "bot" else nn.Identity()
        self.decoder = Decoder(plan, features, kernels, strides, counts_up, num_classes)
        self.init_weights(slope)

    def init_weights(self, slope: float) -> None:
        """Convolutions He-normal for the slope, biases 0; the Mamba layers keep their own start."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=slope)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Without deep supervision only the last head is used; all exist, as in the original."""
        heads = len(self.decoder.seg_layers)
        return () if self.deep_supervision else tuple(f"decoder.seg_layers.{i}." for i in range(heads - 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = check_input("U-Mamba", x, self.in_chans, self.dims)
        if any(s % r for s, r in zip(x.shape[2:], self.reduction, strict=True)):
            raise ValueError(
                f"U-Mamba: the input has sides {tuple(x.shape[2:])}; they must be multiples of {self.reduction}, the "
                "product of the strides. Pad it, or use the pipeline, which does"
            )
        owned = lean.lean(self, x)
        maps = self.encoder(x)
        maps[-1] = self.mamba_layer(maps[-1])
        return self.decoder(maps, self.deep_supervision, owned)


def _counts(name: str, value: int | Sequence[int], n: int) -> list[int]:
    found = [value] * n if isinstance(value, int) else [int(v) for v in value]
    if len(found) != n:
        raise ValueError(f"{name} is {value}; expected one number, or {n} of them")
    return found
