"""One decoding step of the scan with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    state: Tensor,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    dt_scale: Tensor | None = None,
) -> Tensor:
    """One step of :func:`zoo_kernels.ssd`; ``state`` (batch, heads, headdim, state) is updated in place.

    x, z: (batch, heads, headdim); dt, dt_scale: (batch, heads); A, dt_bias: (heads,); B, C: (batch, groups, state) or
    (batch, state); D: (heads,) or (heads, headdim). Returns y: (batch, heads, headdim), x's dtype.
    Raises ValueError as :func:`zoo_kernels.ssd`. Source: as there; ``selective_state_update`` in the original.
    """
    from . import check_ssd, discretise, gate

    _checks.has_shape("ssd_step", "x", x, [("batch", None), ("heads", None), ("headdim", None)])
    _checks.is_tensor("ssd_step", "state", state, x)
    B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
    one = [None if t is None else t[:, None] for t in (x, dt, B, C, z, dt_scale)]
    check_ssd("ssd_step", one[0], one[1], A, one[2], one[3], D, one[4], dt_bias, one[5], state)
    work = state.dtype
    d = discretise(dt, dt_scale, dt_bias, dt_softplus, dt_limit, work)
    repeat = x.shape[1] // B.shape[1]
    b, c = (t.to(work).repeat_interleave(repeat, dim=1) for t in (B, C))
    xs = x.to(work)
    new = torch.exp(d * A.to(d.dtype)).to(work)[..., None, None] * state
    new = new + (d.to(work)[..., None] * xs)[..., None] * b[:, :, None]
    state.copy_(new)
    y = (new * c[:, :, None]).sum(-1)
    if D is not None:
        y = y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * xs
    y = y.to(x.dtype)
    return y if z is None else gate(y, z)
