"""The parts of mmMamba: decoder layers and stacks of them, tiles as tokens, the pixel shuffle.

Original: hustvl/mmMamba @ 85143d0, MIT (``hovle/modeling_internlm2.py``, ``hovle/modeling_holistic_embedding.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Recomputed, RMSNorm
from zoo.layers.linear import linear

from .mmmamba_mixers import LayerState, Mamba2Attention, Phases, Rotary, SoftmaxAttention

#: Activations of the feed-forward layers, by transformers' names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class FeedForward(nn.Module):
    """``w2(act(w1 x) * w3 x)``."""

    def __init__(self, d_model: int, hidden: int, act: str = "silu") -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"the activation is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.act = act
        self.w1, self.w3 = Linear(d_model, hidden, bias=False), Linear(d_model, hidden, bias=False)
        self.w2 = Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.act in ("silu", "swish"):
            return self.w2(linear(x, self.w1.weight, act="silu") * self.w3(x))
        return self.w2(ACTIVATIONS[self.act](self.w1(x)) * self.w3(x))


class DecoderLayer(Recomputed):
    """``x + attention(RMSNorm(x))``, then ``x + feed_forward(RMSNorm(x))``."""

    def __init__(
        self, d_model: int, hidden: int, eps: float, attention: SoftmaxAttention | Mamba2Attention, act: str = "silu"
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model, eps)
        self.feed_forward = FeedForward(d_model, hidden, act)

    def forward(
        self,
        x: Tensor,
        phases: Phases | None,
        state: LayerState | None = None,
        before: int = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, D) to the same. ``phases``, ``padding``: of softmax layers."""
        n = self.attention_norm(x)
        if isinstance(self.attention, SoftmaxAttention):
            assert phases is not None
            x = x + self.attention(n, phases, state=state, before=before, padding=padding)
        else:
            x = x + self.attention(n, state=state)
        return self.after_attention(x)

    def after_attention(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(self.ffn_norm(x))

    def step(self, x: Tensor, phases: Phases | None, state: LayerState, before: int) -> Tensor:
        """(batch, D) to the same."""
        n = self.attention_norm(x)
        if isinstance(self.attention, SoftmaxAttention):
            assert phases is not None
            x = x + self.attention(n[:, None], phases, state=state, before=before)[:, 0]
        else:
            x = x + self.attention.step(n, state)
        return self.after_attention(x)


#: How a stack runs one of its layers: (layer, x, phases, padding) to the next x. Distillation passes its own.
Run = Callable[[DecoderLayer, Tensor, Phases | None, Tensor | None], Tensor]


class Stack(nn.Module):
    """Decoder layers of one kind of sizes. ``softmax``: the indices of the layers that keep softmax attention.

    ``rope_theta``, ``rope_scaling``, ``max_positions``: of their rotary phases (:class:`Rotary`); ``mixer``: the flags
    of the others (:class:`Mamba2Attention`); ``bias``: of the attention's projections; ``act``: of the feed-forward
    layers, a key of ``ACTIVATIONS``.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        softmax: Sequence[int] = (),
        eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        max_positions: int = 32768,
        mixer: Mapping[str, Any] | None = None,
        bias: bool = False,
        act: str = "silu",
    ) -> None:
        super().__init__()
        outside = [i for i in softmax if not 0 <= i < layers]
        if outside:
            raise ValueError(f"softmax names the layers {outside}; this stack has layers 0 to {layers - 1}")
        self.layers = nn.ModuleList(
            DecoderLayer(
                d_model,
                hidden,
                eps,
                SoftmaxAttention(d_model, heads, kv_heads, bias=bias)
                if i in softmax
                else Mamba2Attention(d_model, heads, kv_heads, bias=bias, **(mixer or {})),
                act,
            )
            for i in range(layers)
        )
        self.rotary = Rotary(d_model // heads, rope_theta, rope_scaling, max_positions)
        self.has_softmax = bool(softmax)

    def phases(self, positions: Tensor | None, before: int, length: int, device: torch.device) -> Phases:
        if positions is None:
            positions = torch.arange(before, before + length, device=device)[None]
        return self.rotary(positions, before + length)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        state: list[LayerState] | None = None,
        before: int = 0,
        run: Run | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, D) to the same. ``positions`` (1 or batch, length); default: behind ``before`` tokens;
        ``padding``: as in :func:`softmax_heads`."""
        needed = self.has_softmax or run is not None
        phases = self.phases(positions, before, x.shape[1], x.device) if needed else None
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            if run is not None:
                x = run(layer, x, phases, padding)
            else:
                own = None if state is None else state[i]
                x = layer(x, phases, state=own, before=before, padding=padding)
        return x

    def step(self, x: Tensor, state: list[LayerState], before: int) -> Tensor:
        """(batch, D) to the same."""
        phases = self.phases(None, before, 1, x.device) if self.has_softmax else None
        for layer, own in zip(self.layers, state, strict=True):
            x = layer.step(x, phases, own, before)  # type: ignore[operator]
        return x

    def init_state(self, batch: int) -> list[LayerState]:
        return [layer.attention.init_state(batch) for layer in self.layers]  # type: ignore[union-attr, operator]


class VisionEmbeddings(nn.Module):
    """Patches of a tile as tokens, with a place: (tiles, channels, H, W) to (tiles, patches, D), row by row.

    The places of another tile size are those of ``image_size``, bicubically resized. ``class_embedding`` and the first
    place belong to the format and are not used.
    """

    def __init__(self, d_model: int, image_size: int, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, d_model))
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.grid**2, d_model))
        self.patch_embedding = nn.Conv2d(in_chans, d_model, patch_size, stride=patch_size)

    def places(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, D)."""
        own = self.position_embedding[:, 1:]
        if rows == columns == self.grid:
            return own
        square = own.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(own.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.places(*patches.shape[2:])


def pixel_shuffle(x: Tensor, ratio: float) -> Tensor:
    """Neighbouring tokens of a square grid as one, (n, l, c) to (n, l ratio^2, c / ratio^2): the original's order."""
    n, length, c = x.shape
    side = int(length**0.5)
    low = int(side * ratio)
    if side * side != length or low < 1 or round(low / ratio) != side:
        raise ValueError(
            f"{length} patches a tile do not form a square that a pixel shuffle by {ratio} divides; expected tiles as "
            f"wide as high, with a multiple of {round(1 / ratio)} patches a side"
        )
    x = x.reshape(n, side, low, int(c / ratio)).permute(0, 2, 1, 3)
    x = x.reshape(n, low, low, int(c / ratio**2)).permute(0, 2, 1, 3)
    return x.reshape(n, low * low, -1)
