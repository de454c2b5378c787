"""The definition of one step of Mamba-3's recurrence: that of the walk, over one row."""

from __future__ import annotations

from torch import Tensor

from .reference import mamba3_reference


def forward(
    x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, theta, h, last_K, last_x, halves,
    contract, *, save=False,
) -> Tensor:  # fmt: skip
    """See :func:`zoo_kernels.mamba3_step`; B, C (batch, ranks, groups, state); contract: gate and sum over ranks."""
    from . import finish

    state = (theta, h, last_K, last_x)
    rows = [t[:, None] for t in (x, dt, A, B, C, trap, angles)]
    y, new = mamba3_reference(*[*rows, D, B_bias, C_bias, mimo_x, halves, state, None, None])
    for kept, value in zip(state, new, strict=True):
        kept.copy_(value)
    mimo = mimo_o is not None or not contract
    y = finish("mamba3_step", y, None if z is None else z[:, None], mimo, mimo_z, mimo_o, x)
    return y[:, 0].contiguous()
