"""OccMamba's head: voxel features through Mamba along height-prioritised 2D curves to semantic occupancy.

Paper: Li et al., "OccMamba: Semantic Occupancy Prediction with State Space Models", arXiv 2408.09859 (CVPR 2025).
Original: USTCLH/OccMamba @ 7dc5781 (dense_heads/occmamba_head.py, utils/reorder.py, utils/mamba.py), MIT; the local
context processor from the head of commit 0e0fa3d. The LiDAR encoder before the head is in ``occmamba_lidar.py``; the
camera branch is OpenOccupancy's. Differs from the original: any batch size; grids need not be square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing
from zoo_kernels import paths

from .layers import MambaLayer

Recorder = Callable[[str, Tensor], None]


def _nothing(_name: str, _tensor: Tensor) -> None:
    pass


class Mixer(nn.Module):
    """Add-norm-mix layers over a sequence and a last norm: ``norm(h + r)``."""

    def __init__(self, dim: int, depth: int, drop_path: float, expand: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MambaLayer(dim, rms=False, two_way=False, drop_path=drop_path, depth=depth, expand=expand)
            for _ in range(depth)
        )
        self.norm_f = nn.LayerNorm(dim)

    def forward(self, h: Tensor) -> Tensor:
        residual: Tensor | None = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        return self.norm_f(h if residual is None else h + residual)


def windows(voxels: Tensor, size: int, shift: int) -> Tensor:
    """Square columns of a grid as sequences: (B, C, W, H, D) to (B, windows, D * size * size, C), height outermost.

    The grid is moved by ``shift`` along x and y and padded with zeros to whole windows.
    """
    width, height = voxels.shape[2:4]
    right, far = -(width + shift) % size, -(height + shift) % size
    padded = F.pad(voxels, (0, 0, shift, far, shift, right))
    parts = padded.unfold(2, size, size).unfold(3, size, size)  # (B, C, columns, rows, D, size, size)
    return parts.flatten(4).flatten(2, 3).permute(0, 2, 3, 1)


def unwindow(sequences: Tensor, grid: Sequence[int], size: int, shift: int) -> Tensor:
    """The inverse of :func:`windows`: (B, windows, D * size * size, C) to (B, C, W, H, D) for ``grid`` (W, H, D)."""
    width, height, depth = grid
    columns, rows = -(-(width + shift) // size), -(-(height + shift) // size)
    parts = sequences.permute(0, 3, 1, 2).unflatten(3, (depth, size, size)).unflatten(2, (columns, rows))
    whole = parts.permute(0, 1, 2, 5, 3, 6, 4).flatten(4, 5).flatten(2, 3)
    return whole[:, :, shift : shift + width, shift : shift + height]


class LocalContext(nn.Module):
    """OccMamba's local context processor: Mamba inside of windows of several sizes over the ground plane.

    Windows of ``sizes[i]`` voxels are laid out ``sizes[i] // strides[i]`` times, each time moved by the stride, so that
    they overlap where the stride is less than the size; all layouts go through one mixer of two layers, and a pointwise
    convolution joins what every layout says about a voxel. (B, C, W, H, D) to the same shape.
    Source: arXiv 2408.09859 v2, section 3.3; USTCLH/OccMamba @ 0e0fa3d, ``with_lcp``.
    """

    def __init__(
        self, channels: int, sizes: Sequence[int], strides: Sequence[int], dim: int, expand: int, drop_path: float,
        norm: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(sizes) != len(strides) or not all(0 < step <= size for size, step in zip(sizes, strides, strict=False)):
            raise ValueError(
                f"windows of {list(sizes)} with strides {list(strides)}; expected 0 < stride <= size of each"
            )
        self.layouts = [(size, step, size // step) for size, step in zip(sizes, strides, strict=True)]
        count = sum(times for *_, times in self.layouts)
        if int(sum(size / step for size, step, _ in self.layouts)) != count:
            raise ValueError(
                f"windows of {list(sizes)} with strides {list(strides)}: sizes are no multiples of their strides, for "
                "which the original's layers do not fit"
            )
        self.linear = nn.ModuleList(nn.Linear(channels, dim) for _ in sizes if dim != channels)
        self.mamba = nn.ModuleList(Mixer(dim, 2, drop_path, expand) for _ in sizes)
        self.out = nn.Sequential(nn.Conv3d(dim * count, channels, 1, bias=False), norm, nn.ReLU())

    def forward(self, voxels: Tensor) -> Tensor:
        grid = voxels.shape[2:]
        found = []
        for i, (size, step, times) in enumerate(self.layouts):
            parts = [windows(voxels, size, step * k) for k in range(times)]
            counts = [part.shape[1] for part in parts]
            h = torch.cat(parts, dim=1)
            h = self.linear[i](h) if len(self.linear) else h
            h = self.mamba[i](h.flatten(0, 1)).unflatten(0, h.shape[:2])
            found += [unwindow(part, grid, size, step * k) for k, part in enumerate(h.split(counts, dim=1))]
        return self.out(torch.cat(found, dim=1))


class OccMambaHead(GradCheckpointing, nn.Module):
    """Voxel features (B, in_chans, W, H, D) to coarse and fine semantic occupancy.

    Arguments: ``embed_dim`` C; ``down_blocks``, ``up_blocks``: Mamba layers of each stage; ``orders``: the voxel order
    of each group of channels, mappings with ``coor_order`` "xy" or "yx" and ``inverse``; ``norm`` "group" (of
    ``norm_groups``) or "batch", ``norm_eps``; ``conv_bias``; ``fine_dim``: width of the features that are refined (C
    is halved down to it).
    ``cascade_ratio`` r > 1: voxels whose coarse class is not ``empty_idx`` are refined r times; of more than ``topk``
    such voxels (``fine_topk`` in training) a random part is; ``final_size`` (r W, r H, r D) is the grid that their
    coordinates are normalised by (None: from the input).
    Otherwise ``upsample_ratio`` u > 1: dense fine logits; ``out_refine`` then
    adds logits of the input features where the first are unsure: below the probability ``out_refine``, or
    (``refine_method`` "ratio") for that share of the voxels. ``drop_path``: the same for all layers.
    ``local_sizes``: windows of the local context processor (:class:`LocalContext`; empty: none), ``local_strides``,
    ``local_dim`` and ``local_expand`` of its mixers.

    Returns a dict: ``coarse`` (B, classes, W, H, D) and ``fine``: with r > 1 one dict a sample of ``logits`` (points,
    classes) and ``coords`` (points, 3) int64, with u > 1 logits (B, classes, uW, uH, uD), else absent.
    """

    not_compilable = "which voxels are refined depends on the coarse answer"
    not_exportable = not_compilable

    def __init__(
        self,
        in_chans: int = 160,
        num_classes: int = 17,
        embed_dim: int = 384,
        down_blocks: Sequence[int] = (2, 2, 2, 2),
        up_blocks: Sequence[int] = (2, 2, 2, 2),
        orders: Sequence[Mapping[str, Any]] = ({"coor_order": "xy", "inverse": False},),
        *,
        norm: str = "batch",
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        conv_bias: bool = False,
        fine_dim: int = 128,
        cascade_ratio: int = 4,
        final_size: Sequence[int] | None = None,
        topk: int = 30000,
        fine_topk: int = 10000,
        empty_idx: int = 0,
        upsample_ratio: int = 1,
        out_refine: float = 0.0,
        refine_method: str = "threshold",
        drop_path: float = 0.2,
        local_sizes: Sequence[int] = (),
        local_strides: Sequence[int] = (),
        local_dim: int = 32,
        local_expand: int = 1,
    ) -> None:
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"norm is {norm!r}; expected 'group' or 'batch'")
        if refine_method not in ("threshold", "ratio"):
            raise ValueError(f"refine_method is {refine_method!r}; expected 'threshold' or 'ratio'")
        if embed_dim % len(orders):
            raise ValueError(f"{embed_dim} channels do not divide into {len(orders)} orders")
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.down, self.up = len(down_blocks), len(up_blocks)
        self.orders = [(str(o.get("coor_order", "xy")), bool(o.get("inverse", False))) for o in orders]
        self.cascade_ratio, self.upsample_ratio = cascade_ratio, upsample_ratio
        self.final_size = None if final_size is None else tuple(final_size)
        self.topk, self.fine_topk, self.empty_idx = topk, fine_topk, empty_idx
        self.out_refine, self.refine_method = out_refine, refine_method

        def normed(channels: int) -> nn.Module:
            if norm == "batch":
                return nn.BatchNorm3d(channels, eps=norm_eps)
            return nn.GroupNorm(norm_groups, channels, eps=norm_eps)

        def conv(i: int, o: int, kernel: int = 1, stride: int = 1) -> nn.Conv3d:
            return nn.Conv3d(i, o, kernel, stride=stride, padding=kernel // 2, bias=conv_bias)

        def predictor(channels: int) -> nn.Sequential:
            return nn.Sequential(conv(channels, 64), normed(64), nn.ReLU(), conv(64, num_classes))

        dim = embed_dim
        self.encoder = nn.Sequential(conv(in_chans + 3, dim), normed(dim), nn.ReLU(), conv(dim, dim))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        width = dim // len(orders)
        depths = [*down_blocks, *up_blocks]
        self.blocks = nn.ModuleList(Mixer(width, depth, drop_path) for depth in depths)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in depths)
        self.downsample = nn.ModuleList(
            nn.Sequential(conv(dim, dim, 3, 2), normed(dim), nn.ReLU()) for _ in range(self.down - 1)
        )
        self.upconv = nn.ModuleList(
            nn.Sequential(conv(2 * dim, dim, 3), normed(dim), nn.ReLU()) for _ in range(self.up - 1)
        )
        self.mamba_out = nn.ModuleList()
        while dim > fine_dim:
            out = max(dim // 2, fine_dim)
            self.mamba_out.append(nn.Sequential(conv(dim, out), normed(out), nn.ReLU()))
            dim = out
        self.local = None
        if local_sizes:
            self.local = LocalContext(
                fine_dim, local_sizes, local_strides, local_dim, local_expand, drop_path, normed(fine_dim)
            )
        self.occ_pred_conv = predictor(fine_dim)
        if cascade_ratio > 1:
            self.fine_mlp = nn.Sequential(
                nn.Linear(fine_dim, 64), nn.GroupNorm(16, 64), nn.ReLU(), nn.Linear(64, num_classes)
            )
        elif upsample_ratio > 1:
            self.fine_out = predictor(fine_dim)
            if out_refine:
                self.fine_out_refine = predictor(in_chans)

    def forward_features(self, voxels: Tensor, record: Recorder = _nothing) -> Tensor:
        """(B, in_chans, W, H, D) to (B, fine_dim, W, H, D)."""
        if voxels.dim() != 5 or voxels.shape[1] != self.in_chans:
            raise ValueError(f"voxels have shape {tuple(voxels.shape)}; expected (batch, {self.in_chans}, W, H, D)")
        size = voxels.shape[2:]
        axes = torch.meshgrid(*(torch.arange(n, device=voxels.device, dtype=voxels.dtype) for n in size), indexing="ij")
        xyz = torch.stack(axes)  # raw indices, not scaled
        h = self.encoder(torch.cat([voxels, xyz.unsqueeze(0).expand(voxels.shape[0], -1, -1, -1, -1)], dim=1))
        record("encoder", h)
        h = h + self.pos_embed(xyz.permute(1, 2, 3, 0)).permute(3, 0, 1, 2)
        kept: list[Tensor] = []
        last = self.down + self.up - 1
        for i in range(last + 1):
            h = self._stage(i, h, record)
            kept.append(h)
            if i < self.down - 1:
                h = self.downsample[i](h)
            elif self.down - 1 < i < last:
                skip = kept[2 * (self.down - 1) - i]
                h = F.interpolate(h, size=skip.shape[2:], mode="trilinear", align_corners=False)
                h = self.upconv[i - self.down](torch.cat([h, skip], dim=1))
        for layer in self.mamba_out:
            h = layer(h)
        return h if self.local is None else self.local(h)

    def _stage(self, i: int, h: Tensor, record: Recorder) -> Tensor:
        """Voxels to sequences, one for each group of channels and all in one; Mamba; back."""
        size = h.shape[2:]
        flat = h.flatten(2).transpose(1, 2)
        walks = [
            paths.get(f"h2he(order={name}, inverse={inverse})", tuple(size), device=h.device)[0]
            for name, inverse in self.orders
        ]
        groups = flat.chunk(len(walks), dim=-1)
        sequence = torch.cat([g[:, walk] for g, walk in zip(groups, walks, strict=True)], dim=1)
        sequence = self.norm[i](self.blocks[i](sequence))
        record(f"seq{i}", sequence)
        parts = sequence.chunk(len(walks), dim=1)
        back = [part[:, paths.inverse(walk)] for part, walk in zip(parts, walks, strict=True)]
        return torch.cat(back, dim=-1).transpose(1, 2).reshape(h.shape)

    def forward(self, voxels: Tensor, record: Recorder = _nothing) -> dict[str, Any]:
        features = self.forward_features(voxels, record)
        coarse = self.occ_pred_conv(features)
        found: dict[str, Any] = {"coarse": coarse}
        if self.cascade_ratio > 1:
            found["fine"] = [self.refine(features[b], coarse[b]) for b in range(len(features))]
        elif self.upsample_ratio > 1:
            found["fine"] = self._dense(features, voxels)
        return found

    def refine(self, features: Tensor, coarse: Tensor) -> dict[str, Tensor]:
        """One sample: features (C, W, H, D), coarse logits (classes, W, H, D) -> fine logits and coordinates."""
        r, size = self.cascade_ratio, coarse.shape[1:]
        voxels = (coarse.argmax(dim=0) != self.empty_idx).nonzero()
        limit = self.fine_topk if self.training else self.topk
        if len(voxels) > limit:
            voxels = voxels[torch.randperm(len(voxels), device=voxels.device)[:limit]]
        steps = torch.arange(r, device=voxels.device)
        offsets = torch.cartesian_prod(steps, steps, steps)
        coords = (voxels[None] * r + offsets[:, None]).reshape(-1, 3)
        final = torch.tensor(self.final_size or [n * r for n in size], device=coords.device, dtype=torch.float32)
        places = ((coords.float() / (final - 1)) - 0.5) * 2
        picked = F.grid_sample(
            features.permute(0, 3, 2, 1)[None], places.view(1, 1, 1, -1, 3).to(features.dtype),
            mode="bilinear", padding_mode="zeros", align_corners=False,
        )  # fmt: skip
        return {"logits": self.fine_mlp(picked[0, :, 0, 0].t()), "coords": coords}

    def _dense(self, features: Tensor, voxels: Tensor) -> Tensor:
        # the features are of a lower resolution than the voxels where there are fewer stages up than down
        size = [n * self.upsample_ratio for n in features.shape[2:]]

        def upsample(t: Tensor) -> Tensor:
            return F.interpolate(t, size=size, mode="trilinear", align_corners=False)

        logits = self.fine_out(upsample(features))
        if not self.out_refine:
            return logits
        sure = logits.softmax(dim=1).amax(dim=1, keepdim=True)
        threshold = torch.as_tensor(self.out_refine, dtype=sure.dtype, device=sure.device)
        if self.refine_method == "ratio":
            count = int(sure[0].numel() * self.out_refine)
            if count < 1:
                return logits
            threshold = sure.flatten().topk(count).values[-1]
        return torch.where(sure <= threshold, logits + self.fine_out_refine(upsample(voxels)), logits)


def occupancy(output: Mapping[str, Any], sample: int, ratio: int) -> Tensor:
    """The final map (rW, rH, rD) int64 of one sample: coarse classes repeated, fine classes written over them."""
    coarse = output["coarse"][sample].argmax(dim=0)
    fine = output.get("fine")
    if isinstance(fine, Tensor):
        return fine[sample].argmax(dim=0)
    whole = coarse
    for axis in range(3):
        whole = whole.repeat_interleave(ratio, dim=axis)
    if fine is not None:
        x, y, z = fine[sample]["coords"].unbind(1)
        whole[x, y, z] = fine[sample]["logits"].argmax(dim=1)
    return whole
