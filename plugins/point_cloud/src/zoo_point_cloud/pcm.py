"""Point Cloud Mamba: classification, part segmentation and scene segmentation.

Paper: Zhang et al., "Point Cloud Mamba: Point Cloud Learning via State Space Model", arXiv 2403.00762. Original:
SkyworkAI/PointCloudMamba @ 57fdb29 (openpoints/models/PCM), no licence stated.

Layout here is (batch, points, channels). What leaves a stage is the output of its last mixer, not the residual stream
(as published): the stream runs on beside it and its end is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapting import NewHead
from zoo.layers import GradCheckpointing, Linear
from zoo_kernels.paths import POINT_ORDERS

from .grouping import Grouper, PreBlock, group_and_pool
from .layers import ConvNormAct, MambaLayer, ResidualStack
from .pcm_parts import (
    ClsHead,
    Decoder,
    PositionMLP,
    Recorder,
    SegHead,
    Windows,
    check_cloud,
    nothing,
    serialise,
)  # fmt: skip

PROMPT_DIM = 384
#: Tiles of a scene along x and y, by their number (BaseSeg).
TILES = {2: (1, 2), 4: (2, 2), 6: (2, 3), 9: (3, 3), 12: (3, 4), 16: (4, 4), 20: (4, 5), 25: (5, 5)}


class PCMEncoder(nn.Module):
    """Embedding and stages; see :class:`PCM` for the arguments."""

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 384,
        dim_expansion: Sequence[int] = (1, 1, 2, 1),
        pre_blocks: Sequence[int] = (1, 1, 1, 1),
        mamba_blocks: Sequence[int] = (1, 2, 2, 4),
        pos_blocks: Sequence[int] = (0, 0, 0, 0),
        k_neighbors: Sequence[int] = (12, 12, 12, 12),
        k_strides: Sequence[int] = (1, 1, 1, 1),
        reducers: Sequence[int] = (1, 2, 2, 2),
        orders: Sequence[str] | str = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx", "hilbert", "z", "z-trans"),
        *,
        prompts: int = 6,
        prompt_rows: Sequence[Sequence[int]] | None = None,
        groups: int = 1,
        res_expansion: float = 1.0,
        bias: bool = False,
        activation: str = "relu",
        use_xyz: bool = True,
        normalize: str | None = "anchor",
        block_residual: bool = True,
        mamba_pos: bool = True,
        pos_type: str = "share",
        pos_proj: str = "linear",
        rms_norm: bool = True,
        two_way: bool = True,
        drop_path: float = 0.1,
        windows: Sequence[int] | int | None = None,
        grid_size: float = 0.02,
        combine_pos: bool = False,
        per_cloud_order: bool = False,
    ) -> None:
        super().__init__()
        stages = len(dim_expansion)
        lists = {
            "pre_blocks": pre_blocks, "mamba_blocks": mamba_blocks, "pos_blocks": pos_blocks,
            "k_neighbors": k_neighbors, "k_strides": k_strides, "reducers": reducers,
        }  # fmt: skip
        for name, values in lists.items():
            if len(values) != stages:
                raise ValueError(f"{name} has {len(values)} values for {stages} stages (the length of dim_expansion)")
        layers = sum(mamba_blocks)
        self.orders = [orders] * layers if isinstance(orders, str) else list(orders)
        if len(self.orders) != layers:
            raise ValueError(f"{len(self.orders)} orders for {layers} Mamba layers (the sum of mamba_blocks)")
        if unknown := sorted(set(self.orders) - set(POINT_ORDERS)):
            raise ValueError(f"unknown orders {unknown}; known: {', '.join(POINT_ORDERS)}")
        self.windows = [windows] * stages if isinstance(windows, int) else None if windows is None else list(windows)
        self.in_chans, self.combine_pos, self.grid_size = in_chans, combine_pos, grid_size
        self.block_residual, self.prompts, self.per_cloud_order = block_residual, prompts, per_cloud_order
        distinct = list(dict.fromkeys(self.orders))
        if prompt_rows is None:  # the original's rows follow the hash order of a set; here: order of first use
            starts = [distinct.index(name) * prompts for name in self.orders]
            prompt_rows = [(start, start + prompts) for start in starts]
        self.prompt_rows = [(int(a), int(b)) for a, b in prompt_rows]
        if prompts and (
            len(self.prompt_rows) != layers
            or any(b - a != prompts or a < 0 or b > len(distinct) * prompts for a, b in self.prompt_rows)
        ):
            raise ValueError(
                f"prompt_rows is {self.prompt_rows}; expected {layers} pairs (first, end) of {prompts} rows each out "
                f"of {len(distinct) * prompts}"
            )
        common: dict[str, Any] = {"groups": groups, "expansion": res_expansion, "bias": bias, "act": activation}
        self.embedding = ConvNormAct(in_chans, embed_dim, bias=bias, act=activation)
        self.local_grouper_list, self.pre_blocks_list = nn.ModuleList(), nn.ModuleList()
        self.mamba_blocks_list, self.pos_blocks_list = nn.ModuleList(), nn.ModuleList()
        self.residual_proj_blocks_list, self.order_prompt_proj = nn.ModuleList(), nn.ModuleList()
        rates = [0.0, *torch.linspace(0, drop_path, layers, device="cpu").tolist()]
        width, number = embed_dim, 0
        self.channels = [embed_dim]
        for i in range(stages):
            grouper = Grouper(
                width, reducers[i], k_neighbors[i], stride=k_strides[i], use_xyz=use_xyz, normalize=normalize
            )
            out = width * dim_expansion[i]
            self.local_grouper_list.append(grouper)
            self.pre_blocks_list.append(PreBlock(grouper.out_channels, out, pre_blocks[i], **common))
            project = block_residual and i > 0 and out != width
            self.residual_proj_blocks_list.append(Linear(width, out, bias=False) if project else nn.Identity())
            self.mamba_blocks_list.append(
                nn.ModuleList(
                    MambaLayer(out, rms=rms_norm, two_way=two_way, drop_path=rates[number + j], depth=layers)
                    for j in range(mamba_blocks[i])
                )
            )
            self.pos_blocks_list.append(ResidualStack(out, pos_blocks[i], **common) if pos_blocks[i] else nn.Identity())
            if prompts:
                self.order_prompt_proj.append(nn.Linear(PROMPT_DIM, out, bias=False))
            number += mamba_blocks[i]
            width = out
            self.channels.append(out)
        self.order_prompt = nn.Embedding(len(distinct) * prompts, PROMPT_DIM) if prompts else None
        self.pos_proj = self._positions(mamba_pos, pos_type, pos_proj, dim_expansion, mamba_blocks)
        self.pos_shared = pos_type == "share"

    def _positions(
        self, used: bool, kind: str, projection: str, expansion: Sequence[int], blocks: Sequence[int]
    ) -> nn.Module | None:
        """One projection of positions for all, one a stage, or one a Mamba layer."""
        if not used:
            return None

        def make(width: int) -> nn.Module:
            return nn.Linear(3, width, bias=False) if projection == "linear" else PositionMLP(width)

        stages = self.channels[1:]
        if kind == "share":
            return make(stages[0]) if all(e == 1 for e in expansion) else nn.ModuleList(make(w) for w in stages)
        return nn.ModuleList(make(w) for w, count in zip(stages, blocks, strict=True) for _ in range(count))

    def forward(
        self, pos: Tensor, x: Tensor | None = None, record: Recorder = nothing
    ) -> tuple[list[Tensor], list[Tensor]]:
        """pos (B, N, 3), x (B, C, N): points (B, N_i, 3) and features (B, N_i, C_i) of embedding and stages."""
        check_cloud(pos, x, self.in_chans, 3 if self.combine_pos else 0)
        p, dtype = pos, self.embedding.net[0].weight.dtype
        given = pos if x is None else x.transpose(1, 2)
        if x is not None and self.combine_pos:
            given = torch.cat([given, pos.to(given.dtype)], dim=-1)
        h = self.embedding(given.to(dtype))
        record("embedding", h.transpose(1, 2))
        points, features = [p], [h]
        residual: Tensor | None = None
        current, number = "original", 0
        for i in range(len(self.pre_blocks_list)):
            if not self.block_residual:
                residual = None
            grouper, pre = self.local_grouper_list[i], self.pre_blocks_list[i]
            p, h, residual = group_and_pool(grouper, pre, p, h, residual)  # type: ignore[arg-type]
            record(f"stage{i}_pre", h.transpose(1, 2))
            record(f"stage{i}_xyz", p)
            if residual is not None:
                residual = self.residual_proj_blocks_list[i](residual)
            y = h
            for layer in self.mamba_blocks_list[i]:  # type: ignore[attr-defined]
                order = self.orders[number]
                if order != current:
                    p, (h, residual) = serialise(  # type: ignore[assignment]
                        p, (h, residual), order, self.grid_size, per_cloud=self.per_cloud_order
                    )
                    current = order
                p, h, residual, y, stream = self._layer(layer, i, number, p, h, residual)
                number += 1
            if number and len(self.mamba_blocks_list[i]):  # type: ignore[arg-type]
                record(f"stage{i}_mixer", y)
                record(f"stage{i}_residual", stream)
            h = self.pos_blocks_list[i](h)
            points.append(p)
            features.append(h)
        return points, features

    def _layer(
        self, layer: nn.Module, stage: int, number: int, p: Tensor, h: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One Mamba layer with windows, position and prompts around it; also its raw outputs."""
        windows = Windows(p, self.windows[stage]) if self.windows is not None else None
        base: Any = 0.0
        extent: Any = 1.0
        if windows is not None:
            p, base, extent = windows.split_points(p)
            h = windows.split(h)
            residual = None if residual is None else windows.split(residual)
        if self.pos_proj is not None:
            project: Any = self.pos_proj
            if isinstance(project, nn.ModuleList):
                project = project[stage if self.pos_shared else number]
            h = h + project(p.to(h.dtype))
        if self.order_prompt is not None:
            first, end = self.prompt_rows[number]
            prompt = self.order_prompt_proj[stage](self.order_prompt.weight[first:end])
            prompt = prompt.unsqueeze(0).expand(h.shape[0], -1, -1)
            h = torch.cat([prompt, h, prompt], dim=1)
            residual = None if residual is None else torch.cat([prompt, residual, prompt], dim=1)
        y, stream = layer(h, residual)
        h, residual = y, stream
        if self.order_prompt is not None:
            h, residual = h[:, self.prompts : -self.prompts], residual[:, self.prompts : -self.prompts]
        if windows is not None:
            p = windows.join(p * extent + base)
            h, residual = windows.join(h), windows.join(residual)
        return p, h, residual, y, stream


class _PCM(GradCheckpointing, nn.Module):
    """What the three models share."""

    encoder: PCMEncoder
    num_classes: int
    not_compilable = "serialisation takes the number of bits of a curve from the points"
    not_exportable = not_compilable

    @property
    def mixes_batch(self) -> bool:
        """As published, the extent of the whole batch decides each cloud's order; see ``per_cloud_order``."""
        return not self.encoder.per_cloud_order


class PCM(_PCM):
    """Point Cloud Mamba for classification: (B, N, 3) points, optionally (B, C, N) features, to (B, num_classes).

    Arguments of the encoder, one value a stage: ``dim_expansion`` (width = previous width times it), ``pre_blocks``
    (residual MLPs on groups), ``mamba_blocks``, ``pos_blocks`` (residual MLPs after them), ``k_neighbors`` and
    ``k_strides`` (of each group), ``reducers`` (points are divided by it). ``orders``: one of
    ``zoo_kernels.paths.POINT_ORDERS`` for each Mamba layer; ``prompts``: prompt rows per order, ``prompt_rows``: which
    rows each layer reads (the original draws this from a set; the published weights do not say). ``windows``: longest
    sequence of each stage (S3DIS). ``combine_pos``: append coordinates to the features. ``pos_type`` "share" or
    "layer", ``pos_proj`` "linear" or "mlp". ``per_cloud_order``: order every cloud alone, so that a result does not
    depend on its batch; False is the published behaviour. ``pool`` "max", "mean" or "max_mean" (their sum).
    Other arguments: ``in_chans``, ``embed_dim``, ``groups``, ``res_expansion``, ``bias``, ``activation``,
    ``use_xyz``, ``normalize``, ``block_residual``, ``mamba_pos``, ``rms_norm``, ``two_way``, ``drop_path``,
    ``grid_size``; ``head_mlps``, ``head_dropout``, ``head_norm`` (batch norm in the head's hidden layers) and
    ``head_act`` of them.
    """

    def __init__(
        self, num_classes: int = 15, *, pool: str = "max", head_mlps: Sequence[int] = (512, 256),
        head_dropout: float = 0.5, head_norm: bool = True, head_act: str | None = "relu", **encoder: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in ("max", "mean", "max_mean"):
            raise ValueError(f"pool is {pool!r}; expected 'max', 'mean' or 'max_mean'")
        self.encoder = PCMEncoder(**encoder)
        self.pool, self.num_features = pool, self.encoder.channels[-1]
        self.head_arguments = (list(head_mlps), head_dropout, head_norm, head_act)
        self.reset_classifier(num_classes)
        self.ends = {"num_classes": NewHead(f"prediction.head.{len(self.prediction.head) - 1}")}

    def reset_classifier(self, num_classes: int) -> None:
        """A new head with ``num_classes`` outputs; 0 leaves the hidden layers of the head."""
        self.num_classes = num_classes
        device = self.encoder.embedding.net[0].weight.device
        self.prediction = ClsHead(self.num_features, num_classes, *self.head_arguments).to(device)
        self.head_hidden_size = self.prediction.head_hidden_size
        self.prediction.train(self.training)

    def forward_features(self, pos: Tensor, x: Tensor | None = None, record: Recorder = nothing) -> Tensor:
        """Pooled features (B, num_features)."""
        last = self.encoder(pos, x, record)[1][-1]
        if self.pool == "max":
            return last.amax(dim=1)
        mean = last.mean(dim=1)
        return mean if self.pool == "mean" else last.amax(dim=1) + mean

    def forward(self, pos: Tensor, x: Tensor | None = None) -> Tensor:
        return self.prediction(self.forward_features(pos, x))


class PCMSegmentation(_PCM):
    """Point Cloud Mamba for segmentation: (B, N, 3) points and (B, C, N) features to (B, num_classes, N).

    ``decoder_channels``, ``decoder_blocks``, ``decoder_mamba_blocks``: deep level first; ``decoder_orders`` of its
    Mamba layers ("null": as it is), ``decoder_act``, ``decoder_bias`` and ``decoder_rms_norm`` (None: the encoder's);
    ``global_feat``: pools appended to every point before the head; ``shapes``: number of object classes (part
    segmentation; 0: none), given as ``cls`` (B,). ``test_crop``: in eval mode a single cloud with more points is cut
    into tiles over x and y (scene segmentation; None: never). Other arguments: :class:`PCM`.
    """

    def __init__(
        self,
        num_classes: int = 13,
        *,
        decoder_channels: Sequence[int] = (384, 192, 96, 96),
        decoder_blocks: Sequence[int] = (1, 1, 1, 1),
        decoder_mamba_blocks: Sequence[int] | None = None,
        decoder_orders: Sequence[str] = (),
        decoder_act: str = "relu",
        decoder_bias: bool | None = None,
        decoder_rms_norm: bool | None = None,
        context_dim: int = 64,
        shapes: int = 0,
        shape_dim: int = 64,
        global_feat: Sequence[str] = ("max", "avg"),
        head_mlps: Sequence[int] | None = None,
        head_dropout: float = 0.5,
        head_norm: bool = True,
        head_act: str | None = "relu",
        test_crop: int | None = None,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.encoder = PCMEncoder(**encoder)
        self.num_classes, self.test_crop = num_classes, test_crop
        self.decoder = Decoder(
            self.encoder.channels,
            decoder_channels,
            decoder_blocks,
            [0] * len(decoder_channels) if decoder_mamba_blocks is None else decoder_mamba_blocks,
            decoder_orders,
            rms=encoder.get("rms_norm", True) if decoder_rms_norm is None else decoder_rms_norm,
            two_way=encoder.get("two_way", True),
            bias=encoder.get("bias", False) if decoder_bias is None else decoder_bias,
            act=decoder_act,
            context_dim=context_dim,
            shapes=shapes,
            shape_dim=shape_dim,
            per_cloud=self.encoder.per_cloud_order,
        )
        self.num_features = self.decoder.out_channels
        self.head = SegHead(self.num_features, num_classes, global_feat, head_mlps, head_dropout, head_norm, head_act)
        self.ends = {"num_classes": NewHead(f"head.head.{len(self.head.head) - 1}")}

    def forward(
        self, pos: Tensor, x: Tensor | None = None, cls: Tensor | None = None, record: Recorder = nothing
    ) -> Tensor:
        crop = self.test_crop
        if self.training or crop is None or pos.shape[0] != 1 or pos.shape[1] <= crop:
            return self._whole(pos, x, cls, record)
        logits: Tensor | None = None
        for inside in tiles(pos[0], crop):
            tile = pos[:, inside]
            tile = tile - tile.amin(dim=1, keepdim=True)
            found = self._whole(tile, None if x is None else x[:, :, inside], cls, record)
            logits = found.new_zeros(1, found.shape[1], pos.shape[1]) if logits is None else logits
            logits[:, :, inside] = found
        assert logits is not None
        return logits

    def _whole(self, pos: Tensor, x: Tensor | None, cls: Tensor | None, record: Recorder) -> Tensor:
        points, features = self.encoder(pos, x, record)
        return self.head(self.decoder(points, features, cls)).transpose(1, 2)


def tiles(p: Tensor, crop: int) -> list[Tensor]:
    """Indices of the points in each tile of a scene (N, 3): a grid over x and y of about N / crop tiles.

    Tiles are half open; the last of an axis reaches 0.1 further. Empty tiles are left out.
    """
    wanted = p.shape[0] / crop
    along_x, along_y = TILES[min(TILES, key=lambda n: abs(n - wanted))]
    low, high = p.amin(dim=0), p.amax(dim=0)
    extent = high - low
    if extent[0] > extent[1]:
        along_x, along_y = along_y, along_x
    found = []
    for i in range(along_x):
        for j in range(along_y):
            inside = torch.ones(p.shape[0], dtype=torch.bool, device=p.device)
            for axis, k, count in ((0, i, along_x), (1, j, along_y)):
                step = extent[axis] / count
                start, end = low[axis] + step * k, low[axis] + step * (k + 1)
                end = end + 0.1 if k == count - 1 else end
                inside &= (p[:, axis] >= start) & (p[:, axis] < end)
            index = inside.nonzero().squeeze(1)
            if index.numel():
                found.append(index)
    return found
