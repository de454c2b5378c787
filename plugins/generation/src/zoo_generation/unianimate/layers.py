"""The layers of UniAnimate's network: attention, blocks in space and in time, and the temporal Mamba.

Order of reading: how memory is bounded, attention and feed-forward, space, time (transformer, Mamba, convolution),
residual block and sampling, the encoder's transformer.

One layout everywhere: frames are rows of a batch, (batch * frames, C, h, w), channels last in memory. What one frame
owns is then a stretch of memory, a pixel's channels lie together, and neither the tokens of an attention in space nor
the statistics over all frames need a copy: (batch, frames * h, w, C) is the same memory.

Paper: arXiv 2406.01188. Original: ali-vilab/UniAnimate @ 643c963, ``tools/modules/unet/util.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Mamba, Recomputed
from zoo.layers.linear import linear

#: Numbers of a layer's input in one piece, in inference (see :func:`in_pieces`). On a CPU what is made of a piece
#: stays near the cache; a GPU wants more rows a call.
PIECE = {"cpu": 1 << 19, "cuda": 1 << 24}
GROUPS = 32  #: of every GroupNorm in the original


def in_pieces(function: Callable[..., Tensor], *inputs: Tensor, axis: int = 0) -> Tensor:
    """``function(*inputs)`` for a function that treats every index of ``axis`` by itself, some of them at a time.

    In inference alone: what lies between the layers of ``function`` then takes memory for one piece and not for all
    frames. The result is the same up to the order of float32 sums.
    """
    x, count = inputs[0], inputs[0].shape[axis]
    step = max(PIECE.get(x.device.type, PIECE["cuda"]) * count // max(x.numel(), 1), 1)
    if step >= count or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return function(*inputs)
    out: Tensor | None = None
    for start in range(0, count, step):
        size = min(step, count - start)
        y = function(*(t.narrow(axis, start, size) for t in inputs))
        if out is None:
            shape = [*y.shape[:axis], count, *y.shape[axis + 1 :]]
            order = torch.channels_last if y.dim() == 4 and axis == 0 else torch.contiguous_format
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=order)
        out.narrow(axis, start, size).copy_(y)
    assert out is not None
    return out


def tokens(x: Tensor) -> Tensor:
    """(N, C, h, w) to (N, h * w, C); no copy where channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h * w, C) to (N, C, h, w), channels last in memory."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def over_frames(x: Tensor, frames: int) -> Tensor:
    """(batch * frames, C, h, w) to (batch, C, frames * h, w): time as further rows, for statistics over all frames."""
    height = x.shape[2]
    return x.permute(0, 2, 3, 1).reshape(-1, frames * height, x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm(x)`` for (N, C, h, w), channels last.

    On a CPU the groups' means are taken out first: torch's kernel for this layout computes the variance as
    E[x^2] - E[x]^2, which loses digits where a group's mean is far from zero. A constant shift of a group changes
    neither the result nor its gradient, hence detach.
    """
    if x.is_cpu:
        mean = x.detach().mean((2, 3)).unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True)
        x = x - mean.expand(-1, -1, x.shape[1] // norm.num_groups).flatten(1)[:, :, None, None]
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def norm_over_frames(x: Tensor, norm: nn.GroupNorm, frames: int) -> Tensor:
    """GroupNorm of (batch * frames, C, h, w) with statistics over the frames of a video."""
    y = group_norm(over_frames(x, frames), norm)
    return y.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


# -- attention and feed-forward ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention of several heads: q, k, v without bias, the output projection with one."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        inner, self.heads = heads * head_dim, heads
        context_dim = dim if context_dim is None else context_dim
        self.to_q = Linear(dim, inner, bias=False)
        self.to_k = Linear(context_dim, inner, bias=False)
        self.to_v = Linear(context_dim, inner, bias=False)
        self.to_out = nn.ModuleList([Linear(inner, dim)])

    def split(self, x: Tensor) -> Tensor:
        """(..., length, inner) to (..., heads, length, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (N, heads, tokens, head_dim) each, of (N, tokens, context_dim)."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def in_space(self, x: Tensor, keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (N, length, dim); keys: what :meth:`keys` gave, None: those of x itself."""
        k, v = self.keys(x) if keys is None else keys
        y = F.scaled_dot_product_attention(self.split(self.to_q(x)), k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

    def in_time(self, x: Tensor) -> Tensor:
        """x (batch, frames, pixels, dim): every pixel attends to itself over the frames."""
        q, k, v = (self.split(f(x).transpose(1, 2).flatten(0, 1)) for f in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](y.unflatten(0, (x.shape[0], -1)).transpose(1, 2))


class GEGLU(nn.Module):
    """value * GELU(gate) of one projection (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a projection, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": GEGLU(dim, 4 * dim), "2": Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nn.Module):
    """x += attn1(norm1(x)); x += attn2(norm2(x), context); x += ff(norm3(x)).

    In space attn2 reads the context; in time (``context_dim`` None) both attentions are over a pixel's frames.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None) -> None:
        super().__init__()
        self.attn1 = Attention(dim, heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def in_space(self, x: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1.in_space(self.norm1(x))
        x = x + self.attn2.in_space(self.norm2(x), keys)
        return x + self.ff(self.norm3(x))

    def in_time(self, x: Tensor) -> Tensor:
        x = x + self.attn1.in_time(self.norm1(x))
        x = x + self.attn2.in_time(self.norm2(x))
        return x + self.ff(self.norm3(x))


# -- space ------------------------------------------------------------------------------------------------------------


class SpatialTransformer(Recomputed):
    """Attention among the pixels of a frame and to the context, inside norm, projections and a residual."""

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        *,
        groups: int = GROUPS,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        if inner != channels:
            raise ValueError(f"channels is {channels} and the heads hold {heads} x {head_dim}; expected them equal")
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_dim, context_dim)])
        self.proj_out = zeroed(Linear(inner, channels), zero_init)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (batch * frames, C, h, w); context (batch, tokens, context_dim), the same for every frame of a video."""
        block: TransformerBlock = self.transformer_blocks[0]  # type: ignore[assignment]
        frames = x.shape[0] // context.shape[0]  # keys are computed once a video
        k, v = (t.repeat_interleave(frames, dim=0) for t in block.attn2.keys(context))
        return in_pieces(self.frames, x, k, v)

    def frames(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.proj_in(tokens(group_norm(x, self.norm)))
        y = self.transformer_blocks[0].in_space(y, (k, v))  # type: ignore[operator]
        return x + maps(self.proj_out(y), (x.shape[2], x.shape[3]))


# -- time -------------------------------------------------------------------------------------------------------------


class TemporalLayer(Recomputed):
    """What transformer and Mamba over frames share: norm over all frames, 1x1 in, mixing, 1x1 out, residual."""

    def __init__(self, channels: int, inner: int, *, groups: int = GROUPS, zero_init: bool = True) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv1d(channels, inner, 1)
        self.proj_out = zeroed(nn.Conv1d(inner, channels, 1), zero_init)

    def mix(self, z: Tensor) -> Tensor:
        """(batch, frames, pixels, inner) to the same."""
        raise NotImplementedError

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(batch * frames, C, h, w) to the same."""
        size = (x.shape[2], x.shape[3])
        y = tokens(norm_over_frames(x, self.norm, frames)).unflatten(0, (-1, frames))
        y = in_pieces(self.pixels, y, axis=2)
        return x + maps(y.flatten(0, 1), size)

    def pixels(self, y: Tensor) -> Tensor:
        y = self.mix(linear(y, self.proj_in.weight.squeeze(2), self.proj_in.bias))
        return linear(y, self.proj_out.weight.squeeze(2), self.proj_out.bias)


class TemporalTransformer(TemporalLayer):
    """Two self-attentions over the frames of each pixel and a feed-forward. No positions: order is known only through
    the temporal convolutions."""

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        *,
        depth: int = 1,
        groups: int = GROUPS,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, heads * head_dim, groups=groups, zero_init=zero_init)
        inner = heads * head_dim
        self.transformer_blocks = nn.ModuleList(TransformerBlock(inner, heads, head_dim, None) for _ in range(depth))

    def mix(self, z: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            z = block.in_time(z)  # type: ignore[operator]
        return z


class TemporalMamba(TemporalLayer):
    """The paper's other layer over frames: a bidirectional state-space model of each pixel, in linear time.

    z + mamba_fwd(LN(z)) + mamba_bwd(LN(z), walked from the last frame), two independent Mamba-1 mixers. The paper
    says no more than "bidirectional" and "spatial positions in the batch", and no code of it is public: the form is
    our reading.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        groups: int = GROUPS,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, inner, groups=groups, zero_init=zero_init)
        self.norm1 = nn.LayerNorm(inner)
        self.mamba_fwd = Mamba(inner, d_state=d_state, d_conv=d_conv, expand=expand)
        self.mamba_bwd = Mamba(inner, d_state=d_state, d_conv=d_conv, expand=expand)

    def mix(self, z: Tensor) -> Tensor:
        u = self.norm1(z).transpose(1, 2).flatten(0, 1)
        y = self.mamba_fwd(u) + self.mamba_bwd(u, reverse=True)
        return z + y.unflatten(0, (z.shape[0], -1)).transpose(1, 2)


class TemporalConv(nn.Module):
    """x + four times [norm over all frames, SiLU, (dropout from the second on), convolution of three frames]."""

    def __init__(self, channels: int, dropout: float = 0.0, *, groups: int = GROUPS, zero_init: bool = True) -> None:
        super().__init__()
        self.dropout = dropout
        for i in range(1, 5):
            conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
            last = "2" if i == 1 else "3"  # the place after the dropout
            self.add_module(f"conv{i}", nn.ModuleDict({"0": nn.GroupNorm(groups, channels), last: conv}))
        zeroed(self.conv4["3"], zero_init)  # type: ignore[index, arg-type]

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(batch * frames, C, h, w) to the same."""
        y = x
        for i in range(1, 5):
            norm, conv = self.get_submodule(f"conv{i}").values()  # type: ignore[operator]
            y = F.silu(norm_over_frames(y, norm, frames))
            if i > 1 and self.training:
                y = F.dropout(y, self.dropout)
            y = convolve_frames(y, conv, frames)
        return x + y


def convolve_frames(x: Tensor, conv: nn.Conv3d, frames: int) -> Tensor:
    """A convolution over three frames, as one of two dimensions: (frames, pixels) are its rows and columns."""
    (height, width), channels = x.shape[2:], x.shape[1]
    rows = x.permute(0, 2, 3, 1).reshape(-1, frames, height * width, channels).permute(0, 3, 1, 2)
    y = F.conv2d(rows, conv.weight.squeeze(4), conv.bias, padding=(1, 0))
    return y.permute(0, 2, 3, 1).reshape(-1, height, width, y.shape[1]).permute(0, 3, 1, 2)


# -- residual block and sampling --------------------------------------------------------------------------------------


class ResBlock(Recomputed):
    """Two 3x3 convolutions of a frame with the time embedding between them, then a :class:`TemporalConv`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        dropout: float,
        *,
        temporal_dropout: float = 0.1,
        groups: int = GROUPS,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.in_layers = nn.ModuleDict(
            {"0": nn.GroupNorm(groups, channels), "2": nn.Conv2d(channels, out_channels, 3, padding=1)}
        )
        self.emb_layers = nn.ModuleDict({"1": Linear(embedding, out_channels)})
        out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1), zero_init)
        self.out_layers = nn.ModuleDict({"0": nn.GroupNorm(groups, out_channels), "3": out})
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        self.temporal_conv = TemporalConv(out_channels, temporal_dropout, groups=groups, zero_init=zero_init)

    def forward(self, x: Tensor, embedding: Tensor, frames: int, skip: Tensor | None = None) -> Tensor:
        """x (batch * frames, C, h, w), or two such parts of its channels; embedding (batch, width)."""
        e = self.emb_layers["1"](F.silu(embedding)).repeat_interleave(frames, dim=0)
        y = in_pieces(self.frames, x, e) if skip is None else in_pieces(self.frames, x, e, skip)
        return self.temporal_conv(y, frames)

    def frames(self, x: Tensor, e: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        y = self.in_layers["2"](F.silu(group_norm(x, self.in_layers["0"]))) + e[:, :, None, None]
        y = F.silu(group_norm(y, self.out_layers["0"]))
        if self.training:
            y = F.dropout(y, self.dropout)
        return self.skip_connection(x) + self.out_layers["3"](y)


class Downsample(nn.Module):
    """A convolution of stride 2: (N, C, h, w) to (N, C, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Every pixel four times, then a convolution: (N, C, h, w) to (N, C, 2 h, 2 w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self.frames, x)

    def frames(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# -- the condition encoders' transformer ------------------------------------------------------------------------------


class _PreNormAttention(nn.Module):
    """x + attention(LN(x)) over frames: two heads, each as wide as the input."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(dim)
        self.fn = nn.Module()
        self.fn.to_qkv = Linear(dim, 3 * heads * dim, bias=False)
        self.fn.to_out = nn.ModuleList([Linear(heads * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.fn.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (pixels, heads, frames, dim) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.training:
            return x + F.dropout(self.fn.to_out[0](y), self.dropout)
        return x + self.fn.to_out[0](y)


class _Gelu4(nn.Module):
    """A plain feed-forward, four times as wide inside; its keys are the original's."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.net = nn.ModuleDict({"0": nn.ModuleList([Linear(dim, 4 * dim)]), "2": Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.net["0"][0](x))  # type: ignore[index]
        return self.net["2"](F.dropout(y, self.dropout) if self.training else y)


class ConditionTransformer(nn.Module):
    """x = x + attention(LN(x)); x = x + ff(x), without a norm before ff, over the frames of every pixel."""

    def __init__(self, dim: int, depth: int = 1, dropout: float = 0.05) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([_PreNormAttention(dim, 2, dropout), _Gelu4(dim, dropout)]) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(pixels, frames, dim) to the same."""
        return in_pieces(self.pixels, x)

    def pixels(self, x: Tensor) -> Tensor:
        for attention, ff in self.layers:  # type: ignore[attr-defined]
            x = attention(x)
            x = x + ff(x)
        return x


def zeroed(module: nn.Module, zero: bool = True) -> nn.Module:
    """The module with its parameters at zero, so that what it ends begins as the identity."""
    if zero:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return module
