"""The parts of Vim: its mixer, its block, patches, positions. See :mod:`zoo_vision.vim`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.layers import Linear, PathScan, Recomputed, RMSNorm
from zoo_kernels import causal_conv1d


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
        self.in_proj = Linear(dim, 2 * inner, bias=bias, **dd)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner, **dd)) if conv_bias else None
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scan = PathScan(inner, state, rank, paths, shared=kind == "v1", **dd)
        self.out_proj = Linear(inner, dim, bias=bias, **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
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
        weight, bias = self.conv_weight, self.conv_bias
        if weight.shape[0] > 1:  # (batch, length, K, E)
            x, _ = causal_conv1d(x, weight, bias, activation="silu", path=path, reverse=backward)
        else:
            first = None if path is None else path[0]
            bias = None if bias is None else bias[0]
            x, _ = causal_conv1d(x, weight[0], bias, activation="silu", path=first, reverse=backward[0])
        y = self.scan(x, z=z, path=path, reverse=backward)
        out = self.out_proj(y / 2 if self.divide else y)
        return out if self.gamma is None else out * self.gamma


class VimBlock(Recomputed):
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
        """Number of patches (rows, columns) of an image of ``size`` (H, W). Raises ValueError where it has none."""
        if any(n < p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"an image of {size[0]} x {size[1]} is smaller than a patch, {self.patch[0]} x {self.patch[1]}; give a "
                "larger img_size, or resize the image"
            )
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
