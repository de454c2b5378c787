"""Local groups of points: each centre's neighbours through a small network, and the maximum over them.

A group's rows are (batch, centres, k, features). With the published sizes they are by far the largest tensor of the
network, and everything done to them is done row by row; so on a CPU, where only the result is wanted, they are made a
few centres at a time and never lie in memory together, and their first layer, which is linear in a neighbour and in its
centre, is applied to the points before they are gathered: k times less work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.inference import results_only, untouched
from zoo.layers.linear import linear
from zoo_kernels import grouped_mlp, runtime

from .geometry import farthest_point_sample, gather, nearest_neighbours
from .layers import ConvNormAct, ResidualStack, activate, conv_norm, folded, folds, rowwise, stack_rows, stacked_weights

#: Numbers (rows of groups times their widest features) that are worked on at once, and the fewest rows.
BLOCK, ROWS = 1 << 18, 1024
#: The first layer is applied before gathering where features are no more than so many times the spread of the
#: differences between them: beyond, subtracting afterwards costs digits.
APART = 128.0
#: Instruction sets for which one operator takes a stage's groups from the gathering to the maximum.
FUSED = runtime.OWN_PRODUCTS
#: A sum of squared differences comes from sums of their terms where it is no less than this part of them.
CANCELLED = 64.0


class Groups(NamedTuple):
    """Centres and their neighbours in a cloud, by number."""

    x: Tensor  #: (B, N, C [+ 3]): all points' features [and coordinates]
    centres: Tensor  #: (B, S, C [+ 3]): those of the centres
    index: Tensor  #: (B, S, k): the neighbours
    kept: Tensor | None  #: (B, S): the centres; None: all points


class Grouper(nn.Module):
    """Subsample by farthest points (order kept), gather k neighbours, normalise each cloud's groups by one scale.

    ``normalize``: "anchor" (minus the centre's own features), "center" (minus the mean of the group) or None.
    Parameters (with a normalisation): ``affine_alpha``, ``affine_beta`` (1, 1, 1, channels [+ 3]).
    Source: PointMLP, arXiv 2202.07123, section 3.3.
    """

    def __init__(
        self,
        channels: int,
        reducer: int,
        k: int,
        *,
        stride: int = 1,
        use_xyz: bool = True,
        normalize: str | None = "anchor",
    ) -> None:
        super().__init__()
        self.reducer, self.k, self.stride, self.use_xyz = reducer, k, stride, use_xyz
        kind = normalize.lower() if normalize is not None else None
        self.normalize = kind if kind in ("anchor", "center") else None
        width = channels + (3 if use_xyz else 0)
        self.channels, self.out_channels = channels, width + channels
        self.affine_alpha = self.affine_beta = None
        if self.normalize is not None:
            self.affine_alpha = nn.Parameter(torch.ones(1, 1, 1, width))
            self.affine_beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, p: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """p (B, N, 3), x (B, N, C), residual like x or None -> p (B, S, 3), groups (B, S, k, .), residual (B, S, C)."""
        p, groups, residual = self.find(p, x, residual)
        return p, self.rows(groups), residual

    def find(self, p: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Groups, Tensor | None]:
        """Like :meth:`forward`, with the groups by number."""
        n = p.shape[1]
        count = n // self.reducer
        if count < 1:
            raise ValueError(f"{n} points cannot be reduced {self.reducer} times; give more points")
        kept = farthest_point_sample(p, count).sort(dim=1).values if count < n else None
        centre_p = p if kept is None else gather(p, kept)
        index = nearest_neighbours(centre_p, p, self.k)[1][..., :: self.stride]
        points = centres = torch.cat([x, p.to(x.dtype)], dim=-1) if self.use_xyz else x
        if kept is not None:
            centres, residual = gather(points, kept), None if residual is None else gather(residual, kept)
        return centre_p, Groups(points, centres, index, kept), residual

    def rows(self, groups: Groups, scale: Tensor | None = None) -> Tensor:
        """The groups' rows: (B, S, k, out_channels). ``scale`` (B): of their differences, where it is known."""
        grouped = gather(groups.x, groups.index)
        if self.affine_alpha is not None:
            grouped = grouped - self._middle(grouped, groups.centres)
            if scale is None:
                scale = _spread(grouped.flatten(1))
            grouped = self.affine_alpha * (grouped / (scale.view(-1, 1, 1, 1) + 1e-5)) + self.affine_beta
        centre = groups.centres[..., : self.channels].unsqueeze(2).expand(-1, -1, grouped.shape[2], -1)
        return torch.cat([grouped, centre], dim=-1)

    def _middle(self, grouped: Tensor, centres: Tensor) -> Tensor:
        return grouped.mean(dim=2, keepdim=True) if self.normalize == "center" else centres.unsqueeze(2)

    def spread(self, groups: Groups) -> Tensor:
        """Each cloud's scale (B): the standard deviation of all its groups' differences."""
        found = [self._deviation(groups, cloud) for cloud in range(len(groups.x))]
        return torch.tensor(found, dtype=groups.x.dtype).sqrt()

    def _deviation(self, groups: Groups, cloud: int) -> float:
        """The unbiased variance of one cloud's differences, without making them where the digits allow."""
        x, centres, index = groups.x[cloud], groups.centres[cloud], groups.index[cloud]
        found = None
        if x.dtype in (torch.float32, torch.float64):
            found = self._from_sums(x, centres, index)
            if found is None:  # what all points have in common is in no difference
                common = x.mean(dim=0)
                found = self._from_sums(x - common, centres - common, index)
        square, total = self._differences(groups, cloud) if found is None else found
        n = index.numel() * x.shape[-1]
        return max(square - total * total / n, 0.0) / max(n - 1, 1)

    def _from_sums(self, x: Tensor, centres: Tensor, index: Tensor) -> tuple[float, float] | None:
        """Sum of squares and sum of one cloud's differences, from sums of their terms; None where too much cancels.

        With b the sum of a group's k neighbours x, the squares of x - c add up to ``sum |x|^2 - |b|^2 / k``, those
        around the group's own mean, and ``|b - k c|^2 / k``.
        """
        k = index.shape[-1]
        sums = F.embedding_bag(index, x, mode="sum")
        squares = float(torch.linalg.vector_norm(x, dim=-1).double().square().index_select(0, index.flatten()).sum())
        square, total = squares - _square(sums) / k, 0.0
        if self.normalize == "anchor":
            apart = sums.sub_(centres, alpha=k)
            square, total = square + _square(apart) / k, float(apart.sum(dtype=torch.float64))
        return None if square * CANCELLED < squares else (square, total)

    def _differences(self, groups: Groups, cloud: int) -> tuple[float, float]:
        """Sum of squares and sum of one cloud's differences, made a few groups at a time."""
        x, centres, index = groups.x[cloud], groups.centres[cloud], groups.index[cloud]
        square = total = 0.0
        for _, part in _parts(groups, cloud, x.shape[-1]):
            d = x.index_select(0, part.index.flatten()).view(*part.index.shape, -1)
            square += float(torch.linalg.vector_norm(d.sub_(self._middle(d, part.centres)))) ** 2
        if self.normalize == "anchor":  # around a group's mean, differences cancel
            each = x.sum(-1, dtype=torch.float64)
            total = float(each[index].sum() - index.shape[-1] * centres.sum(dtype=torch.float64))
        return square, total


def _square(x: Tensor) -> float:
    """The sum of the squares of rows (..., C); those of a row in its own precision, the rows' in double."""
    return float(torch.linalg.vector_norm(x, dim=-1).double().square().sum())


def _spread(x: Tensor) -> Tensor:
    """The unbiased standard deviation of each row (B, n); as a norm it takes a tenth of the time of ``torch.std`` on a
    CPU, and agrees with it to about 4e-6."""
    deviation = x - x.mean(dim=1, keepdim=True)
    return torch.linalg.vector_norm(deviation, dim=1) / (x.shape[1] - 1) ** 0.5


def _parts(groups: Groups, cloud: int, width: int) -> Iterator[tuple[slice, Groups]]:
    """One cloud's groups, some centres at a time: which, and the groups. ``width``: features of a row."""
    x, centres, index, kept = groups
    step = max(1, max(ROWS, BLOCK // width) // index.shape[-1])
    for start in range(0, index.shape[1], step):
        some = slice(start, start + step)
        piece = (slice(cloud, cloud + 1), some)
        yield some, Groups(x[piece[:1]], centres[piece], index[piece], None if kept is None else kept[piece])


class PreBlock(nn.Module):
    """To the stage's width, ``count`` residual blocks, maximum over the group; ``count`` 0 is the maximum alone."""

    def __init__(
        self, in_channels: int, channels: int, count: int, *, groups: int, expansion: float, bias: bool, act: str
    ):
        super().__init__()
        self.transfer = self.operation = None
        if count:
            self.transfer = ConvNormAct(in_channels, channels, bias=bias, act=act)
            stack = ResidualStack(channels, count, groups=groups, expansion=expansion, bias=bias, act=act)
            self.operation = stack.operation

    def forward(self, grouped: Tensor) -> Tensor:
        """(B, S, k, in) to (B, S, channels)."""
        if self.transfer is not None and self.operation is not None:
            grouped = self.operation(self.transfer(grouped))
        return grouped.amax(dim=2)


def group_and_pool(
    grouper: Grouper, pre: PreBlock, p: Tensor, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``pre`` of what ``grouper`` makes of p (B, N, 3), x (B, N, C) and the residual: p (B, S, 3), features
    (B, S, channels) and residual (B, S, C)."""
    p, groups, residual = grouper.find(p, x, residual)
    if (
        isinstance(pre.transfer, ConvNormAct)
        and rowwise(pre)
        and results_only(groups.x)
        and untouched(grouper, *pre.modules())
        and folds(*pre.transfer.net, x=groups.x)
    ):
        return p, _by_blocks(grouper, pre, groups), residual
    return p, pre(grouper.rows(groups)), residual


def _by_blocks(grouper: Grouper, pre: PreBlock, groups: Groups) -> Tensor:
    """The same, a few centres at a time."""
    scale = None if grouper.affine_alpha is None else grouper.spread(groups)
    conv, norm, act = pre.transfer.net  # type: ignore[union-attr]
    first = _first_layer(grouper, folded(conv, norm), groups)
    early = [_digits_do(groups.x[cloud], None if scale is None else scale[cloud]) for cloud in range(len(groups.x))]
    if all(early) and (weights := _fused(grouper, pre, groups.x)) is not None:
        return _at_once(grouper, first, groups, scale, weights)
    transfer = conv_norm(conv, norm, groups.x, act)
    rest = stack_rows(pre.operation, groups.x)  # type: ignore[arg-type]
    pooled = groups.x.new_empty(*groups.centres.shape[:2], conv.weight.shape[0])
    for cloud in range(len(pooled)):
        own = None if scale is None else scale[cloud : cloud + 1]
        if early[cloud]:
            table = linear(groups.x[cloud], first.per_point if own is None else first.per_point / (own + 1e-5))
            base = linear(groups.centres[cloud], first.per_centre, first.bias)
            if grouper.normalize == "anchor":
                base.sub_(table if groups.kept is None else table.index_select(0, groups.kept[cloud]))
        for some, part in _parts(groups, cloud, pooled.shape[-1]):
            if not early[cloud]:
                rows = transfer(grouper.rows(part, own)[0])
            else:
                rows = table.index_select(0, part.index.flatten()).view(*part.index.shape[1:], -1)
                if grouper.normalize == "center":
                    rows.sub_(rows.mean(dim=1, keepdim=True))
                rows = activate(rows.add_(base[some].unsqueeze(1)), act)
            pooled[cloud, some] = rest(rows).amax(dim=1)
    return pooled


class FirstLayer(NamedTuple):
    """The first layer of a group's rows, before neighbours are gathered.

    ``W [alpha * (x - c) / s + beta, c']`` is ``per_point x / s`` of a neighbour and ``-per_point c / s + per_centre c +
    bias`` of its centre.
    """

    per_point: Tensor  #: (out, C [+ 3]): W alpha
    per_centre: Tensor  #: (out, C [+ 3]): W of c', which are the features without coordinates; these count 0
    bias: Tensor  #: (out): with W beta


def _first_layer(grouper: Grouper, product: tuple[Tensor, Tensor], groups: Groups) -> FirstLayer:
    (weight, bias), width = product, groups.x.shape[-1]
    per_point = weight[:, :width].contiguous()
    per_centre = F.pad(weight[:, width:], (0, width - grouper.channels))
    if grouper.affine_alpha is not None and grouper.affine_beta is not None:
        bias = torch.addmv(bias, per_point, grouper.affine_beta.flatten())
        per_point = per_point * grouper.affine_alpha.flatten()
    return FirstLayer(per_point, per_centre, bias)


def _digits_do(x: Tensor, scale: Tensor | None) -> bool:
    """Whether a cloud's first layer may come before the gathering: not where differences are so small beside their
    terms that the digits would not do, nor in half precision."""
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return scale is None or float(torch.linalg.vector_norm(x)) / x.numel() ** 0.5 <= APART * float(scale)


def _fused(grouper: Grouper, pre: PreBlock, x: Tensor) -> list[Tensor] | None:
    """The residual blocks' weights for :func:`zoo_kernels.grouped_mlp`, or None where torch's products must serve:
    for another network than the published one, or on a processor for which that operator is not the faster way."""
    relu = type(pre.transfer.net[2]) is nn.ReLU  # type: ignore[union-attr]
    if not relu or grouper.normalize == "center" or runtime.instruction_set() not in FUSED:
        return None
    return stacked_weights(pre.operation, x)  # type: ignore[arg-type]


def _at_once(
    grouper: Grouper, first: FirstLayer, groups: Groups, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """All groups of all clouds in one operator, from the gathering to the maximum."""
    anchor = None
    if grouper.normalize == "anchor":
        batch, count = groups.index.shape[:2]
        anchor = torch.arange(count).expand(batch, -1) if groups.kept is None else groups.kept
    return grouped_mlp(
        linear(groups.x, first.per_point),
        linear(groups.centres, first.per_centre, first.bias),
        groups.index,
        *weights,
        anchor=anchor,
        scale=None if scale is None else 1 / (scale + 1e-5),
    )
