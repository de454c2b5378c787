"""UniAnimate's network: a video UNet that sees the reference as one more frame in front of the video.

Paper: Wang et al., "UniAnimate: Taming Unified Video Diffusion Models for Consistent Human Image Animation", arXiv
2406.01188. Original: ali-vilab/UniAnimate @ 643c963, ``tools/modules/unet/unet_unianimate.py``, no licence stated.
Differs from the original: ``temporal="mamba"`` is the paper's other layer over frames, which the released code lacks
(our reading, :class:`~zoo_generation.unianimate.layers.TemporalMamba`); conditions can be encoded once for all steps
of a sampling (:meth:`UNet.encode`); in inference frames and pixels go through what treats them singly in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear

from .layers import (
    ConditionTransformer,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TemporalMamba,
    TemporalTransformer,
    Upsample,
    group_norm,
    in_pieces,
    zeroed,
)

CONDITIONS = ("image", "local_image", "dwpose", "randomref", "randomref_pose")
LATENT = 4  #: channels of the reference's latent, whatever ``in_dim`` is
PROMPT_TOKENS = 77  #: of the empty prompt, where no features of it are given


class Conditions(NamedTuple):
    """What :meth:`UNet.encode` makes of the conditions; it depends on neither the step nor the noise."""

    frames: Tensor  #: (batch, concat_dim, frames, h, w), beside the latents
    reference: Tensor  #: (batch, concat_dim + 4, 1, h, w), the frame in front
    context: Tensor  #: (batch, tokens, context_dim), for the attention in space


class PixelEncoder(nn.ModuleDict):
    """Pictures to an eighth of their size: (N, 3, H, W) to (N, out, h, w), pooled to the configured half size."""

    def __init__(self, out: int, width: int, half: tuple[int, int]) -> None:
        super().__init__(
            {
                "0": nn.Conv2d(3, width, 3, padding=1),
                "3": nn.Conv2d(width, width, 3, stride=2, padding=1),
                "5": nn.Conv2d(width, out, 3, stride=2, padding=1),
            }
        )
        self.half = half

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self.frames, x)

    def frames(self, x: Tensor) -> Tensor:
        x = F.silu(self["0"](x))
        if x.shape[2:] != self.half:
            x = F.adaptive_avg_pool2d(x, self.half)
        return self["5"](F.silu(self["3"](x)))


class LatentEncoder(nn.ModuleDict):
    """The reference's latent, three convolutions of stride 1: (N, 4, h, w) to (N, out, h, w)."""

    def __init__(self, out: int, width: int) -> None:
        sizes = {"0": (LATENT, width), "2": (width, width), "4": (width, out)}
        super().__init__({k: nn.Conv2d(a, b, 3, padding=1) for k, (a, b) in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self["4"](F.silu(self["2"](F.silu(self["0"](x)))))


class ConditionDropout(nn.Module):
    """In training, whole conditions of some samples at zero, without rescaling. The reference's frame is never one.

    ``p``: how likely one is, drawn for each condition; ``zero`` and ``keep`` (batch,) are the samples that lose all
    conditions or none, drawn once a forward pass.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, zero: Tensor, keep: Tensor) -> Tensor:
        if not self.training:
            return x
        batch = x.shape[0]
        free = ~(zero | keep)
        count = (torch.rand(batch, device=x.device) < self.p).sum()
        order = torch.rand(batch, device=x.device).masked_fill(~free, 2.0).argsort().argsort()  # free ones come first
        dropped = (free & (order < count)) | zero
        return x.masked_fill(dropped.view(-1, *[1] * (x.dim() - 1)), 0.0)


def sinusoidal(t: Tensor, dim: int) -> Tensor:
    """(batch,) to (batch, dim): cosines, then sines, of t * 10000^(-i / half)."""
    half = dim // 2
    rates = torch.pow(10000.0, -torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class UNet(GradCheckpointing, nn.Module):
    """``v = model(x, t, image, local_image, dwpose, randomref)``: one step's prediction for all frames of a video.

    dim: channels of the first level, dim_mult: factors of the levels. context_dim: width of image and text features.
    attn_scales: levels (1, 1/2, 1/4 ...) with attention. num_heads, head_dim: inner width of the first layer over
    frames (all others are as wide as their level). concat_dim: channels of the encoded conditions. resolution: (width,
    height) of the video. video_compositions: which conditions there are (:data:`CONDITIONS`). temporal: the layer over
    frames, "transformer" (released) or "mamba" (d_state, d_conv, expand); temporal_attention=False leaves it out.
    misc_dropout, p_all_zero, p_all_keep: see :class:`ConditionDropout`; dropout, temporal_dropout, condition_dropout:
    of the residual blocks, their convolutions over frames and the conditions' transformers.
    adapter_transformer_layers: depth of the conditions' transformers. decoder_context_dim: 1024 in the original,
    whatever context_dim is. groups: of every GroupNorm, 32 in the original. zero_init=False begins with random weights
    where the original begins with zeros.
    """

    def __init__(
        self,
        in_dim: int = 4,
        dim: int = 320,
        out_dim: int = 4,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        num_heads: int | None = 8,
        head_dim: int = 64,
        attn_scales: Sequence[float] = (1 / 2, 1 / 4, 1 / 8),
        context_dim: int = 1024,
        num_tokens: int = 4,
        concat_dim: int = 8,
        resolution: Sequence[int] = (512, 768),
        video_compositions: Sequence[str] = CONDITIONS,
        temporal: str = "transformer",
        temporal_attention: bool = True,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        use_fps_condition: bool = False,
        dropout: float = 0.1,
        temporal_dropout: float = 0.1,
        condition_dropout: float = 0.05,
        misc_dropout: float = 0.5,
        p_all_zero: float = 0.1,
        p_all_keep: float = 0.1,
        adapter_transformer_layers: int = 1,
        decoder_context_dim: int | None = None,
        groups: int = 32,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        _check(dim, dim_mult, groups, in_dim, temporal, resolution, video_compositions)
        self.in_dim, self.dim, self.context_dim, self.num_tokens = in_dim, dim, context_dim, num_tokens
        self.out_dim, self.concat_dim, self.resolution = out_dim, concat_dim, tuple(resolution)
        self.head_dim, self.temporal = head_dim, temporal
        self.dropouts: dict[str, Any] = {"dropout": dropout, "temporal_dropout": temporal_dropout}
        self.common: dict[str, Any] = {"groups": groups, "zero_init": zero_init}
        self.video_compositions, self.temporal_attention = tuple(video_compositions), temporal_attention
        self.use_fps_condition, self.levels = use_fps_condition, len(dim_mult)
        self.p_all_zero, self.p_all_keep = p_all_zero, p_all_keep
        self.mixer: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.embedding = 4 * dim
        #: features of the empty prompt (1, tokens, context_dim), no part of the weights; None: zeros
        self.zero_y: Tensor | None = None

        self.time_embed = nn.ModuleDict({"0": Linear(dim, 4 * dim), "2": Linear(4 * dim, 4 * dim)})
        if use_fps_condition:
            last = zeroed(Linear(4 * dim, 4 * dim), zero_init)
            self.fps_embedding = nn.ModuleDict({"0": Linear(dim, 4 * dim), "2": last})
        self._make_encoders({"depth": adapter_transformer_layers, "dropout": condition_dropout})
        self.misc_dropout = ConditionDropout(misc_dropout)
        self._make_blocks(
            num_heads or dim // 32,
            [dim * m for m in dim_mult],
            num_res_blocks,
            set(attn_scales),
            1024 if decoder_context_dim is None else decoder_context_dim,
        )

    # -- construction

    def _make_encoders(self, options: dict[str, Any]) -> None:
        c, wide = self.concat_dim, 4 * self.concat_dim
        half = (self.resolution[1] // 2, self.resolution[0] // 2)
        if "image" in self.video_compositions:
            d = self.context_dim
            self.pre_image_condition = nn.ModuleDict({"0": Linear(d, d), "2": Linear(d, d * self.num_tokens)})
        for name in ("local_image", "dwpose"):
            if name in self.video_compositions:
                self.add_module(f"{name}_embedding", PixelEncoder(c, wide, half))
                self.add_module(f"{name}_embedding_after", ConditionTransformer(c, **options))
        if "randomref_pose" in self.video_compositions:
            self.randomref_pose2_embedding = PixelEncoder(c + LATENT, wide, half)
            self.randomref_pose2_embedding_after = ConditionTransformer(c + LATENT, **options)
        if "randomref" in self.video_compositions:
            self.randomref_embedding2 = LatentEncoder(c + LATENT, wide)
            self.randomref_embedding_after2 = ConditionTransformer(c + LATENT, **options)

    def _over_frames(self, channels: int, inner: int) -> list[nn.Module]:
        if not self.temporal_attention:
            return []
        if self.temporal == "mamba":
            return [TemporalMamba(channels, inner, **self.mixer, **self.common)]
        heads = inner // self.head_dim
        return [TemporalTransformer(channels, heads, self.head_dim, **self.common)]

    def _attentions(self, channels: int, context_dim: int) -> list[nn.Module]:
        heads = channels // self.head_dim
        space = SpatialTransformer(channels, heads, self.head_dim, context_dim, **self.common)
        return [space, *self._over_frames(channels, channels)]

    def _res(self, channels: int, out: int) -> ResBlock:
        return ResBlock(channels, out, self.embedding, **self.dropouts, **self.common)

    def _make_blocks(
        self, num_heads: int, widths: list[int], depth: int, attend: set[float], decoder_context: int
    ) -> None:
        first = nn.Conv2d(self.in_dim + self.concat_dim, self.dim, 3, padding=1)
        inner = num_heads * self.head_dim
        self.input_blocks = nn.ModuleList([nn.ModuleList([first, *self._over_frames(self.dim, inner)])])
        skips, channels, scale = [self.dim], self.dim, 1.0
        for level, width in enumerate(widths):
            for j in range(depth):
                attention = self._attentions(width, self.context_dim) if scale in attend else []
                self.input_blocks.append(nn.ModuleList([self._res(channels, width), *attention]))
                skips.append(width)
                channels = width
                if level < len(widths) - 1 and j == depth - 1:  # without residual blocks no level is made smaller
                    self.input_blocks.append(Downsample(width))
                    skips.append(width)
                    scale /= 2
        width = widths[-1]
        attention = self._attentions(width, self.context_dim)
        self.middle_block = nn.ModuleList([self._res(width, width), *attention, self._res(width, width)])
        self.output_blocks = nn.ModuleList()
        channels = width
        for level, width in reversed(list(enumerate(widths))):
            for j in range(depth + 1):
                attention = self._attentions(width, decoder_context) if scale in attend else []
                block = nn.ModuleList([self._res(channels + skips.pop(), width), *attention])
                channels = width
                if level > 0 and j == depth:
                    block.append(Upsample(width))
                    scale *= 2
                self.output_blocks.append(block)
        last = nn.Conv2d(width, self.out_dim, 3, padding=1)
        if self.common["zero_init"]:
            nn.init.zeros_(last.weight)
        self.out = nn.ModuleDict({"0": nn.GroupNorm(self.common["groups"], width), "2": last})

    # -- conditions

    def encode(
        self,
        size: Sequence[int],
        *,
        image: Tensor | None = None,
        local_image: Tensor | None = None,
        dwpose: Tensor | None = None,
        randomref: Tensor | None = None,
        zero_y: Tensor | None = None,
    ) -> Conditions:
        """The conditions of a video of ``size`` (batch, channels, frames, h, w), as :meth:`forward` takes them.

        image (batch, 1, context_dim): features of the reference. local_image (batch, 3, frames, H, W): the first
        frame, repeated. dwpose (batch, 3, frames + 1, H, W): drawn poses, the reference's in front where there is
        "randomref_pose" (else frames of them). randomref (batch, 4, >= 1, h, w): the reference's latent, of which the
        first frame counts. zero_y (1 or batch, tokens, context_dim): features of the empty prompt. Each may be None:
        the zeros that the network was trained to take for it; a dwpose without randomref drops its reference pose.
        """
        batch, _, frames, h, w = size
        given = {"image": image, "local_image": local_image, "dwpose": dwpose, "randomref": randomref}
        for name, value in given.items():
            if value is not None and name not in self.video_compositions:
                raise ValueError(f"{name} is given; this model has no such condition: {self.video_compositions}")
        posed = "randomref_pose" in self.video_compositions
        if randomref is not None and dwpose is None and posed:
            raise ValueError("randomref is given without dwpose, which holds the reference's pose in front; give both")
        like = self.time_embed["0"].weight
        zero, keep = self._drawn(batch, like)
        c = self.concat_dim
        beside = torch.zeros(batch, c, frames, h, w, dtype=like.dtype, device=like.device)
        reference = torch.zeros(batch, c + LATENT, 1, h, w, dtype=like.dtype, device=like.device)
        if local_image is not None:
            beside = beside + self.misc_dropout(self._pictures("local_image", local_image, size), zero, keep)
        if dwpose is not None:
            poses = dwpose[:, :, 1:] if posed else dwpose
            beside = beside + self.misc_dropout(self._pictures("dwpose", poses, size), zero, keep)
        if randomref is not None:
            if randomref.shape[0] != batch or randomref.shape[1] != LATENT or randomref.shape[3:] != (h, w):
                raise ValueError(
                    f"randomref is of shape {tuple(randomref.shape)}; expected ({batch}, {LATENT}, 1 or more, {h}, {w})"
                )
            y = over_pixels(self.randomref_embedding_after2, self.randomref_embedding2(randomref[:, :, 0])[:, None])
            if posed:
                assert dwpose is not None
                pose = self.randomref_pose2_embedding(dwpose[:, :, 0])[:, None]
                y = y + over_pixels(self.randomref_pose2_embedding_after, pose)
            reference = reference + y
        return Conditions(beside, reference, self._context(batch, image, zero_y, zero, keep))

    def _drawn(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples lose all conditions and which keep all, (batch,) each."""
        none = torch.zeros(batch, dtype=torch.bool, device=like.device)
        if not self.training:
            return none, none
        lost = (torch.rand(batch, device=like.device) < self.p_all_zero).sum()
        kept = (torch.rand(batch, device=like.device) < self.p_all_keep).sum()
        order = torch.rand(batch, device=like.device).argsort()
        return order < lost, (order >= lost) & (order < lost + kept)

    def _pictures(self, name: str, x: Tensor, size: Sequence[int]) -> Tensor:
        """(batch, 3, frames, H, W) to (batch, concat_dim, frames, h, w)."""
        batch, _, frames, h, w = size
        if x.shape[0] != batch or x.shape[1] != 3 or x.shape[2] != frames:
            more = name == "dwpose" and "randomref_pose" in self.video_compositions
            raise ValueError(
                f"{name} has {x.shape[0]} samples of {x.shape[2] + more} frames with {x.shape[1]} channels; expected "
                f"{batch} of {frames + more} with 3" + (", the reference's pose in front" if more else "")
            )
        y = self.get_submodule(f"{name}_embedding")(x.transpose(1, 2).flatten(0, 1))
        if y.shape[2:] != (h, w):
            raise ValueError(
                f"latents are {h} x {w} (h x w), and a model for videos of {self.resolution[0]} x {self.resolution[1]} "
                f"(W x H) has conditions of {y.shape[2]} x {y.shape[3]}; expected them equal: set resolution="
            )
        return over_pixels(self.get_submodule(f"{name}_embedding_after"), y.unflatten(0, (batch, -1)))

    def _context(self, batch: int, image: Tensor | None, zero_y: Tensor | None, zero: Tensor, keep: Tensor) -> Tensor:
        like = self.time_embed["0"].weight
        zero_y = self.zero_y if zero_y is None else zero_y
        if zero_y is None:
            zero_y = torch.zeros(1, PROMPT_TOKENS, self.context_dim, dtype=like.dtype, device=like.device)
        zero_y = zero_y.to(like).expand(batch, -1, -1)
        if image is None:
            return torch.cat([zero_y, torch.zeros_like(zero_y)[:, : self.num_tokens]], dim=1)
        y = self.pre_image_condition["2"](F.silu(self.pre_image_condition["0"](image)))
        y = self.misc_dropout(y.reshape(batch, self.num_tokens, self.context_dim), zero, keep)
        return torch.cat([zero_y, y], dim=1)

    # -- the network

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        image: Tensor | None = None,
        local_image: Tensor | None = None,
        dwpose: Tensor | None = None,
        randomref: Tensor | None = None,
        fps: Tensor | None = None,
        zero_y: Tensor | None = None,
        *,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """x (batch, in_dim, frames, h, w) latents, t (batch,) steps, fps (batch,); to (batch, out_dim, frames, h, w).

        image ... zero_y: see :meth:`encode`. conditions: what that gave, instead of them. Raises ValueError for
        shapes that do not fit.
        """
        batch, channels, frames, h, w = x.shape
        step = 2 ** sum(isinstance(block, Downsample) for block in self.input_blocks)
        if channels != self.in_dim or h % step or w % step:
            raise ValueError(
                f"x is of shape {tuple(x.shape)}; expected (batch, {self.in_dim}, frames, h, w), h and w multiples of "
                f"{step}"
            )
        if conditions is None:
            named = {"image": image, "local_image": local_image, "dwpose": dwpose, "randomref": randomref}
            conditions = self.encode(x.shape, **named, zero_y=zero_y)
        unified = self.unified(x, conditions)
        return self._body(unified, self.embed(t, fps).to(x.dtype), conditions.context, frames + 1, batch)

    def unified(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Latents beside conditions, behind the reference frame: (batch * (frames + 1), in_dim + concat_dim, h, w)."""
        y = torch.cat([conditions.reference.to(x), torch.cat([x, conditions.frames.to(x)], dim=1)], dim=2)
        return y.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def embed(self, t: Tensor, fps: Tensor | None = None) -> Tensor:
        """Steps (and frames a second) to (batch, 4 * dim)."""
        kind = self.time_embed["0"].weight.dtype
        e = self.time_embed["2"](F.silu(self.time_embed["0"](sinusoidal(t, self.dim).to(kind))))
        if self.use_fps_condition and fps is not None:
            e = e + self.fps_embedding["2"](F.silu(self.fps_embedding["0"](sinusoidal(fps, self.dim).to(kind))))
        return e

    def _body(self, x: Tensor, e: Tensor, context: Tensor, frames: int, batch: int) -> Tensor:
        skips = []
        for block in self.input_blocks:
            x = block(x) if isinstance(block, Downsample) else self._chain(block, x, e, context, frames)
            skips.append(x)
        x = self._chain(self.middle_block, x, e, context, frames)
        for block in self.output_blocks:
            x = self._chain(block, x, e, context, frames, skips.pop())
        x = x.unflatten(0, (batch, frames))[:, 1:].flatten(0, 1)  # what the reference became is not wanted
        x = in_pieces(self._head, x.contiguous(memory_format=torch.channels_last))
        return x.unflatten(0, (batch, -1)).transpose(1, 2)

    def _head(self, x: Tensor) -> Tensor:
        return self.out["2"](F.silu(group_norm(x, self.out["0"])))

    def _chain(
        self, block: nn.Module, x: Tensor, e: Tensor, context: Tensor, frames: int, skip: Tensor | None = None
    ) -> Tensor:
        for layer in block:  # type: ignore[attr-defined]
            if isinstance(layer, ResBlock):
                x, skip = layer(x, e, frames, skip), None
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, (TemporalTransformer, TemporalMamba)):
                x = layer(x, frames)
            else:
                x = layer(x)
        return x


def over_pixels(transformer: nn.Module, y: Tensor) -> Tensor:
    """(batch, frames, c, h, w) through a transformer over frames, to (batch, c, frames, h, w)."""
    batch, _, _, h, w = y.shape
    z = transformer(y.permute(0, 3, 4, 1, 2).flatten(0, 2))  # (pixels, frames, c)
    return z.unflatten(0, (batch, h, w)).permute(0, 4, 3, 1, 2)


def _check(
    dim: int,
    dim_mult: Sequence[int],
    groups: int,
    in_dim: int,
    temporal: str,
    resolution: Sequence[int],
    video_compositions: Sequence[str],
) -> None:
    widths = [dim, *(dim * m for m in dim_mult)]
    if not dim_mult or any(w % groups for w in widths):
        raise ValueError(
            f"dim {dim} times dim_mult {list(dim_mult)} is {widths}; expected multiples of {groups} groups"
        )
    if in_dim != LATENT:
        raise ValueError(f"in_dim is {in_dim}; the reference frame has {LATENT} channels more than the conditions, 4")
    if temporal not in ("transformer", "mamba"):
        raise ValueError(f"temporal is {temporal!r}; expected 'transformer' or 'mamba'")
    if len(resolution) != 2 or min(resolution) < 8:
        raise ValueError(f"resolution is {resolution}; expected (width, height) in pixels, 8 or more")
    unknown = [name for name in video_compositions if name not in CONDITIONS]
    if unknown:
        raise ValueError(f"video_compositions holds {unknown[0]!r}; expected some of {', '.join(CONDITIONS)}")
