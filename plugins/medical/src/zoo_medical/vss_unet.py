"""VMamba's first blocks in U-shaped networks: what VM-UNet and Swin-UMamba share.

Layout (batch, height, width, channels). The block itself is :class:`zoo.layers.vss.VSSBlock` without an MLP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from zoo.layers.vss import PatchEmbed, PatchMerging, VSSBlock
from zoo.rules import Rename, Reshape, Rules


def doubling(dims: int | Sequence[int], stages: int) -> list[int]:
    """The widths of the stages: ``dims`` itself, or for one number that times 1, 2, 4, ..."""
    found = [dims * 2**i for i in range(stages)] if isinstance(dims, int) else [int(d) for d in dims]
    if len(found) != stages:
        raise ValueError(f"dims is {dims}; expected {stages} widths, or one that doubles from stage to stage")
    return found


def states(state: int | None, dims: Sequence[int]) -> int:
    """The number of states: ``state``, or for None a sixth of the first width, rounded up."""
    return math.ceil(dims[0] / 6) if state is None else state


def vss_blocks(dim: int, rates: Sequence[float], state: int, drop: float = 0.0) -> nn.Sequential:
    """One VSS block for each drop-path rate; ``drop``: dropout behind each mixer."""
    mixer = {"expand": 2.0, "state": state, "gate": True, "conv_bias": True, "drop": drop}
    return nn.Sequential(*(VSSBlock(dim, mixer, mlp_ratio=0.0, drop_path=rate) for rate in rates))


class VSSLayer(nn.Module):
    """(Up,) blocks (, down): one resolution of an encoder or a decoder."""

    def __init__(
        self,
        dim: int,
        rates: Sequence[float],
        state: int,
        *,
        up: nn.Module | None = None,
        down: nn.Module | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if up is not None:
            self.upsample = up
        self.blocks = vss_blocks(dim, rates, state, drop)
        if down is not None:
            self.downsample = down
        self.has_up, self.has_down = up is not None, down is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.has_up:
            x = self.upsample(x)
        x = self.blocks(x)
        return self.downsample(x) if self.has_down else x


class VSSMEncoder(nn.Module):
    """Patch embedding and four stages; returns the input and every stage's map before its downsampling.

    Input (batch, in_chans, H, W); a list of (batch, C_i, H/(p 2^i), W/(p 2^i)) behind the input itself. ``patch_norm``:
    LayerNorm in the patch embedding; ``drop``: dropout behind it, ``mixer_drop``: behind each block's mixer.
    Source: Swin-UMamba's ``VSSMEncoder``.
    """

    def __init__(
        self,
        in_chans: int,
        patch: int,
        depths: Sequence[int],
        dims: Sequence[int],
        state: int,
        rates: Sequence[float],
        patch_norm: bool = True,
        drop: float = 0.0,
        mixer_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, dims[0], patch, norm="ln" if patch_norm else "none")
        self.drop = nn.Dropout(drop)
        starts = [sum(depths[:i]) for i in range(len(depths))]
        self.layers = nn.ModuleList(
            VSSLayer(dim, rates[s : s + depth], state, drop=mixer_drop)
            for dim, depth, s in zip(dims, depths, starts, strict=True)
        )
        self.downsamples = nn.ModuleList(PatchMerging(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        y = self.drop(self.patch_embed(x))
        for i, layer in enumerate(self.layers):
            y = layer(y)
            maps.append(y.permute(0, 3, 1, 2))
            if i < len(self.downsamples):
                y = self.downsamples[i](y)
        return maps


def init_linear(model: nn.Module) -> None:
    """Linear weights truncated normal 0.02, biases 0; the scans keep their own start."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_PER_PATH = Reshape(zoo=lambda s: (4, s[0] // 4, *s[1:]), reference=lambda s: (s[0] * s[1], *s[2:]))


def rules_for(theirs: str = "", ours: str = "") -> Rules:
    """The keys of VMamba's first release inside blocks and patch embeddings, below a prefix on each side."""
    tail = "{stack}.{s:d}.blocks.{b:d}."
    rules: list[Rename] = []
    for middle in ("", "{part}."):
        a, z = theirs + middle + tail, ours + middle + tail
        rules += [
            Rename(a + "ln_1.{leaf}", z + "norm.{leaf}"),
            Rename(a + "self_attention.x_proj_weight", z + "op.scan.x_proj"),
            Rename(a + "self_attention.dt_projs_weight", z + "op.scan.dt_proj"),
            Rename(a + "self_attention.dt_projs_bias", z + "op.scan.dt_bias"),
            Rename(a + "self_attention.A_logs", z + "op.scan.A_log", _PER_PATH),
            Rename(a + "self_attention.Ds", z + "op.scan.D", _PER_PATH),
            Rename(a + "self_attention.conv2d.{leaf}", z + "op.conv.{leaf}"),
            Rename(a + "self_attention.{rest:*}", z + "op.{rest:*}"),
        ]
        a, z = theirs + middle + "patch_embed.", ours + middle + "patch_embed."
        rules += [
            Rename(a + "proj.{leaf}", z + "conv1.{leaf}"),
            Rename(a + "norm.{leaf}", z + "norm1.{leaf}"),
        ]
    return Rules(*rules, Rename(theirs + "{rest:*}", ours + "{rest:*}"))


#: modules inside a block that are named otherwise here
RENAMED = {"ln_1": "norm", "self_attention": "op"}


def block_path(path: str) -> str:
    """The original's submodule under our name."""
    return ".".join(RENAMED.get(part, part) for part in path.split("."))
