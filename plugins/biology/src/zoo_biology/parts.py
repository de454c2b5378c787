"""The small parts of an xLSTM: norms, block-diagonal products, the short convolution, the gated feed-forward layer.

Source: Beck et al., "xLSTM", arXiv 2405.04517, appendix A; NX-AI/xlstm ``xlstm/components``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo_kernels
from zoo.layers.inference import untouched
from zoo.layers.linear import Linear
from zoo_kernels import causal_conv1d, causal_conv1d_step

EPS = 1e-5


def rounded_width(d_model: int, factor: float, multiple: int = 64, up: bool = True) -> int:
    """``factor * d_model`` rounded to a multiple, up or down: the inner width of a layer."""
    count = factor * d_model / multiple
    width = int((math.ceil(count) if up else math.floor(count)) * multiple)
    if width < 1:
        raise ValueError(
            f"a width of {factor} * {d_model} rounded {'up' if up else 'down'} to a multiple of {multiple} is {width}; "
            "expected at least 1"
        )
    return width


def small_init(weight: Tensor, d_model: int) -> None:
    """N(0, 2 / (5 d)): embeddings and what widens."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * d_model)))


def narrow_init(weight: Tensor, d_model: int, num_blocks: int) -> None:
    """N(0, (2 / (blocks sqrt(d)))^2): what leads back to the residual stream."""
    nn.init.normal_(weight, std=2 / num_blocks / math.sqrt(d_model))


def few_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, whatever it is; for up to four rows, as decoding has them, at the speed of reading weights."""
    if type(layer) in (nn.Linear, Linear) and x.shape[0] <= 4 and untouched(layer):
        return zoo_kernels.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return layer(x)


class LayerNorm(nn.Module):
    """Layer norm without a bias; the weight is stored as its distance from 1, as the originals store it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, None, EPS)


class HeadNorm(LayerNorm):
    """(..., heads, headdim) to (..., heads * headdim): every head normed by itself; weights as in LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], None, None, EPS).flatten(-2) * (1 + self.weight)


class HeadwiseLinear(nn.Module):
    """A block-diagonal product: channels in ``heads`` equal groups, a matrix (out, in) for each.

    weight: (heads, width / heads, width / heads); bias: (width,) or None.
    """

    def __init__(self, width: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} blocks")
        self.weight = nn.Parameter(torch.empty(heads, width // heads, width // heads))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return headwise(x, self.weight, self.bias)


def headwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., heads * in) by a matrix a head, weight (heads, out, in), to (..., heads * out)."""
    heads, _, inside = weight.shape
    y = torch.einsum("...hi,hoi->...ho", x.unflatten(-1, (heads, inside)), weight).flatten(-2)
    return y if bias is None else y + bias


class ShortConv(nn.Module):
    """Depthwise convolution and SiLU, (batch, length, channels) to the same.

    ``causal=False``: the window lies around the row as torch's padding "same" puts it (for an even width one row more
    behind than ahead of it in reading order: 1 before, 2 after for width 4).
    """

    def __init__(self, channels: int, width: int = 4, causal: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution of width {width}; expected 1 or more")
        self.width, self.causal = width, causal
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self,
        x: Tensor,
        *,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """``reverse``: as on the flipped sequence, flipped back. ``state`` (batch, width, channels) is moved on."""
        if self.causal and self.width <= 8:
            keep = state is not None
            y, last = causal_conv1d(
                x, self.weight, self.bias, activation="silu", reverse=reverse, resets=resets, lengths=lengths,
                initial_state=state, return_final_state=keep,
            )  # fmt: skip
            if state is not None:
                assert last is not None
                state.copy_(last.detach())
            return y
        if state is not None or resets is not None or lengths is not None:
            raise ValueError(
                f"a convolution of width {self.width}{'' if self.causal else ' that looks ahead'} takes no state, "
                "resets or lengths; only causal ones of width 1 to 8 do"
            )
        before = self.width - 1 if self.causal else (self.width - 1) // 2
        rows = x.flip(1) if reverse else x
        rows = F.pad(rows.transpose(1, 2), (before, self.width - 1 - before))
        y = F.silu(F.conv1d(rows, self.weight[:, None], self.bias, groups=len(self.bias))).transpose(1, 2)
        return y.flip(1) if reverse else y

    def init_state(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.width, self.weight.shape[0])

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One row (batch, channels); ``state`` moves on in place."""
        return causal_conv1d_step(x, self.weight, self.bias, state=state, activation="silu")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu^2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "selu": F.selu,
}


class GatedFeedForward(nn.Module):
    """``down(act(a) * b)`` with ``a, b`` the halves of ``up(x)``."""

    def __init__(
        self,
        d_model: int,
        proj_factor: float = 1.3,
        act: str = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
        round_up: bool = True,
        multiple: int = 64,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
        width = rounded_width(d_model, proj_factor, multiple, round_up)
        self.act = act
        self.up = Linear(d_model, 2 * width, bias=bias)
        self.down = Linear(width, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)
        small_init(self.up.weight, d_model)
        narrow_init(self.down.weight, d_model, num_blocks)
        for layer in (self.up, self.down):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.dropout(self.down(ACTIVATIONS[self.act](a) * b))
