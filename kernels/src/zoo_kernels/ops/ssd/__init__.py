"""State space duality (Mamba-2): the scan with one decay per head, in chunks; its time-aware and tree forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels.ops._walk import resets_of_segments, walk_order

from .core import decayed_scan
from .step import ssd_step
from .tree import ancestor_windows, causal_conv1d_tree, ssd_replay, ssd_tree, tree_mask

__all__ = ["ancestor_windows", "causal_conv1d_tree", "ssd", "ssd_replay", "ssd_step", "ssd_tree", "tree_mask"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    dt_scale: Tensor | None = None,
    path: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """State space duality: a recurrence with one decay per head and step, computed with matrix products in chunks.

    With ``d_t = clamp(softplus(dt_t * dt_scale_t + dt_bias), *dt_limit)`` (or without softplus), per head::

        h_t = exp(d_t * A) * h_{t-1} + d_t * x_t B_t^T        (headdim, state)
        y_t = h_t C_t + D * x_t                               (times silu(z_t) when z is given)

    One path (A has 1 axis):
        x, z: (batch, length, heads, headdim)
        dt, dt_scale: (batch, length, heads); dt_scale multiplies dt before bias and softplus: the time-aware form
        A: (heads,), real, negative in every published model; used as given
        B, C: (batch, length, groups, state), head h reads group h // (heads / groups); (batch, length, state) is one
        group
        D: (heads,) or (heads, headdim); dt_bias: (heads,); dt_limit: (least, most) of d_t, after softplus
        path: None, (steps,) or (batch, steps) integer rows in visiting order, steps <= length, no row twice
        initial_state, final state: (batch, heads, headdim, state), float32 (float64 if x is)

    Several paths over the same rows, K parameter sets, outputs summed (A has 2 axes):
        x: (batch, length, heads, headdim), shared, or (batch, length, K, heads, headdim)
        dt, dt_scale: (batch, length, K, heads); A, dt_bias: (K, heads); D: (K, heads) or (K, heads, headdim)
        B, C: (batch, length, K, state) or (batch, length, K, groups, state); z as above, applied to the sum
        path: None, (K, steps) or (batch, K, steps); reverse: one bool or K of them
        initial_state, final state: (batch, K, heads, headdim, state)

    reverse: walk the path from its end (each row's own end when ``lengths`` is given).
    resets: (batch, length) bool, by row: the state is dropped before the input of that row is added.
    seq_idx: (batch, length) integers: the state is dropped where the index differs from that of the row visited before.
    lengths: (batch,) int: only the first ``lengths[b]`` steps of the path are walked; rows not visited give 0.

    Returns ``(y, final_state)``; y has the shape (batch, length, heads, headdim) and x's dtype. Inputs are not
    modified. Raises ValueError naming the argument, what it is and what it must be.
    Inputs that are discretised already (x times dt, A times dt) go to :func:`zoo_kernels.linear_attention`.
    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6 and listing 1; state-spaces/mamba
    ``ssd_combined.py``. Time-aware: TiM4Rec, arXiv 2409.16182, ``ssd.py``.

    Example::

        y, _ = ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
    """
    if isinstance(A, Tensor) and A.dim() == 2:
        return _several(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, dt_scale, path, reverse, initial_state,
            return_final_state, resets, seq_idx, lengths,
        )  # fmt: skip
    B, C = check_ssd("ssd", x, dt, A, B, C, D, z, dt_bias, dt_scale, initial_state)
    batch, length = x.shape[:2]
    path = _checks.canonical_path("ssd", path, batch=batch, length=length, paths=None, like=x)
    (flag,) = _checks.canonical_reverse("ssd", reverse, paths=1)
    resets = _checks.canonical_resets("ssd", resets, batch=batch, length=length, like=x)
    lengths = _checks.canonical_lengths("ssd", lengths, batch=batch, like=x)
    if path is not None:
        path = path[:, 0]
    if concrete(path, lengths):
        _checks.check_values("ssd", path, lengths, length=length)
    order = walk_order(path, flag, lengths, batch=batch, length=length, device=x.device)
    if seq_idx is not None:
        _checks.has_shape("ssd", "seq_idx", seq_idx, [("batch", batch), ("length", length)], x)
        _checks.has_dtype("ssd", "seq_idx", seq_idx, _checks.INTEGERS)
        changes = resets_of_segments(seq_idx, order)
        resets = changes if resets is None else resets | changes
    d = discretise(dt, dt_scale, dt_bias, dt_softplus, dt_limit, x.dtype)
    y, final = decayed_scan(x, d * A.to(d.dtype), d, B, C, D, initial_state, resets, order)
    if z is not None:
        y = gate(y, z)
    return y, final if return_final_state else None


def discretise(
    dt: Tensor, scale: Tensor | None, bias: Tensor | None, softplus: bool, limit: tuple[float, float], like: torch.dtype
) -> Tensor:
    """``clamp(softplus(dt * scale + bias))`` in the accumulation dtype."""
    work = torch.promote_types(torch.promote_types(dt.dtype, like), torch.float32)
    d = dt.to(work)
    if scale is not None:
        d = d * scale.to(work)
    if bias is not None:
        d = d + bias.to(work)
    if softplus:
        d = F.softplus(d)
    low, high = float(limit[0]), float(limit[1])
    if low > high:
        raise ValueError(f"ssd: dt_limit is {tuple(limit)}; the first must not exceed the second")
    if low > 0.0 or high < float("inf"):
        d = d.clamp(low, high)
    return d


def gate(y: Tensor, z: Tensor) -> Tensor:
    """``y * silu(z)`` in the accumulation dtype, back to y's dtype."""
    work = torch.promote_types(y.dtype, torch.float32)
    return (y.to(work) * F.silu(z.to(work))).to(y.dtype)


def concrete(*tensors: Tensor | None) -> bool:
    """Whether values may be looked at: not while tracing."""
    return not torch.compiler.is_compiling() and all(t is None or type(t) is Tensor for t in tensors)


def check_ssd(
    name: str, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any, dt_scale: Any, state: Any
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and devices of a scan along one path; B and C with their axis of groups."""
    _checks.has_shape(name, "x", x, [("batch", None), ("length", None), ("heads", None), ("headdim", None)])
    _checks.has_dtype(name, "x", x)
    batch, length, heads, headdim = x.shape
    rows = [("batch", batch), ("length", length)]
    _checks.has_shape(name, "dt", dt, [*rows, ("heads", heads)], x)
    _checks.has_dtype(name, "dt", dt)
    _checks.has_shape(name, "A", A, [("heads", heads)], x)
    _checks.has_dtype(name, "A", A)
    for label, t in (("B", B), ("C", C)):
        _checks.is_tensor(name, label, t, x)
        _checks.has_dtype(name, label, t)
    B, C = (t[:, :, None] if t.dim() == 3 else t for t in (B, C))
    _checks.has_shape(name, "B", B, [*rows, ("groups", None), ("state", None)], x)
    groups, state_size = B.shape[2:]
    _checks.has_shape(name, "C", C, [*rows, ("groups", groups), ("state", state_size)], x)
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: B has {groups} groups; it must be a divisor of the {heads} heads")
    if D is not None:
        _checks.is_tensor(name, "D", D, x)
        axes = [("heads", heads), ("headdim", headdim)]
        _checks.has_shape(name, "D", D, axes[:1] if D.dim() == 1 else axes, x)
    if z is not None:
        _checks.has_shape(name, "z", z, [*rows, ("heads", heads), ("headdim", headdim)], x)
    if dt_bias is not None:
        _checks.has_shape(name, "dt_bias", dt_bias, [("heads", heads)], x)
    if dt_scale is not None:
        _checks.has_shape(name, "dt_scale", dt_scale, [*rows, ("heads", heads)], x)
    if state is not None:
        axes = [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", state_size)]
        _checks.has_shape(name, "initial_state", state, axes, x)
    return B, C


def _several(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, dt_scale, path, reverse, initial_state, return_final_state,
    resets, seq_idx, lengths,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """K scans over the same rows, summed: the arguments of each lie along axis 2 (axis 0 of the parameters)."""
    K = A.shape[0]
    _checks.is_tensor("ssd", "x", x)
    if x.dim() not in (4, 5):
        raise ValueError(
            f"ssd: x has shape {tuple(x.shape)}; with A (K {K}, heads) it must be (batch, length, heads, headdim) or "
            f"(batch, length, K {K}, heads, headdim)"
        )
    for name, t in (("dt", dt), ("B", B), ("C", C), ("dt_scale", dt_scale)):
        if t is not None and (t.dim() < 4 or t.shape[2] != K):
            raise ValueError(
                f"ssd: {name} has shape {tuple(t.shape)}; with A (K {K}, heads) its third axis must be K {K}"
            )
    path = _checks.canonical_path("ssd", path, batch=x.shape[0], length=x.shape[1], paths=K, like=x)
    flags = _checks.canonical_reverse("ssd", reverse, paths=K)

    def part(t, axis, k):
        return None if t is None else t.select(axis, k)

    total, finals = None, []
    for k in range(K):
        y, final = ssd(
            x if x.dim() == 4 else x[:, :, k], dt[:, :, k], A[k], B[:, :, k], C[:, :, k], part(D, 0, k), None,
            part(dt_bias, 0, k), dt_softplus=dt_softplus, dt_limit=dt_limit, dt_scale=part(dt_scale, 2, k),
            path=part(path, 1, k), reverse=flags[k], initial_state=part(initial_state, 1, k),
            return_final_state=return_final_state, resets=resets, seq_idx=seq_idx, lengths=lengths,
        )  # fmt: skip
        total = y if total is None else total + y
        finals.append(final)
    assert total is not None
    if z is not None:
        total = gate(total, z)
    return total, torch.stack(finals, dim=1) if return_final_state else None
