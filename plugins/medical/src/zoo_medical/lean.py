"""Residual convolution blocks in little memory: inference on a CPU.

At full size one feature map of a 128^3 patch takes hundreds of megabytes, and the peak of a network is the number of
them alive at once. Here maps lie channel-last, where oneDNN's convolutions read and write without copies of their own
(and run about 1.5 times as fast); norms and activations happen where a map lies, by blocks that stay in the cache; and
convolutions that keep the size write over the maps they read, slab by slab. The numbers are those of the modules'
definitions to rounding. Nothing here has gradients: :func:`lean` says when it may be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.inference import results_only, untouched
from zoo.layers.linear import linear

#: values of a block of rows that is worked on in the cache
BLOCK = 1 << 18
#: values of a slab that a convolution reads at once, and the least number of its layers
SLAB, LAYERS = 1 << 24, 8
FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


def lean(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module(x)`` may go these ways: a plain float32 tensor on the CPU of which only the result is wanted.

    Not with hooks on the module or on one inside it, for they would see maps that are written over, or not be called;
    not with modules of other packages inside (adapters, quantised layers); not where the reference operators are
    forced, which stand for the definitions.
    """
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and results_only(x, *module.parameters())
        and untouched(*module.modules())
        and all(type(m).__module__.partition(".")[0] in ("torch", "zoo", "zoo_medical") for m in module.modules())
        and all(p.dtype == torch.float32 for p in module.parameters())
    )


class Norm(NamedTuple):
    """An instance norm: its eps and, where it has them, its parameters (C,)."""

    eps: float = 1e-5
    weight: Tensor | None = None
    bias: Tensor | None = None


def norm_of(norm: Any) -> Norm:
    """What an instance norm without running statistics holds."""
    return Norm(norm.eps, norm.weight, norm.bias)


def channel_last(x: Tensor) -> Tensor:
    """(batch, C, *size) with the channels innermost in memory; x itself where it lies so."""
    if x.shape[1] == 1 and x.stride(1) != 1:  # either order counts as contiguous, but convolutions look at the strides
        return _empty(x.shape).copy_(x)
    return x.contiguous(memory_format=FORMAT[x.dim()])


def _empty(shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, memory_format=FORMAT[len(shape)])


def pieces(length: int, width: int) -> list[slice]:
    """``length`` rows of ``width`` values in pieces that stay in the cache."""
    step = max(BLOCK // max(width, 1), 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def rows(x: Tensor) -> Tensor:
    """A channel-last map (batch, C, *size) as (batch, positions, C), without a copy."""
    return x.movedim(1, -1).flatten(1, -2)


def convolve(x: Tensor, conv: Any) -> Tensor:
    """``conv(x)``, channel-last."""
    x = channel_last(x)
    if _pointwise(conv):
        return linear(rows(x), conv.weight.flatten(1), conv.bias).transpose(1, 2).unflatten(2, x.shape[2:])
    return channel_last(conv(x))


def _pointwise(conv: Any) -> bool:
    """Torch has a slow way of its own for these; they are a matrix product of the rows."""
    return conv.weight[0, 0].numel() == 1 and set(conv.stride) == {1} and conv.groups == 1 and not conv.transposed


def enlarge(x: Tensor, conv: Any) -> Tensor:
    """A transposed convolution whose kernel is its stride, without padding or bias: every position becomes a cell."""
    x = channel_last(x)
    batch, channels, *size = x.shape
    cell = tuple(conv.stride)
    width = conv.weight.shape[1]
    weight = conv.weight.movedim(0, -1).movedim(0, -2).reshape(-1, channels)  # (cell, width), channels
    answer = _empty((batch, width, *(s * c for s, c in zip(size, cell, strict=True))))
    parts = [n for s, c in zip(size, cell, strict=True) for n in (s, c)]
    written = answer.movedim(1, -1).view(batch, *parts, width)
    axes = range(len(size))
    order = [*(2 * a for a in axes), *(2 * a + 1 for a in axes), 2 * len(size)]  # positions, then the cell's own axes
    step = max(4 * BLOCK // (x[0, 0, 0].numel() * len(weight)), 1)
    for b in range(batch):
        for start in range(0, size[0], step):
            source = x[b, :, start : start + step].movedim(0, -1)
            cells = linear(source, weight).view(*source.shape[:-1], *cell, width)
            written[b, start : start + step].permute(order).copy_(cells)
    return answer


def convolve_onto(maps: Sequence[Tensor], convs: Sequence[Any], onto: Sequence[Tensor]) -> None:
    """Convolutions that keep the size, of ``maps`` side by side (as channels); the k-th result is written to
    ``onto[k]``, which may be one of the maps.

    Slab by slab along the first axis of space: the layers that a slab shares with the next one are kept before they
    are written over.
    """
    batch, depth = maps[0].shape[0], maps[0].shape[2]
    halo = max(conv.weight.shape[2] // 2 for conv in convs)
    channels = sum(m.shape[1] for m in maps)
    layer = channels * maps[0][0, 0, 0].numel()
    step = min(max(SLAB // max(layer, 1), LAYERS), depth)
    slab = _empty((1, channels, step + 2 * halo, *maps[0].shape[3:]))
    for b in range(batch):
        slab[:, :, :halo] = 0  # what lies before the first layer
        for start in range(0, depth, step):
            stop = min(start + step, depth)
            last = min(stop + halo, depth)
            first = 0
            for m in maps:
                slab[0, first : first + m.shape[1], halo : halo + last - start] = m[b, :, start:last]
                first += m.shape[1]
            slab[:, :, halo + last - start : 2 * halo + stop - start] = 0  # what lies behind the last
            for conv, target in zip(convs, onto, strict=True):
                side = conv.weight.shape[2] // 2
                part = slab[:, :, halo - side : halo + stop - start + side]
                target[b : b + 1, :, start:stop] = _layers(part, conv)
            slab[:, :, :halo] = slab[:, :, stop - start : stop - start + halo].clone()


def _layers(x: Tensor, conv: Any) -> Tensor:
    """``conv(x)`` without padding along the first axis of space."""
    if _pointwise(conv):
        return convolve(x, conv)
    run = F.conv2d if x.dim() == 4 else F.conv3d
    return run(x, conv.weight, conv.bias, 1, (0, *(k // 2 for k in conv.weight.shape[3:])))  # type: ignore[operator]


def normalise(
    x: Tensor,
    norm: Norm,
    *,
    onto: Tensor | None = None,
    add: Tensor | None = None,
    add_norm: Norm | None = None,
    slope: float | None = None,
) -> Tensor:
    """``leaky_relu(norm(x) + add_norm(add), slope)`` of channel-last maps, written to ``onto`` or over x.

    ``add`` None adds nothing, ``add_norm`` None adds it as it is; ``slope`` None leaves the activation out, 0 is ReLU.
    """
    F._verify_spatial_size(x.size())  # type: ignore[attr-defined]
    target = x if onto is None else onto
    for b in range(x.shape[0]):
        source, written = rows(x)[b], rows(target)[b]
        scale, shift = _scale_and_shift(source, norm)
        added = None if add is None else rows(add)[b]
        again = None if added is None or add_norm is None else _scale_and_shift(added, add_norm)
        for piece in pieces(*source.shape):
            block = torch.addcmul(shift, source[piece], scale, out=written[piece])
            if added is not None:
                other = added[piece]
                block.add_(other if again is None else torch.addcmul(again[1], other, again[0]))
            if slope is not None:
                F.leaky_relu_(block, slope)
    return target


def _scale_and_shift(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(positions, C) to the (C,) by which an instance norm multiplies and adds.

    Squares are summed around the mean of the first block, so that a large mean costs no digits.
    """
    n, channels = x.shape
    cut = pieces(n, channels)
    middle = x[cut[0]].mean(0)
    total = torch.zeros(2, channels, dtype=torch.float64)
    scratch = torch.empty(cut[0].stop, channels)
    for piece in cut:
        d = torch.sub(x[piece], middle, out=scratch[: piece.stop - piece.start])
        total[0] += d.sum(0)
        total[1] += d.square_().sum(0)
    mean = total[0] / n
    scale = (total[1] / n - mean * mean + norm.eps).rsqrt()
    mean = mean + middle
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale.float(), shift.float()


def residual(
    maps: Sequence[Tensor],
    convs: tuple[Any, Any, Any | None],
    norms: tuple[Norm, Norm, Norm | None],
    slope: float,
    *,
    owned: Sequence[bool],
) -> Tensor:
    """``act(norm(conv2(act(norm(conv1 x)))) + norm(shortcut x))`` of ``maps`` side by side, channel-last.

    ``convs``, ``norms``: of conv1, conv2 and the shortcut; no convolution is the identity, no norm none. ``owned``:
    which maps nobody else reads; they are written over where they have the result's size.
    """
    conv1, conv2, shortcut = convs
    if len(maps) == 1:
        y = convolve(maps[0], conv1)
        other = maps[0] if shortcut is None else convolve(maps[0], shortcut)
    else:
        assert shortcut is not None
        width = conv1.weight.shape[0]
        free = [m for m, mine in zip(maps, owned, strict=True) if mine and m.shape[1] == width]
        shape = (maps[0].shape[0], width, *maps[0].shape[2:])
        y, other = (free.pop(0) if free else _empty(shape) for _ in range(2))
        convolve_onto(maps, (conv1, shortcut), (y, other))
    normalise(y, norms[0], slope=slope)
    convolve_onto([y], [conv2], [y])
    return normalise(y, norms[1], add=other, add_norm=norms[2], slope=slope)
