"""NetMamba: network flows as byte strides through a unidirectional Mamba, pre-trained by masking, then fine-tuned.

Paper: Wang et al., "NetMamba", arXiv 2405.11449 (ICNP 2024). Original: wangtz19/NetMamba @ bef641e
(``src/models_net_mamba.py``, ``src/models_mamba.py``), no licence stated.
Differs from the original: the classifier computes its last layer's gate and output projection at the one position that
is read, the class token's (the same numbers).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, Mamba, Recomputed, RMSNorm
from zoo.layers.vss import DropPath
from zoo_kernels import causal_conv1d, selective_scan

EPS = 1e-5


class StrideEmbed(nn.Module):
    """Each ``stride`` neighbouring bytes to one token: (batch, 1, bytes) to (batch, bytes / stride, dim).

    A convolution whose kernel is its stride, computed as a product. ``proj``: weight (dim, 1, stride), bias (dim).
    """

    def __init__(self, byte_length: int, stride: int, dim: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_patches = byte_length // stride
        self.proj = nn.Conv1d(1, dim, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x[:, : x.shape[1] // self.stride * self.stride]  # bytes that fill no stride are not read
        return F.linear(x.unflatten(1, (-1, self.stride)), self.proj.weight.squeeze(1), self.proj.bias)


class Block(Recomputed):
    """Add, norm, mixer: ``residual += hidden; hidden = mixer(norm(residual))``; the first block has no residual yet."""

    def __init__(self, dim: int, drop_path: float = 0.0, bimamba_type: str = "none") -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=EPS)
        self.mixer = Mamba(dim) if bimamba_type == "none" else TwoWayMamba(dim, bimamba_type)
        self.drop_path = DropPath(drop_path)

    def add(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return hidden if residual is None else residual + self.drop_path(hidden)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both (batch, length, dim); returns (hidden, residual)."""
        residual = self.add(hidden, residual)
        return self.mixer(self.norm(residual)), residual

    def last(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` at the last position, (batch, dim) each: all rows are scanned, one is gated and projected."""
        residual = self.add(hidden, residual)
        y, z = self.mixer.mix(self.norm(residual), gate=False)
        return self.mixer.out_proj(y[:, -1] * F.silu(z[:, -1])), residual[:, -1]


class TwoWayMamba(Mamba):
    """The mixer that also scans from the end: ``out_proj((scan(x) + scan_b(x)) silu(z))``, both including the present.

    ``kind`` "v1": the second scan has its own A alone (``A_b_log``) and reads what the first one's convolution made;
    "v2": all of its own (``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``, ``D_b``), and the mean is taken.
    Source: the Mamba that wangtz19/NetMamba vendors (``bimamba_type``, with ``if_devide_out``), which is Vim's.
    """

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__(dim)
        if kind not in ("v1", "v2"):
            raise ValueError(f"bimamba_type is {kind!r}; expected 'none', 'v1' or 'v2'")
        self.kind = kind
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        if kind == "v2":
            other = Mamba(dim)
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = other.conv1d, other.x_proj, other.dt_proj
            self.D_b = other.D

    def mix(self, u: Tensor, *, gate: bool = True, **walk: Any) -> tuple[Tensor, Tensor]:
        if any(value is not None and value is not False for value in walk.values()):
            raise ValueError("a mixer of two directions has no state and takes no other order than its own")
        x, z = self.in_proj(u).chunk(2, dim=-1)
        seen = self._convolved(x, self.conv1d)
        y = self._scan(seen, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.kind == "v1":
            y = y + self._scan(seen, self.x_proj, self.dt_proj, self.A_b_log, self.D, reverse=True)
        else:
            seen = self._convolved(x, self.conv1d_b, reverse=True)
            y = (y + self._scan(seen, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)) / 2
        return y * F.silu(z) if gate else y, z

    @staticmethod
    def _convolved(x: Tensor, conv: nn.Conv1d, reverse: bool = False) -> Tensor:
        return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", reverse=reverse)[0]

    def _scan(
        self, x: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor, reverse: bool = False
    ) -> Tensor:
        dt, B, C = x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A, bias = -torch.exp(A_log.float()), dt_proj.bias.float()
        return selective_scan(
            x, dt, A, B, C, D.float(), None, bias, dt_proj=dt_proj.weight, dt_softplus=True, reverse=reverse
        )[0]

    def init_state(self, batch: int, *, device=None, dtype=None) -> dict[str, Tensor]:
        raise ValueError("a mixer of two directions cannot step; it has no state")


def _blocks(dim: int, depth: int, drop_path: float, bimamba_type: str) -> nn.ModuleList:
    """Drop path of block i: 0, 0, then rising; the list is one place behind the usual one, as in the original."""
    rates = [0.0, *torch.linspace(0, drop_path, depth, device="cpu").tolist()]
    return nn.ModuleList(Block(dim, rates[i], bimamba_type) for i in range(depth))


class _Encoder(GradCheckpointing, nn.Module):
    """Strides, positions, the class token at the END (a causal model sees everything there), blocks, last norm."""

    def __init__(
        self, byte_length: int, stride_size: int, embed_dim: int, depth: int, drop_rate: float, drop_path_rate: float,
        bimamba_type: str,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= stride_size <= byte_length:
            raise ValueError(f"stride_size is {stride_size}; expected 1 to byte_length {byte_length}")
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected 1 or more blocks")
        self.byte_length, self.stride_size, self.depth = byte_length, stride_size, depth
        self.embed_dim = self.num_features = embed_dim
        self.patch_embed = StrideEmbed(byte_length, stride_size, embed_dim)
        self.num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = _blocks(embed_dim, depth, drop_path_rate, bimamba_type)
        self.norm_f = RMSNorm(embed_dim, eps=EPS)
        self.drop_path = DropPath(drop_path_rate)
        std = stride_size**-0.5 / 0.87962566  # LeCun's normal, cut off at two deviations
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _scale_out_proj(self) -> None:
        """Residual branches start smaller with depth: kaiming_uniform / sqrt(depth), the decoder's too."""
        for module in self.modules():
            if isinstance(module, Mamba):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(self.depth)

    def embed(self, flows: Tensor) -> Tensor:
        """(batch, 1, H, W) or (batch, bytes), values in [-1, 1], to tokens with positions (batch, strides, dim)."""
        if flows.dim() < 2 or flows[0].numel() != self.byte_length:
            raise ValueError(
                f"flows have shape {tuple(flows.shape)}; expected (batch, 1, H, W) or (batch, bytes) with "
                f"{self.byte_length} bytes a flow"
            )
        return self.patch_embed(flows.flatten(1).to(self.pos_embed.dtype)) + self.pos_embed[:, :-1]

    def with_class_token(self, x: Tensor) -> Tensor:
        token = (self.cls_token + self.pos_embed[:, -1:]).expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([x, token], dim=1))

    def no_weight_decay(self) -> set[str]:
        """Parameters that the original's optimiser leaves undecayed."""
        return {"pos_embed", "cls_token"}


class NetMamba(_Encoder):
    """A flow's class from its bytes: strides, ``depth`` Mamba blocks, a linear head on the class token.

    Arguments: ``byte_length`` of a flow, ``stride_size`` bytes a token, ``embed_dim`` D, ``depth``, ``num_classes``
    (0: no head), ``drop_rate``, ``drop_path_rate``, ``bimamba_type`` ("none"; "v1", "v2": :class:`TwoWayMamba`).
    forward: (batch, 1, H, W) or (batch, bytes), bytes scaled to [-1, 1] (:func:`zoo_network.flows.to_tensor`), to
    (batch, num_classes) logits, or (batch, D) features without a head. Raises ValueError for another number of bytes.
    Source: arXiv 2405.11449, section IV; wangtz19/NetMamba ``src/models_net_mamba.py``.
    """

    def __init__(
        self,
        byte_length: int = 1600,
        stride_size: int = 4,
        embed_dim: int = 192,
        depth: int = 4,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        bimamba_type: str = "none",
    ) -> None:
        super().__init__(byte_length, stride_size, embed_dim, depth, drop_rate, drop_path_rate, bimamba_type)
        self._scale_out_proj()
        self.head: nn.Module
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes`` classes (0: none), on the model's device and dtype."""
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        self.head = Linear(self.embed_dim, num_classes, device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, flows: Tensor) -> Tensor:
        """The class token after the last norm, (batch, D)."""
        hidden, residual = self.with_class_token(self.embed(flows)), None
        *first, last = self.blocks
        for block in first:
            hidden, residual = block(hidden, residual)
        hidden, residual = last.last(hidden, residual)  # type: ignore[union-attr, operator]
        return self.norm_f(self.drop_path(hidden) + residual)

    def forward(self, flows: Tensor) -> Tensor:
        return self.head(self.forward_features(flows))


class NetMambaPretrain(_Encoder):
    """Masked pre-training: a share of the strides is hidden and rebuilt by a small decoder.

    Arguments: NetMamba's, and ``decoder_embed_dim``, ``decoder_depth``, ``norm_pix_loss`` (targets normalised within
    each stride). forward: flows as NetMamba's, ``mask_ratio`` of the strides hidden, ``noise`` (batch, strides) whose
    smallest int(N (1 - ratio)) entries stay visible (drawn if None). Returns a dictionary: ``loss`` (mean over hidden
    strides), ``pred`` (batch, strides, stride) and ``mask`` (batch, strides), 1 where hidden.

    Visible tokens stay in the order of the noise, not of the flow, as in the original. The class token stands last in
    a causal model and its prediction is dropped, so it gets no gradient here (``bimamba_type`` "none").
    """

    def __init__(
        self,
        byte_length: int = 1600,
        stride_size: int = 4,
        embed_dim: int = 192,
        depth: int = 4,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        norm_pix_loss: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        bimamba_type: str = "none",
    ) -> None:
        super().__init__(byte_length, stride_size, embed_dim, depth, drop_rate, drop_path_rate, bimamba_type)
        if byte_length % stride_size:
            raise ValueError(
                f"byte_length {byte_length} does not divide into strides of {stride_size} bytes, all of which are to "
                "be rebuilt; give a multiple"
            )
        self.norm_pix_loss = norm_pix_loss
        # Where no token sees a later one, the class token, which stands last and is not rebuilt, reaches no loss.
        self.unused_parameters = ("cls_token",) if bimamba_type == "none" else ()
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, decoder_embed_dim))
        self.decoder_blocks = _blocks(decoder_embed_dim, decoder_depth, drop_path_rate, bimamba_type)
        self.decoder_norm_f = RMSNorm(decoder_embed_dim, eps=EPS)
        self.decoder_pred = Linear(decoder_embed_dim, stride_size)
        nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in (self.decoder_embed, self.decoder_pred):
            nn.init.zeros_(layer.bias)
        self._scale_out_proj()

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token", "decoder_pos_embed"}

    def encode(self, flows: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the visible strides and the class token, the mask, and where each stride went."""
        x = self.embed(flows)
        visible, mask, restore = self.hide(x, mask_ratio, noise)
        hidden, residual = self.with_class_token(visible), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        return self.norm_f(self.drop_path(hidden) + residual), mask, restore

    def hide(self, x: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the strides with the smallest noise, in that order: (visible, mask, restore)."""
        batch, strides = x.shape[:2]
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; expected a share above 0 and below 1")
        if noise is None:
            noise = torch.rand(batch, strides, device=x.device)
        elif noise.shape != (batch, strides):
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {(batch, strides)}, a number a stride")
        keep = int(strides * (1 - mask_ratio))
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        visible = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
        return visible, (restore >= keep).to(x.dtype), restore

    def decode(self, encoded: Tensor, restore: Tensor) -> Tensor:
        """Predictions of all strides, (batch, strides, stride)."""
        x = self.decoder_embed(encoded)
        visible, token = x[:, :-1], x[:, -1:]
        hidden_count = restore.shape[1] - visible.shape[1]
        x = torch.cat([visible, self.mask_token.to(x.dtype).expand(x.shape[0], hidden_count, -1)], dim=1)
        x = torch.cat([x.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2])), token], dim=1)
        hidden, residual = x + self.decoder_pos_embed, None
        for block in self.decoder_blocks:
            hidden, residual = block(hidden, residual)
        x = self.decoder_norm_f(hidden if residual is None else self.drop_path(hidden) + residual)
        return self.decoder_pred(x)[:, :-1]

    def rebuilding_loss(self, flows: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean square error of a stride's bytes, averaged over the hidden strides."""
        target = flows.flatten(1).unflatten(1, (-1, self.stride_size))
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, flows: Tensor, mask_ratio: float = 0.9, noise: Tensor | None = None) -> dict[str, Tensor]:
        encoded, mask, restore = self.encode(flows, mask_ratio, noise)
        pred = self.decode(encoded, restore)
        return {"loss": self.rebuilding_loss(flows, pred, mask), "pred": pred, "mask": mask}
