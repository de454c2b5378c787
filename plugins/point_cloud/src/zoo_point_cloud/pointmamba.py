"""PointMamba: point patches along two Hilbert curves through a plain Mamba.

Paper: Liang et al., "PointMamba: A Simple State Space Model for Point Cloud Analysis", arXiv 2402.10739. Original:
LMD0311/PointMamba @ 80858e0 (models/point_mamba_scan.py), Apache-2.0: the version with Hilbert and trans-Hilbert
orders and an order indicator. ``version=1`` is that of the paper's first versions (branch "old" @ ff34a07,
models/point_mamba.py, part_segmentation/models/pt_mamba.py): centres sorted along x, y and z, one more norm at the end.

Layout here is (batch, patches, channels). Differs from the original: masks and orders of the pre-training may be given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapting import NewHead
from zoo.layers import GradCheckpointing, Mamba, Recomputed
from zoo.layers.inference import untouched
from zoo.layers.linear import linear
from zoo_kernels import paths

from .geometry import (
    check_points,
    farthest_point_sample,
    gather,
    interpolate,
    nearest_neighbours,
    serialise_each,
    squared_distances,
)
from .layers import (
    ConvNormAct,
    DropPath,
    PointConv,
    PointNorm,
    activate,
    by_clouds,
    conv_norm,
    folded,
    folds,
    make_norm,
    rowwise,
)

Recorder = Callable[[str, Tensor], None]
ORDERS = ("hilbert", "hilbert-trans")
#: of the first version
AXES = ("x", "y", "z")
#: Rows of patches that are worked on at once in inference on a CPU.
PATCH_ROWS = 2048


def _nothing(_name: str, _tensor: Tensor) -> None:
    pass


class PatchEncoder(nn.Module):
    """A small PointNet: the points of each patch (B, G, K, 3) to one token (B, G, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            PointConv(3, 128, bias=True), PointNorm(128), nn.ReLU(), PointConv(128, 256, bias=True)
        )
        self.second_conv = nn.Sequential(
            PointConv(512, 512, bias=True), PointNorm(512), nn.ReLU(), PointConv(512, channels, bias=True)
        )

    def forward(self, patches: Tensor) -> Tensor:
        first, second = self.first_conv, self.second_conv
        if (
            rowwise(self)
            and untouched(*self.modules())
            and all(folds(*layers[:2], x=patches) and type(layers[3]) is PointConv for layers in (first, second))
        ):
            return self._by_blocks(patches)
        x = first(patches)
        x = torch.cat([x.amax(dim=2, keepdim=True).expand_as(x), x], dim=-1)
        return second(x).amax(dim=2)

    def _by_blocks(self, patches: Tensor) -> Tensor:
        """The same for inference on a CPU: some patches at a time, which stay in the cache, and a third fewer products.

        What the third layer makes of a patch's maximum is computed once a patch, not once a point. Nothing lies
        between the second layer and the third, so what the third makes of a point is one product with both weights
        multiplied; the second alone is then needed for the maximum only. Biases are the same for every point of a
        patch and are added after the maxima.
        """
        (enter, norm, act, widen), (_, _, again, last) = self.first_conv, self.second_conv
        first = conv_norm(enter, norm, patches, act)
        weight, bias = folded(*self.second_conv[:2])  # type: ignore[arg-type]
        half = weight.shape[1] // 2
        of_patch, of_point = weight[:, :half].contiguous(), weight[:, half:]
        through = _multiplied(of_point, widen.weight)
        bias = bias + _multiplied(weight, widen.bias.repeat(2).unsqueeze(1)).squeeze(1)
        flat = patches.flatten(0, 1)
        tokens = patches.new_empty(len(flat), last.weight.shape[0])
        step = max(1, PATCH_ROWS // patches.shape[2])
        for start in range(0, len(flat), step):
            x = first(flat[start : start + step])
            largest = linear(x, widen.weight).amax(dim=1)
            y = linear(x, through).add_(linear(largest, of_patch, bias).unsqueeze(1))
            tokens[start : start + step] = linear(activate(y, again), last.weight).amax(dim=1)
        return tokens.add_(last.bias).view(*patches.shape[:2], -1)


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of weights, rounded once."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


class Block(Recomputed):
    """``h + drop_path(mamba(norm(h)))``, then dropout."""

    def __init__(self, dim: int, rms: bool, drop_path: float, dropout: float) -> None:
        super().__init__()
        self.norm, self.mixer = make_norm(dim, rms), Mamba(dim)
        self.drop_path, self.drop_out = DropPath(drop_path), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.drop_out(h + self.drop_path(self.mixer(self.norm(h))))


class Mixer(nn.Module):
    """``depth`` blocks over ``tokens + positions``, and a last norm. ``drop_path``: of the last block (rising from 0),
    or the rates of all."""

    def __init__(self, dim: int, depth: int, rms: bool, drop_path: float | Sequence[float], dropout: float) -> None:
        super().__init__()
        rates = drop_path
        if isinstance(rates, int | float):
            rates = torch.linspace(0, rates, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(Block(dim, rms, rate, dropout) for rate in rates)
        self.norm_f = make_norm(dim, rms)

    def forward(
        self, tokens: Tensor, pos: Tensor, *, taps: Sequence[int] = (), record: Recorder = _nothing
    ) -> tuple[Tensor, list[Tensor]]:
        """(batch, length, dim): the normalised end, and the (normalised) streams after the layers ``taps``."""
        h = tokens + pos
        tapped = []
        for i, layer in enumerate(self.layers):
            h = by_clouds(layer, h)
            record(f"block{i}", h)
            if i in taps:
                tapped.append(self.norm_f(h))
        return self.norm_f(h), tapped


def position_mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


class PointMambaTrunk(GradCheckpointing, nn.Module):
    """Patches, tokens, positions, the order indicator and the mixer; see :class:`PointMamba` for the arguments."""

    not_compilable = "serialisation takes the number of bits of a curve from the points"
    not_exportable = not_compilable

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_groups: int = 64,
        group_size: int = 32,
        *,
        rms_norm: bool = False,
        drop_path: float = 0.1,
        drop_rate: float = 0.0,
        grid_size: float = 0.02,
        skip_origin: bool = True,
        per_cloud_order: bool = False,
        version: int = 2,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version is {version!r}; expected 2, or 1 for the network of the paper's first versions")
        if num_groups < 1 or group_size < 1:
            raise ValueError(f"num_groups is {num_groups}, group_size {group_size}; expected 1 or more of each")
        self.num_groups, self.group_size, self.grid_size = num_groups, group_size, grid_size
        self.embed_dim, self.skip_origin, self.per_cloud_order = embed_dim, skip_origin, per_cloud_order
        self.version, self.orders = version, ORDERS if version == 2 else AXES
        self.encoder, self.pos_embed = PatchEncoder(embed_dim), position_mlp(embed_dim)
        if version == 2:
            self.blocks = Mixer(embed_dim, depth, rms_norm, drop_path, drop_rate)
            self.order_gamma = nn.Parameter(torch.ones(2, embed_dim) + torch.randn(2, embed_dim) * 0.02)
            self.order_beta = nn.Parameter(torch.randn(2, embed_dim) * 0.02)
        else:  # a layer's result is dropped where the next one adds it, so the last one's never is
            self.blocks = Mixer(embed_dim, depth, rms_norm, [drop_path] * (depth - 1) + [0.0], 0.0)
            self.norm = nn.LayerNorm(embed_dim)
            self.drop_out = nn.Dropout(drop_rate)

    @property
    def mixes_batch(self) -> bool:
        """As published, the extent of the whole batch decides the bits of the curve; see ``per_cloud_order``."""
        return self.version == 2 and not self.per_cloud_order

    def normed(self, x: Tensor) -> Tensor:
        """The first version's second norm, behind the mixer's own."""
        return self.norm(x) if self.version == 1 else x

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points (B, N, 3): patches (B, G, K, 3), relative to their centres, and the centres (B, G, 3)."""
        check_points(points)
        n = points.shape[1]
        if n < max(self.num_groups, self.group_size):
            raise ValueError(
                f"the cloud has {n} points; the model makes {self.num_groups} patches of {self.group_size} points and "
                f"needs at least {max(self.num_groups, self.group_size)}"
            )
        centres = gather(points, farthest_point_sample(points, self.num_groups, skip_origin=self.skip_origin))
        index = nearest_neighbours(centres, points, self.group_size)[1]
        return gather(points, index) - centres.unsqueeze(2), centres

    def order(self, centres: Tensor, name: str) -> Tensor:
        """(B, G) int64: which patch each step visits."""
        xyz = centres.detach() if centres.dtype == torch.float64 else centres.detach().float()
        if name in AXES:
            return xyz[..., AXES.index(name)].argsort(dim=1, stable=True)
        if self.per_cloud_order:
            return serialise_each(xyz, name, self.grid_size)
        return paths.serialize(xyz, name, grid_size=self.grid_size)

    def sequence(self, points: Tensor, record: Recorder = _nothing) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """All orders one after the other: tokens and positions (B, orders * G, C), centres (B, G, 3), the orders."""
        patches, centres = self.group(points)
        dtype = self.pos_embed[0].weight.dtype
        tokens, pos = self.encoder(patches.to(dtype)), self.pos_embed(centres.to(dtype))
        record("neighborhood", patches)
        record("center", centres)
        record("tokens", tokens)
        record("pos", pos)
        orders = [self.order(centres, name) for name in self.orders]
        for name, order in zip(self.orders, orders, strict=True):
            start = torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]
            record(f"order_{name}", (order + start).view(1, -1))
        parts = [gather(tokens, order) for order in orders]
        if self.version == 2:
            parts = [part * self.order_gamma[k] + self.order_beta[k] for k, part in enumerate(parts)]
        tokens = torch.cat(parts, dim=1)
        tokens = tokens if self.version == 2 else self.drop_out(tokens)
        return tokens, torch.cat([gather(pos, order) for order in orders], dim=1), centres, orders


class PointMamba(PointMambaTrunk):
    """PointMamba for classification: points (B, N, 3) to (B, num_classes).

    Arguments: ``embed_dim`` C, ``depth`` Mamba layers, ``num_groups`` G patches of ``group_size`` points, ``pool``: a
    set of "mean", "max" or "token" (a class token at the end of the sequence, pooled with the mean over all; the
    others are then ignored). ``rms_norm``, ``drop_path`` (at the last layer), ``drop_rate``; ``grid_size``: cell of the
    curves, in the units of the points. ``skip_origin``: no patch centre is put within 0.0316 of the origin, as the
    original's CUDA sampling does. ``per_cloud_order``: a cloud's order does not depend on its batch (False: published).
    ``version`` 1: the first version, without an order indicator; ``drop_path`` of all layers but the last.
    """

    ends = {"num_classes": NewHead("head.8")}  # noqa: RUF012

    def __init__(self, num_classes: int = 40, *, pool: Sequence[str] = ("mean",), **trunk: Any) -> None:
        super().__init__(**trunk)
        self.pool = [pool] if isinstance(pool, str) else list(pool)
        if not self.pool or any(p not in ("mean", "max", "token") for p in self.pool):
            raise ValueError(f"pool is {self.pool}; expected one or more of 'mean', 'max', 'token'")
        self.cls_token = self.cls_pos = None
        if "token" in self.pool:
            if len(self.pool) == 3:
                raise ValueError("pool holds 'mean', 'max' and 'token'; the original's head does not fit all three")
            self.cls_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
            self.cls_pos = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.num_features = self.embed_dim * (2 if len(self.pool) > 1 or "token" in self.pool else 1)
        self.head_hidden_size = 256
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head with ``num_classes`` outputs; 0 leaves its hidden layers (256 features)."""
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for width in (self.num_features, 256):
            layers += [nn.Linear(width, 256), PointNorm(256), nn.ReLU(), nn.Dropout(0.5)]
        layers.append(nn.Linear(256, num_classes) if num_classes else nn.Identity())
        self.head = nn.Sequential(*layers).to(self.pos_embed[0].weight.device).train(self.training)

    def forward_features(self, points: Tensor, record: Recorder = _nothing) -> Tensor:
        """Pooled features (B, num_features)."""
        tokens, pos, _, _ = self.sequence(points, record)
        if self.cls_token is not None and self.cls_pos is not None:
            tokens = torch.cat([tokens, self.cls_token.expand(tokens.shape[0], -1, -1)], dim=1)
            pos = torch.cat([pos, self.cls_pos.expand(pos.shape[0], -1, -1)], dim=1)
        x = self.normed(self.blocks(tokens, pos, record=record)[0])
        if self.cls_token is not None:
            return torch.cat([x[:, -1], x.mean(dim=1)], dim=-1)
        pools = {"mean": lambda t: t.mean(dim=1), "max": lambda t: t.amax(dim=1)}
        return torch.cat([pools[name](x) for name in ("mean", "max") if name in self.pool], dim=-1)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.forward_features(points))


class PointMambaMAE(GradCheckpointing, nn.Module):
    """Masked autoencoding pre-training: points (B, N, 3) to ``rebuilt`` patches and their Chamfer ``loss``.

    ``mask_ratio`` of the patches are hidden, at random or (``mask_type`` "block") around a random centre;
    ``decoder_depth`` layers rebuild their points from the others'. ``loss``: "cdl2" (squared distances) or "cdl1".
    Other arguments: :class:`PointMamba`. ``rebuilt``: (B * M, group_size, 3), masked patches in sequence order.
    """

    not_compilable = PointMambaTrunk.not_compilable
    not_exportable = not_compilable
    mixes_batch = True  # masks and the order are drawn for a whole batch

    def __init__(
        self,
        *,
        decoder_depth: int = 4,
        mask_ratio: float = 0.6,
        mask_type: str = "rand",
        loss: str = "cdl2",
        **trunk: Any,
    ) -> None:
        super().__init__()
        if loss not in ("cdl1", "cdl2"):
            raise ValueError(f"loss is {loss!r}; expected 'cdl1' or 'cdl2'")
        if trunk.get("version", 2) != 2:
            raise ValueError("version is 1; the masked autoencoder is built for version 2 alone")
        self.trunk = PointMambaTrunk(**trunk)
        if not 0 < int(mask_ratio * self.trunk.num_groups) < self.trunk.num_groups:
            raise ValueError(
                f"mask_ratio is {mask_ratio}: {int(mask_ratio * self.trunk.num_groups)} of {self.trunk.num_groups} "
                "patches; expected some, not all"
            )
        self.mask_ratio, self.mask_type, self.loss_type = mask_ratio, mask_type, loss
        dim, size = self.trunk.embed_dim, self.trunk.group_size
        rms, rate = trunk.get("rms_norm", False), trunk.get("drop_path", 0.1)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = position_mlp(dim)
        self.decoder = Mixer(dim, decoder_depth, rms, rate, trunk.get("drop_rate", 0.0))
        self.rebuild = PointConv(dim, 3 * size, bias=True)
        with torch.no_grad():
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            self._initialise()

    def _initialise(self) -> None:
        """As published: the outer initialisation also resets what Mamba had set (its dt bias becomes 0)."""
        for part, xavier in ((self.trunk, False), (self.decoder, True)):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    if xavier:
                        nn.init.xavier_uniform_(module.weight)
                    else:
                        nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def draw_mask(
        self, centres: Tensor, ratio: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """centres (B, G, 3) in sequence order: (B, G) bool, True = hidden. ratio: another than the model's; generator:
        where chance comes from, in place of torch's own."""
        batch, groups, _ = centres.shape
        count = int((self.mask_ratio if ratio is None else ratio) * groups)
        drawn = {"generator": generator, "device": centres.device if generator is None else generator.device}
        if self.mask_type == "rand":
            score = torch.rand(batch, groups, **drawn).to(centres.device)  # type: ignore[arg-type]
        else:
            seed = torch.randint(groups, (batch, 1), **drawn).to(centres.device)  # type: ignore[call-overload]
            score = squared_distances(gather(centres, seed).float(), centres.float())[:, 0]
        hidden = score.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros(batch, groups, dtype=torch.bool, device=centres.device).scatter_(1, hidden, True)

    def forward(
        self, points: Tensor, mask: Tensor | None = None, order: str | None = None, record: Recorder = _nothing
    ) -> dict[str, Tensor]:
        """mask: (B, G) bool in sequence order, the same number a row; order: of :data:`ORDERS`; None draws them."""
        trunk = self.trunk
        if order is not None and order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected {' or '.join(map(repr, ORDERS))}, or None")
        which = int(torch.randint(2, ())) if order is None else ORDERS.index(order)
        patches, centres = trunk.group(points)
        walk = trunk.order(centres, ORDERS[which])
        centres = gather(centres, walk)
        patches = gather(patches.flatten(2), walk).view_as(patches)
        dtype = trunk.order_gamma.dtype
        tokens = trunk.encoder(patches.to(dtype)) * trunk.order_gamma[which] + trunk.order_beta[which]
        record("center_sorted", centres)
        record("tokens", tokens)
        mask = self.draw_mask(centres) if mask is None else mask.bool()
        batch, groups, dim = tokens.shape
        hidden = mask.sum(1).tolist() if mask.shape == (batch, groups) else []
        if len(set(hidden)) != 1 or not 0 < hidden[0] < groups:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and hides {hidden} patches; expected ({batch}, {groups}), one "
                f"number a row, from 1 to {groups - 1}"
            )
        seen = tokens[~mask].view(batch, -1, dim)
        seen_pos = trunk.pos_embed(centres[~mask].view(batch, -1, 3).to(dtype))
        seen, _ = trunk.blocks(seen, seen_pos)
        record("x_vis", seen)
        full = self.mask_token.to(seen.dtype).expand(batch, groups, dim).clone()
        full[~mask] = seen.reshape(-1, dim)
        full, _ = self.decoder(full, self.decoder_pos_embed(centres.to(dtype)))
        rebuilt = self.rebuild(full[mask]).view(-1, trunk.group_size, 3)
        truth = patches[mask]
        record("gt", truth)
        return {"rebuilt": rebuilt, "loss": chamfer(rebuilt, truth.to(rebuilt.dtype), self.loss_type)}


def chamfer(a: Tensor, b: Tensor, kind: str = "cdl2") -> Tensor:
    """Chamfer distance of patches (P, K, 3): mean nearest squared distance both ways, summed ("cdl2"), or half the sum
    of the mean nearest distances ("cdl1")."""
    distance = squared_distances(a, b)
    there, back = distance.amin(dim=2), distance.amin(dim=1)
    if kind == "cdl1":
        return (there.sqrt().mean() + back.sqrt().mean()) / 2
    return there.mean() + back.mean()


class PointMambaSegmentation(PointMambaTrunk):
    """PointMamba for part segmentation: points (B, N, 3) and the kind of object (B,) to (B, num_classes, N).

    The second version's code has no part segmentation; here is Point-MAE's part head (arXiv 2203.06604) on its trunk:
    streams after a third, two thirds and all of the layers (mean of the two orders), their maximum and mean, a code of
    the kind of object, and the streams interpolated from the patch centres onto the points. With ``version=1`` it is
    the original's (branch "old"): every centre stands in the sequence three times, so the three nearest of a point are
    its nearest centre's, and the maximum is over all three orders.
    Arguments: ``shapes`` kinds of objects, ``taps``: numbers of the three layers, others as in :class:`PointMamba`.
    """

    ends = {"num_classes": NewHead("head.6")}  # noqa: RUF012

    def __init__(
        self, num_classes: int = 50, *, shapes: int = 16, taps: Sequence[int] | None = None, **trunk: Any
    ) -> None:
        super().__init__(**trunk)
        depth = len(self.blocks.layers)
        if depth < 3:
            raise ValueError(f"depth is {depth}; part segmentation reads three layers and needs at least 3")
        self.taps = sorted({depth // 3 - 1, 2 * depth // 3 - 1, depth - 1} if taps is None else taps)
        if len(self.taps) != 3 or not 0 <= self.taps[0] < self.taps[1] < self.taps[2] < depth:
            raise ValueError(f"taps is {taps}; expected three different layers from 0 to {depth - 1}")
        width = 3 * self.embed_dim
        self.num_classes, self.shapes = num_classes, shapes
        self.shape_code = ConvNormAct(shapes, 64, act="leakyrelu")
        self.shape_code.net[2].negative_slope = 0.2  # Point-MAE's
        self.propagate = nn.Sequential(
            PointConv(width + 3, 4 * self.embed_dim, bias=True), PointNorm(4 * self.embed_dim), nn.ReLU(),
            PointConv(4 * self.embed_dim, 1024, bias=True), PointNorm(1024), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            PointConv(2 * width + 64 + 1024, 512, bias=True), PointNorm(512), nn.ReLU(), nn.Dropout(0.5),
            nn.Sequential(PointConv(512, 256, bias=True), PointNorm(256)), nn.ReLU(),
            PointConv(256, num_classes, bias=True),
        )  # fmt: skip

    def forward(self, points: Tensor, cls: Tensor) -> Tensor:
        tokens, pos, centres, orders = self.sequence(points)
        _, tapped = self.blocks(tokens, pos, taps=self.taps)
        groups = centres.shape[1]
        streams = []
        tapped = [self.normed(h) for h in tapped]
        for h in tapped:
            back = [gather(h[:, k * groups : (k + 1) * groups], paths.inverse(order)) for k, order in enumerate(orders)]
            streams.append(sum(back[1:], start=back[0]) / len(back))
        x = torch.cat(streams, dim=-1)
        if bool(((cls < 0) | (cls >= self.shapes)).any()) or cls.reshape(-1).shape[0] != points.shape[0]:
            raise ValueError(f"cls is {cls.tolist()}; expected {points.shape[0]} numbers from 0 to {self.shapes - 1}")
        code = self.shape_code(nn.functional.one_hot(cls.reshape(-1), self.shapes).to(x.dtype))
        every = x if self.version == 2 else torch.cat(tapped, dim=-1)
        whole = torch.cat([every.amax(dim=1), x.mean(dim=1), code], dim=-1).unsqueeze(1)
        near = interpolate(points, centres, x, k=3 if self.version == 2 else 1)
        local = self.propagate(torch.cat([points.to(x.dtype), near], dim=-1))
        return self.head(torch.cat([local, whole.expand(-1, points.shape[1], -1)], dim=-1)).transpose(1, 2)
