"""MambaMIM's networks: a MedNeXt and Vision Mamba encoder for volumes, and the segmentation network on it.

Paper: Tang et al., "MambaMIM", arXiv 2408.08070 (Medical Image Analysis 2025). Original: FengheTan9/MambaMIM @ 471c2f6,
Apache-2.0 (``models/network/hymamba.py``, ``models/encoder.py``). Differs: the sparse layers of pre-training are the
dense ones with a mask given to forward; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Mamba, Recomputed

from ._base import Undecayed, check_input
from .unetr_blocks import UpBlock, named_conv

CHANNELS = (32, 64, 128, 192, 384)
DEPTHS, KERNELS, EXPANSION = (1, 2, 2, 2, 1), (3, 3, 3, 3, 3), (2, 2, 4, 4, 4)
#: the encoder's stride
STRIDE = 16


class Visible:
    """Hides the masked cells of a map: multiplies it by the grid ``active`` at its resolution; None hides nothing.

    ``active``: (batch, 1, f, f, f) bool, True where a cell is visible. ``norms``: whether it hides what norms leave too
    (their bias, in the masked cells), not what convolutions and pools leave alone.
    """

    def __init__(self, active: Tensor | None = None, norms: bool = True) -> None:
        self.active, self.norms = active, norms
        self._at: dict[int, Tensor] = {}

    def at(self, size: int) -> Tensor:
        """The grid with every cell repeated to ``size`` positions a side."""
        assert self.active is not None
        if size not in self._at:
            grid = self.active
            for axis in (2, 3, 4):
                grid = grid.repeat_interleave(size // self.active.shape[2], dim=axis)
            self._at[size] = grid
        return self._at[size]

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.active is None else x * self.at(x.shape[2])

    def normed(self, x: Tensor) -> Tensor:
        """The same for what a norm returned."""
        return self(x) if self.norms else x


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (batch, C, X, Y, Z), eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x if x.dtype == torch.float64 else x.float()  # statistics of half-precision maps in single precision
        y = y - y.mean(1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)
        shape = (-1, 1, 1, 1)
        return y.to(x.dtype) * self.weight.view(shape) + self.bias.view(shape)


class MedNeXtBlock(Recomputed):
    """Depthwise convolution, norm, 1x1x1 convolution to ``expansion`` times the channels, GELU, back, residual.

    Source: Roy et al., "MedNeXt", arXiv 2303.09975, section 2.1.
    """

    def __init__(self, channels: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = ChannelNorm(channels)
        self.conv2 = nn.Conv3d(channels, expansion * channels, 1)
        self.conv3 = nn.Conv3d(expansion * channels, channels, 1)

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        y = visible.normed(self.norm(visible(self.conv1(x))))
        return x + visible(self.conv3(F.gelu(visible(self.conv2(y)))))


class SkipBlock(Recomputed):
    """``act(norm(conv(act(norm(conv x)))) + x)`` with LeakyReLU 0.01; the shortcut is 1x1x1 and norm where needed."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv3d(cout, cout, 3, padding=1)
        self.norm1 = ChannelNorm(cout)
        self.norm2 = ChannelNorm(cout)
        self.shortcut = cin != cout
        if self.shortcut:
            self.conv3 = nn.Conv3d(cin, cout, 1)
            self.norm3 = ChannelNorm(cout)

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        y = F.leaky_relu(visible.normed(self.norm1(visible(self.conv1(x)))), 0.01)
        y = visible.normed(self.norm2(visible(self.conv2(y))))
        if self.shortcut:
            x = visible.normed(self.norm3(visible(self.conv3(x))))
        return F.leaky_relu(y + x, 0.01)


class Embeddings(nn.Module):
    """The convolutional part: maps at strides 1, 2, 4, 8 for the skips, and the map at stride 16 for the tokens."""

    def __init__(
        self,
        in_chans: int,
        channels: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[int],
        expansion: Sequence[int],
    ) -> None:
        super().__init__()
        c = list(channels)
        self.stem = nn.Conv3d(in_chans, c[0], 3, padding=1)
        for i in range(1, 5):
            self.add_module(f"expend{i}", nn.Conv3d(c[i - 1], c[i], 3, padding=1))
            self.add_module(f"encoder{i}", SkipBlock(c[i], c[i]))
            blocks = [MedNeXtBlock(c[i], expansion[i], kernels[i]) for _ in range(depths[i])]
            self.add_module(f"layer{i + 1}", _Blocks(blocks))

    def forward(self, x: Tensor, visible: Visible) -> tuple[Tensor, list[Tensor]]:
        """The map at stride 16, and the skips from full size (c1) down to stride 8 (c4)."""
        x = visible(self.stem(x))
        skips = []
        for i in range(1, 5):
            x = visible(self.get_submodule(f"expend{i}")(x))
            skips.append(self.get_submodule(f"encoder{i}")(x, visible))
            x = visible(F.max_pool3d(x, 2))
            x = self.get_submodule(f"layer{i + 1}")(x, visible)
        return x, skips


class _Blocks(nn.ModuleList):
    """Blocks one after the other, each with the mask."""

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        for block in self:
            x = block(x, visible)
        return x


class OneWayMamba(Mamba):
    """Mamba with the weights of a second direction that nothing reads (``bimamba_type="v1"`` of the original)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 16, 4, 2)
        inner = self.d_inner
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.D_b = nn.Parameter(torch.ones_like(self.D))
        self.conv1d_b = nn.Conv1d(inner, inner, self.d_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj_b = nn.Linear(self.dt_rank, inner)


class TokenMlp(nn.Module):
    """Linear to twice the width, GELU, back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MambaBlock(Recomputed):
    """``x + mamba(norm x)``, then ``x + mlp(norm x)``; (batch, length, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mamba = OneWayMamba(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TokenMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mamba(self.norm1(x)) + x
        return self.mlp(self.norm2(x)) + x


def sine_positions(grid: int, dim: int) -> Tensor:
    """(1, grid^3, dim): sines and cosines of the three coordinates, dim/6 frequencies 10000^(-i/(dim/6)) each."""
    if dim % 6:
        raise ValueError(f"the last of channels is {dim}; positions in three axes need a multiple of 6")
    p = dim // 6
    rate = 10000.0 ** (-torch.arange(p, dtype=torch.float64, device="cpu") / p)
    where = torch.arange(grid, dtype=torch.float64, device="cpu")
    axes = torch.meshgrid(where, where, where, indexing="ij")
    parts = [f(a.reshape(-1, 1) * rate) for a in axes for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]


class TokenMixer(nn.Module):
    """The map at stride 16 as tokens in raster order, with fixed positions, through Mamba blocks.

    With a mask only visible tokens are walked; the rest of the result is ``mask_token``.
    """

    def __init__(self, dim: int, grid: int, depth: int, *, masked: bool = False) -> None:
        super().__init__()
        self.grid, self.masked = grid, masked
        self.pos_embed = nn.Parameter(torch.empty(1, grid**3, dim), requires_grad=False)
        with torch.no_grad():
            self.pos_embed.copy_(sine_positions(grid, dim))
        if masked:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(MambaBlock(dim) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # also dt_proj: its own start is lost, as in the original
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tokens(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.grid,) * 3:
            raise ValueError(
                f"MambaMIM: the input gives a grid of {tuple(x.shape[2:])} cells of {STRIDE}^3, this network has "
                f"positions for {self.grid}^3; give it cubes of side "
                f"{self.grid * STRIDE}, or build it with another img_size"
            )
        return x.flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x)
        for block in self.blocks:
            y = block(y)
        return y.transpose(1, 2).reshape(x.shape)

    def forward_masked(self, x: Tensor, active: Tensor, kept: int | None = None) -> tuple[Tensor, Tensor, int]:
        """x (batch, dim, f, f, f), active (batch, 1, f, f, f). Returns the map, the inverse order (batch, n), the
        number of tokens that were walked.

        ``kept`` is the number of visible cells of the *whole batch*, capped at n: as in the original, batches above one
        volume also walk hidden tokens (zeros with their positions), and fewer mask tokens fill the rest.
        """
        y = self.tokens(x)
        batch, n, dim = y.shape
        order = (~active.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)
        restore = order.argsort(dim=1)
        kept = min(n, int(active.sum()) if kept is None else kept)
        y = y.gather(1, order[:, :kept, None].expand(-1, -1, dim))
        for block in self.blocks:
            y = block(y)
        y = torch.cat([y, self.mask_token.expand(batch, n - kept, -1).to(y.dtype)], dim=1)
        y = y.gather(1, restore[:, :, None].expand(-1, -1, dim))
        return y.transpose(1, 2).reshape(x.shape), restore, kept


class Decoder(nn.Module):
    """Four UNETR up-blocks, a residual block to c0, a 1x1x1 convolution to the classes."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        c = list(channels)
        self.decoder5 = UpBlock(3, c[4], c[4])
        self.decoder4 = UpBlock(3, c[4], c[3])
        self.decoder3 = UpBlock(3, c[3], c[2])
        self.decoder2 = UpBlock(3, c[2], c[1])
        self.decoder1 = SkipBlock(c[1], c[0])
        self.out = named_conv(3, c[0], classes, 1, bias=True)

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        x = self.decoder5(x, skips[3])
        x = self.decoder4(x, skips[2])
        x = self.decoder3(x, skips[1])
        x = self.decoder2(x, skips[0])
        return self.out(self.decoder1(x, Visible()))


def check_encoder(
    channels: Sequence[int], depths: Sequence[int], kernels: Sequence[int], expansion: Sequence[int], img_size: int
) -> None:
    lists = {"channels": channels, "depths": depths, "kernels": kernels, "expansion": expansion}
    for name, given in lists.items():
        if len(given) != 5:
            raise ValueError(f"{name} is {tuple(given)}; expected five entries (the first of depths, kernels and "
                             "expansion is not used)")  # fmt: skip
    if img_size % STRIDE or img_size < STRIDE:
        raise ValueError(f"img_size is {img_size}; expected a multiple of {STRIDE}")


class Hybird(Undecayed, GradCheckpointing, nn.Module):
    """MambaMIM's segmentation network (the original's spelling): hybrid encoder, UNETR decoder.

    Arguments: ``in_chans``, ``num_classes``, ``img_size`` S (cubes of S^3, a multiple of 16), ``channels`` c0..c4,
    ``depths``, ``kernels``, ``expansion`` of the MedNeXt stages (entry 0 is not used), ``depth`` Mamba blocks.
    (batch, in_chans, S, S, S) to logits (batch, num_classes, S, S, S). Source: arXiv 2408.08070, section 3.
    """

    ends: ClassVar[dict[str, Any]] = {
        "num_classes": NewHead("decoder.out"),
        "in_chans": InputChannels("embeddings.stem.weight"),
    }

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 14,
        img_size: int = 96,
        channels: Sequence[int] = CHANNELS,
        depths: Sequence[int] = DEPTHS,
        kernels: Sequence[int] = KERNELS,
        expansion: Sequence[int] = EXPANSION,
        depth: int = 4,
    ) -> None:
        super().__init__()
        check_encoder(channels, depths, kernels, expansion, img_size)
        self.in_chans, self.num_classes, self.img_size = in_chans, num_classes, img_size
        self.embeddings = Embeddings(in_chans, channels, depths, kernels, expansion)
        self.mae = TokenMixer(channels[-1], img_size // STRIDE, depth)
        self.decoder = Decoder(channels, num_classes)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        return second_direction("mae.", len(self.mae.blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = check_input("MambaMIM", x, self.in_chans, 3, STRIDE)
        x, skips = self.embeddings(x, Visible())
        return self.decoder(self.mae(x), skips)


def second_direction(at: str, depth: int) -> tuple[str, ...]:
    """Prefixes of the parameters of the direction that nothing reads."""
    leaves = ("A_b_log", "D_b", "conv1d_b.", "x_proj_b.", "dt_proj_b.")
    return tuple(f"{at}blocks.{i}.mamba.{leaf}" for i in range(depth) for leaf in leaves)
