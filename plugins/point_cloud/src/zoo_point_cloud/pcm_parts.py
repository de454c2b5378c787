"""The parts of Point Cloud Mamba: grouping, serialisation, windows, prompts, decoder, head. See :mod:`.pcm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo_kernels import paths

from .geometry import check_points, farthest_point_sample, gather, interpolate, serialise_each
from .layers import ConvNormAct, MambaLayer, PointConv, PointNorm, ResidualStack, activation

Recorder = Callable[[str, Tensor], None]


def nothing(_name: str, _tensor: Tensor) -> None:
    """A recorder that keeps nothing."""


class PositionMLP(nn.Module):
    """Three linear layers, ReLU between them. (The original's ``bias=False`` does not reach them.)"""

    def __init__(self, out_channels: int, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in ((3, hidden), (hidden, hidden), (hidden, out_channels)))

    def forward(self, p: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            p = layer(p).relu()
        return self.layers[-1](p)


def serialise(
    p: Tensor, rest: Sequence[Tensor | None], order: str, grid_size: float, *, per_cloud: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """p (B, N, 3) and tensors (B, N, C) in the named order.

    As published, the batch is sorted as one list: the bits of a curve and the extents of a traverse are those of the
    whole batch. ``per_cloud`` orders every cloud as if it were alone.
    """
    if per_cloud:
        order_of = serialise_each(_coordinates(p), order, grid_size)
        return gather(p, order_of), [None if t is None else gather(t, order_of) for t in rest]
    flat = paths.serialize(_coordinates(p), order, grid_size=grid_size, across_batch=True)

    def ordered(t: Tensor) -> Tensor:
        return t.flatten(0, 1).index_select(0, flat).view_as(t)

    return ordered(p), [None if t is None else ordered(t) for t in rest]


def _coordinates(p: Tensor) -> Tensor:
    return p.detach() if p.dtype == torch.float64 else p.detach().float()


class Windows:
    """Equal pieces of the sequence as clouds of their own (S3DIS); coordinates lie in [0, 1] inside, as published
    scaled by the range of each point's own three coordinates."""

    def __init__(self, p: Tensor, size: int) -> None:
        n = p.shape[1]
        self.count = n // size if n > size else 1
        self.active, self.size = n > size, size
        self.kept: Tensor | None = None
        if self.active and self.count * size < n:
            self.kept = farthest_point_sample(p, self.count * size).sort(dim=1).values

    def split(self, t: Tensor) -> Tensor:
        if not self.active:
            return t
        t = t if self.kept is None else gather(t, self.kept)
        return t.reshape(-1, self.size, t.shape[-1])

    def join(self, t: Tensor) -> Tensor:
        return t.reshape(-1, self.count * t.shape[1], t.shape[-1]) if self.active else t

    def split_points(self, p: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Scaled points, and the base and range that undo it."""
        p = self.split(p)
        if not self.active:
            return p, 0.0, 1.0
        base = p.amin(dim=2, keepdim=True)
        extent = p.amax(dim=2, keepdim=True) - base + 1e-6
        return (p - base) / extent, base, extent


class Propagation(nn.Module):
    """Deep features onto shallower points, joined with the shallow features. Source: PointNet++, section 3.4."""

    def __init__(self, in_channels: int, channels: int, blocks: int, act: str) -> None:
        super().__init__()
        self.fuse = ConvNormAct(in_channels, channels, bias=True)  # ReLU whatever ``act`` is, as in the original
        self.extraction = ResidualStack(channels, blocks, groups=1, expansion=1.0, bias=True, act=act)

    def forward(self, shallow_p: Tensor, deep_p: Tensor, shallow: Tensor, deep: Tensor) -> Tensor:
        return self.extraction(self.fuse(torch.cat([shallow, interpolate(shallow_p, deep_p, deep)], dim=-1)))


class Decoder(nn.Module):
    """From deep to shallow: propagation, optional Mamba layers, then the global context and (parts) the class.

    ``encoder_channels``: embedding and stages, shallow first; ``channels``: of the levels, deep first. ``shapes``:
    number of object classes whose one-hot vector is an input (16 for ShapeNetPart), 0 for none.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        channels: Sequence[int],
        blocks: Sequence[int],
        mamba_blocks: Sequence[int],
        orders: Sequence[str],
        *,
        rms: bool,
        two_way: bool,
        bias: bool,
        act: str,
        context_dim: int,
        shapes: int,
        shape_dim: int,
        per_cloud: bool,
    ) -> None:
        super().__init__()
        deep_first = list(reversed(encoder_channels))
        if not len(deep_first) == len(channels) + 1 == len(blocks) + 1 == len(mamba_blocks) + 1:
            raise ValueError(
                f"the decoder has {len(channels)} widths, {len(blocks)} blocks and {len(mamba_blocks)} mamba_blocks "
                f"for {len(deep_first) - 1} levels; expected one of each a level"
            )
        if sum(mamba_blocks) not in (0, len(orders)):
            raise ValueError(f"the decoder has {sum(mamba_blocks)} Mamba layers and {len(orders)} orders")
        if mamba_blocks[-1] and orders[-1] != "null":
            raise ValueError(
                f"the decoder's last order is {orders[-1]!r}; expected 'null': outputs keep the points' order"
            )
        self.orders, self.per_cloud, self.shapes = list(orders), per_cloud, shapes
        widths = [deep_first[0], *channels]
        self.decode_list = nn.ModuleList(
            Propagation(widths[i] + deep_first[i + 1], widths[i + 1], blocks[i], act) for i in range(len(channels))
        )
        depth = max(1, sum(mamba_blocks))
        self.mamba_list = nn.ModuleList(
            nn.ModuleList(MambaLayer(width, rms=rms, two_way=two_way, depth=depth) for _ in range(count))
            for width, count in zip(channels, mamba_blocks, strict=True)
        )
        if shapes:
            self.cls_map = nn.Sequential(
                ConvNormAct(shapes, shape_dim, bias=bias, act=act),
                ConvNormAct(shape_dim, shape_dim, bias=bias, act=act),
            )
        self.gmp_map_list = nn.ModuleList(ConvNormAct(width, context_dim, bias=bias, act=act) for width in deep_first)
        self.gmp_map_end = ConvNormAct(context_dim * len(deep_first), context_dim, bias=bias, act=act)
        self.out_channels = channels[-1] + context_dim + (shape_dim if shapes else 0)

    def forward(self, points: list[Tensor], features: list[Tensor], shape: Tensor | None = None) -> Tensor:
        """points (B, N_l, 3) and features (B, N_l, C_l) of all levels, shallow first; shape (B,): (B, N, out)."""
        points, features = points[::-1], features[::-1]
        x, current, number = features[0], "original", 0
        for level, (decode, layers) in enumerate(zip(self.decode_list, self.mamba_list, strict=True)):
            p = points[level + 1]
            x = decode(p, points[level], features[level + 1], x)
            residual: Tensor | None = None
            for layer in layers:  # type: ignore[attr-defined]
                order = self.orders[number]
                if order not in ("null", current):
                    # As published: the level's stored points are not reordered with the features.
                    p, (x, residual) = serialise(p, (x, residual), order, 0.02, per_cloud=self.per_cloud)  # type: ignore[assignment]
                    current = order
                x, residual = layer(x, residual)
                number += 1
        context = torch.cat([m(f).amax(dim=1) for m, f in zip(self.gmp_map_list, features, strict=True)], dim=-1)
        parts = [x, self.gmp_map_end(context).unsqueeze(1).expand(-1, x.shape[1], -1)]
        if self.shapes:
            if shape is None:
                raise ValueError(
                    f"the model segments parts of {self.shapes} kinds of objects; give their number as cls (B,)"
                )
            shape = shape.reshape(-1)
            if shape.shape[0] != x.shape[0] or (
                not torch.compiler.is_compiling() and bool(((shape < 0) | (shape >= self.shapes)).any())
            ):
                raise ValueError(f"cls is {shape.tolist()}; expected {x.shape[0]} numbers from 0 to {self.shapes - 1}")
            one_hot = nn.functional.one_hot(shape, self.shapes).to(x.dtype)
            parts.append(self.cls_map(one_hot).unsqueeze(1).expand(-1, x.shape[1], -1))
        return torch.cat(parts, dim=-1)


def _hidden(linear: type[nn.Linear] | type[PointConv], width: int, out: int, norm: bool, act: str | None) -> nn.Module:
    """One hidden layer of a head. Batch norm takes the place of the linear layer's bias."""
    layers: list[nn.Module] = [linear(width, out, bias=not norm)]
    layers += [PointNorm(out)] if norm else []
    return nn.Sequential(*layers, *([] if act is None else [activation(act)]))


class ClsHead(nn.Module):
    """[Linear, batch norm, activation, dropout] for each of ``mlps``, then Linear; (B, C) to (B, classes)."""

    def __init__(
        self, in_channels: int, num_classes: int, mlps: Sequence[int], dropout: float = 0.5, norm: bool = True,
        act: str | None = "relu",
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for hidden in mlps:
            layers.append(_hidden(nn.Linear, width, hidden, norm, act))
            layers += [nn.Dropout(dropout)] if dropout else []  # as published: numbers of later layers depend on it
            width = hidden
        self.head_hidden_size = width
        layers.append(nn.Sequential(nn.Linear(width, num_classes)) if num_classes else nn.Identity())
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class SegHead(nn.Module):
    """Pointwise head; ``pooled`` ("max", "avg") are appended to every point. (B, N, C) to (B, N, classes)."""

    def __init__(
        self, in_channels: int, num_classes: int, pooled: Sequence[str] = (), mlps: Sequence[int] | None = None,
        dropout: float = 0.5, norm: bool = True, act: str | None = "relu",
    ) -> None:  # fmt: skip
        super().__init__()
        if unknown := [p for p in pooled if p not in ("max", "avg")]:
            raise ValueError(f"global_feat holds {unknown}; expected 'max', 'avg' or both")
        self.pooled = list(pooled)
        width = in_channels * (1 + len(self.pooled))
        layers: list[Any] = []
        for hidden in [width] if mlps is None else mlps:
            layers.append(_hidden(PointConv, width, hidden, norm, act))
            layers += [nn.Dropout(dropout)] if dropout else []
            width = hidden
        layers.append(nn.Sequential(PointConv(width, num_classes, bias=True)))
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        pools = {"max": lambda t: t.amax(dim=1, keepdim=True), "avg": lambda t: t.mean(dim=1, keepdim=True)}
        return self.head(torch.cat([x, *(pools[p](x).expand_as(x) for p in self.pooled)], dim=-1))


def check_cloud(pos: Tensor, x: Tensor | None, in_channels: int, added: int) -> None:
    """Raises ValueError for clouds that the network cannot take."""
    check_points(pos, "pos")
    if x is not None and (x.dim() != 3 or x.shape[0] != pos.shape[0] or x.shape[2] != pos.shape[1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (batch, features, points) for pos of shape {tuple(pos.shape)}"
        )
    given = 3 if x is None else x.shape[1] + added
    if given != in_channels:
        what = "coordinates" if x is None else "x and coordinates" if added else "x"
        raise ValueError(f"the cloud has {given} channels ({what}); the model takes {in_channels}")
