"""A2Mamba: a hierarchical backbone whose mixer lets attention maps gather the hidden states of a scan (MASS).

Paper: Lou, Fu and Yu, "A2Mamba: Attention-augmented State Space Models for Visual Recognition", arXiv 2507.16624.
Original: LMMMEng/A2Mamba ``models/a2mamba.py``. Differences in form, not in numbers: neighbourhood attention is
``zoo.layers.neighborhood`` instead of the compiled NATTEN, the state-only scan is the ordinary one with C = 1, and the
bias table that both dilations share is one parameter (the original lists it twice in its state dict).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, to_2tuple, trunc_normal_
from torch import Tensor, nn

from zoo.adapting import Converted
from zoo.layers import Recomputed
from zoo.layers.init import inverse_softplus_log_uniform
from zoo.layers.linear import linear
from zoo.layers.neighborhood import (
    neighborhood_attention,
    neighborhood_gather,
    neighborhood_plan,
    neighborhood_replan,
)
from zoo_kernels import selective_scan

from ._base import Indices, VisionModel, build

STAGES = 4
#: one number, or one for rows and one for columns
PerAxis = int | tuple[int, int]


def rope_angles(head_dim: int) -> Tensor:
    """The d/2 base angles: 10000^-linspace(0, 1, d/4), each twice (the last is exactly 1/10000). float32."""
    if head_dim % 4:
        raise ValueError(f"the heads have {head_dim} channels; rotary positions on two axes need a multiple of 4")
    theta = 1.0 / 10000 ** torch.linspace(0, 1, head_dim // 4)
    return theta.repeat_interleave(2)


class Rope(nn.Module):
    """Rotary positions on two axes: the first half of a head turns with the row, the second with the column."""

    angle: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("angle", rope_angles(head_dim), persistent=False)

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """sin and cos, each (height * width, head_dim)."""
        rows = torch.arange(height, device=self.angle.device)[:, None] * self.angle
        columns = torch.arange(width, device=self.angle.device)[:, None] * self.angle
        both = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(
            0, 1
        )
        return both.sin(), both.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x (..., d) turned: neighbours (a, b) become (a cos - b sin, b cos + a sin)."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class A2SSM(nn.Module):
    """A one-direction scan whose hidden states are gathered over the image by given attention maps.

    ``u = silu(conv5x5 x)``, ``s_t = exp(dt A) s_{t-1} + dt B u`` with one state a channel, the map of states gathered
    head by head (``gather``) and mixed over heads, then ``out = s' C + D u``. Parameters: ``x_proj`` (R + 2, C),
    ``dt_proj`` (C, R), ``dt_bias`` (C), ``A_log`` (C, 1), ``D`` (C). Source: arXiv 2507.16624, section 3.2.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dt_rank = heads, math.ceil(dim / 16)
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.x_proj = nn.Parameter(torch.empty(self.dt_rank + 2, dim))
        self.dt_proj = nn.Parameter(torch.empty(dim, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(dim))
        self.A_log = nn.Parameter(torch.zeros(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.state_fusion = nn.Conv2d(heads, heads, 1)
        with torch.no_grad():
            self.x_proj.uniform_(-(dim**-0.5), dim**-0.5)
            self.dt_proj.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_bias.copy_(inverse_softplus_log_uniform(self.dt_bias, 1e-3, 0.1))

    def forward(self, x: Tensor, gather) -> Tensor:
        """x: (batch, C, H, W); ``gather``: (batch, heads, H*W, d) to the same. Returns like x."""
        u = F.silu(self.conv(x)).flatten(2).transpose(1, 2)  # (batch, H*W, C)
        dt_r, B, C = linear(u, self.x_proj).split([self.dt_rank, 1, 1], dim=-1)
        A = -torch.exp(self.A_log.float())
        s, _ = selective_scan(
            u, dt_r, A, B, torch.ones_like(C), dt_bias=self.dt_bias, dt_proj=self.dt_proj, dt_softplus=True
        )
        s = gather(s.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        s = self.state_fusion(s).transpose(1, 2).flatten(2)  # a 1x1 convolution whose channels are the heads
        return (s * C + u * self.D.to(u.dtype)).transpose(1, 2).reshape(x.shape)


class MASS(nn.Module):
    """Multi-scale attention-augmented state space mixer.

    Half of the heads attend their neighbourhood, the other half a dilated one whose values add the first half's
    result. The local stages then scan that result and gather the states with the same two maps (:class:`A2SSM`); the
    last stage (``table`` given) attends globally instead. ``proj(norm(y) + lepe(v)) * gate``.

    Arguments: ``dim`` C, ``heads`` n (even), ``window`` K (odd) and ``dilation`` of the first half (its states are
    gathered without dilation), each one number or one an axis; ``bias``: relative position bias; ``table``: (H, W) of
    the global bias table.
    Source: arXiv 2507.16624, section 3.2; ``models/a2mamba.py`` ``Attention``.
    """

    def __init__(
        self, dim: int, heads: int, window: PerAxis, dilation: PerAxis = 1, *, bias: bool = True,
        local: bool = True, table: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads % 2 or dim % heads:
            raise ValueError(f"{heads} heads for {dim} channels; expected an even number that divides the channels")
        self.window, self.dilation = to_2tuple(window), to_2tuple(dilation)
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.SiLU())
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.ssm = A2SSM(dim, heads) if local else None
        #: (heads / 2, 2 Kh - 1, 2 Kw - 1), shared by both dilations
        self.rpb = nn.Parameter(torch.zeros(heads // 2, *(2 * k - 1 for k in self.window))) if bias else None
        #: (1, heads, H*W, H*W), the last stage's
        self.rpb_global = None
        if bias and not local and table is not None:
            self.rpb_global = nn.Parameter(torch.zeros(1, heads, table[0] * table[1], table[0] * table[1]))
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.proj = nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """x: (batch, C, H, W), both sides at least the window; sin, cos: from :class:`Rope`."""
        H, W = x.shape[2:]
        qkv = self.qkv(x)
        v = qkv.chunk(3, dim=1)[2]
        q, k, values = qkv.flatten(2).transpose(1, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, sin, cos) * self.scale, rotate(k, sin, cos)  # (batch, heads, H*W, d)
        wide = tuple(max(1, min(s // k, k)) for s, k in zip((H, W), self.window, strict=True))
        near, far = (
            neighborhood_plan((H, W), self.window, r, device=x.device) for r in (self.dilation, (wide[0], wide[1]))
        )
        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=1) for t in (q, k, values))
        map1 = neighborhood_attention(q1, k1, near, self.rpb)
        y1 = neighborhood_gather(map1, v1, near)
        map2 = neighborhood_attention(q2, k2, far, self.rpb)
        y2 = neighborhood_gather(map2, y1 + v2, far)
        y = torch.cat([y1, y2], dim=1)  # (batch, heads, H*W, d)
        if self.ssm is not None:
            if self.dilation != (1, 1):  # the original gathers the first half's states without dilation
                plain = neighborhood_plan((H, W), self.window, 1, device=x.device)
                map1, near = neighborhood_replan(map1, (H, W), near, plain), plain

            def gather(states: Tensor) -> Tensor:
                s1, s2 = states.chunk(2, dim=1)
                return torch.cat([neighborhood_gather(map1, s1, near), neighborhood_gather(map2, s2, far)], dim=1)

            y = self.ssm(to_image(y, H, W), gather)
        else:
            bias = self._global_bias(H * W)
            y = F.scaled_dot_product_attention(q, k, y, attn_mask=bias, scale=1.0)
            y = to_image(y, H, W)
        return self.proj((self.norm(y) + self.lepe(v)) * self.gate(x))

    def _global_bias(self, tokens: int) -> Tensor | None:
        """The table, resampled as an image where the map has another number of positions (as the original does)."""
        if self.rpb_global is None or self.rpb_global.shape[-1] == tokens:
            return self.rpb_global
        return resize_pairs(self.rpb_global, (1, 1, tokens, tokens))


def resize_pairs(table: Tensor, shape: Sequence[int]) -> Tensor:
    """A table over pairs of positions (1, heads, n, n) for the pairs ``shape[2:]``: resampled as an image, bicubic."""
    return F.interpolate(table, size=tuple(shape[2:]), mode="bicubic", align_corners=False)


def to_image(y: Tensor, height: int, width: int) -> Tensor:
    """(batch, heads, H*W, d) to (batch, heads * d, H, W), channels last in memory."""
    return y.transpose(1, 2).flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FFN(nn.Module):
    """1x1 convolution, GELU, plus its own depthwise 3x3, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Scale(nn.Module):
    """A learned gain and shift for each channel of (batch, C, H, W)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


#: norms of a block's two branches: over the channels of each place, or over a whole image
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda dim: LayerNorm2d(dim, eps=1e-6),
    "group": lambda dim: nn.GroupNorm(1, dim, eps=1e-6),
}


class Block(Recomputed):
    """``x += cpe1 x; x += mixer(norm1 x); x += cpe2 x; x += mlp(norm2 x)``, the branches scaled or the shortcuts.

    ``scale``: ``None``, ``"layer"`` (the branch is scaled) or ``"res"`` (the shortcut is). ``norm``: see :data:`NORMS`.
    """

    def __init__(
        self, dim: int, mixer: MASS, hidden: int, *, drop_path: float = 0.0, scale: str | None = None,
        init: float = 1.0, norm: str = "layer",
    ) -> None:  # fmt: skip
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = NORMS[norm](dim)
        self.mixer = mixer
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = NORMS[norm](dim)
        self.mlp = FFN(dim, hidden)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scale = scale
        if scale is not None:
            self.scale1, self.scale2 = Scale(dim, init), Scale(dim, init)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        y = self.mixer(self.norm1(x), sin, cos)
        x = self._add(x, y, "scale1")
        x = x + self.cpe2(x)
        return self._add(x, self.mlp(self.norm2(x)), "scale2")

    def _add(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        if self.scale == "layer":
            y = getattr(self, name)(y)
        elif self.scale == "res":
            x = getattr(self, name)(x)
        return x + self.drop_path(y)


class Stage(nn.Module):
    """Blocks at one resolution; they share the rotary tables."""

    def __init__(self, head_dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rope = Rope(head_dim)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        sin, cos = self.rope(*x.shape[2:])
        for block in self.blocks:
            x = block(x, sin, cos)
        return x


def _downsample(dim: int, out: int, stride: int = 2) -> list[nn.Module]:
    return [nn.Conv2d(dim, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out)]


class A2Mamba(VisionModel):
    """A2Mamba: stem (stride 4), four stages of :class:`Block`, 1x1 convolution to ``projection``, pool, linear.

    Arguments: ``dims``, ``depths``, ``heads``, ``windows`` (odd), ``dilations``, ``mlp_ratios``, ``scales`` (None,
    "layer" or "res") and ``scale_init``: one for each stage; windows and dilations may be pairs, one number an axis.
    There may be fewer stages than four; the fourth is the one that attends globally. ``norm`` of the blocks: "layer"
    or "group". ``bias``: relative position bias. ``img_size``: sizes the global table of the fourth stage; other sizes
    resample it. Input (batch, in_chans, H, W) whose maps (H/4, H/8, H/16, H/32) are at least as large as the windows.
    Source: arXiv 2507.16624, section 3.
    """

    first_conv = "patch_embed.0"

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        windows: Sequence[PerAxis] = (7, 7, 7, 7),
        dilations: Sequence[PerAxis] = (1, 1, 1, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        scales: Sequence[str | None] = (None, None, None, None),
        scale_init: Sequence[float] = (1, 1, 1, 1),
        *,
        norm: str = "layer",
        bias: bool = True,
        projection: int = 1024,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = {
            "dims": dims, "depths": depths, "heads": heads, "windows": windows, "dilations": dilations,
            "mlp_ratios": mlp_ratios, "scales": scales, "scale_init": scale_init,
        }  # fmt: skip
        count = len(depths)
        if not 1 <= count <= STAGES:
            raise ValueError(f"depths is {list(depths)}; expected one to {STAGES} stages")
        for name, value in per_stage.items():
            if len(value) != count:
                raise ValueError(f"{name} is {list(value)}; expected one entry for each of {count} stages (of depths)")
        scales = [s or None for s in scales]
        if set(scales) - {None, "layer", "res"}:
            raise ValueError(f"scales is {list(scales)}; expected None, 'layer' or 'res' for each stage")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, projection
        half = dims[0] // 2
        stem: list[nn.Module] = []
        for a, b, stride in ((in_chans, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)):
            stem += [*_downsample(a, b, stride), nn.GELU()]
        self.patch_embed = nn.Sequential(*stem[:-1])
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        height, width = to_2tuple(img_size)
        stages, downsamples = [], []
        for i in range(count):
            is_global, last = i == STAGES - 1, i == count - 1
            blocks = [
                Block(
                    dims[i],
                    MASS(
                        dims[i], heads[i], windows[i], dilations[i], bias=bias, local=not is_global,
                        table=(height >> (i + 2), width >> (i + 2)) if is_global else None,
                    ),
                    int(mlp_ratios[i] * dims[i]),
                    drop_path=rates[sum(depths[:i]) + j], scale=scales[i], init=scale_init[i], norm=norm,
                )
                for j in range(depths[i])
            ]  # fmt: skip
            stages.append(Stage(dims[i] // heads[i], blocks))
            downsamples.append(nn.Identity() if last else nn.Sequential(*_downsample(dims[i], dims[i + 1])))
        self.stages, self.downsamples = nn.ModuleList(stages), nn.ModuleList(downsamples)
        self.pre_head: nn.Module = nn.Sequential(
            nn.Conv2d(dims[-1], projection, 1), nn.BatchNorm2d(projection), nn.SiLU()
        )
        self.head = nn.Linear(projection, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [{"num_chs": d, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, d in enumerate(dims)]
        self.apply(self._init_weights)

    @property
    def ends(self) -> dict[str, Any]:
        """What arguments change in a checkpoint: the head, the first convolution, the global tables of positions."""
        tables = [k for k in self.state_dict() if k.endswith("rpb_global")]
        return super().ends | {"img_size": [Converted(k, resize_pairs) for k in tables]}

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`VisionModel`. The maps have no norm of their own: ``norm`` changes nothing."""
        x, maps = self.patch_embed(x), []
        last = max(indices) if stop_early and indices else len(self.stages) - 1
        for i, (stage, down) in enumerate(zip(self.stages, self.downsamples, strict=True)):
            x = stage(x)
            if i in indices:
                maps.append(x)
            if i == last:
                break
            x = down(x)
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map, expanded to ``projection`` channels (batch, projection, H/32, W/32)."""
        return self.pre_head(self.forward_stages(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's call: drops the classifier with its 1x1 convolution, and the stages after the last index."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_head = nn.Identity()
        self.stages, self.downsamples = self.stages[: max(take) + 1], self.downsamples[: max(take) + 1]
        self.downsamples[-1] = nn.Identity()
        return take


def a2mamba(*, features_only: bool = False, out_indices: Indices = None, **config: Any) -> A2Mamba:
    """Builder of the cards: a :class:`A2Mamba`, as a pyramid of the maps at ``out_indices`` with ``features_only``."""
    return build(A2Mamba, features_only=features_only, out_indices=out_indices, **config)
