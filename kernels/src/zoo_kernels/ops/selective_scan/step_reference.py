"""The definition of one step of the selective scan."""

from __future__ import annotations

from torch import Tensor

from . import reference


def forward(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus, *, save) -> Tensor:
    """Canonical arguments: u, dt, z (batch, channels); B, C (batch, groups, state); state is overwritten."""
    u_, dt_, B_, C_ = (t[:, None] for t in (u, dt, B, C))
    z_ = None if z is None else z[:, None]
    y, final, _ = reference.forward(
        u_[:, :, None], dt_[:, :, None], A[None], B_[:, :, None], C_[:, :, None], None if D is None else D[None], z_,
        None if dt_bias is None else dt_bias[None], dt_softplus, None, [False], state[:, None], True, None, None,
        save=False,
    )  # fmt: skip
    state.copy_(final[:, 0])
    return y[:, 0]
