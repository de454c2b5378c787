"""MambaVision: convolutions, then windows of Mamba mixers followed by attention.

Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", arXiv 2407.08083. Original:
NVlabs/MambaVision @ 7860a50, ``mambavision/models/mamba_vision.py`` and the dense
``semantic_segmentation/tools/mamba_vision.py`` (its code and weights are licensed for non-commercial use).

Keys are the original's. Reproduced on purpose: the bias of ``dt_proj`` acts twice (once in the projection, once in the
scan), the convolutions look both ways, and padding tokens of incomplete windows take part in scan and attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from zoo.adapting import NewHead
from zoo.layers import Linear, Mlp, Recomputed
from zoo.reference import ReferenceAdapter
from zoo.rules import Rules
from zoo_kernels import causal_conv1d, selective_scan

from ._base import Indices, VisionModel, build, check_reference_config, takes

LEVELS = 4
NORMS = ("ln2d", "bn")


class MambaVisionMixer(nn.Module):
    """A scan beside a symmetric branch: ``out_proj(concat(scan(silu(conv(x))), silu(conv(z))))``.

    ``x, z = in_proj(u)``. Width C, halves of C / 2 channels, N = 8 states, convolutions of width 3 that look one token
    each way, without bias. ``delta = softplus(dt_proj.weight r + 2 dt_proj.bias)``. One forward scan over the tokens,
    no gate. Source: arXiv 2407.08083, equation 2 and figure 3; ``MambaVisionMixer``.
    """

    def __init__(self, dim: int, state: int = 8, width: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        half, self.rank, self.state = dim // 2, -(-dim // 16), state
        self.in_proj = Linear(dim, dim, bias=False, **dd)
        self.x_proj = Linear(half, self.rank + 2 * state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.rank, half, **dd)
        self.A_log = nn.Parameter(torch.empty(half, state, **dd))
        self.D = nn.Parameter(torch.ones(half, **dd))
        self.out_proj = Linear(dim, dim, bias=False, **dd)
        self.conv1d_x = nn.Conv1d(half, half, width, groups=half, bias=False, **dd)
        self.conv1d_z = nn.Conv1d(half, half, width, groups=half, bias=False, **dd)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, state + 1, device=self.A_log.device).log().expand_as(self.A_log))

    def forward(self, u: Tensor) -> Tensor:
        """u: (batch, length, dim). Returns the same shape."""
        xz = self.in_proj(u)
        weight = torch.cat([self.conv1d_x.weight, self.conv1d_z.weight])[:, 0]  # (dim, width): both branches at once
        ahead = weight.shape[1] // 2  # a causal convolution, read so many tokens later, looks both ways
        xz = causal_conv1d(F.pad(xz, (0, 0, 0, ahead)), weight, activation="silu")[0][:, ahead:]
        x, z = xz.chunk(2, dim=-1)
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        A = -torch.exp(self.A_log.float())
        y, _ = selective_scan(
            x, dt, A, B, C, self.D, dt_bias=2 * self.dt_proj.bias, dt_proj=self.dt_proj.weight, dt_softplus=True
        )
        return self.out_proj(torch.cat([y, z], dim=-1))


class Attention(nn.Module):
    """Multi-head attention over the tokens of a window; ``qk_norm`` puts a LayerNorm on queries and keys."""

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool, qk_norm: bool, attn_drop: float, proj_drop: float, **dd: Any
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = nn.LayerNorm(dim // heads, **dd) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, **dd) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, dim). Returns the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, length, d)
        drop = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(Recomputed):
    """Norm, mixer (Mamba or attention), norm, MLP, each added; ``layer_scale`` starts gains of both branches."""

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float, drop: float, drop_path: float, layer_scale: float | None,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)
        self.mixer = mixer
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            setattr(
                self, name, None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norm1(x))
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)


class ConvBlock(Recomputed):
    """``x + gamma * BN(conv(GELU(BN(conv(x)))))`` with 3x3 convolutions and the tanh form of GELU."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None, **dd: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1, **dd), nn.BatchNorm2d(dim, **dd)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, padding=1, **dd), nn.BatchNorm2d(dim, **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)), approximate="tanh")))
        return x + self.drop_path(y if self.gamma is None else y * self.gamma[:, None, None])


class Downsample(nn.Module):
    """3x3 convolution of stride 2 to twice the channels, without bias and norm."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


class PatchEmbed(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU: stride 4."""

    def __init__(self, in_chans: int, hidden: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, hidden, 3, 2, 1, bias=False, **dd),
            nn.BatchNorm2d(hidden, eps=1e-4, **dd),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, 3, 2, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, eps=1e-4, **dd),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(x)


class Level(nn.Module):
    """Blocks of one resolution, on the map (``window`` None) or inside windows of ``window`` x ``window`` tokens."""

    def __init__(self, blocks: list[nn.Module], window: int | None, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.window, self.downsample = nn.ModuleList(blocks), window, downsample

    def body(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to the map before downsampling. Right and bottom are padded with zeros to windows."""
        height, width = x.shape[2:]
        if self.window is not None:
            w = self.window
            x = F.pad(x, (0, -width % w, 0, -height % w))
            rows, columns = x.shape[2] // w, x.shape[3] // w
            x = x.unflatten(3, (columns, w)).unflatten(2, (rows, w))  # (batch, C, rows, w, columns, w)
            x = x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)  # (batch * windows, w * w, C)
        for block in self.blocks:
            x = block(x)
        if self.window is not None:
            x = x.unflatten(1, (w, w)).unflatten(0, (-1, rows, columns)).permute(0, 5, 1, 3, 2, 4)
            x = x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width].contiguous()
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if self.downsample is None else self.downsample(x)


class MambaVision(VisionModel):
    """MambaVision. Levels of width dim, 2 dim, 4 dim, 8 dim at strides 4, 8, 16, 32; any image size.

    Arguments as the original's: ``dim``, ``in_dim`` (stem), ``depths``, ``window_size`` and ``num_heads`` of the four
    levels (read in the last two), ``mlp_ratio``, ``qkv_bias``, ``qk_norm`` (its ``qk_scale``), ``layer_scale`` and
    ``layer_scale_conv`` (start values; None: none), ``drop_rate``, ``attn_drop_rate``, ``drop_path_rate``. In the last
    two levels the second half of the blocks (the smaller one) attends, the rest are Mamba mixers.

    ``pyramid_norm``: norm of the maps of a pyramid (``features_only=True``): None, "ln2d" or "bn"; the dense original
    uses "ln2d". Maps are taken before downsampling.
    """

    first_conv = "patch_embed.conv_down.0"
    #: a pyramid drops levels that none of its maps needs
    prune_levels = True

    def __init__(
        self,
        dim: int = 80,
        in_dim: int = 32,
        depths: Sequence[int] = (1, 3, 8, 4),
        window_size: Sequence[int] = (8, 8, 14, 7),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        pyramid_norm: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, value in (("depths", depths), ("window_size", window_size), ("num_heads", num_heads)):
            if len(value) != LEVELS:
                raise ValueError(f"{name} is {list(value)}; expected {LEVELS} numbers, one a level")
        if pyramid_norm is not None and pyramid_norm not in NORMS:
            raise ValueError(f"pyramid_norm is {pyramid_norm!r}; expected None or one of {', '.join(NORMS)}")
        widths = [dim * 2**i for i in range(LEVELS)]
        self.num_classes, self.in_chans, self.pyramid_norm = num_classes, in_chans, pyramid_norm
        self.num_features = self.head_hidden_size = widths[-1]
        self.patch_embed = PatchEmbed(in_chans, in_dim, dim, **dd)
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        levels = []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                if i < 2:
                    blocks.append(ConvBlock(width, next(rates), layer_scale_conv, **dd))
                    continue
                if j < (depth + 1) // 2:
                    mixer: nn.Module = MambaVisionMixer(width, **dd)
                else:
                    mixer = Attention(width, num_heads[i], qkv_bias, qk_norm, attn_drop_rate, drop_rate, **dd)
                blocks.append(Block(width, mixer, mlp_ratio, drop_rate, next(rates), layer_scale, **dd))
            down = Downsample(width, **dd) if i < LEVELS - 1 else None
            levels.append(Level(blocks, window_size[i] if i >= 2 else None, down))
        self.levels = nn.ModuleList(levels)
        self.norm = nn.BatchNorm2d(widths[-1], **dd)
        self.head = nn.Linear(widths[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, width in enumerate(widths)
        ]
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Truncated normals for every linear layer, dt_proj included, as the original's initialiser leaves it."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x)
        maps = []
        for i, level in enumerate(self.levels):
            x = level.body(x)
            if i in indices:
                own = getattr(self, f"outnorm{i}", None)
                maps.append(x if own is None else own(x).contiguous())
                if stop_early and i == max(indices):
                    break
            x = x if level.downsample is None else level.downsample(x)
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, H, W) to the normed last map (batch, 8 dim, H / 32, W / 32)."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    @property
    def ends(self) -> dict[str, Any]:
        norms = NewHead(*(f"outnorm{i}" for i in range(LEVELS)))
        return super().ends | {"pyramid_norm": norms}

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or prune_head:
            self.norm = nn.Identity()
        if self.prune_levels:
            self.levels = self.levels[: max(take) + 1]
            self.levels[-1].downsample = None
        return take

    def as_pyramid(self, out_indices: Indices = None) -> MambaVision:
        like = self.patch_embed.conv_down[0].weight
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        super().as_pyramid(out_indices)
        for i in (self.out_indices or []) if self.pyramid_norm else []:
            width = self.feature_info.get("num_chs", i)
            norm = LayerNorm2d(width, eps=1e-5, **dd) if self.pyramid_norm == "ln2d" else nn.BatchNorm2d(width, **dd)
            self.add_module(f"outnorm{i}", norm)
        return self


@takes(MambaVision)
def mambavision(**config: Any) -> MambaVision:
    """Builder of the cards: a :class:`MambaVision`, as a pyramid of four maps with ``features_only=True``."""
    return build(MambaVision, **config)


# -- the original's arguments and files ------------------------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "dim": 128, "in_dim": 64, "depths": (3, 3, 10, 5), "window_size": (8, 8, 14, 7), "mlp_ratio": 4.0,
    "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2, "in_chans": 3, "num_classes": 1000, "qkv_bias": True,
    "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "layer_scale": None, "layer_scale_conv": None,
}  # fmt: skip
_SWALLOWED = {
    "resolution", "model_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "norm_layer", "pretrained",
    "type", "init_cfg",
}  # fmt: skip
#: what the dense class passes on; it swallows every other argument
_DENSE = ("dim", "in_dim", "depths", "window_size", "mlp_ratio", "num_heads", "layer_scale")


class MambaVisionAdapter(ReferenceAdapter):
    """NVlabs/MambaVision: the classifier ``MambaVision`` and the dense ``MM_mamba_vision``."""

    system = "mambavision"

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """The keys are ours but for a common prefix: ``module.`` of parallel training, ``model.`` of the Hub class."""
        for prefix in ("module.", "model."):
            if state and all(k.startswith(prefix) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
        return dict(state)

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        dense = source.endswith("MM_mamba_vision") or "out_indices" in config or any("outnorm" in k for k in state)
        known = _DEFAULTS | ({"out_indices": (0, 1, 2, 3), "norm_layer": "ln2d"} if dense else {})
        theirs = check_reference_config("mambavision", config, known, _SWALLOWED)
        ours = {k: v for k, v in theirs.items() if k in _DENSE or not dense}
        ours = {k: v for k, v in ours.items() if k not in ("out_indices", "norm_layer", "qk_scale")}
        if not dense:
            ours["qk_norm"] = bool(theirs["qk_scale"])
        for key in ("layer_scale", "layer_scale_conv"):
            if type(ours.get(key)) not in (int, float):  # the original's own test: anything else means none
                ours[key] = None
        with torch.device("meta"):
            if not dense:
                model = MambaVision(**ours)
            else:
                kind = str(theirs["norm_layer"]).lower()
                if kind not in NORMS:
                    raise ValueError(f"norm_layer is {kind!r}; the dense original runs with {' and '.join(NORMS)}")
                model = MambaVision(**ours, num_classes=0, pyramid_norm=kind)
                model.prune_levels = False  # its state dict holds every level, whichever maps it returns
                model.norm = nn.Identity()
                if indices := list(theirs["out_indices"]):
                    model.as_pyramid(indices)
        return self.load(model, state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """features (pooled) and logits, with mid tensors of blocks and levels; a pyramid's maps by level index."""
        assert isinstance(model, MambaVision)
        image = inputs["image"]
        if model.out_indices is not None:
            return {f"stage{i}": m for i, m in zip(model.out_indices, model(image), strict=True)}
        if isinstance(model.head, nn.Identity) and isinstance(model.norm, nn.Identity):
            return {"last": model.forward_features(image)}  # the dense class without out_indices
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, name: str) -> Any:
            return module.register_forward_hook(lambda _m, _i, out: kept.update({name: out}))

        handles = [keep(model.patch_embed, "mid/patch_embed")]
        for i, level in enumerate(model.levels):
            handles.append(keep(level, f"mid/level{i}_out"))
            handles += [keep(block, f"mid/level{i}_block{j}") for j, block in enumerate(level.blocks)]
            if level.window is not None and len(level.blocks):
                handles.append(keep(level.blocks[0].mixer, f"mid/level{i}_block0_mamba"))
                handles.append(keep(level.blocks[-1].mixer, f"mid/level{i}_lastblock_attention"))
        try:
            features = model.forward_head(model.forward_features(image), pre_logits=True)
        finally:
            for handle in handles:
                handle.remove()
        return {"logits": model.head(features), "features": features, **kept}
