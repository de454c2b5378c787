"""Companion matrices: kernels, states and powers of ``A = S + a e_d^T`` (S: ones below the diagonal).

Zhang et al., "Effectively Modeling Time Series with Simple Discrete State Spaces", arXiv 2303.09489, section 3 and
algorithm 1; HazyResearch/spacetime ``model/functional/{krylov,companion_krylov}.py``, Apache-2.0.

Two ways to the same numbers:

- by powers (:func:`krylov`): repeated squaring, for any matrix, O(d^3 log L). The definition.
- by generating functions (:func:`companion_kernel`, :func:`last_state`): O((d + L) log (d + L)), for companion matrices
  whose column has a 1-norm of at most 1. Then no power of A grows.

The original's form of the second (:func:`companion_krylov`) evaluates on the unit circle, where the sequence wraps, so
it needs ``c - c A^L``: a power of A again. Here the circle is a little smaller, what wraps has decayed below rounding,
and no power is needed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.layers.ssm_kernel import exact, wide
from zoo_kernels import long_conv
from zoo_kernels.ops.long_conv.reference import fast_length

#: Points of the circle for each step of the sequence, and radius^points. What wraps is weighed with the second;
#: rounding in double precision is magnified by it to the power of minus one over the first. Both stay below 2e-9, for
#: results in double precision below 1e-10.
CIRCLE = (1.25, 1.5e-9)
EXACT_CIRCLE = (2.0, 2e-11)


def companion_matrix(a: Tensor) -> Tensor:
    """``S + a e_d^T``: (..., d) to (..., d, d), the last column is a."""
    d = a.shape[-1]
    shift = torch.diag(a.new_ones(d - 1), -1)
    return shift + F.pad(a.unsqueeze(-1), (d - 1, 0))


def krylov(length: int, A: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``A^i b`` for i < length by repeated squaring, or ``c^T A^i b``.

    A: (..., d, d); b, c: (..., d), broadcast against it. Returns (..., d, length), or (..., length) with c. Raises
    ValueError for a length below 1.
    """
    check_length(length)
    columns = b.unsqueeze(-1)
    while columns.shape[-1] < length:
        missing = length - columns.shape[-1]
        columns = torch.cat([columns, A @ columns[..., :missing]], dim=-1)
        if columns.shape[-1] < length:
            A = A @ A
    return columns if c is None else torch.einsum("...nl,...n->...l", columns, c)


def companion_krylov(
    length: int, a: Tensor, b: Tensor, c: Tensor | None = None, *, c_tilde: Tensor | None = None
) -> Tensor:
    """``c^T A^i b`` for i < length on the unit circle, as the original's function of this name.

    a, b, c: (..., d) real. ``c_tilde``: ``c^T (I - A^length)``, where it is known (the original may learn it in c's
    place); without it a power of A is computed. Returns (..., length). Raises ValueError where both or none are given.
    """
    check_length(length)
    if (c is None) == (c_tilde is None):
        raise ValueError("companion_krylov takes c or c_tilde, one of them")
    if c_tilde is None:
        assert c is not None
        power = torch.linalg.matrix_power(companion_matrix(a), length)
        c_tilde = c - (c.unsqueeze(-2) @ power).squeeze(-2)
    last = torch.zeros_like(a)
    last[..., -1] = 1
    turn = 2 * math.pi / length * torch.arange(length // 2 + 1, dtype=a.dtype, device=a.device)
    z = torch.polar(torch.ones_like(turn), turn)

    def form(u: Tensor, v: Tensor) -> Tensor:
        folded = _correlation(u, v)
        folded = F.pad(folded, (0, -folded.shape[-1] % length))
        return torch.fft.rfft(folded.unflatten(-1, (-1, length)).sum(-2))

    values = form(c_tilde, b) + form(c_tilde, a) * form(last, b) / (z - form(last, a))
    return torch.fft.irfft(values, n=length)


def companion_kernel(length: int, a: Tensor | None, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``c^T A^i b`` for i < length, by generating functions; the 1-norm of ``a`` must be at most 1.

    a, b, c: (..., d) real; ``a`` None is the bare shift matrix, ``c`` None the last unit vector. Returns (..., length)
    in float32, or float64 for float64.

    With s_i the last entry of ``A^i b`` (c the last unit vector), ``c^T A^i b = r_i + sum_{m < i} q_{i-1-m} s_m`` where
    r and q correlate c with b and with a. As power series: ``S = B / (1 - z A)``, ``F = R + z Q S`` with the entries of
    b and a counted from the last. They are evaluated on a circle of radius below 1 in double precision.
    """
    check_length(length)
    out = wide(b).dtype
    b = exact(b)
    target = None if c is None else exact(c)
    direct = b.flip(-1) if target is None else _correlation(target, b)
    if a is None:
        return _crop(direct, length).to(out)
    a = exact(a)
    share, decay = EXACT_CIRCLE if out == torch.float64 else CIRCLE
    points = fast_length(math.ceil(share * length))
    falling = torch.exp(math.log(decay) / points * torch.arange(length, dtype=b.dtype, device=b.device))

    def on_circle(series: Tensor) -> Tensor:
        return torch.fft.rfft(_crop(series, length) * falling, n=points)

    turn = -2 * math.pi / points * torch.arange(points // 2 + 1, dtype=b.dtype, device=b.device)
    z = torch.polar(torch.full_like(turn, decay ** (1 / points)), turn)
    last = on_circle(b.flip(-1)) / (1 - z * on_circle(a.flip(-1)))
    values = last if target is None else on_circle(direct) + z * on_circle(_correlation(target, a)) * last
    return (torch.fft.irfft(values, n=points)[..., :length] / falling).to(out)


def last_state(u: Tensor, a: Tensor | None, b: Tensor) -> Tensor:
    """The state after the last input: ``x_t = A x_{t-1} + b u_t`` from rest; the 1-norm of ``a`` must be at most 1.

    u: (batch, length, channels); a, b: (channels, d), ``a`` None for the bare shift matrix. Returns (batch, channels,
    d) in float32 or better. The last entries s_t of all states are one convolution; the last d of them and of the
    inputs give the state, ``x_t[j] = sum_{k <= j} a[j-k] s_{t-1-k} + b[j-k] u_{t-k}``.
    """
    d = b.shape[-1]
    x = wide(u)
    state = _newest(x, d) @ _triangle(wide(b)).transpose(-1, -2)
    if a is not None and x.shape[1] > 1:
        s, _ = long_conv(x[:, :-1], companion_kernel(x.shape[1] - 1, a, b))
        state = state + _newest(s, d) @ _triangle(wide(a)).transpose(-1, -2)
    return state.transpose(0, 1)


def check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length is {length}; expected at least 1")


def _newest(x: Tensor, d: int) -> Tensor:
    """The last d rows of (batch, length, channels), newest first, zeros before the first: (channels, batch, d)."""
    recent = x[:, -d:].flip(1)
    return F.pad(recent, (0, 0, 0, d - recent.shape[1])).permute(2, 0, 1)


def _triangle(v: Tensor) -> Tensor:
    """Lower triangular Toeplitz matrices with first columns v: (..., d) to (..., d, d)."""
    d = v.shape[-1]
    offset = torch.arange(d, device=v.device)[:, None] - torch.arange(d, device=v.device)
    return v[..., offset.clamp(min=0)] * (offset >= 0).to(v.dtype)


def _correlation(u: Tensor, v: Tensor) -> Tensor:
    """``sum_j u_j v_{j-i}`` for i < d, along the last axis."""
    d = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * d) * torch.fft.rfft(v, n=2 * d).conj(), n=2 * d)[..., :d]


def _crop(x: Tensor, length: int) -> Tensor:
    """The last axis cut or zero-padded to ``length``."""
    return F.pad(x[..., :length], (0, max(length - x.shape[-1], 0)))
