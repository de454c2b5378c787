"""dt as a product of low rank, for the back ends that do not compute it within the scan, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product(dt: Tensor, dt_proj: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(batch, length, K, rank) times (K, channels, rank): (batch, length, K, channels), in ``dtype`` or the wider."""
    dtype = torch.promote_types(dt.dtype, dt_proj.dtype) if dtype is None else dtype
    dt, dt_proj = dt.to(dtype), dt_proj.to(dtype)
    if dt_proj.shape[0] == 1:
        return F.linear(dt[:, :, 0], dt_proj[0])[:, :, None]
    return torch.einsum("blkr,kcr->blkc", dt, dt_proj)


def gradients(grad: Tensor, dt: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``dt`` and ``dt_proj`` from that of their product, in its dtype."""
    to_dt = torch.einsum("blkc,kcr->blkr", grad, dt_proj.to(grad.dtype))
    return to_dt, torch.einsum("blkc,blkr->kcr", grad, dt.to(grad.dtype))
