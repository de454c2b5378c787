"""Vim, "Vision Mamba": a plain (single-scale) vision backbone of bidirectional Mamba mixers.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
arXiv 2401.09417. Original: hustvl/Vim @ dd0358a, ``vim/models_mamba.py`` and its modified ``mamba_ssm``, Apache-2.0.

Differs from the original in form, not in numbers: tokens stay in row order and the backward direction is a scan with
``reverse=True`` (nothing is flipped); the parameters of the directions are stacked on a leading axis; other scan paths
than forwards and backwards can be named (``paths="hilbert + reverse(hilbert)"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from torch import Tensor, nn

from zoo.adapting import Converted
from zoo.layers import RMSNorm
from zoo_kernels import paths as scan_paths

from ._base import Indices, VisionModel, build, takes
from .vim_parts import PatchEmbed, VimBlock, VimMixer, class_slots, normalise, resample_positions, rotary_table, rotate

#: both directions of the raster order: what the original does, and what needs no index tensor
BOTH = "bidirectional"
CLS = ("middle", "head", "double", "none")
POOLS = ("mean", "last", "max", "all")


class VimTrunk(nn.Module):
    """Patches, tokens and blocks: ``depth`` blocks of width ``embed_dim`` over the patches of an image.

    Arguments (where they differ from the original's, its name in brackets): ``img_size``, ``patch_size``, ``stride``
    (default: the patch size), ``in_chans`` (channels), ``embed_dim`` D, ``depth``, ``d_state`` N, ``mixer`` "v2", "v1"
    or "none" (bimamba_type), ``paths``: the scan paths, any spec of ``zoo_kernels.paths``, ``cls_token`` "middle",
    "head", "double" or "none", ``pos_embed``, ``rope`` and ``rope_residual``, ``rope_length`` (pt_hw_seq_len),
    ``rms_norm``, ``norm_eps``, ``residual_in_fp32``, ``divide_out``, ``layer_scale``, ``paired_layers``
    (if_bidirectional: layers in pairs, the second on the reversed tokens), ``flip_ratio`` (probability of reversing
    the tokens, also in eval mode), ``ssm``: d_conv, expand, dt_rank, conv_bias and bias of the mixers,
    ``drop_rate``, ``drop_path_rate``; ``dynamic_img_size``: accept other image sizes than ``img_size`` by resampling
    the position table at every call.

    Source: hustvl/Vim @ dd0358a ``vim/models_mamba.py:VisionMamba``; arXiv 2401.09417, section 3.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int | Sequence[int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        mixer: str = "v2",
        paths: str = BOTH,
        cls_token: str = "middle",
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_length: float = 14,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        divide_out: bool = True,
        layer_scale: float | None = None,
        paired_layers: bool = False,
        flip_ratio: float = -1.0,
        ssm: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, value, known in (("mixer", mixer, ("v2", "v1", "none")), ("cls_token", cls_token, CLS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        self.in_chans, self.embed_dim, self.cls, self.paths = in_chans, embed_dim, cls_token, paths
        self.rope, self.rope_residual, self.rope_length = rope, rope_residual, rope_length
        self.paired_layers, self.flip_ratio, self.dynamic_img_size = paired_layers, flip_ratio, dynamic_img_size
        patch = to_2tuple(patch_size)
        self.patch_embed = PatchEmbed(patch, to_2tuple(patch if stride is None else stride), in_chans, embed_dim, **dd)
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.patch_embed.grid(self.img_size)
        patches = self.grid_size[0] * self.grid_size[1]
        directions = 1
        if paths != BOTH:
            orders = scan_paths.get(paths, self.grid_size)
            directions = len(orders)
            #: which paths are an earlier one walked backwards
            self.backward_paths = [
                any(torch.equal(orders[k], o.flip(0)) for o in orders[:k]) for k in range(directions)
            ]
            if mixer == "none" and directions != 1:
                raise ValueError(f"paths={paths!r} has {directions} directions; mixer='none' walks one")
        elif mixer != "none":
            directions = 2
        if paired_layers and paths != BOTH:
            raise ValueError("paired_layers walks the raster order in both directions; it takes no other paths")

        for name in self._class_tokens():
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)))
        tokens = patches + len(class_slots(cls_token, patches))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(drop_rate)

        def norm() -> nn.Module:
            return RMSNorm(embed_dim, norm_eps, **dd) if rms_norm else nn.LayerNorm(embed_dim, norm_eps, **dd)

        ssm = dict(ssm or {})
        if "d_conv" in ssm:
            ssm["conv"] = ssm.pop("d_conv")
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            VimBlock(
                VimMixer(
                    embed_dim, d_state, kind=mixer, paths=directions, divide=divide_out, layer_scale=layer_scale,
                    **ssm, **dd,
                ),
                norm(), rates[i], residual_in_fp32,
            )
            for i in range(depth)
        )  # fmt: skip
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm_f = norm()
        self._init_weights()

    def _class_tokens(self) -> list[str]:
        return {"none": [], "double": ["cls_token_head", "cls_token_tail"]}.get(self.cls, ["cls_token"])

    def _init_weights(self) -> None:
        """The original's start: lecun-normal patches, truncated-normal tokens, Mamba's own for the mixers."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
            if getattr(self, name, None) is not None:
                trunc_normal_(getattr(self, name), std=0.02)
        for block in self.layers:
            block.mixer.reset_parameters(depth=len(self.layers))

    # -- tokens

    def embed(self, image: Tensor, cls_position: int | None = None) -> tuple[Tensor, tuple[int, int], list[int]]:
        """Image (batch, in_chans, H, W) to tokens (batch, length, D), the grid, and where the class tokens are."""
        size = image.shape[-2:]
        if tuple(size) != self.img_size and not self.dynamic_img_size:
            raise ValueError(
                f"the image is {size[0]} x {size[1]}, this model was built for {self.img_size[0]} x "
                f"{self.img_size[1]}; resize the image, or build with img_size=(height, width), or with "
                "dynamic_img_size=True"
            )
        grid = self.patch_embed.grid(size)
        x = self.patch_embed(image)
        slots = class_slots(self.cls, grid[0] * grid[1])
        if cls_position is not None:
            if self.cls != "head":
                raise ValueError(f"cls_position moves the class token of cls_token='head'; this model has {self.cls!r}")
            slots = [cls_position]
        for name, slot in zip(self._class_tokens(), slots, strict=True):
            token = getattr(self, name).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :slot], token, x[:, slot:]], dim=1)
        if self.pos_embed is not None:
            x = self.pos_drop(x + resample_positions(self.pos_embed, self.grid_size, grid, self.cls))
        return x, grid, slots

    def walk(self, grid: tuple[int, int], slots: Sequence[int], device: torch.device) -> Tensor | None:
        """The rows in visiting order, (K, length); None for the raster order in both directions.

        A class token is visited at its own place: the middle one after half of the patches, on every path. A path
        that is an earlier one walked backwards meets the class tokens from the other end, as the raster order does.
        """
        if self.paths == BOTH:
            return None
        rows = []
        for order, backward in zip(scan_paths.get(self.paths, grid, device=device), self.backward_paths, strict=True):
            order = order.flip(0) if backward else order
            for slot in slots:
                order = order + (order >= slot)  # rows behind the class token move up by one
                order = torch.cat([order[:slot], torch.full_like(order[:1], slot), order[slot:]])
            rows.append(order.flip(0) if backward else order)
        return torch.stack(rows)

    # -- body

    def run(
        self, x: Tensor, grid: tuple[int, int], slots: Sequence[int], take: Sequence[int] = (), stop: int | None = None
    ) -> tuple[Tensor, Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Tokens through the blocks: the last mixer's output h, the stream r before it, and (h, r) after each of
        ``take`` (indices of blocks; of pairs with ``paired_layers``). ``stop``: leave out the blocks from there on."""
        path = self.walk(grid, slots, x.device)
        table = rotary_table(grid, self.embed_dim, self.rope_length, x.device) if self.rope else None
        flipped = self.flip_ratio > 0 and self.flip_ratio - float(torch.rand(())) > 1e-5
        h, r = (x.flip(1) if flipped else x), None
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        step = 2 if self.paired_layers else 1
        for i in range(len(self.layers) // step if stop is None else stop):
            if table is not None:
                turn = flipped and not self.paired_layers  # the original turns rows back only in the plain loop
                h = self._rotate(h, table, turn)
                if r is not None and self.rope_residual:
                    r = self._rotate(r, table, turn)
            if not self.paired_layers:
                h, r = self.layers[i](h, r, path)
            else:
                h, r = self._pair(i, h, r)
            if i in take:
                kept[i] = (h, r)
        return h, (torch.zeros_like(h) if r is None else r), kept  # None where no block ran

    def _pair(self, i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two one-way layers, the second on reversed tokens. Both return the whole stream, so r doubles (as theirs)."""
        h_f, r_f = self.layers[2 * i](h, r)
        h_b, r_b = self.layers[2 * i + 1](h.flip(1), None if r is None else r.flip(1))
        return h_f + h_b.flip(1), r_f + r_b.flip(1)

    @staticmethod
    def _rotate(x: Tensor, table: tuple[Tensor, Tensor], turn: bool) -> Tensor:
        return rotate(x.flip(1), table).flip(1) if turn else rotate(x, table)

    @staticmethod
    def to_map(tokens: Tensor, grid: tuple[int, int], slots: Sequence[int]) -> Tensor:
        """Tokens (batch, length, D) without their class tokens as a map (batch, D, rows, columns)."""
        for slot in reversed(list(slots)):
            tokens = torch.cat([tokens[:, :slot], tokens[:, slot + 1 :]], dim=1)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def position_ends(self) -> dict[str, Any]:
        """Arguments that change the position table, for the loader."""
        return dict.fromkeys(("img_size", "stride", "patch_size"), Converted("pos_embed", self._fit_positions))

    def _fit_positions(self, table: Tensor, shape: Sequence[int]) -> Tensor:
        """A checkpoint's position table for this model's grid; the checkpoint's grid is taken to be square."""
        patches = table.shape[1] - len(class_slots(self.cls, 0))
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"a position table of {patches} patches is of no square grid; resample it by hand")
        return resample_positions(table, (side, side), self.grid_size, self.cls)


class Vim(VimTrunk, VisionModel):
    """Vision Mamba, the classifier: :class:`VimTrunk` (all its arguments), a last norm, the class token and a head.

    ``num_classes``; ``pool`` where there is no class token: "mean", "last", "max" (of the logits) or "all"
    (final_pool_type). Feature maps: the residual stream after each block (mixer output included), at the stride of the
    patches, class token removed.
    """

    def __init__(self, num_classes: int = 1000, pool: str = "mean", **trunk: Any) -> None:
        super().__init__(**trunk)
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; expected one of {', '.join(POOLS)}")
        dd = {k: trunk[k] for k in ("device", "dtype") if k in trunk}
        self.num_classes, self.pool = num_classes, pool
        self.num_features = self.head_hidden_size = self.embed_dim
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        step, depth = 2 if self.paired_layers else 1, len(self.layers)
        self.feature_info = [
            {"num_chs": self.embed_dim, "reduction": self.patch_embed.stride[0], "module": f"layers.{i}"}
            for i in range(step - 1, depth - depth % step, step)
        ]

    # -- timm's habits

    def forward_features(self, x: Tensor, cls_position: int | None = None, order: Tensor | None = None) -> Tensor:
        """Images to normalised tokens (batch, length, D), in row order.

        Ablations of the original, with its randomness as arguments: ``cls_position`` puts the class token (of
        ``cls_token="head"``) there; ``order`` (length,) is a permutation in which the tokens are processed.
        """
        x, grid, slots = self.embed(x, cls_position)
        if order is not None:
            x = x[:, order]
        h, r, _ = self.run(x, grid, slots)
        out = normalise(self.norm_f, r + self.drop_path(h))
        return out if order is None else out[:, torch.argsort(order)]

    def pool_tokens(self, x: Tensor, cls_position: int | None = None) -> Tensor:
        """Tokens (batch, length, D) to features (batch, D); all tokens for ``pool`` "max" and "all"."""
        patches = x.shape[1] - len(class_slots(self.cls, 0))
        if self.cls == "double":
            return (x[:, 0] + x[:, -1]) / 2
        if self.cls != "none":
            return x[:, class_slots(self.cls, patches)[0] if cls_position is None else cls_position]
        return {"mean": lambda: x.mean(dim=1), "last": lambda: x[:, -1]}.get(self.pool, lambda: x)()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool_tokens(x)
        if pre_logits:
            return x
        x = self.head(x)
        return x.amax(dim=1) if self.pool == "max" and self.cls == "none" else x

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x, grid, slots = self.embed(x)
        stop = max(indices) + 1 if stop_early and len(indices) else None
        h, r, kept = self.run(x, grid, slots, indices, stop)
        maps = []
        for i in sorted(kept):
            stream = kept[i][0] + kept[i][1]
            stream = normalise(self.norm_f, stream) if norm and hasattr(self.norm_f, "weight") else stream
            maps.append(self.to_map(stream, grid, slots))
        return r + h, maps

    @property
    def ends(self) -> dict[str, Any]:
        return super().ends | self.position_ends()

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        step = 2 if self.paired_layers else 1
        self.layers = self.layers[: (max(take) + 1) * step]
        if prune_norm or prune_head:
            self.norm_f = nn.Identity()
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            if self.cls != "none":
                raise ValueError(f"global_pool={global_pool!r}: this model reads its class token ({self.cls})")
            if global_pool not in POOLS:
                raise ValueError(f"global_pool is {global_pool!r}; expected one of {', '.join(POOLS)}")
            self.pool = global_pool
        super().reset_classifier(num_classes)


@takes(Vim, VimTrunk)
def vim(**config: Any) -> Vim:
    """Builder of the cards: a :class:`Vim`, as a pyramid with ``features_only=True`` (four evenly spaced blocks)."""
    if config.get("features_only") and config.get("out_indices") is None:
        steps = config.get("depth", 24) // (2 if config.get("paired_layers") else 1)
        config["out_indices"] = sorted({max(steps * i // 4 - 1, 0) for i in (1, 2, 3, 4)})
    return build(Vim, **config)
