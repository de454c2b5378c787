"""Normalisations of the field, as modules over the fused operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo_kernels import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), statistics in float32 or better."""
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """Mamba-2's output norm: RMS over each group of channels, with a SiLU gate before or after it.

    ``norm(y * silu(z)) * weight`` (default) or, with ``norm_before_gate``, ``norm(y) * weight * silu(z)``.
    Source: Dao and Gu, arXiv 2405.21060, section 7; state-spaces/mamba ``ops/triton/layernorm_gated.py``.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, groups: int = 1, norm_before_gate: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"dim {dim} does not divide into {groups} groups")
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """y, z: (..., dim)."""
        return gated_rms_norm(
            y, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=self.norm_before_gate
        )
