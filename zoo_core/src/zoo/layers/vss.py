"""The VSS block of VMamba and what stands around it in a hierarchical backbone.

Shared by VMamba itself, Res-VMamba, and the encoders and decoders that other domains build
from the same blocks. Layout is (batch, height, width, channels) everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bands import conv_chain
from .checkpointing import Recomputed
from .inference import by_rows, results_only, settled
from .linear import Linear, call
from .ss2d import SS2D, activation


class BatchNormLast(nn.BatchNorm2d):
    """BatchNorm2d on (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def channel_norm(kind: str, channels: int) -> nn.Module:
    """``"ln"`` LayerNorm (eps 1e-5), ``"bn"`` BatchNorm, ``"none"`` nothing; over the last axis."""
    if kind == "ln":
        return nn.LayerNorm(channels)
    if kind == "bn":
        return BatchNormLast(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm is {kind!r}; expected 'ln', 'bn' or 'none'")


class ConvLast(nn.Conv2d):
    """A convolution on (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth: in training a whole sample's branch is dropped with ``rate`` and the rest scaled up."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.rate)
        return x * keep.div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Mlp(nn.Module):
    """``fc2(act(fc1 x))``; gated: fc1 is twice as wide, split into (x, z), ``fc2(x * act(z))``.

    Dropout after the activation (not when gated) and after fc2. Source: MzeroMiko/VMamba ``Mlp`` and ``gMlp``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: str = "gelu",
        drop: float = 0.0,
        gated: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = Linear(dim, hidden * 2 if gated else hidden, device=device, dtype=dtype)
        self.act = activation(act)
        self.fc2 = Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim). Returns the same shape."""
        return by_rows(self.rows, x, module=self)

    def rows(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """The same in one go, ``add`` (..., dim) added: for who computes by blocks of rows already."""
        if self.gated:
            x, z = call(self.fc1, x).chunk(2, dim=-1)
            x = x * self.act(z)
        else:
            x = self.drop(call(self.fc1, x, act=self.act))
        if self.training:
            x = self.drop(call(self.fc2, x))
            return x if add is None else x + add
        return call(self.fc2, x, add=add)


class VSSBlock(Recomputed):
    """``x + drop_path(op(norm x))``, then ``x + drop_path(mlp(norm2 x))``; with ``post_norm`` the norm comes after.

    Arguments: ``dim`` C; ``mixer``: options of :class:`zoo.layers.SS2D` (``None``: no mixer); ``mlp_ratio``: hidden
    width int(C * ratio), 0 for no MLP; ``norm``: see :func:`channel_norm`. Input and output (batch, height, width, C).
    Source: Liu et al., "VMamba", arXiv 2401.10166, figure 3; MzeroMiko/VMamba ``VSSBlock``.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mapping[str, Any] | None = None,
        *,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_drop: float = 0.0,
        mlp_gated: bool = False,
        norm: str = "ln",
        post_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.has_op, self.has_mlp = mixer is not None, mlp_ratio > 0
        if mixer is not None:
            self.norm = channel_norm(norm, dim)
            self.op = SS2D(dim, **mixer)
        if self.has_mlp:
            self.norm2 = channel_norm(norm, dim)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), act=mlp_act, drop=mlp_drop, gated=mlp_gated)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self._in_inference(x):
            return self._inference(x)
        if self.has_op:
            y = self.norm(self.op(x)) if self.post_norm else self.op(self.norm(x))
            x = x + self.drop_path(y)
        if self.has_mlp:
            y = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
            x = x + self.drop_path(y)
        return x

    def _in_inference(self, x: Tensor) -> bool:
        return (
            not torch.is_grad_enabled() and results_only(x) and settled(self) and (not self.has_op or self.op.has_bands)
        )

    def _inference(self, x: Tensor) -> Tensor:
        """The same numbers with as few maps in memory as there can be: neighbours meet in the convolution and the scan
        alone, so all that lies before the scan is one pass over the image, and all that follows, MLP included, another.
        """
        if not self.has_op:
            return by_rows(self._mlp_rows, x) if self.has_mlp else x
        return by_rows(self._leave_rows, x, self.op.scanned(x, self._op_norm))

    def _op_norm(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.norm(x)

    def _leave_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """From the scan's rows y to the block's, the residual stream x added."""
        z = self.op.gate_of(self._op_norm(x))
        x = x + self.norm(self.op.leave(y, z)) if self.post_norm else self.op.leave(y, z, add=x)
        return self._mlp_rows(x) if self.has_mlp else x

    def _mlp_rows(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.mlp.rows(x)) if self.post_norm else self.mlp.rows(self.norm2(x), add=x)


class PatchMerging(nn.Module):
    """Four neighbours side by side, norm, linear: (batch, H, W, C) to (batch, ceil(H/2), ceil(W/2), out).

    Order of the neighbours: (0,0), (1,0), (0,1), (1,1), row index first. Odd sides are padded with zeros at the end.
    """

    def __init__(self, dim: int, out: int, norm: str = "ln") -> None:
        super().__init__()
        self.norm = channel_norm(norm, 4 * dim)
        self.reduction = Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return by_rows(lambda rows: call(self.reduction, self.norm(rows)), x, module=self)


class PatchExpanding(nn.Module):
    """A linear layer to scale^2 times ``out`` channels, laid out over scale x scale positions, then LayerNorm.

    (batch, h, w, dim) to (batch, scale h, scale w, out), the way back from patch merging. Source: Cao et al.,
    "Swin-Unet", arXiv 2105.05537, section 3.5.
    """

    def __init__(self, dim: int, out: int, scale: int = 2, norm: str = "ln") -> None:
        super().__init__()
        self.scale, self.out = scale, out
        self.expand = Linear(dim, scale * scale * out, bias=False)
        self.norm = channel_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        p = self.scale
        y = self.expand(x).view(batch, height, width, p, p, self.out)
        return self.norm(y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * p, width * p, self.out))


class ConvDownsample(nn.Module):
    """A strided convolution with bias, then a norm: (batch, H, W, C) to half the side.

    ``kernel`` 2 drops an odd last row or column, ``kernel`` 3 (padding 1) rounds up.
    """

    def __init__(self, dim: int, out: int, kernel: int = 3, norm: str = "ln") -> None:
        super().__init__()
        self.conv = ConvLast(dim, out, kernel, stride=2, padding=(kernel - 1) // 2)
        self.norm = channel_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        return conv_chain(self.conv, x, after=self.norm)


class PatchEmbed(nn.Module):
    """Image (batch, channels, H, W) to (batch, H/patch, W/patch, dim), by one convolution or by two.

    ``overlap=False``: kernel and stride ``patch``, then the norm. ``overlap=True``: two convolutions of stride
    patch // 2 and kernel patch // 2 + 1 through dim // 2 channels, a norm after each and GELU between.
    Source: MzeroMiko/VMamba ``_make_patch_embed`` and ``_make_patch_embed_v2``.
    """

    def __init__(self, in_chans: int, dim: int, patch: int = 4, *, overlap: bool = False, norm: str = "ln") -> None:
        super().__init__()
        self.overlap = overlap
        if overlap:
            stride = patch // 2
            if stride < 1:
                raise ValueError(f"patch_size is {patch}; the overlapping embedding halves it and needs 2 or more")
            self.conv1 = ConvLast(in_chans, dim // 2, stride + 1, stride=stride, padding=1)
            self.norm1 = channel_norm(norm, dim // 2)
            self.act = nn.GELU()
            self.conv2 = ConvLast(dim // 2, dim, stride + 1, stride=stride, padding=1)
            self.norm2 = channel_norm(norm, dim)
        else:
            self.conv1 = ConvLast(in_chans, dim, patch, stride=patch)
            self.norm1 = channel_norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (batch, H, W, channels): a view, which the first convolution takes as it is
        if not self.overlap:
            return conv_chain(self.conv1, x, after=self.norm1)
        x = conv_chain(self.conv1, x, after=lambda y: self.act(self.norm1(y)), watched=(self.norm1, self.act))
        return conv_chain(self.conv2, x, after=self.norm2)
