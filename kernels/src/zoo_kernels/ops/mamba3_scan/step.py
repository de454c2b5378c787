"""One decoding step of Mamba-3's recurrence with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor


def mamba3_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    rotate_halves: bool | None = None,
) -> Tensor:
    """One step of :func:`zoo_kernels.mamba3_scan`; the four tensors of ``state`` are updated in place.

    Arguments and result as there without the axis of length. Raises ValueError as there.
    """
    from . import check, finish
    from .reference import mamba3_reference

    x, dt, A, B, C, trap, angles = (t[:, None] for t in (x, dt, A, B, C, trap, angles))
    mimo = B.dim() == 5
    halves = mimo if rotate_halves is None else rotate_halves
    check("mamba3_step", x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, state, halves)
    if not mimo:
        B, C = B[:, :, None], C[:, :, None]
    with torch.no_grad():
        y, new = mamba3_reference(x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, halves, state, None, None)
        for kept, value in zip(state, new, strict=True):
            kept.copy_(value)
        y = finish("mamba3_step", y, None if z is None else z[:, None], mimo, mimo_z, mimo_o, x)
    return y[:, 0]
