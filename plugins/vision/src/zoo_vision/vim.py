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
import torch.nn.functional as F
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from zoo.adapting import Converted
from zoo.layers import PathScan, RMSNorm
from zoo_kernels import causal_conv1d
from zoo_kernels import paths as scan_paths

from ._base import Indices, VisionModel, build

#: both directions of the raster order: what the original does, and what needs no index tensor
BOTH = "bidirectional"
CLS = ("middle", "head", "double", "none")
POOLS = ("mean", "last", "max", "all")


class VimMixer(nn.Module):
    """A Mamba-1 mixer over K scan paths that share the gate and the projections in and out.

    ``x, z = in_proj(u)``; for each path k ``y_k = scan_k(silu(conv_k(x)))``;
    ``out = out_proj(sum_k y_k * silu(z))``, the sum halved if ``divide`` (only for kind "v2").

    kind "v2": every path has its own convolution and scan parameters (the published models). "v1": one set of all but
    A, and one convolution along the first path. "none": one path. Width E = expand * dim; ``layer_scale`` starts a
    learned gain (dim). Parameters: ``conv_weight`` (S, E, conv), ``conv_bias`` (S, E), S = K for "v2", else 1.
    Source: arXiv 2401.09417, section 3.3 and algorithm 1; ``mamba_ssm/modules/mamba_simple.py`` (``bimamba_type``).
    """

    def __init__(
        self,
        dim: int,
        state: int = 16,
        conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        kind: str = "v2",
        paths: int = 2,
        divide: bool = True,
        layer_scale: float | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        sets = paths if kind == "v2" else 1
        self.kind, self.num_paths, self.divide = kind, paths, divide and kind == "v2"
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner, **dd)) if conv_bias else None
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scan = PathScan(inner, state, rank, paths, shared=kind == "v1", **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.reset_parameters()

    def reset_parameters(self, depth: int = 1) -> None:
        """The original's start in a model of ``depth`` blocks. Its backward dt bias begins at 0 (softplus: 0.69)."""
        with torch.no_grad():
            bound = self.conv_weight.shape[-1] ** -0.5
            self.conv_weight.uniform_(-bound, bound)
            if self.conv_bias is not None:
                self.conv_bias.uniform_(-bound, bound)
            if self.kind == "v2":
                self.scan.dt_bias[1:].zero_()
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight /= math.sqrt(depth)
            for layer in (self.in_proj, self.out_proj):
                if layer.bias is not None:
                    layer.bias.zero_()

    def backward_paths(self, path: Tensor | None) -> list[bool]:
        """Which paths are walked from their end: without an index tensor, the second one."""
        return [path is None and k == 1 for k in range(self.num_paths)]

    def forward(self, u: Tensor, path: Tensor | None = None) -> Tensor:
        """u: (batch, length, dim); path: None (forwards and backwards over the rows) or (K, length). Returns like u."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        backward = self.backward_paths(path)
        walked = []
        for k, weight in enumerate(self.conv_weight):
            bias = None if self.conv_bias is None else self.conv_bias[k]
            order = None if path is None else path[k]
            walked.append(causal_conv1d(x, weight, bias, activation="silu", path=order, reverse=backward[k])[0])
        x = torch.stack(walked, dim=2) if len(walked) > 1 else walked[0]  # (batch, length, K, E), or without K
        y = self.scan(x, z=z, path=path, reverse=backward)
        out = self.out_proj(y / 2 if self.divide else y)
        return out if self.gamma is None else out * self.gamma


class VimBlock(nn.Module):
    """Add, norm, mix: ``r += h; h = mixer(norm(r))``. The mixer's output is added by the next block."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, h: Tensor, r: Tensor | None, path: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h: the last mixer's output, r: the stream before it (None in the first block); (batch, length, dim) both."""
        r = h if r is None else r + self.drop_path(h)
        if self.residual_in_fp32:
            r = r.float() if r.dtype in (torch.float16, torch.bfloat16) else r
        return self.mixer(normalise(self.norm, r), path), r


def normalise(norm: nn.Module, r: Tensor) -> Tensor:
    """``norm(r)`` in float32 where the stream is, handed on in the dtype of the weights."""
    dtype = norm.weight.dtype
    return norm(r if isinstance(norm, RMSNorm) else r.to(dtype)).to(dtype)


class PatchEmbed(nn.Module):
    """Overlapping patches: one convolution of kernel ``patch`` and stride ``stride``, without padding."""

    def __init__(self, patch: tuple[int, int], stride: tuple[int, int], in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=stride, **dd)

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Number of patches (rows, columns) of an image of ``size`` (H, W)."""
        rows, columns = ((n - p) // s + 1 for n, p, s in zip(size, self.patch, self.stride, strict=True))
        return rows, columns

    def forward(self, image: Tensor) -> Tensor:
        """(batch, in_chans, H, W) to (batch, rows * columns, dim), row by row."""
        return self.proj(image).flatten(2).transpose(1, 2)


def rotary_table(grid: tuple[int, int], dim: int, pretrain: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2D rotary embedding, (rows * columns, dim): row angles in the first half, column angles after.

    Angle j (of dim / 4) is ``position * 10000^(-2j / (dim / 2))``, each for a pair of neighbours; positions of a side
    of n patches are ``0 .. n - 1`` scaled by ``pretrain / n``. Source: ``vim/rope.py`` (VisionRotaryEmbeddingFast).
    """
    half = dim // 2
    frequency = 1.0 / 10000.0 ** (torch.arange(0, half, 2, device=device, dtype=torch.float32)[: half // 2] / half)
    rows, columns = (
        (torch.arange(n, device=device, dtype=torch.float32) / n * pretrain)[:, None] * frequency for n in grid
    )
    rows, columns = rows.repeat_interleave(2, dim=-1), columns.repeat_interleave(2, dim=-1)
    angle = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1).flatten(
        0, 1
    )
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of tokens (batch, length, dim). With an odd length, token 0 is left alone (as the original)."""
    cos, sin = table
    head, body = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
    if body.shape[1] != cos.shape[0]:
        raise ValueError(
            f"rotary embedding of {x.shape[1]} tokens on {cos.shape[0]} patches: it needs an even number of patches "
            "and at most one class token"
        )
    pairs = body.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([head, body * cos.to(x.dtype) + turned * sin.to(x.dtype)], dim=1)


def resample_positions(table: Tensor, old: Sequence[int], new: Sequence[int], cls: str) -> Tensor:
    """Position table (1, tokens, dim) of the grid ``old`` for the grid ``new``: bicubic, class tokens kept in place."""
    if tuple(old) == tuple(new):
        return table
    slots = class_slots(cls, old[0] * old[1])
    tokens = table.shape[1]
    patches = [i for i in range(tokens) if i not in slots]
    image = table[:, patches].unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=tuple(new), mode="bicubic", align_corners=False)
    rows = image.flatten(2).transpose(1, 2).to(table.dtype)
    for slot, token in zip(class_slots(cls, new[0] * new[1]), slots, strict=True):
        rows = torch.cat([rows[:, :slot], table[:, token : token + 1], rows[:, slot:]], dim=1)
    return rows


def class_slots(cls: str, patches: int) -> list[int]:
    """Where the class tokens stand among the tokens of ``patches`` patches."""
    return {"middle": [patches // 2], "head": [0], "double": [0, patches + 1], "none": []}[cls]


class Vim(VisionModel):
    """Vision Mamba. ``depth`` blocks of width ``embed_dim`` over the patches of an image and its class token.

    Arguments (where they differ from the original's, its name in brackets): ``img_size``, ``patch_size``, ``stride``
    (default: the patch size), ``in_chans`` (channels), ``num_classes``, ``embed_dim`` D, ``depth``, ``d_state`` N,
    ``mixer`` "v2", "v1" or "none" (bimamba_type), ``paths``: the scan paths, any spec of ``zoo_kernels.paths``,
    ``cls_token`` "middle", "head", "double" or "none", ``pool`` without class token: "mean", "last", "max" or "all"
    (final_pool_type), ``pos_embed``, ``rope`` and ``rope_residual``, ``rope_length`` (pt_hw_seq_len), ``rms_norm``,
    ``norm_eps``, ``residual_in_fp32``, ``divide_out``, ``layer_scale``, ``paired_layers`` (if_bidirectional: layers in
    pairs, the second on the reversed tokens), ``flip_ratio`` (probability of reversing the tokens, also in eval mode),
    ``ssm``: d_conv, expand, dt_rank, conv_bias and bias of the mixers; ``dynamic_img_size``: accept other image sizes
    than ``img_size`` by resampling the position table at every call.

    Feature maps: the residual stream after each block (mixer output included), stride 16 or 8, class token removed.
    Source: hustvl/Vim @ dd0358a ``vim/models_mamba.py:VisionMamba``; arXiv 2401.09417, section 3.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int | Sequence[int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        mixer: str = "v2",
        paths: str = BOTH,
        cls_token: str = "middle",
        pool: str = "mean",
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
        for name, value, known in (
            ("mixer", mixer, ("v2", "v1", "none")),
            ("cls_token", cls_token, CLS),
            ("pool", pool, POOLS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        self.num_classes, self.in_chans, self.num_features, self.embed_dim = num_classes, in_chans, embed_dim, embed_dim
        self.head_hidden_size = embed_dim
        self.cls, self.pool, self.paths, self.drop_rate = cls_token, pool, paths, drop_rate
        self.rope, self.rope_residual, self.rope_length = rope, rope_residual, rope_length
        self.paired_layers, self.flip_ratio, self.dynamic_img_size = paired_layers, flip_ratio, dynamic_img_size
        patch = to_2tuple(patch_size)
        self.patch_embed = PatchEmbed(patch, to_2tuple(patch if stride is None else stride), in_chans, embed_dim, **dd)
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.patch_embed.grid(self.img_size)
        patches = self.grid_size[0] * self.grid_size[1]
        directions = 1 if mixer == "none" else self._directions(paths)
        if mixer == "none" and paths != BOTH:
            directions = self._directions(paths)
            if directions != 1:
                raise ValueError(f"paths={paths!r} has {directions} directions; mixer='none' walks one")
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
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = self.patch_embed.stride[0]
        step = 2 if paired_layers else 1
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"layers.{i}"}
            for i in range(step - 1, depth - depth % step, step)
        ]
        self.init_weights()

    def _class_tokens(self) -> list[str]:
        return {"none": [], "double": ["cls_token_head", "cls_token_tail"]}.get(self.cls, ["cls_token"])

    def _directions(self, spec: str) -> int:
        return 2 if spec == BOTH else scan_paths.get(spec, self.grid_size).shape[0]

    def init_weights(self) -> None:
        """The original's start: lecun-normal patches, truncated-normal tokens and head, Mamba's own for the mixers."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
            if getattr(self, name, None) is not None:
                trunc_normal_(getattr(self, name), std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
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

        A class token is visited at its own place: the middle one after half of the patches, on every path.
        """
        if self.paths == BOTH:
            return None
        order = scan_paths.get(self.paths, grid, device=device)
        for slot in slots:
            order = order + (order >= slot)  # rows behind the class token move up by one
            own = torch.full_like(order[:, :1], slot)
            order = torch.cat([order[:, :slot], own, order[:, slot:]], dim=1)
        return order

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
                h, r = self._block(i, h, r, path)
            else:
                h, r = self._pair(i, h, r)
            if i in take:
                kept[i] = (h, r)
        return h, r, kept

    def _block(self, i: int, h: Tensor, r: Tensor | None, path: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.layers[i], h, r, path)
        return self.layers[i](h, r, path)

    def _pair(self, i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two one-way layers, the second on reversed tokens. Both return the whole stream, so r doubles (as theirs)."""
        h_f, r_f = self._block(2 * i, h, r)
        h_b, r_b = self._block(2 * i + 1, h.flip(1), None if r is None else r.flip(1))
        return h_f + h_b.flip(1), r_f + r_b.flip(1)

    @staticmethod
    def _rotate(x: Tensor, table: tuple[Tensor, Tensor], turn: bool) -> Tensor:
        return rotate(x.flip(1), table).flip(1) if turn else rotate(x, table)

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

    @staticmethod
    def to_map(tokens: Tensor, grid: tuple[int, int], slots: Sequence[int]) -> Tensor:
        """Tokens (batch, length, D) without their class tokens as a map (batch, D, rows, columns)."""
        for slot in reversed(list(slots)):
            tokens = torch.cat([tokens[:, :slot], tokens[:, slot + 1 :]], dim=1)
        return tokens.transpose(1, 2).unflatten(2, grid)

    @property
    def ends(self) -> dict[str, Any]:
        fit = Converted("pos_embed", self._fit_positions)
        return super().ends | {"img_size": fit, "stride": fit, "patch_size": fit}

    def _fit_positions(self, table: Tensor, shape: Sequence[int]) -> Tensor:
        """A checkpoint's position table for this model's grid; the checkpoint's grid is taken to be square."""
        patches = table.shape[1] - len(class_slots(self.cls, 0))
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"a position table of {patches} patches is of no square grid; resample it by hand")
        return resample_positions(table, (side, side), self.grid_size, self.cls)

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


def vim(**config: Any) -> Vim:
    """Builder of the cards: a :class:`Vim`, as a pyramid with ``features_only=True`` (four evenly spaced blocks)."""
    if config.get("features_only") and config.get("out_indices") is None:
        steps = config.get("depth", 24) // (2 if config.get("paired_layers") else 1)
        config["out_indices"] = sorted({max(steps * i // 4 - 1, 0) for i in (1, 2, 3, 4)})
    return build(Vim, **config)
