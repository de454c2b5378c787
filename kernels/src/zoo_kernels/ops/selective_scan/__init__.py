"""The selective scan (S6) of Mamba-1, along one path or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator, results_only

from .step import step as _step

__all__ = ["selective_scan", "selective_scan_step"]

NAME = "selective_scan"
# Steps between the states that forward keeps for backward, which replays one such chunk at a time.
CHUNK = 64


def work_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    if u.dtype == A.dtype == torch.float32:
        return torch.float32
    return torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)


def empty_borders(u: Tensor, A: Tensor, path: Tensor | None, save: bool) -> Tensor:
    """The states before each chunk of ``CHUNK`` steps: (batch, K, chunks, state, channels)."""
    if not save:
        return u.new_empty(0, dtype=work_dtype(u, A))
    steps = u.shape[1] if path is None else path.shape[-1]
    K, channels, N = A.shape
    chunks = (steps + CHUNK - 1) // CHUNK
    return u.new_empty(u.shape[0], K, chunks, N, channels, dtype=work_dtype(u, A))


def _fake(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    path,
    reverse,
    initial_state,
    return_final_state,
    resets,
    lengths,
    dt_proj=None,
    *,
    save,
):
    y = u.new_empty(u.shape[0], u.shape[1], u.shape[3])
    final = u.new_empty((u.shape[0], *A.shape) if return_final_state else (0,), dtype=work_dtype(u, A))
    return y, final, empty_borders(u, A, path, save)


def _validate(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj=None,
) -> None:  # fmt: skip
    checks.check_values(NAME, path, lengths, length=u.shape[1])


def _cases(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for K, groups, N, channels, length, rank in ((1, 1, 16, 24, 70, 0), (2, 2, 4, 6, 33, 0), (2, 1, 4, 18, 67, 5)):
        path = None if K == 1 else torch.stack([torch.randperm(length) for _ in range(K)])[None].to(device)
        yield (
            r(2, length, 1, channels), r(2, length, K, rank or channels),
            -torch.rand(K, channels, N, device=device).to(dtype) - 0.1,
            r(2, length, K, groups, N), r(2, length, K, groups, N), r(K, channels), r(2, length, channels),
            r(K, channels), True, path, [False, True][:K], None, False, None, None,
            r(K, channels, rank) if rank else None,
        )  # fmt: skip


_scan = Operator(
    NAME,
    package=__name__,
    arguments=(
        "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
        "Tensor? path, bool[] reverse, Tensor? initial_state, bool return_final_state, Tensor? resets, "
        "Tensor? lengths, Tensor? dt_proj"
    ),
    outputs=("y", "final"),
    saved=("borders",),
    differentiable=("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "dt_proj"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
    validate=_validate,
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
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
    dt_proj: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan: an input-dependent diagonal recurrence over every channel and state.

    With ``d_t = softplus(dt_t + dt_bias)`` (or without softplus), per channel and state n::

        h_t[n] = exp(d_t * A[n]) * h_{t-1}[n] + d_t * B_t[n] * u_t
        y_t    = sum_n C_t[n] * h_t[n] + D * u_t            (times silu(z_t) when z is given)

    One path (A has 2 axes):
        u, dt: (batch, length, channels)
        A: (channels, state), real and negative in every published model; used as given. Complex: reference only, and
            y is twice the real part of the sum
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
    dt_proj: (channels, rank) or (K, channels, rank): dt is then (batch, length, rank) or (batch, length, K, rank), and
        ``dt_proj @ dt`` takes its place, as every published block computes it. On a CPU the product is formed within
        the scan, and the tensor of all steps and channels never exists; elsewhere it is formed first.
    C None: the states themselves instead of their weighted sum, ``y`` (batch, length, channels, state) in u's dtype
        (summed over paths, if several); D and z must be None. This is what A2Mamba's mixer gathers from.

    Returns ``(y, final_state)``; y has u's dtype and shape (batch, length, channels). Inputs are not modified.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2; state-spaces/mamba ``selective_scan_ref``.

    Example::

        y, _ = selective_scan(u, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
    """
    usual = isinstance(reverse, bool) and initial_state is None and resets is None and lengths is None
    if usual and not return_final_state and type(u) is Tensor and u.is_cpu and (path is None or _whole(path, u)):
        tensors = (u, dt, A, B, C, D, z, dt_bias, None, dt_proj)
        signature = checks.signature(*tensors)
        if signature in _FITTING and results_only(tensors):
            from .plain import plain

            checks.check_values(NAME, path, None, length=u.shape[1])
            found = plain(u, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), path, reverse, dt_proj, signature)
            if found is not None:
                return found, None
    states = C is None
    if states:
        if D is not None or z is not None:
            raise ValueError(f"{NAME}: D and z must be None where C is None, for the result is the states themselves")
        C = B
    args = _canonical(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
        dt_proj,
    )  # fmt: skip
    if states:
        args = _with_states_as_channels(*args)
    if _scan.exporting() and not A.is_complex():
        from .export import selective_scan_export

        y, final = selective_scan_export(*args)
    else:
        y, final = _scan(*args)
    if states:
        y = y.unflatten(-1, (A.shape[-1], A.shape[-2])).transpose(-1, -2)
    if not return_final_state:
        return y, None
    if states:
        final = final.squeeze(-1).unflatten(-1, (A.shape[-1], A.shape[-2])).transpose(-1, -2)
    return y, final[:, 0] if A.dim() == 2 else final


def _whole(path: Any, u: Tensor) -> bool:
    """Whether ``path`` is one order of all rows, for every sequence, as the native library reads it."""
    return (
        type(path) is Tensor
        and path.dtype == torch.int64
        and path.shape == u.shape[1:2]
        and path.is_contiguous()
        and path.is_cpu
    )


_FITTING: set[tuple[Any, ...]] = set()  # signatures that have passed the checks


def _canonical(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj,
) -> tuple[Any, ...]:  # fmt: skip
    """Check everything and give every argument its K axis and B, C their groups axis (views: nothing is copied)."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, dt_proj)
    signature = checks.signature(*tensors)
    if signature is None or signature not in _FITTING:
        _check(*tensors)
        checks.remember(_FITTING, signature)
    single = A.dim() == 2
    K = 1 if single else A.shape[0]
    batch, length = u.shape[:2]
    path = checks.canonical_path(NAME, path, batch=batch, length=length, paths=None if single else K, like=u)
    flags = checks.canonical_reverse(NAME, reverse, paths=K)
    resets = checks.canonical_resets(NAME, resets, batch=batch, length=length, like=u)
    lengths = checks.canonical_lengths(NAME, lengths, batch=batch, like=u)
    if B.dim() == (3 if single else 4):
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    if u.dim() == 3:
        u = u.unsqueeze(2)
    if single:
        dt, B, C = dt.unsqueeze(2), B.unsqueeze(2), C.unsqueeze(2)
        A = A.unsqueeze(0)
        D, dt_bias, dt_proj = (None if p is None else p.unsqueeze(0) for p in (D, dt_bias, dt_proj))
        initial_state = None if initial_state is None else initial_state.unsqueeze(1)
    return (
        u, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), path, flags, initial_state, bool(return_final_state), resets,
        lengths, dt_proj,
    )  # fmt: skip


def _check(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_proj) -> None:
    """Raise ValueError unless these fit together."""
    checks.is_tensor(NAME, "u", u)
    checks.has_dtype(NAME, "u", u)
    checks.is_tensor(NAME, "A", A, u)
    if A.dim() not in (2, 3):
        raise ValueError(
            f"{NAME}: A has shape {tuple(A.shape)}; it must be (channels, state) or (paths, channels, state)"
        )
    checks.has_dtype(NAME, "A", A, (*checks.FLOATS, torch.complex64, torch.complex128))
    single = A.dim() == 2
    K = 1 if single else A.shape[0]
    channels, state = A.shape[-2:]
    if u.dim() not in ((3,) if single else (3, 4)):
        words = "(batch, length, channels)" + ("" if single else " or (batch, length, paths, channels)")
        raise ValueError(f"{NAME}: u has shape {tuple(u.shape)}; it must be {words}")
    batch, length = u.shape[:2]
    rows: list[tuple[str, int | None]] = [("batch", batch), ("length", length)]
    paths: list[tuple[str, int | None]] = [] if single else [("paths", K)]
    width: list[tuple[str, int | None]] = [("channels", channels)]
    checks.has_shape(NAME, "u", u, rows + (paths if u.dim() == 4 else []) + width)
    columns = width
    if dt_proj is not None:
        checks.has_shape(NAME, "dt_proj", dt_proj, [*paths, *width, ("rank", None)], u)
        checks.has_dtype(NAME, "dt_proj", dt_proj)
        columns = [("rank", dt_proj.shape[-1])]
    checks.has_shape(NAME, "dt", dt, rows + paths + columns, u)
    checks.has_dtype(NAME, "dt", dt)
    allowed = (*checks.FLOATS, torch.complex64, torch.complex128) if A.is_complex() else checks.FLOATS
    for name, value in (("B", B), ("C", C)):
        checks.is_tensor(NAME, name, value, u)
        grouped = value.dim() == len(rows + paths) + 2
        groups: list[tuple[str, int | None]] = [("groups", value.shape[-2])] if grouped else []
        checks.has_shape(NAME, name, value, rows + paths + groups + [("state", state)], u)
        checks.has_dtype(NAME, name, value, allowed)
        if grouped and (value.shape[-2] == 0 or channels % value.shape[-2]):
            raise ValueError(f"{NAME}: {name} has {value.shape[-2]} groups; they must divide the {channels} channels")
    if B.shape[:-1] != C.shape[:-1]:
        raise ValueError(f"{NAME}: C has shape {tuple(C.shape)}; it must be {tuple(B.shape)}, as B is")
    for name, value, axes in (
        ("D", D, paths + width),
        ("z", z, rows + width),
        ("dt_bias", dt_bias, paths + width),
        ("initial_state", initial_state, [("batch", batch), *paths, *width, ("state", state)]),
    ):
        if value is not None:
            checks.has_shape(NAME, name, value, axes, u)
            checks.has_dtype(NAME, name, value, allowed if name == "initial_state" else checks.FLOATS)


def _with_states_as_channels(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj,
) -> tuple[Any, ...]:  # fmt: skip
    """Canonical arguments whose outputs are the states: each (state, channel) becomes a channel of one state, C = 1.

    The channels are ordered by state first, so that the states of B become its groups.
    """
    if A.is_complex():
        raise ValueError(f"{NAME}: C is None; it must be given where A is complex")
    K, channels, N = A.shape
    if N > 1:
        u = u.repeat(1, 1, 1, N)
        if dt_proj is None:
            dt = dt.repeat(1, 1, 1, N)
        else:
            dt_proj = dt_proj.repeat(1, N, 1)
        dt_bias = None if dt_bias is None else dt_bias.repeat(1, N)
        A = A.transpose(1, 2).reshape(K, N * channels, 1)
        B = B.transpose(3, 4).reshape(*B.shape[:3], -1, 1)
        if initial_state is not None:
            initial_state = initial_state.transpose(2, 3).reshape(-1, K, N * channels, 1)
    return (
        u, dt, A, B, torch.ones_like(B), None, None, dt_bias, dt_softplus, path, reverse, initial_state,
        return_final_state, resets, lengths, dt_proj,
    )  # fmt: skip


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
    return _step(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus)
