"""RSMamba: scene classification with one Mamba mixer a layer, walked along several paths and gated between them.

Paper: Chen et al., "RSMamba: Remote Sensing Image Classification with State Space Model", arXiv 2403.19654. Original:
KyanChen/RSMamba (Apache-2.0), ``mmpretrain/rsmamba/models/models.py``; the mixer is transformers' ``MambaMixer``.

Differences: the tokens stay where they are and the convolution and the scan walk the paths, so that what acts token by
token (norm, projections, gate branch) is computed once for all paths instead of once for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing, Linear, Recomputed
from zoo.layers.init import inverse_softplus_log_uniform
from zoo_kernels import causal_conv1d, selective_scan

ARCHITECTURES = {"small": (192, 16), "base": (192, 24), "large": (256, 36), "huge": (320, 48)}
PATHS = (
    "forward", "forward_reverse_mean", "forward_reverse_gate", "forward_reverse_shuffle_gate",
    "forward_reverse_shuffle_mean",
)  # fmt: skip
CLS_POSITIONS = ("none", "head", "tail", "middle")
OUT_TYPES = ("avg_featmap", "cls_token", "featmap", "raw")
EPS = 1e-6
#: the widest causal convolution of ``zoo_kernels.causal_conv1d``
LONGEST = 8
#: one number, or one for rows and one for columns
PerAxis = int | Sequence[int]
#: by the names of transformers, whose mixer the original uses
_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
    "mish": F.mish, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip


class PatchEmbed(nn.Module):
    """Patches, overlapping where the stride is the smaller.

    ``patch`` and ``stride``: one number, or one an axis. ``padding``: "corner" adds the zeros that no pixel is lost for
    at the right and at the bottom, "same" half of them on each side (both give ceil(size / stride) patches a side), a
    number that many on every side. ``norm_eps``: a LayerNorm of the tokens (None: none).

    (batch, channels, H, W) to tokens (batch, h * w, dim), row by row, and (h, w). Source: mmcv ``PatchEmbed``.
    """

    def __init__(
        self, in_chans: int, dim: int, patch: PerAxis, stride: PerAxis, *, padding: str | PerAxis = "corner",
        dilation: PerAxis = 1, bias: bool = False, norm_eps: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(padding, str) and padding not in ("corner", "same"):
            raise ValueError(f"padding is {padding!r}; expected 'corner', 'same' or a number of pixels")
        self.padding, self.stride = padding, _pair(stride)
        #: pixels that one patch reaches over
        self.reach = tuple(d * (k - 1) + 1 for d, k in zip(_pair(dilation), _pair(patch), strict=True))
        fixed = (0, 0) if isinstance(padding, str) else _pair(padding)
        self.proj = nn.Conv2d(in_chans, dim, _pair(patch), self.stride, fixed, _pair(dilation), bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, norm_eps)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        sides = zip((height, width), self.stride, strict=True)
        if isinstance(self.padding, str):
            h, w = (-(-size // stride) for size, stride in sides)
        else:
            room = zip(sides, _pair(self.padding), self.reach, strict=True)
            h, w = ((size + 2 * more - reach) // stride + 1 for (size, stride), more, reach in room)
        return h, w

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.grid(*x.shape[2:])
        if isinstance(self.padding, str):
            down, right = (
                max((n - 1) * stride + reach - size, 0)
                for n, stride, reach, size in zip(grid, self.stride, self.reach, x.shape[2:], strict=True)
            )
            above, left = (0, 0) if self.padding == "corner" else (down // 2, right // 2)
            x = F.pad(x, (left, right - left, above, down - above))
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)), grid


def _pair(value: PerAxis) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class MultiPathMamba(nn.Module):
    """Mamba-1's mixer with one set of weights walked along P paths.

    Arguments: ``dim`` d, ``hidden`` D, ``state`` N, ``conv`` width of the causal convolution, ``dt_rank``
    (None: ceil(d / 16)), ``conv_bias``, ``bias`` (of both projections), ``act``.
    """

    def __init__(
        self, dim: int, hidden: int, *, state: int = 16, conv: int = 4, dt_rank: int | None = None,
        conv_bias: bool = True, bias: bool = False, act: str = "silu",
    ) -> None:  # fmt: skip
        super().__init__()
        if act not in _ACTS:
            raise ValueError(f"act is {act!r}; expected one of {', '.join(_ACTS)}")
        self.state, self.act = state, act
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(dim, 2 * hidden, bias=bias)
        self.conv1d = nn.Conv1d(hidden, hidden, conv, groups=hidden, bias=conv_bias)
        self.x_proj = Linear(hidden, self.dt_rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, hidden)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(hidden, 1))
        self.D = nn.Parameter(torch.ones(hidden))
        self.out_proj = Linear(hidden, dim, bias=bias)
        with torch.no_grad():  # Mamba's own start, which the original's mixer alone leaves out
            self.dt_proj.bias.copy_(inverse_softplus_log_uniform(self.dt_proj.bias, 1e-3, 0.1, 1e-4))

    def walk(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, L, d); order: (P, L), visiting orders. Returns the scans (P, batch, L, D), each token's output at
        its own place, without the gate branch, and that branch act(z), (batch, L, D)."""
        batch, paths = x.shape[0], order.shape[0]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        rows = order.unsqueeze(1).expand(-1, batch, -1).reshape(paths * batch, -1)
        u = u.unsqueeze(0).expand(paths, -1, -1, -1).reshape(paths * batch, *u.shape[1:])
        fused = _ACTS[self.act] is F.silu
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if weight.shape[1] > LONGEST:
            u, fused = long_causal_conv(u, weight, bias, rows), False
        else:
            u, _ = causal_conv1d(u, weight, bias, activation="silu" if fused else None, path=rows)
        u = u if fused else _ACTS[self.act](u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state, self.state], dim=-1)
        y, _ = selective_scan(
            u, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), dt_bias=self.dt_proj.bias.float(),
            dt_proj=self.dt_proj.weight, dt_softplus=True, path=rows,
        )  # fmt: skip
        return y.unflatten(0, (paths, batch)), _ACTS[self.act](z)

    def by_path(self, x: Tensor, order: Tensor) -> Tensor:
        """What each path puts out: (P, batch, L, d). For looking; the layer itself mixes before ``out_proj``."""
        y, z = self.walk(x, order)
        return self.out_proj(y * z)


def long_causal_conv(u: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """:func:`zoo_kernels.causal_conv1d` along ``rows`` (batch, L) for a weight (D, k) wider than it takes."""
    at = rows.unsqueeze(-1).expand_as(u)
    walked = F.pad(u.gather(1, at).transpose(1, 2), (weight.shape[1] - 1, 0))
    y = F.conv1d(walked, weight.unsqueeze(1), bias, groups=weight.shape[0]).transpose(1, 2)
    return torch.empty_like(y).scatter(1, at, y)


class Layer(Recomputed):
    """``x + sum_j g_j path_j(norm(x))`` with means or a learned softmax gate between the paths.

    The norm is given, for all layers share one. The gate sees each path's output averaged over the tokens.
    """

    def __init__(self, dim: int, hidden: int, paths: int, gated: bool, mixer: Mapping[str, Any]) -> None:
        super().__init__()
        self.mixer = MultiPathMamba(dim, hidden, **mixer)
        self.gate = nn.Sequential(nn.Linear(paths * dim, paths, bias=False), nn.Softmax(-1)) if gated else None

    def forward(self, x: Tensor, norm: nn.Module, order: Tensor) -> Tensor:
        """x: (batch, L, d); order: (P, L)."""
        y, z = self.mixer.walk(norm(x), order)
        if self.gate is None:
            mixed = y.mean(0)
        else:
            mean = self.mixer.out_proj((y * z).mean(2))  # out_proj is affine: the mean may go first
            weights = self.gate(mean.transpose(0, 1).flatten(1))  # (batch, P)
            mixed = (y * weights.t()[:, :, None, None]).sum(0)
        return x + self.mixer.out_proj(mixed * z)


class RSMamba(GradCheckpointing, nn.Module):
    """RSMamba, classifier or backbone.

    Arguments
        arch: "small", "base", "large" or "huge"; or give ``dim``, ``depth`` and ``hidden`` (None: 2 dim).
        path_type: which paths a layer walks (forward; + reverse; + a random shuffle) and how it joins them.
        pos_embed: "learnable", "sine" (fixed, without class token) or "none".
        cls_position: "none", "head", "tail" or "middle"; the last keeps an oddity of the original: for an odd number of
            patches the token that is taken as the class token is the one after it.
        out_type: "avg_featmap" (mean of the patches, norm), "cls_token", "featmap" (maps) or "raw" (all tokens).
        out_indices: layers whose outputs are returned; final_norm: a norm after the last layer; norm_eps: of all norms.
        patch_size, stride (None: patch_size), patch: of the patches; patch holds :class:`PatchEmbed`'s other settings.
        mixer: settings of :class:`MultiPathMamba` beyond the widths, one table or one for each layer.

    Input: (batch, in_chans, H, W) of ``img_size``. Output: logits (batch, num_classes) where the output is a vector;
    features otherwise, or with ``num_classes=0`` (a list where ``out_indices`` names several layers).
    The shuffle draws a new permutation in every layer at every call, in evaluation too, from torch's global generator,
    as the original does; ``orders`` (depth, tokens) gives them, and ``shuffle_seed`` fixes them.
    Source: arXiv 2403.19654, section II; KyanChen/RSMamba ``RSMamba``.
    """

    def __init__(
        self,
        arch: str | None = "base",
        *,
        dim: int | None = None,
        depth: int | None = None,
        hidden: int | None = None,
        num_classes: int = 45,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: PerAxis = 16,
        stride: PerAxis | None = 8,
        patch: Mapping[str, Any] | None = None,
        path_type: str = "forward_reverse_shuffle_gate",
        pos_embed: str = "learnable",
        cls_position: str = "none",
        out_type: str = "avg_featmap",
        out_indices: Sequence[int] | int = -1,
        final_norm: bool = True,
        norm_eps: float = EPS,
        drop_rate: float = 0.0,
        mixer: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("path_type", path_type, PATHS), ("cls_position", cls_position, CLS_POSITIONS),
            ("out_type", out_type, OUT_TYPES), ("pos_embed", pos_embed, ("learnable", "sine", "none")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        if arch is not None and arch not in ARCHITECTURES:
            raise ValueError(
                f"arch is {arch!r}; expected one of {', '.join(ARCHITECTURES)}, or None with dim and depth"
            )
        if arch is None and (dim is None or depth is None):
            raise ValueError("arch is None; expected dim and depth with it")
        named = ARCHITECTURES[arch] if arch is not None else (0, 0)
        dim, depth = dim or named[0], depth or named[1]
        hidden = 2 * dim if hidden is None else hidden
        has_token = cls_position != "none"
        if has_token and pos_embed == "sine":
            raise ValueError(f"pos_embed='sine' has no place for a class token; cls_position is {cls_position!r}")
        if out_type == "cls_token" and not has_token:
            raise ValueError("out_type='cls_token' needs a class token; cls_position is 'none'")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, dim
        self.img_size = _pair(img_size)
        self.path_type, self.cls_position, self.out_type = path_type, cls_position, out_type
        self.shuffle_seed = shuffle_seed
        chosen = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        if not chosen or any(not -depth <= i < depth for i in chosen):
            raise ValueError(f"out_indices is {out_indices}; expected layers from 0 to {depth - 1}")
        self.out_indices = sorted({i % depth for i in chosen})

        step = patch_size if stride is None else stride
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, step, **(patch or {}))
        h, w = self.grid_size = self.patch_embed.grid(*self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_token else None
        self.pos_embed: Tensor | None = None
        if pos_embed == "learnable":
            self.pos_embed = nn.Parameter(torch.empty(1, h * w + int(has_token), dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif pos_embed == "sine":
            del self.pos_embed
            self.register_buffer("pos_embed", sine_table(h, w, dim), persistent=False)
        self.drop = nn.Dropout(drop_rate)
        self.n_paths = sum(word in ("forward", "reverse", "shuffle") for word in path_type.split("_"))
        one = isinstance(mixer, Mapping) or not mixer
        settings: list[dict[str, Any]] = [dict(mixer) if one else {} for _ in range(depth)]  # type: ignore[arg-type]
        if not one:
            settings = [dict(table) for table in mixer]  # type: ignore[arg-type]
        if len(settings) != depth:
            raise ValueError(f"mixer has {len(settings)} tables; expected one, or one for each of {depth} layers")
        gated = path_type.endswith("gate")
        self.layers = nn.ModuleList(Layer(dim, s.pop("hidden", hidden), self.n_paths, gated, s) for s in settings)
        self.pre_norm = nn.LayerNorm(dim, norm_eps)
        self.final_norm = nn.LayerNorm(dim, norm_eps) if final_norm else nn.Identity()
        self.out_norm = nn.LayerNorm(dim, norm_eps) if out_type == "avg_featmap" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

    # -- forward

    def visiting_orders(self, tokens: int, layer: int, orders: Tensor | None, device: torch.device) -> Tensor:
        """The paths of one layer: (P, tokens), forward, reverse, shuffled, as many as there are."""
        forward = torch.arange(tokens, device=device)
        paths = [forward]
        if self.n_paths > 1:
            paths.append(forward.flip(0))
        if self.n_paths > 2:
            if orders is not None:
                paths.append(orders[layer].to(device))
            else:
                generator = None
                if self.shuffle_seed is not None:
                    generator = torch.Generator().manual_seed(self.shuffle_seed + layer)
                paths.append(torch.randperm(tokens, generator=generator).to(device))
        return torch.stack(paths)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens with class token and positions, (batch, L, d), and the grid of the patches."""
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            token, middle = self.cls_token.expand(x.shape[0], -1, -1), x.shape[1] // 2
            at = {"head": 0, "tail": x.shape[1], "middle": middle}[self.cls_position]
            x = torch.cat([x[:, :at], token, x[:, at:]], dim=1)
        if self.pos_embed is not None:
            if grid != self.grid_size:
                raise ValueError(
                    f"the image gives {grid[0]} x {grid[1]} patches, the position table is for {self.grid_size[0]} x "
                    f"{self.grid_size[1]}; resize the image to {self.img_size[0]} x {self.img_size[1]} pixels"
                )
            x = x + self.pos_embed
        return self.drop(x), grid

    def features(self, x: Tensor, orders: Tensor | None = None) -> list[Tensor]:
        """The outputs at ``out_indices``, each of the kind ``out_type``."""
        x, grid = self.embed(x)
        if orders is not None and orders.shape != (len(self.layers), x.shape[1]):
            raise ValueError(
                f"orders has shape {tuple(orders.shape)}; expected (layers, tokens) = "
                f"({len(self.layers)}, {x.shape[1]})"
            )
        found = []
        for i, layer in enumerate(self.layers):
            x = layer(x, self.pre_norm, self.visiting_orders(x.shape[1], i, orders, x.device))
            if i == len(self.layers) - 1:
                x = self.final_norm(x)
            if i in self.out_indices:
                found.append(self.take(x, grid))
        return found

    def take(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (batch, L, d) to an output of the kind ``out_type``."""
        if self.out_type == "raw":
            return x
        at = {"none": None, "head": 0, "tail": x.shape[1] - 1, "middle": x.shape[1] // 2}[self.cls_position]
        if self.out_type == "cls_token":
            return x[:, at]
        patches = x if at is None else torch.cat([x[:, :at], x[:, at + 1 :]], dim=1)
        if self.out_type == "featmap":
            return patches.transpose(1, 2).unflatten(2, grid)
        return self.out_norm(patches.mean(1))

    def forward_features(self, x: Tensor, orders: Tensor | None = None) -> Tensor:
        """The output at the last of ``out_indices``."""
        return self.features(x, orders)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, orders: Tensor | None = None) -> Any:
        found = self.features(x, orders)
        if self.out_type in ("avg_featmap", "cls_token") and self.num_classes > 0:
            return self.head(found[-1])
        return found if len(found) > 1 else found[0]

    # -- habits

    @property
    def ends(self) -> dict[str, Any]:
        return {"num_classes": NewHead("head"), "in_chans": InputChannels("patch_embed.proj.weight")}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head of ``num_classes`` (0: none)."""
        like = self.pre_norm.weight
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )


def sine_table(height: int, width: int, dim: int) -> Tensor:
    """(1, height * width, dim): sin and cos of the column, then of the row; the *column* is the outer index, unlike the
    row by row order of the tokens (an oddity of the original, kept)."""
    if dim % 4:
        raise ValueError(f"dim is {dim}; a two-dimensional sine table needs a multiple of 4")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    column, row = torch.meshgrid(torch.arange(width).double(), torch.arange(height).double(), indexing="ij")
    w, h = column.flatten()[:, None] * omega, row.flatten()[:, None] * omega
    return torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], dim=1).float()[None]
