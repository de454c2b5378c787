"""Convolutions of large images by bands of rows, in inference on a CPU: what lies around them stays in cache.

``after(act(conv(before(x))))`` with ``before`` and ``after`` row by row: the map that the convolution reads, and the
one that it writes, exist a band at a time. Layout is (batch, height, width, channels) everywhere.
Order of reading: one convolution with what follows it fused (:func:`convolve`), then :func:`by_bands`, then
:func:`conv_chain` for modules, which also says when; last, a convolution with its batch norm (:func:`conv_norm`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels.runtime import empty

from .inference import results_only, settled, untouched
from .linear import ACTIVATIONS, activation_name

#: positions of a band of results, about; bands of 1000 to 8000 are within 10 % of each other
BAND = 2048
Rows = Callable[[Tensor], Tensor]


def plain(conv: nn.Module, x: Tensor) -> bool:
    """Whether ``conv`` may be computed without calling it: an ordinary convolution in eager inference, unwatched."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.dilation == (1, 1)
        and x.dtype == conv.weight.dtype
        and not torch.is_grad_enabled()
        and results_only(x, conv.weight)
        and untouched(conv)
    )


@functools.cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether torch's own convolution is oneDNN's here, so that fusing changes no library."""
    found = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return found and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def convolve(conv: nn.Conv2d, x: Tensor, act: nn.Module | None = None, *, rows_padded: bool = False) -> Tensor:
    """``act(conv(x))`` on (batch, height, width, channels), in one step where oneDNN has the activation.

    rows_padded: x has the zeros above and below already. For a :func:`plain` convolution.
    """
    vertical, horizontal = conv.padding  # type: ignore[misc]
    padding = (0 if rows_padded else int(vertical), int(horizontal))
    x = x.permute(0, 3, 1, 2)
    name = None if act is None or not untouched(act) else activation_name(act)
    if name is not None and _fuses(x.dtype):
        attribute, algorithm, _ = ACTIVATIONS[name]
        y = torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups, attribute, [], algorithm
        )
        return y.permute(0, 2, 3, 1)
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups).permute(0, 2, 3, 1)
    return y if act is None else act(y)


class _Source:
    """The rows that a convolution reads for a band of results: ``before`` of x's, zeros beyond the image.

    Bands are asked for from the top down; rows that two of them share are made once. x: (1, height, width, channels).
    """

    def __init__(self, x: Tensor, before: Rows | None, most: int) -> None:
        self.x, self.before, self.most = x, before, most
        self.kept: Tensor | None = None  # room for the ``most`` rows of a band; rows first to last - 1 lie in it
        self.first = self.last = 0

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1, some of which may lie above or below the image."""
        height = self.x.shape[1]
        if self.before is None:
            band = self.x[:, max(first, 0) : min(last, height)].contiguous()
            above, below = max(-first, 0), max(last - height, 0)
            return F.pad(band, (0, 0, 0, 0, above, below)) if above or below else band
        shared = max(self.last - first, 0) if self.kept is not None else max(-first, 0)
        start, stop = first + shared, min(last, height)
        new = self.before(self.x[:, start:stop]) if start < stop else None
        if self.kept is None:
            assert new is not None
            self.kept = new.new_zeros(1, self.most, *new.shape[2:])
        elif shared:
            end = self.last - self.first
            self.kept[:, :shared] = self.kept[:, end - shared : end].clone()
        if new is not None:
            self.kept[:, shared : shared + new.shape[1]] = new
            shared += new.shape[1]
        self.kept[:, shared : last - first] = 0
        self.first, self.last = first, last
        return self.kept[:, : last - first]


def by_bands(
    conv: nn.Conv2d,
    x: Tensor,
    *,
    before: Rows | None = None,
    act: nn.Module | None = None,
    after: Callable[[Tensor], Tensor | tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """``after(act(conv(before(x))))`` for a :func:`plain` convolution, a band of rows at a time.

    x: (batch, height, width, channels); before, after: functions that treat every position by itself, shapes (..., C).
    Returns what ``after`` returns, as a tuple of maps (batch, height', width', channels').
    """
    batch, height, width = x.shape[:3]
    kernel, stride, padding = (int(t[0]) for t in (conv.kernel_size, conv.stride, conv.padding))
    out_height, out_width = (
        (size + 2 * int(p) - int(k)) // int(s) + 1
        for size, p, k, s in zip((height, width), conv.padding, conv.kernel_size, conv.stride, strict=True)
    )
    step = max(1, BAND // max(out_width, 1))
    maps: list[Tensor] = []
    for i in range(batch):
        source = _Source(x[i : i + 1], before, (step - 1) * stride + kernel)
        for top in range(0, out_height, step):
            bottom = min(top + step, out_height)
            first = top * stride - padding
            y = convolve(conv, source.rows(first, first + (bottom - top - 1) * stride + kernel), act, rows_padded=True)
            found = y if after is None else after(y)
            found = found if isinstance(found, tuple) else (found,)
            if not maps:
                maps = [empty(batch, out_height, out_width, t.shape[-1], dtype=t.dtype) for t in found]
            for whole, part in zip(maps, found, strict=True):
                whole[i : i + 1, top:bottom] = part
    return tuple(maps)


def conv_chain(
    conv: nn.Module,
    x: Tensor,
    *,
    before: Rows | None = None,
    act: nn.Module | None = None,
    after: Rows | None = None,
    watched: Sequence[nn.Module] = (),
) -> Tensor:
    """``after(act(conv(before(x))))``, by bands where that is allowed and worth it, else each called once.

    ``before`` and ``after`` may be modules or functions that call modules; name those in ``watched`` (modules given
    themselves are known): a hook on one of them sees whole maps.
    """
    known = [m for m in (act, before, after) if isinstance(m, nn.Module)]
    large = not torch.compiler.is_compiling() and x.dim() == 4 and x.shape[:3].numel() >= 2 * BAND
    if large and plain(conv, x) and settled(conv, *known, *watched):
        return by_bands(conv, x, before=before, act=act, after=after)[0]  # type: ignore[arg-type]
    y = conv(x if before is None else before(x))
    y = y if act is None else act(y)
    return y if after is None else after(y)


def conv_norm(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, *, add: Tensor | None = None, act: nn.Module | None = None
) -> Tensor:
    """``act(norm(conv(x)) + add)`` on (batch, channels, height, width), in one step in inference.

    The norm's statistics are folded into the convolution's weights, in float32, which takes the time of reading them.
    """
    rows = x.permute(0, 2, 3, 1)
    name = None if act is None else activation_name(act)
    if (
        not plain(conv, rows)
        or type(norm) is not nn.BatchNorm2d
        or norm.running_var is None
        or norm.training
        or not untouched(norm, *([] if act is None else [act]))
        or not _fuses(x.dtype)
        or (act is not None and name is None)
        or (add is not None and add.dtype != x.dtype)
    ):
        y = norm(conv(x))
        y = y if add is None else y + add
        return y if act is None else act(y)
    weight, bias = folded(conv, norm)
    attribute, algorithm, _ = ACTIVATIONS[name] if name else ("none", "", None)
    where = (conv.padding, conv.stride, conv.dilation, conv.groups)
    x = x.contiguous(memory_format=torch.channels_last)
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *where, attribute, [], algorithm)
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, add.contiguous(memory_format=torch.channels_last), weight, bias, *where, "add", 1.0,
        None if name is None else attribute, [], algorithm,
    )  # fmt: skip


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what ``norm(conv(x))`` does in evaluation mode."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var.float() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.float()
    bias = -norm.running_mean.float() if conv.bias is None else conv.bias.float() - norm.running_mean.float()
    bias = bias * scale
    bias = bias if norm.bias is None else bias + norm.bias.float()
    weight = conv.weight.float() * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
