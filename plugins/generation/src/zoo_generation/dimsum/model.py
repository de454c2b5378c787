"""DiMSUM, "Diffusion Mamba": an image generator whose blocks scan an image twice, over tokens and over wavelets.

Phung et al., "DiMSUM: Diffusion Mamba - A Scalable and Unified Spatial-Frequency Method for Image Generation",
arXiv 2411.04168 (NeurIPS 2024). Original: VinAIResearch/DiMSUM @ 8743e63 (``dimsum/models_dim.py``), BSD 3-clause.

Differs from the original in form, not in numbers: tokens stay in row order, and the orders in which they are scanned
(columns, reversed, windows, snakes, zigzags) are an argument of the scan. Parameters keep the original's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, RMSNorm
from zoo.layers.inference import reusing_memory
from zoo.layers.linear import Linear, linear
from zoo.layers.vss import DropPath

from .blocks import BLOCKS, AttentionBlock, make_block
from .parts import LabelEmbedder, Mixer, Modulation, TimestepEmbedder, modulate, rotated

#: Scan types of the original that raise in it (and so have no numbers): an argument is given twice, or tables lack.
BROKEN_SCANS = ("sweep", "zigma", "jpeg")


class PatchEmbed(nn.Module):
    """Patches of p x p pixels to tokens: (batch, channels, R, R) to (batch, (R / p)^2, dim)."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its width is one product over the patch's numbers.
        (p, _), weight = self.proj.kernel_size, self.proj.weight
        rows = F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)
        return linear(rows, weight.flatten(1), self.proj.bias)


class FinalLayer(nn.Module):
    """Tokens (batch, N, dim) to the numbers of their patches (batch, N, out): LayerNorm, modulation, linear."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = Linear(dim, out)
        self.adaLN_modulation = Modulation(dim, dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class DiMSUM(GradCheckpointing, nn.Module):
    """The velocity of a flow from noise (t = 0) to images or latents (t = 1).

    Arguments (the original's): ``img_resolution`` R (of latents: an eighth of the image's), ``patch_size`` p,
    ``in_channels`` C, ``hidden_size`` D, ``depth`` (of block "raw": a third of the layers), ``label_dropout`` (above 0:
    a row for "no label" beside the ``num_classes``), ``learn_sigma`` (twice the channels out), ``rms_norm`` (else
    LayerNorm), ``residual_in_fp32``, ``scan_type`` "none" (rows and columns in turn, forwards and backwards) or "v2"
    (every mixer in both directions along the rows), ``pe_type`` "ape" (a table, learned if ``learnable_pe``) or
    "rope", ``block_type`` (one of "linear", "raw", "wave", "window", "combined", "combined_fourier",
    "combined_einfft"), ``cond_mamba`` (hold the projections of the condition, which do nothing: see
    :class:`~zoo_generation.dimsum.parts.Mixer`), ``scanning_continuity`` (lines back and forth), ``drop_path``,
    ``use_final_norm`` (without it the stream of residuals ends in nothing, as in the published models),
    ``use_attn_every_k_layers`` (one attention block, shared by all its places), ``use_independent_attn`` (a block for
    each place, and as many layers fewer), ``use_gated_mlp`` (of combined and attention blocks), ``ssm`` (arguments of
    :class:`zoo.layers.Mamba`). ``zero_init``: start from zero velocity, as the original; without it the last layer
    and the gates are random, for tests that follow gradients.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1024,
        depth: int = 16,
        label_dropout: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        *,
        rms_norm: bool = False,
        residual_in_fp32: bool = True,
        scan_type: str = "none",
        pe_type: str = "ape",
        block_type: str = "linear",
        cond_mamba: bool = False,
        scanning_continuity: bool = False,
        learnable_pe: bool = False,
        drop_path: float = 0.0,
        use_final_norm: bool = False,
        use_attn_every_k_layers: int = -1,
        use_gated_mlp: bool = True,
        use_independent_attn: bool = False,
        ssm: Mapping[str, Any] | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        _check(img_resolution, patch_size, hidden_size, num_classes, scan_type, pe_type, block_type)
        every = use_attn_every_k_layers
        layers, attention = _depths(depth * 3 if block_type == "raw" else depth, every, use_independent_attn)
        self.img_resolution, self.patch_size, self.in_channels = img_resolution, patch_size, in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.hidden_size, self.num_classes, self.pe_type, self.every = hidden_size, num_classes, pe_type, every
        self.residual_in_fp32, self.depth = residual_in_fp32, layers
        self.grid = img_resolution // patch_size

        def norm() -> nn.Module:
            return RMSNorm(hidden_size) if rms_norm else nn.LayerNorm(hidden_size)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, label_dropout)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=learnable_pe)
        mixers = {**(ssm or {}), "both": scan_type == "v2"}
        self.blocks = nn.ModuleList(
            make_block(
                block_type, hidden_size, i, layers, self.grid, norm, turns=scan_type == "none",
                continuity=scanning_continuity, ssm=mixers | ({"cond_dim": hidden_size} if cond_mamba else {}),
                gated_mlp=use_gated_mlp,
            )
            for i in range(layers)
        )  # fmt: skip
        # the rate at which a block's input is dropped on its way into the residual; the first has no residual yet
        self.drop_paths = nn.ModuleList(
            DropPath(drop_path * (i - 1) / max(layers - 1, 1) if i else 0.0) for i in range(layers)
        )
        self.attn_block: nn.Module | None = None
        if every > 0:
            blocks = [AttentionBlock(hidden_size, use_gated_mlp) for _ in range(attention)]
            self.attn_block = nn.ModuleList(blocks) if use_independent_attn else blocks[0]
        self.norm_f = norm() if use_final_norm else None
        self.last_drop = DropPath(drop_path)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.unused_parameters = tuple(self._unused(use_independent_attn))
        self._init_weights(zero_init)

    def _unused(self, independent: bool) -> list[str]:
        """Parameters that no output depends on."""
        found = [f"{n}.cond_proj" for n, m in self.named_modules() if isinstance(m, Mixer) and hasattr(m, "cond_proj")]
        if self.pe_type == "rope" and self.pos_embed.requires_grad:
            found.append("pos_embed")
        if independent and isinstance(self.attn_block, nn.ModuleList):
            found += [f"attn_block.{j}" for j in range(self.depth // self.every, len(self.attn_block))]
        return found

    # -- the start

    def _init_weights(self, zero: bool) -> None:
        """The original's: biases zero, normal embeddings, small outputs of mixers, gates and last layer zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for mixer in self.modules():
            if isinstance(mixer, Mixer):
                mixer.reset_scan_parameters()  # the bias of dt is one of those
                nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
                mixer.out_proj.weight.data.div_(math.sqrt(self.depth))
        self.pos_embed.data.copy_(position_table(self.hidden_size, self.grid)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
        if zero:
            last = [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1]]  # type: ignore[union-attr, index]
            for layer in (*last, self.final_layer.linear):
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    # -- the pass

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Times and labels (batch,) to the vectors that modulate every block, (batch, D). y None: no label."""
        if y is None:
            y = torch.full_like(t, self.y_embedder.null, dtype=torch.long)
        return self.t_embedder(t) + self.y_embedder(y)

    def embed(self, x: Tensor) -> Tensor:
        """(batch, C, R, R) to tokens (batch, (R / p)^2, D), with their places."""
        tokens = self.x_embedder(x)
        if self.pe_type == "rope":
            return rotated(tokens, self.grid)
        return tokens + self.pos_embed

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, found: dict[str, Tensor] | None = None) -> Tensor:
        """The velocity at x (batch, C, R, R), times t (batch,) in [0, 1], labels y (batch,): (batch, C, R, R), or twice
        the channels with ``learn_sigma``.

        y None: no label. ``found`` is given what lies between, for comparisons. Raises ValueError for other shapes.
        """
        size = (self.in_channels, self.img_resolution, self.img_resolution)
        if x.dim() != 4 or tuple(x.shape[1:]) != size:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, {', '.join(map(str, size))})")
        for name, tensor in (("t", t), ("y", y)):
            if tensor is not None and tuple(tensor.shape) != (x.shape[0],):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({x.shape[0]},), one a sample")
        with reusing_memory(x):
            c = self.condition(t, y)
            h = self._run(self.embed(x), c, found)
            return self.unpatchify(self.final_layer(h, c))

    def _run(self, h: Tensor, c: Tensor, found: dict[str, Tensor] | None) -> Tensor:
        residual: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if residual is None:
                residual = h.float() if self.residual_in_fp32 else h
            else:
                residual = residual + self.drop_paths[i](h)
            h = block(residual.to(h.dtype), c, found if i == 0 else None)
            if found is not None:
                found |= {"last_block_hidden": h} | ({"block0_hidden": h} if i == 0 else {})
            if self.attn_block is not None and (i + 1) % self.every == 0:
                many = isinstance(self.attn_block, nn.ModuleList)
                attend = self.attn_block[(i + 1) // self.every - 1] if many else self.attn_block  # type: ignore[index]
                h = attend(h, c)
                if found is not None:
                    found["attn_block_last_call"] = h
        if self.norm_f is None:
            return h  # and what the residual gathered is not used
        assert residual is not None
        return self.norm_f((residual + self.last_drop(h)).to(h.dtype))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(batch, g * g, p * p * C), channels fastest, to (batch, C, R, R)."""
        p, g = self.patch_size, self.grid
        x = x.unflatten(2, (p, p, self.out_channels)).unflatten(1, (g, g))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, g * p, g * p)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _check(size: int, patch: int, dim: int, classes: int, scan: str, positions: str, block: str) -> None:
    """Raise ValueError for what cannot be built."""
    if scan.split("_")[0] in BROKEN_SCANS:
        raise ValueError(f"scan_type is {scan!r}, with which the original raises an error; expected 'none' or 'v2'")
    for name, value, known in (
        ("scan_type", scan, ("none", "v2")),
        ("pe_type", positions, ("ape", "rope")),
        ("block_type", block, BLOCKS),
    ):
        if value not in known:
            extra = ", with which the original raises an error" if value == "cpe" else ""
            raise ValueError(f"{name} is {value!r}{extra}; expected one of {', '.join(known)}")
    if size % patch:
        raise ValueError(f"img_resolution is {size}; expected a multiple of patch_size, {patch}")
    if block not in ("linear", "raw", "combined_einfft") and (size // patch) % 4:
        raise ValueError(
            f"img_resolution {size} and patch_size {patch} make a grid of side {size // patch}; block_type {block!r} "
            "needs a multiple of 4"
        )
    if dim % 4:
        raise ValueError(f"hidden_size is {dim}; expected a multiple of 4, for sines and cosines of two coordinates")
    if classes < 1:
        raise ValueError(f"num_classes is {classes}; expected 1 or more")


def _depths(depth: int, every: int, independent: bool) -> tuple[int, int]:
    """How many layers and attention blocks there are."""
    if not independent:
        return depth, int(every > 0)
    if every < 1:
        raise ValueError(f"use_independent_attn needs use_attn_every_k_layers of 1 or more, got {every}")
    layers, blocks = depth - depth // every, depth // every - 1
    if layers // every > blocks or blocks < 0:
        raise ValueError(
            f"depth {depth} with attention every {every} layers has {layers // every} places for {max(blocks, 0)} "
            "attention blocks, at which the original raises an error; expected depth mod k < depth div k"
        )
    return layers, blocks


def position_table(dim: int, side: int) -> Tensor:
    """(side^2, dim): half the numbers for the column, half for the row, each sines, then cosines."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # of one coordinate
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return torch.cat([waves[columns], waves[rows]], dim=1).float()
