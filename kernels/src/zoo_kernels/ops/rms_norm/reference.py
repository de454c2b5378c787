"""The definition of the (gated) normalisation in plain torch; autograd through it is the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
    norm_before_gate: bool,
    centred: bool,
) -> Tensor:
    """See :func:`zoo_kernels.gated_rms_norm`."""
    work = torch.promote_types(x.dtype, torch.float32)
    h = x.to(work)
    gate = None if z is None else F.silu(z.to(work))
    if gate is not None and not norm_before_gate:
        h = h * gate
    h = h.unflatten(-1, (groups, x.shape[-1] // groups))
    if centred:
        h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        h = h * weight.to(work)
    if bias is not None:
        h = h + bias.to(work)
    if gate is not None and norm_before_gate:
        h = h * gate
    return h.to(x.dtype)


def forward(x, z, weight, bias, eps, groups, norm_before_gate, centred, *, save) -> tuple[Tensor]:
    return (normalise(x, z, weight, bias, eps, groups, norm_before_gate, centred).contiguous(),)
