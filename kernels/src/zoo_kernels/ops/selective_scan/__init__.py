"""The selective scan (S6) of Mamba-1, along one path or several."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    path: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan: an input-dependent diagonal recurrence over every channel and state.

    With ``d_t = softplus(dt_t + dt_bias)`` (or without softplus), per channel and state n::

        h_t[n] = exp(d_t * A[n]) * h_{t-1}[n] + d_t * B_t[n] * u_t
        y_t    = sum_n C_t[n] * h_t[n] + D * u_t            (times silu(z_t) when z is given)

    One path (A has 2 axes):
        u, dt: (batch, length, channels)
        A: (channels, state), real and negative in every published model; used as given
        B, C: (batch, length, state) or, with groups of neighbouring channels, (batch, length, groups, state)
        D, dt_bias: (channels,)
        z: (batch, length, channels)
        path: None, (steps,) or (batch, steps) integer rows in visiting order, steps <= length, no row twice
        initial_state, final state: (batch, channels, state), float32 (float64 if u is)

    Several paths over the same rows, K parameter sets, outputs summed (A has 3 axes):
        u: (batch, length, channels), shared, or (batch, length, K, channels)
        dt: (batch, length, K, channels); A: (K, channels, state)
        B, C: (batch, length, K, state) or (batch, length, K, groups, state)
        D, dt_bias: (K, channels); z as above, applied to the sum
        path: None, (K, steps) or (batch, K, steps); reverse: one bool or K of them
        initial_state, final state: (batch, K, channels, state)

    reverse: walk the path from its end (each direction's own end when ``lengths`` is given).
    resets: (batch, length) bool, by row: the state is dropped before the input of that row is added.
    lengths: (batch,) int: only the first ``lengths[b]`` steps of the path are walked; rows not visited give 0.

    Returns ``(y, final_state)``; y has u's dtype and shape (batch, length, channels). Inputs are not modified.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2; state-spaces/mamba ``selective_scan_ref``.

    Example::

        y, _ = selective_scan(u, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
    """
    flags = reverse if isinstance(reverse, bool) else list(reverse)
    return selective_scan_reference(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, flags, initial_state, return_final_state, resets, lengths
    )


def selective_scan_step(
    u: Tensor,
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
) -> Tensor:
    """One step of :func:`selective_scan`; ``state`` (batch, channels, state) is updated in place.

    u, dt, z: (batch, channels); B, C: (batch, state) or (batch, groups, state). Returns y: (batch, channels).
    """
    y, new = selective_scan_reference(
        u[:, None], dt[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None], dt_bias,
        dt_softplus, None, False, state, True, None, None,
    )  # fmt: skip
    assert new is not None
    state.copy_(new)
    return y[:, 0]
