"""Mamba-3: a trapezoidal scan with data-dependent decay and rotation, with one input and output per head or several
(MIMO)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels.ops._walk import gather_rows, scatter_rows, walk_order
from zoo_kernels.ops.ssd.core import decayed_scan

from .reference import mamba3_reference, rotate
from .step import mamba3_step

__all__ = ["mamba3_reference", "mamba3_scan", "mamba3_step"]

State = tuple[Tensor, Tensor, Tensor, Tensor]


def mamba3_scan(
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
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    rotate_halves: bool | None = None,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: State | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Mamba-3's recurrence. Per head, with ``lam = sigmoid(trap)`` and ranks r (one in the SISO form)::

        theta_t = theta_{t-1} + pi * tanh(angles_t) * dt_t
        K_t, Q_t = rotate(B_t + B_bias, theta_t), rotate(C_t + C_bias, theta_t)
        v_t^r = x_t * mimo_x^r
        h_t = exp(A_t dt_t) h_{t-1} + (1 - lam_t) dt_t exp(A_t dt_t) sum_r v_{t-1}^r K_{t-1}^r + lam_t dt_t sum_r
        v_t^r K_t^r y_t^r = h_t Q_t^r + D v_t^r

    then, with z: SISO ``y * silu(z)``; MIMO ``sum_r y^r * silu(z * mimo_z^r) * mimo_o^r``.

    x, z: (batch, length, heads, headdim)
    dt: (batch, length, heads), positive (softplus applied); A: (batch, length, heads), negative; trap: the same shape
    B, C: (batch, length, groups, state) for SISO, (batch, length, ranks, groups, state) for MIMO, normalised; head h
        reads group h // (heads / groups)
    angles: (batch, length, S), 2 S <= state; D: (heads,); B_bias, C_bias: (heads, ranks, state)
    mimo_x, mimo_z, mimo_o: (heads, ranks, headdim). Without mimo_o, MIMO returns the ranks (batch, length, ranks,
        heads, headdim), ungated (for a norm between output and gate); z must not be given then
    rotate_halves: pair channel i with i + state / 2 (MIMO, its default) or neighbours (SISO, its default)
    path, reverse, resets, lengths: as in :func:`zoo_kernels.ssd`; a reset also restarts the angle and the previous step
    initial_state, final state: (theta (batch, heads, S), h (batch, heads, headdim, state), K of the last step (batch,
        ranks, heads, state), x of the last step (batch, heads, headdim)), float32 (float64 if x is); theta is not
        reduced

    Computed as one chunked product: source s weighs ``lam_s dt_s + (1 - lam_{s+1}) dt_{s+1}``, less the second term
    on the diagonal; ranks are steps without decay between them.
    Returns ``(y, final_state)``; y like x (or with ranks, above). Raises ValueError naming the argument and what it
    must be.
    Source: Mamba-3, arXiv 2603.15569; state-spaces/mamba ``modules/mamba3.py`` and the references in its tests.

    Example::

        y, _ = mamba3_scan(x, dt, A, B, C, trap, angles, D, z)
    """
    mimo = isinstance(B, Tensor) and B.dim() == 5
    halves = mimo if rotate_halves is None else rotate_halves
    check("mamba3_scan", x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, initial_state, halves)
    batch, length, _heads, _headdim = x.shape
    path = _checks.canonical_path("mamba3_scan", path, batch=batch, length=length, paths=None, like=x)
    path = None if path is None else path[:, 0]
    (flag,) = _checks.canonical_reverse("mamba3_scan", reverse, paths=1)
    resets = _checks.canonical_resets("mamba3_scan", resets, batch=batch, length=length, like=x)
    lengths = _checks.canonical_lengths("mamba3_scan", lengths, batch=batch, like=x)
    if not torch.compiler.is_compiling() and all(t is None or type(t) is Tensor for t in (path, lengths)):
        _checks.check_values("mamba3_scan", path, lengths, length=length)
    order = walk_order(path, flag, lengths, batch=batch, length=length, device=x.device)
    if not mimo:
        B, C = B[:, :, None], C[:, :, None]
    steps = length if order is None else order.shape[1]
    if steps == 0:
        y, state = mamba3_reference(
            x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, halves, initial_state, resets, order
        )
    else:
        y, state = _parallel(
            x,
            dt,
            A,
            B,
            C,
            trap,
            angles,
            D,
            B_bias,
            C_bias,
            mimo_x,
            halves,
            initial_state,
            resets,
            order,
            return_final_state,
        )
    y = finish("mamba3_scan", y, z, mimo, mimo_z, mimo_o, x)
    return y, state if return_final_state else None


def _parallel(x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, halves, state, resets, order, wants_state):
    """As :func:`mamba3_reference`, by one chunked product over length times ranks."""
    batch, length, heads, headdim = x.shape
    rank, groups, _size = B.shape[2:]
    work = torch.promote_types(x.dtype, torch.float32)
    xs, d, a, bs, cs, lam, ang = (gather_rows(t, order).to(work) for t in (x, dt, A, B, C, trap, angles))
    drop = None if resets is None else gather_rows(resets, order)
    lam = torch.sigmoid(lam)
    steps = xs.shape[1]
    theta = _angles(ang, d, drop, None if state is None else state[0])  # float64: long sums of small angles
    turn = torch.remainder(theta, 2 * torch.pi).to(work)[:, :, None]
    repeat = heads // groups
    bs, cs = (t if repeat == 1 else t.repeat_interleave(repeat, dim=3) for t in (bs, cs))
    if B_bias is not None:
        bs = bs + B_bias.to(work).transpose(0, 1)
    if C_bias is not None:
        cs = cs + C_bias.to(work).transpose(0, 1)
    K, Q = rotate(bs, turn, halves), rotate(cs, turn, halves)  # (batch, steps, rank, heads, state)
    gain = x.new_ones(rank, heads, headdim, dtype=work) if mimo_x is None else mimo_x.to(work).transpose(0, 1)
    v = xs[:, :, None] * gain  # (batch, steps, rank, heads, headdim)
    late = (1 - lam) * d  # the share of a step that goes to the input before it
    if drop is not None:
        late_in = late.masked_fill(drop[..., None], 0)
    else:
        late_in = late
    following = torch.cat([late_in[:, 1:], torch.zeros_like(late_in[:, :1])], dim=1)
    weight = lam * d + following
    start = None
    if state is not None:
        old = torch.einsum("brhp,brhn->bhpn", state[3].to(work)[:, None] * gain, state[2].to(work))
        start = state[1].to(work) + late[:, 0, :, None, None] * old
    # ranks become neighbouring steps; only the first of a step decays
    decay = torch.cat([(a * d)[:, :, None], (a * d).new_zeros(batch, steps, rank - 1, heads)], dim=2).flatten(1, 2)
    spread = weight[:, :, None].expand(-1, -1, rank, -1).flatten(1, 2)
    stops = None
    if drop is not None:
        stops = torch.cat([drop[:, :, None], drop.new_zeros(batch, steps, rank - 1)], dim=2).flatten(1, 2)
    flat = [t.flatten(1, 2) for t in (v, K, Q)]
    y, h = decayed_scan(flat[0], decay, spread, flat[1], flat[2], None, start, stops)
    y = y.unflatten(1, (steps, rank))
    # what the walk gave a row of its own step, against what it should: every rank, without the look-ahead
    own = torch.einsum("bthrn,bthsn->bthrs", Q.transpose(2, 3), K.transpose(2, 3))
    unseen = torch.ones(rank, rank, dtype=work, device=x.device).triu(1)
    own = own * (weight[..., None, None] * unseen - following[..., None, None])
    y = y + torch.einsum("bthrs,btshp->btrhp", own, v)
    if D is not None:
        y = y + D.to(work)[:, None] * v
    final = None
    if wants_state:
        if order is None:
            final = (theta[:, -1].to(work), h, K[:, -1], xs[:, -1])
        else:
            final = _last(order, batch, (theta.to(work), K, xs), h, state, resets)
    if order is not None:
        y = y.masked_fill((order < 0)[..., None, None, None], 0)
    return scatter_rows(y, order, length), final


def _angles(ang: Tensor, d: Tensor, drop: Tensor | None, start: Tensor | None) -> Tensor:
    """theta (batch, steps, heads, S) in float64, restarting at resets."""
    add = torch.pi * torch.tanh(ang.double())[:, :, None] * d.double()[..., None]
    theta = add.cumsum(1)
    if start is not None:
        theta = theta + start.double()[:, None]
    if drop is None:
        return theta
    index = torch.arange(add.shape[1], device=ang.device)
    begun = torch.where(drop, index, index.new_full((), -1)).cummax(1).values  # (batch, steps), -1: no reset yet
    picked = begun.clamp(min=0)[..., None, None].expand_as(theta)
    base = (theta - add).gather(1, picked)
    return theta - torch.where((begun >= 0)[..., None, None], base, torch.zeros_like(base))


def _last(order: Tensor, batch: int, parts: tuple[Tensor, Tensor, Tensor], h: Tensor, state, resets):
    """The state after each row's last visited step; what was given (or zeros) where none is visited."""
    index = order.expand(batch, -1)
    count = (index >= 0).sum(1)
    rows = torch.arange(batch, device=h.device)
    found = [t[rows, (count - 1).clamp(min=0)] for t in parts]
    given = [torch.zeros_like(t) for t in found] if state is None else [state[0], state[2], state[3]]
    kept = [
        torch.where((count > 0).reshape(-1, *[1] * (t.dim() - 1)), t, g.to(t.dtype))
        for t, g in zip(found, given, strict=True)
    ]
    if state is not None:  # the input before the first step belongs to that step: without one it stays apart
        h = torch.where((count > 0)[:, None, None, None], h, state[1].to(h.dtype))
    return kept[0], h, kept[1], kept[2]


def finish(name: str, y: Tensor, z: Tensor | None, mimo: bool, mimo_z: Tensor | None, mimo_o: Tensor | None, x: Tensor):
    """Gate and contraction over the ranks of y (batch, length, ranks, heads, headdim)."""
    if not mimo:
        y = y[:, :, 0]
        return (y if z is None else y * F.silu(z.to(y.dtype))).to(x.dtype)
    check_gate(name, z, mimo_z, mimo_o)
    if mimo_o is None:
        return y.to(x.dtype)
    if z is not None:
        assert mimo_z is not None
        y = y * F.silu(z.to(y.dtype)[:, :, None] * mimo_z.to(y.dtype).transpose(0, 1))
    return (y * mimo_o.to(y.dtype).transpose(0, 1)).sum(2).to(x.dtype)


def check_gate(name: str, z: Tensor | None, mimo_z: Tensor | None, mimo_o: Tensor | None) -> None:
    """With ranks, the gate and the sum over them go together."""
    if mimo_o is None and (z is not None or mimo_z is not None):
        raise ValueError(f"{name}: z or mimo_z is given without mimo_o; with ranks the gate needs mimo_z and mimo_o")
    if z is not None and mimo_z is None:
        raise ValueError(f"{name}: z is given without mimo_z; with ranks the gate is silu(z * mimo_z)")


def check(name, x, dt, A, B, C, trap, angles, D, B_bias, C_bias, mimo_x, state, halves) -> None:
    _checks.has_shape(name, "x", x, [("batch", None), ("length", None), ("heads", None), ("headdim", None)])
    _checks.has_dtype(name, "x", x)
    batch, length, heads, headdim = x.shape
    rows = [("batch", batch), ("length", length)]
    for label, t in (("dt", dt), ("A", A), ("trap", trap)):
        _checks.has_shape(name, label, t, [*rows, ("heads", heads)], x)
        _checks.has_dtype(name, label, t)
    tail = [("groups", None), ("state", None)]
    _checks.is_tensor(name, "B", B, x)
    _checks.has_shape(name, "B", B, [*rows, *([("ranks", None)] if B.dim() == 5 else []), *tail], x)
    _checks.has_shape(name, "C", C, [("like B", n) for n in B.shape], x)
    groups, size = B.shape[-2:]
    rank = B.shape[2] if B.dim() == 5 else 1
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: B has {groups} groups; it must be a divisor of the {heads} heads")
    _checks.has_shape(name, "angles", angles, [*rows, ("angles", None)], x)
    S = angles.shape[2]
    if size < 2 * S or (halves and size % 2):
        raise ValueError(f"{name}: angles has {S} angles and state is {size}; each angle turns a pair of channels")
    if D is not None:
        _checks.has_shape(name, "D", D, [("heads", heads)], x)
    for label, t in (("B_bias", B_bias), ("C_bias", C_bias)):
        if t is not None:
            _checks.has_shape(name, label, t, [("heads", heads), ("ranks", rank), ("state", size)], x)
    if mimo_x is not None:
        _checks.has_shape(name, "mimo_x", mimo_x, [("heads", heads), ("ranks", rank), ("headdim", headdim)], x)
    if state is None:
        return
    if not (isinstance(state, tuple | list) and len(state) == 4):
        raise ValueError(f"{name}: the state is {type(state).__name__}; it must be the four tensors (theta, h, K, x)")
    axes = [
        [("batch", batch), ("heads", heads), ("angles", S)],
        [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", size)],
        [("batch", batch), ("ranks", rank), ("heads", heads), ("state", size)],
        [("batch", batch), ("heads", heads), ("headdim", headdim)],
    ]
    for i, (t, want) in enumerate(zip(state, axes, strict=True)):
        _checks.has_shape(name, f"state[{i}]", t, want, x)
