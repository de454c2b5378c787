"""Serpent: image restoration by a U-shaped network of selective scans at several scales.

Paper: Sepehri, Fabian, Soltanolkotabi, "Serpent", arXiv 2403.17902. The authors' code (AIF4S/Serpent) could not be had,
so this is a reading of the paper. The paper's: a hierarchical network that turns the image into sequences, read along
four directions by selective state-space models at several scales, with a global receptive field at a cost linear in the
image's size. Ours, every one an argument: number of levels, patch size, widths, depths, state size, gate, MLP, how the
sides are halved and doubled, how skips join, the head, and the residual around everything. The block is VMamba's
(:class:`zoo.layers.vss.VSSBlock`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Linear
from zoo.layers.ss2d import CROSS
from zoo.layers.vss import (
    ConvDownsample,
    ConvLast,
    PatchEmbed,
    PatchExpanding,
    PatchMerging,
    VSSBlock,
    channel_norm,
)

from .sizes import check_image, pad_to_multiple

DOWN = ("merge", "conv")
UP = ("expand", "conv")
SKIP = ("concat", "add")


class ConvUpsample(nn.Module):
    """Nearest neighbour to twice the side, then a 3x3 convolution: (batch, h, w, dim) to (batch, 2h, 2w, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = ConvLast(dim, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


class Skip(nn.Module):
    """An encoder's map joined to the decoder's: side by side and back to ``dim`` by a linear layer, or added."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.reduce = Linear(2 * dim, dim, bias=False) if kind == "concat" else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip if self.reduce is None else self.reduce(torch.cat([x, skip], dim=-1))


class Serpent(GradCheckpointing, nn.Module):
    """``x + head(decoder(encoder(patches(x))))`` for images of any size.

    Arguments
        in_chans, out_chans: of the image; the residual needs them equal (``out_chans`` None: as many as came in).
        dims, depths: widths of the levels, finest first, and Serpent blocks in each; the last level is the bottleneck.
        depths_decoder: blocks of the decoder's levels, finest first (None: as the encoder's).
        patch_size: side of the patches that the finest level sees; patch_overlap: embedded by two strided 3x3
        convolutions (patch sizes 2, 4, ...) instead of one without overlap.
        state, expand, dt_rank, paths, gate, act, conv: the mixer, see :class:`zoo.layers.SS2D`; the paths default to
        the four directions, rows and columns from both ends.
        mlp_ratio: hidden width of an MLP in each block (0: none); norm: "ln", "bn" or "none"; drop_path_rate.
        embed_norm, final_norm: norms behind the patch embedding and before the head. Without them, the default, the
        strength of an edge reaches the head as it is; with them the network has to learn it anew.
        down: "merge" (patch merging) or "conv" (strided 3x3); up: "expand" (patch expanding) or "conv" (nearest
        neighbour and 3x3); skip: "concat" or "add".
        head_dim: channels at full resolution before the last 3x3 convolution (None: ``dims[0]``).
        residual: the network's output is added to its input.

    Input (batch, in_chans, H, W), values about 0 to 1; sides that are no multiples of ``patch_size * 2^(levels - 1)``
    are padded by reflection and cropped again. Output (batch, out_chans, H, W). Source: arXiv 2403.17902; sizes are
    ours.
    """

    ends: ClassVar[dict[str, Any]] = {"in_chans": (InputChannels("patch_embed.conv1.weight"), NewHead("head"))}

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] | None = None,
        *,
        patch_size: int = 2,
        patch_overlap: bool = False,
        state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        paths: str = CROSS,
        gate: bool = True,
        act: str = "silu",
        conv: int = 3,
        mlp_ratio: float = 0.0,
        norm: str = "ln",
        drop_path_rate: float = 0.0,
        embed_norm: bool = False,
        final_norm: bool = False,
        down: str = "merge",
        up: str = "expand",
        skip: str = "concat",
        head_dim: int | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.in_chans, self.out_chans = in_chans, in_chans if out_chans is None else out_chans
        decoder = list(depths)[:-1] if depths_decoder is None else list(depths_decoder)
        if not dims or len(dims) != len(depths) or len(decoder) != len(dims) - 1:
            raise ValueError(
                f"dims is {list(dims)}, depths {list(depths)} and depths_decoder {decoder}; expected as many depths as "
                "dims, and one fewer in the decoder, which has no bottleneck"
            )
        for name, given, known in (("down", down, DOWN), ("up", up, UP), ("skip", skip, SKIP)):
            if given not in known:
                raise ValueError(f"{name} is {given!r}; expected one of {', '.join(map(repr, known))}")
        if residual and self.out_chans != in_chans:
            raise ValueError(
                f"out_chans is {self.out_chans} and in_chans {in_chans}; the residual needs them equal: residual=False"
            )
        self.scale, self.residual = 1, residual
        self.multiple = patch_size * 2 ** (len(dims) - 1)
        mixer = {
            "state": state, "expand": expand, "dt_rank": dt_rank, "paths": paths, "gate": gate, "act": act,
            "conv": conv,
        }  # fmt: skip
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths) + sum(decoder), device="cpu").tolist())

        def level(dim: int, depth: int) -> nn.Sequential:
            return nn.Sequential(
                *(VSSBlock(dim, mixer, mlp_ratio=mlp_ratio, norm=norm, drop_path=next(rates)) for _ in range(depth))
            )

        self.patch_embed = PatchEmbed(
            in_chans, dims[0], patch_size, overlap=patch_overlap, norm=norm if embed_norm else "none"
        )
        self.encoder = nn.ModuleList(level(dim, depth) for dim, depth in zip(dims, depths, strict=True))
        steps = list(itertools.pairwise(dims))
        self.downs = nn.ModuleList(
            PatchMerging(a, b, norm) if down == "merge" else ConvDownsample(a, b, 3, norm) for a, b in steps
        )
        self.ups = nn.ModuleList(
            PatchExpanding(b, a, 2, norm) if up == "expand" else ConvUpsample(b, a) for a, b in steps
        )
        self.skips = nn.ModuleList(Skip(a, skip) for a, _ in steps)
        backwards = [level(dim, depth) for dim, depth in zip(dims[-2::-1], decoder[::-1], strict=True)]
        self.decoder = nn.ModuleList(backwards[::-1])
        self.norm = channel_norm(norm if final_norm else "none", dims[0])
        width = dims[0] if head_dim is None else head_dim
        self.expand = PatchExpanding(dims[0], width, patch_size, "none")
        self.head = ConvLast(width, self.out_chans, 3, padding=1)
        if residual:  # begin near the input itself
            with torch.no_grad():
                self.head.weight.mul_(0.1)
                self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_chans, H, W). Returns (batch, out_chans, H, W)."""
        x = check_image("Serpent", x, self.in_chans)
        height, width = x.shape[2:]
        y = self.patch_embed(pad_to_multiple(x, self.multiple))
        maps: list[Tensor] = []
        for i, blocks in enumerate(self.encoder):
            y = blocks(y)
            if i < len(self.downs):
                maps.append(y)
                y = self.downs[i](y)
        for i in reversed(range(len(self.downs))):
            y = self.decoder[i](self.skips[i](self.ups[i](y), maps.pop()))
        y = self.head(self.expand(self.norm(y))).permute(0, 3, 1, 2)[..., :height, :width]
        return x + y if self.residual else y.contiguous()
