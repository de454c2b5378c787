"""DiMSUM's blocks: one Mamba over the tokens ("linear", "raw", "window"), over wavelets ("wave"), or over both with
attention between them ("combined" and its two ablations); and the attention block that stands between blocks.

Order of reading: scan orders, a Scan and its forms over a transform, the blocks, which block stands where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo_kernels import paths

from .parts import (
    Attention,
    BlockDCT,
    CrossAttentionFusion,
    EinFFT,
    GatedMlp,
    HaarPackets,
    HaarTokens,
    Mixer,
    Mlp,
    Modulation,
    gated,
    grid_side,
    modulate,
)

BLOCKS = ("linear", "raw", "wave", "window", "combined", "combined_fourier", "combined_einfft")
#: Heads of the attention block, whatever the width: the original writes the number.
ATTENTION_HEADS = 16
WINDOW = 4  #: the side, in tokens, of the windows of block "window"
Found = dict[str, Tensor] | None

# -- in which order tokens are scanned ---------------------------------------------------------------------------------


def alternating(size: tuple[int, ...], *orders: Callable[..., np.ndarray]) -> np.ndarray:
    """An order (default raster) with every odd run of ``size[-1]`` steps walked back: DiMSUM's "continuity"."""
    walks = np.concatenate([order(size) for order in orders]) if orders else np.arange(math.prod(size))[None]
    rows = walks.reshape(len(walks), -1, size[-1]).copy()
    rows[:, 1::2] = rows[:, 1::2, ::-1]
    return rows.reshape(len(walks), -1)


paths.register("alternating", alternating)


def lines(columns: bool, continuity: bool) -> str | None:
    """Rows or columns, one after the other or back and forth; None: the order in which tokens lie."""
    if continuity:
        return "transpose(snake)" if columns else "snake"
    return "column" if columns else None


def windows(side: int, columns: bool, continuity: bool = False) -> str:
    """Windows of ``side`` tokens, windows and their insides by rows or by columns."""
    name = f"local(w={side}, column_first={'true' if columns else 'false'})"
    return f"alternating({name})" if continuity else name


def walk(order: str | None, x: Tensor) -> Tensor | None:
    """The visiting order of tokens x (batch, g * g, ...) that ``order`` names, (g * g,)."""
    if order is None:
        return None
    side = grid_side(x.shape[1])
    return paths.get(order, (side, side), device=x.device)[0]


def zigzags(layers: int, side: int) -> tuple[Tensor, Tensor]:
    """JPEG's zigzag beginning to the right and downwards in turn, twice as often as there are layers (the original's
    number), and what undoes each: (2 * layers, side * side) int64 twice."""
    tables = paths.get("jpeg_zigzag", (side, side))[:2]
    return tables.repeat(layers, 1), paths.inverse(tables).repeat(layers, 1)


# -- a scan ------------------------------------------------------------------------------------------------------------


class Scan(nn.Module):
    """``u + gate * mixer(modulate(u))`` with the tokens walked in the order of that name, ``reverse`` from its end.

    (batch, tokens, dim) and the condition (batch, cond_dim) to (batch, tokens, dim).
    Source: ``DiMBlockRaw`` inside a combined block.
    """

    def __init__(
        self, dim: int, cond_dim: int, ssm: Mapping[str, Any], order: str | None, reverse: bool = False
    ) -> None:
        super().__init__()
        self.order, self.reverse = order, reverse
        self.mixer = Mixer(dim, **ssm)
        self.adaLN_modulation = Modulation(cond_dim, dim, 3)

    def path(self, u: Tensor) -> Tensor | None:
        return walk(self.order, u)

    def forward(self, u: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)
        return gated(u, gate, self.mixer(modulate(u, shift, scale), path=self.path(u), reverse=self.reverse))


class WaveletScan(Scan):
    """:class:`Scan` over the Haar packets of the tokens. Source: ``WaveDiMBlock`` without its feed-forward part."""

    def __init__(self, dim: int, cond_dim: int, ssm: Mapping[str, Any], order: str | None) -> None:
        super().__init__(dim, cond_dim, ssm, order)
        self.dwt, self.idwt = HaarPackets(), HaarTokens()

    def forward(self, u: Tensor, c: Tensor) -> Tensor:
        return self.idwt(super().forward(self.dwt(u), c))


class CosineScan(Scan):
    """:class:`Scan` over blockwise cosine transforms, in one of the zigzags that the original keeps in its mixer.

    ``zigzag_paths`` and ``zigzag_paths_reverse`` (2 * layers, tokens): layer i walks row i, and what comes out is put
    back by row i of the second. Source: ``DCTBlock`` without its feed-forward part.
    """

    def __init__(
        self, dim: int, cond_dim: int, ssm: Mapping[str, Any], continuity: bool, layer: int, layers: int, side: int
    ) -> None:
        one_way = {k: v for k, v in ssm.items() if k != "both"}
        super().__init__(dim, cond_dim, {**one_way, "cond_dim": cond_dim}, lines(False, continuity))
        self.layer = layer
        for name, table in zip(("zigzag_paths", "zigzag_paths_reverse"), zigzags(layers, side), strict=True):
            self.mixer.register_buffer(name, table.to(self.mixer.A_log.device))
        self.dct_conv, self.idct_conv = BlockDCT(dim), nn.Sequential(BlockDCT(dim, inverse=True))

    def path(self, u: Tensor) -> Tensor | None:
        zigzag: Tensor = self.mixer.zigzag_paths[self.layer]  # type: ignore[index, assignment]
        order = walk(self.order, u)
        return zigzag if order is None else order[zigzag]

    def forward(self, u: Tensor, c: Tensor) -> Tensor:
        return self.idct_conv(super().forward(self.dct_conv(u), c))


# -- blocks: (the normed-to-be residual, the condition) to the next hidden states --------------------------------------


class RawBlock(Recomputed, Scan):
    """``h + gate * mixer(modulate(h))`` with h = norm(residual). Source: ``DiMBlockRaw``."""

    def __init__(self, dim: int, norm: Callable[[], nn.Module], ssm: Mapping[str, Any], order: str | None,
                 reverse: bool) -> None:  # fmt: skip
        super().__init__(dim, dim, ssm, order, reverse)
        self.norm = norm()

    def forward(self, residual: Tensor, c: Tensor, found: Found = None) -> Tensor:
        return super().forward(self.norm(residual), c)


class MlpBlock(Recomputed):
    """A mixer step and a feed-forward step, both modulated and gated: blocks "linear", "window" and, with ``wavelet``,
    "wave", which takes both steps on Haar packets. Source: ``DiMBlock``, ``DiMBlockWindow``, ``WaveDiMBlock``."""

    def __init__(self, dim: int, norm: Callable[[], nn.Module], ssm: Mapping[str, Any], order: str | None,
                 reverse: bool, wavelet: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.order, self.reverse, self.wavelet = order, reverse, wavelet
        self.norm, self.norm_2 = norm(), norm()
        self.mixer = Mixer(dim, **ssm)
        self.adaLN_modulation = Modulation(dim, dim, 6)
        self.mlp = GatedMlp(dim)
        if wavelet:
            self.dwt, self.idwt = HaarPackets(), HaarTokens()

    def forward(self, residual: Tensor, c: Tensor, found: Found = None) -> Tensor:
        h = self.norm(residual)
        if self.wavelet:
            h = self.dwt(h)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        mixed = self.mixer(modulate(h, shift, scale), path=walk(self.order, h), reverse=self.reverse)
        h = gated(h, gate, mixed)
        h = gated(h, gate_mlp, self.mlp(modulate(self.norm_2(h), shift_mlp, scale_mlp)))
        return self.idwt(h) if self.wavelet else h


class CombinedBlock(Recomputed):
    """Half of the channels through a scan of the tokens, half through one of frequencies, fused by attention, then a
    feed-forward step. ``freq_mamba``: :class:`WaveletScan`, :class:`CosineScan` or EinFFT (no condition).

    Source: arXiv 2411.04168, figure 2; ``DiMBlockCombined``, ``DiMBlockCombinedFourier``, ``DiMBlockCombinedEinFFT``.
    """

    def __init__(self, dim: int, norm: Callable[[], nn.Module], spatial: Scan, freq: nn.Module,
                 gated_mlp: bool) -> None:  # fmt: skip
        super().__init__()
        self.norm, self.norm_2 = norm(), norm()
        self.spatial_mamba, self.freq_mamba = spatial, freq
        self.proj = CrossAttentionFusion(dim)
        self.adaLN_modulation = Modulation(dim, dim, 3)
        self.mlp = GatedMlp(dim) if gated_mlp else Mlp(dim)

    def forward(self, residual: Tensor, c: Tensor, found: Found = None) -> Tensor:
        h = self.norm(residual)
        x1, x2 = h.chunk(2, dim=2)
        x1 = self.spatial_mamba(x1, c)
        x2 = self.freq_mamba(x2, c) if isinstance(self.freq_mamba, Scan) else self.freq_mamba(x2)
        if found is not None:
            found |= {"block0_spatial": x1, "block0_freq": x2}
        h = h + self.proj(x1, x2)  # to the normed states, not to the residual
        shift, scale, gate = self.adaLN_modulation(c)
        return gated(h, gate, self.mlp(modulate(self.norm_2(h), shift, scale)))


class AttentionBlock(Recomputed):
    """A DiT block: attention and a feed-forward step, both modulated and gated; LayerNorm without parameters.

    (batch, tokens, dim) and the condition (batch, dim) to (batch, tokens, dim). Source: Peebles and Xie, "Scalable
    Diffusion Models with Transformers", arXiv 2212.09748; here ``DiTBlock``.
    """

    def __init__(self, dim: int, gated_mlp: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, ATTENTION_HEADS)
        self.mlp = GatedMlp(dim) if gated_mlp else Mlp(dim)
        self.adaLN_modulation = Modulation(dim, dim, 6)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = gated(x, gate, self.attn(modulate(self._norm(x), shift, scale)))
        return gated(x, gate_mlp, self.mlp(modulate(self._norm(x), shift_mlp, scale_mlp)))


# -- which block stands where ------------------------------------------------------------------------------------------


def make_block(
    kind: str,
    dim: int,
    layer: int,
    layers: int,
    side: int,
    norm: Callable[[], nn.Module],
    *,
    turns: bool,
    continuity: bool,
    ssm: Mapping[str, Any],
    gated_mlp: bool,
) -> nn.Module:
    """Block number ``layer`` of ``layers``, on a grid of ``side``.

    ``turns``: four layers walk rows, rows from the end, columns, columns from the end; else all walk rows.
    ``continuity``: lines back and forth.
    """
    reverse, columns = turns and layer % 2 > 0, turns and layer % 4 >= 2
    order = lines(columns, continuity)
    if kind == "raw":
        return RawBlock(dim, norm, ssm, order, reverse)
    if kind in ("linear", "wave"):
        return MlpBlock(dim, norm, ssm, order, reverse, wavelet=kind == "wave")
    if kind == "window":
        return MlpBlock(dim, norm, ssm, windows(WINDOW, columns=reverse), False)
    half = dim // 2
    freq: nn.Module
    if kind == "combined":
        freq = WaveletScan(half, dim, ssm, windows(side // 4, columns=reverse, continuity=continuity))
    elif kind == "combined_fourier":
        freq = CosineScan(half, dim, ssm, continuity, layer, layers, side)
    else:
        freq = EinFFT(half)
    return CombinedBlock(dim, norm, Scan(half, dim, ssm, order, reverse), freq, gated_mlp)
