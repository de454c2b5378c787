"""Vim for dense prediction: the segmentation and the detection backbone of the original, and ViTDet's pyramid.

Original: hustvl/Vim @ dd0358a, ``seg/backbone/vim.py:VisionMambaSeg`` and
``det/detectron2/modeling/backbone/vim.py:VisionMambaDet``, Apache-2.0. Their heads (UPerNet of mmsegmentation, Cascade
Mask R-CNN of detectron2) are those libraries' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models._features import FeatureInfo
from torch import Tensor, nn

from ._base import TrainingHabits, takes
from .vim import VimTrunk
from .vim_parts import normalise

LAST = ("none", "add", "add & norm")


class _Dense(TrainingHabits, VimTrunk):
    """What both backbones share: no class token and no classifier."""

    def __init__(self, **trunk: Any) -> None:
        if trunk.setdefault("cls_token", "none") != "none":
            raise ValueError(f"cls_token is {trunk['cls_token']!r}; the dense backbones have none")
        super().__init__(**trunk)
        self.num_features = self.embed_dim

    @property
    def ends(self) -> dict[str, Any]:
        return {"in_chans": super().ends["in_chans"]} | self.position_ends()


class VimSeg(_Dense):
    """Four maps for UPerNet: the raw mixer outputs h of the blocks ``out_indices``, each through a resize branch.

    Arguments beside :class:`~zoo_vision.vim.VimTrunk`'s (there is no class token): ``out_indices``; ``fpn``: resize the
    features to strides 4, 8, 16, 32 (patch size 16; a single feature goes through all four branches), else leave them;
    ``residual_features``: the streams returned by the blocks i with i - 1 in ``out_indices``, and after the loop the
    final stream if ``out_indices`` ends at the last block, put together as ``last_layer`` says: "none" h, "add" h + r,
    "add & norm" the normalised sum. Batch norms are ordinary ones; convert them for training on several devices
    (``nn.SyncBatchNorm.convert_sync_batchnorm``; the keys are the same).
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        fpn: bool = True,
        residual_features: bool = False,
        last_layer: str = "none",
        **config: Any,
    ) -> None:
        if last_layer not in LAST:
            raise ValueError(f"last_layer is {last_layer!r}; expected one of {', '.join(LAST)}")
        super().__init__(**config)
        dd = {k: config[k] for k in ("device", "dtype") if k in config}
        self.taps, self.fpn, self.last_layer = list(out_indices), fpn, last_layer
        self.residual_features = residual_features
        depth = len(self.layers)
        if not self.taps or min(self.taps) < 0 or max(self.taps) >= depth:
            raise ValueError(f"out_indices is {self.taps}; expected blocks between 0 and {depth - 1}")
        width, patch = self.embed_dim, self.patch_embed.patch[0]
        scales = [4.0, 2.0, 1.0, 0.5]
        if fpn and patch == 16:
            self.fpn1 = nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, 2, **dd),
                nn.BatchNorm2d(width, **dd),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, 2, **dd),
            )
            self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2, **dd))
            self.fpn3 = nn.Identity()
            self.fpn4 = nn.MaxPool2d(2, 2)
        elif fpn and patch == 8:
            scales = [2.0, 1.0, 0.5, 0.25]
            self.fpn1 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2, **dd))
            self.fpn2 = nn.Identity()
            self.fpn3 = nn.Sequential(nn.MaxPool2d(2, 2))
            self.fpn4 = nn.Sequential(nn.MaxPool2d(4, 4))
        elif fpn:
            raise ValueError(f"fpn=True has resize branches for patch sizes 16 and 8, not {patch}; use fpn=False")
        stride = self.patch_embed.stride[0]
        info = [
            {"num_chs": width, "reduction": int(stride / scale) if fpn else stride, "module": f"fpn{i + 1}"}
            for i, scale in enumerate(scales)
        ]
        self.feature_info = FeatureInfo(info, out_indices=tuple(range(4)))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (batch, in_chans, H, W) to the maps (batch, D, h, w)."""
        x, grid, slots = self.embed(x)
        depth = len(self.layers)
        h, r, kept = self.run(x, grid, slots, range(depth))
        features: list[Tensor] = []
        if not self.paired_layers:
            if self.residual_features:
                features = [kept[i][1] for i in range(depth) if i - 1 in self.taps]
            else:
                features = [kept[i][0] for i in range(depth) if i in self.taps]
        if self.residual_features and self.taps[-1] == depth - 1:
            features.append(self.join(h, r))
        maps = [self.to_map(f, grid, slots) for f in features]
        if not self.fpn:
            return maps
        if len(maps) > 4:
            raise ValueError(f"{len(maps)} features for four resize branches; choose at most four out_indices")
        branches = [self.fpn1, self.fpn2, self.fpn3, self.fpn4]
        maps = maps * 4 if len(maps) == 1 else maps
        return [branch(m.contiguous()) for branch, m in zip(branches, maps, strict=False)]

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Names (or their beginnings) of parameters that this choice of features leaves without gradient."""
        depth, joined = len(self.layers), self.residual_features and self.taps[-1] == len(self.layers) - 1
        unused = [] if joined and self.last_layer == "add & norm" else ["norm_f."]
        last = depth if joined else min(max(self.taps) + (2 if self.residual_features else 1), depth)
        unused += [f"layers.{i}." for i in range(last, depth)]
        if self.residual_features and not joined:  # the stream that a block returns does not hold its own mixing
            unused += [f"layers.{last - 1}."]
        maps = sum(1 for i in range(depth) if i - self.residual_features in self.taps) + joined
        return tuple(unused + [f"fpn{i + 1}." for i in range(maps, 4) if maps > 1 and i < 2 and self.fpn])

    def join(self, h: Tensor, r: Tensor) -> Tensor:
        """The final stream as ``last_layer`` says."""
        if self.last_layer == "none":
            return h
        return h + r if self.last_layer == "add" else normalise(self.norm_f, h + r)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.forward_features(x)


class VimDet(_Dense):
    """One map for a detector: the last block's h ("none") or h + r ("add", as published), (batch, D, rows, columns)."""

    def __init__(self, *, last_layer: str = "none", **config: Any) -> None:
        if last_layer not in ("none", "add"):
            raise ValueError(f"last_layer is {last_layer!r}; expected 'none' or 'add' (this backbone has no last norm)")
        super().__init__(**config)
        self.last_layer = last_layer
        #: what the original calls the map (out_feature)
        self.out_feature = "last_feat"
        self.norm_f = nn.Identity()
        info = [{"num_chs": self.embed_dim, "reduction": self.patch_embed.stride[0], "module": "last_feat"}]
        self.feature_info = FeatureInfo(info, out_indices=(0,))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, H, W) to the map (batch, D, h, w)."""
        x, grid, slots = self.embed(x)
        h, r, _ = self.run(x, grid, slots)
        return self.to_map(h + r if self.last_layer == "add" else h, grid, slots)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.forward_features(x)]


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid on one map: scales 4, 2, 1 and 1/2, then a 1x1 and a 3x3 convolution with LayerNorm each.

    ``in_chans`` D, ``out_chans`` (256), ``scales``; keys as detectron2's (``simfp_2.0.weight``, strides 4 to 32).
    Input (batch, D, h, w) of stride 16. Returns one map a scale, largest first, and with ``top_block`` one more of half
    the last one's size. Source: Li et al., arXiv 2203.16527, figure 2; detectron2 ``modeling/backbone/vit.py``.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int = 256,
        scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        stride: int = 16,
        top_block: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.top_block = [], top_block
        for scale in scales:
            width = in_chans
            if scale == 4.0:
                layers: list[nn.Module] = [
                    nn.ConvTranspose2d(width, width // 2, 2, 2),
                    LayerNorm2d(width // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
                ]
                width //= 4
            elif scale == 2.0:
                layers = [nn.ConvTranspose2d(width, width // 2, 2, 2)]
                width //= 2
            elif scale == 1.0:
                layers = []
            elif scale == 0.5:
                layers = [nn.MaxPool2d(2, 2)]
            else:
                raise ValueError(f"scale is {scale}; expected 4, 2, 1 or 0.5")
            layers.append(_ConvNorm(width, out_chans, 1))
            layers.append(_ConvNorm(out_chans, out_chans, 3))
            name = f"simfp_{int(stride / scale).bit_length() - 1}"
            self.add_module(name, nn.Sequential(*layers))
            self.names.append(name)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.get_submodule(name)(x) for name in self.names]
        if self.top_block:
            maps.append(torch.nn.functional.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps


class _ConvNorm(nn.Conv2d):
    """A convolution without bias and its LayerNorm, one module with the norm's keys below the convolution's."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int) -> None:
        super().__init__(in_chans, out_chans, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@takes(VimSeg, VimTrunk)
def vim_seg(**config: Any) -> VimSeg:
    """Builder of the cards of the segmentation backbones."""
    _always_maps(config)
    return VimSeg(**config)


@takes(VimDet, VimTrunk)
def vim_det(**config: Any) -> VimDet:
    """Builder of the cards of the detection backbones."""
    _always_maps(config)
    return VimDet(**config)


def _always_maps(config: dict[str, Any]) -> None:
    """These backbones give maps whether or not ``features_only`` says so."""
    config.pop("features_only", None)
