"""ViM2: the vision model of MambaMixer, selective over tokens and over channels in turn. A reading of the paper alone.

Paper: Behrouz, Santacatterina and Zabih, "MambaMixer: Efficient Selective State Space Models with Dual Token and
Channel Selection", arXiv 2403.19888v1. The authors published no code. What the paper states: a block is a selective
token mixer (gated S6 along several scans of the image, with a depthwise 2-D convolution), then a selective channel
mixer (bidirectional S6 along the channels of the transposed input); every mixer reads a learned weighted average of all
earlier outputs of both kinds; four stages with downsampling by 2.

Choices of ours, where the paper leaves room:

* a step of the channel scan is the vector of the tokens of one ``window`` x ``window`` window (7 x 7: the whole map
  of the last stage at 224 px). Over the whole map of the first stage its input projection alone would hold 39 million
  weights, twice what the paper's smallest model has, and would tie the model to one image size; ``window=None`` does
  that.
* each mixer keeps its own residual, and the averages start as a plain chain (as in DenseFormer, which they follow);
* the averages restart in each stage, since they cannot cross a change of resolution;
* LayerNorm before each mixer; embedding, downsampling and head as in VMamba; the depths, chosen so that the three sizes
  come near the paper's 20, 43 and 74 million parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from zoo.layers import Mamba, Recomputed
from zoo.layers.ss2d import CROSS, SS2D
from zoo.layers.vss import PatchEmbed

from ._base import Indices, VisionModel, build
from .vmamba import STAGES, make_downsample


class ChannelMixer(nn.Module):
    """``F(x^T) + flip(G(flip(x^T)))`` transposed back: two Mambas along the channels, one from each end.

    x: (batch, H, W, C). The sequence is the C channels; a step is the vector of the ``tokens`` of one window, sides
    padded with zeros to whole windows. Source: arXiv 2403.19888v1, section 3.2.
    """

    def __init__(self, window: tuple[int, int], state: int = 16, conv: int = 4, expand: float = 2.0) -> None:
        super().__init__()
        self.window = window
        tokens = window[0] * window[1]
        self.forwards = Mamba(tokens, d_state=state, d_conv=conv, expand=expand)
        self.backwards = Mamba(tokens, d_state=state, d_conv=conv, expand=expand)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        h, w = self.window
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
        rows, columns = x.shape[1] // h, x.shape[2] // w
        x = x.view(B, rows, h, columns, w, C).permute(0, 1, 3, 5, 2, 4).reshape(-1, C, h * w)  # one row a window
        y = self.forwards(x) + self.backwards(x, reverse=True)
        y = y.view(B, rows, columns, C, h, w).permute(0, 1, 4, 2, 5, 3).reshape(B, rows * h, columns * w, C)
        return y[:, :H, :W]


class WeightedAverage(nn.Module):
    """``sum_i a_i t_i + sum_i b_i c_i`` with learned scalars; ``tokens`` and ``channels`` say how many of each.

    Starts as ``newest``: weight 1 on the last token output ("token") or the last channel output ("channel"), else 0.
    """

    def __init__(self, tokens: int, channels: int, newest: str) -> None:
        super().__init__()
        self.newest = newest
        self.of_tokens = nn.Parameter(torch.zeros(tokens))
        self.of_channels = nn.Parameter(torch.zeros(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.of_tokens.zero_()
            self.of_channels.zero_()
            (self.of_tokens if self.newest == "token" else self.of_channels)[-1] = 1.0

    def forward(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        weights = [*self.of_tokens.unbind(), *self.of_channels.unbind()]
        total = None
        for weight, x in zip(weights, [*tokens, *channels], strict=True):
            total = weight * x if total is None else torch.addcmul(total, weight, x)
        assert total is not None
        return total


class MixerBlock(Recomputed):
    """A token mixer and a channel mixer, each over a weighted average of all earlier outputs of its stage.

    ``number`` is the block's place in the stage, from 0: it sees ``number + 1`` earlier outputs of each kind.
    """

    def __init__(self, dim: int, number: int, window: tuple[int, int], mixer: dict[str, Any], drop_path: float) -> None:
        super().__init__()
        self.token_input = WeightedAverage(number + 1, number + 1, "channel")
        self.token_norm = nn.LayerNorm(dim)
        self.token_mixer = SS2D(dim, **mixer)
        self.channel_input = WeightedAverage(number + 2, number + 1, "token")
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_mixer = ChannelMixer(window, state=mixer["state"])
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, tokens: list[Tensor], channels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Earlier outputs (batch, H, W, C) of each kind to the new pair."""
        x = self.token_input(tokens, channels)
        t = x + self.drop_path(self.token_mixer(self.token_norm(x)))
        x = self.channel_input([*tokens, t], channels)
        return t, x + self.drop_path(self.channel_mixer(self.channel_norm(x)))


class MixerStage(nn.Module):
    """Blocks at one resolution, densely averaged; the output is the last channel mixer's."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def walk(self, x: Tensor) -> Tensor:
        tokens, channels = [x], [x]
        for block in self.blocks:
            t, c = block(list(tokens), list(channels))  # lists of its own: these two grow
            tokens.append(t)
            channels.append(c)
        return channels[-1]


class ViM2(VisionModel):
    """MambaMixer for images (see the module's text for what is the paper's and what is ours).

    Arguments: ``depths`` and ``dims`` (an int C means C, 2C, 4C, 8C) of the four stages; ``paths``, ``state``,
    ``expand``: the token mixer's scan; ``window``: side of the channel mixer's windows, None for the whole map (then
    ``img_size`` fixes the parameters, and the image must have that size). Input (batch, in_chans, H, W).
    """

    first_conv = "patch_embed.conv1"

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: int | Sequence[int] = 96,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        window: int | None = 7,
        paths: str = CROSS,
        state: int = 16,
        expand: float = 2.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [dims * 2**i for i in range(STAGES)] if isinstance(dims, int) else [int(d) for d in dims]
        if len(widths) != STAGES or len(depths) != STAGES:
            raise ValueError(f"depths is {depths} and dims {dims}; expected {STAGES} stages (dims may be an int)")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        size = to_2tuple(img_size)
        if window is None:
            self.img_size = size
        self.patch_embed = PatchEmbed(in_chans, widths[0], 4, overlap=False)
        #: the gate multiplies the scan's output directly, as in the paper's formula: no norm between
        mixer = {"expand": expand, "state": state, "paths": paths, "gate": True, "conv_bias": True, "out_norm": "none"}
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, widths, strict=True)):
            whole = (-(-size[0] // (4 * 2**i)), -(-size[1] // (4 * 2**i)))
            tokens = whole if window is None else (window, window)
            blocks = [MixerBlock(dim, j, tokens, mixer, rates[sum(depths[:i]) + j]) for j in range(depth)]
            down = make_downsample("merge", dim, widths[i + 1], "ln") if i + 1 < STAGES else nn.Identity()
            stages.append(MixerStage(blocks, down))
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": d, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, d in enumerate(widths)
        ]

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`VisionModel`; the last output is (batch, h, w, C)."""
        fixed = getattr(self, "img_size", None)
        if fixed is not None and tuple(x.shape[2:]) != tuple(fixed):
            raise ValueError(
                f"the image is {tuple(x.shape[2:])}; with window=None this model takes only {tuple(fixed)}"
            )
        x, maps = self.patch_embed(x), []
        last = max(indices, default=STAGES - 1) if stop_early else STAGES - 1
        for i, stage in enumerate(self.stages):
            x = stage.walk(x)  # type: ignore[operator]
            if i in indices:
                y = self.norm(x) if norm and i == STAGES - 1 else x
                maps.append(y.permute(0, 3, 1, 2))
            if i == last:
                break
            x = stage.downsample(x)  # type: ignore[operator]
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normalised last map (batch, h, w, C)."""
        return self.norm(self.forward_stages(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's call: drops the head with its norm, and the stages after the last index."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stages = self.stages[: max(take) + 1]
        self.stages[-1].downsample = nn.Identity()  # type: ignore[union-attr]
        if prune_norm or prune_head:
            self.norm = nn.Identity()
        return take


def vim2(*, features_only: bool = False, out_indices: Indices = None, **config: Any) -> ViM2:
    """Builder of the cards: a :class:`ViM2`, as a pyramid of the maps at ``out_indices`` with ``features_only``."""
    return build(ViM2, features_only=features_only, out_indices=out_indices, **config)
