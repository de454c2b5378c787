# Tuples of results are unpacked whole, though a kernel may need some of them only.
# mypy: ignore-errors
"""One step of Mamba-3's recurrence in one launch, the four tensors of the state updated in place.

A program takes one head of one sequence, whose angles, rotated keys and last step its rows share. Bound: one read and
one write of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program, sigmoid


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    if not all(t.is_contiguous() for t in arguments[14:18]):
        return "the state is not contiguous"
    return _gpu.unsupported(arguments)


@triton.jit
def turned(theta, turn, line, b, d, index, inside, S: tl.constexpr):
    """The angle after this step at ``index``, brought into one turn: 2 sigmoid(2 x) - 1 is tanh(x)."""
    old = tl.load(theta + line * S + index, mask=inside, other=0.0)
    step = 2.0 * sigmoid(2.0 * tl.load(turn + b * S + index, mask=inside, other=0.0).to(tl.float32)) - 1.0
    return old + 3.141592653589793 * step * d


@triton.jit
def rotated(source, at, bias, at_bias, n, partner, sign, cosine, sine, N: tl.constexpr):
    """One row of B or C, with its bias, rotated: channel n times the cosine and its partner times the signed sine."""
    own = tl.load(source + at + n, mask=n < N, other=0.0).to(tl.float32)
    other = tl.load(source + at + partner, mask=n < N, other=0.0).to(tl.float32)
    if bias is not None:
        own += tl.load(bias + at_bias + n, mask=n < N, other=0.0).to(tl.float32)
        other += tl.load(bias + at_bias + partner, mask=n < N, other=0.0).to(tl.float32)
    return own * cosine + sign * other * sine


@triton.jit(do_not_specialize=["total"])
def step_kernel(
    x, dt, A, B, C, trap, turn, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, theta, h, last_K, last_x, y, heads,
    groups, total, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, HALVES: tl.constexpr, CONTRACT: tl.constexpr,
):  # fmt: skip
    line = program()  # sequence and head
    if line < total:
        b = line // heads
        head = line % heads
        n = tl.arange(0, BN)
        nm = n < N
        d = tl.load(dt + line).to(tl.float32)
        lam = sigmoid(tl.load(trap + line).to(tl.float32))
        alpha = tl.exp2(d * tl.load(A + line).to(tl.float32) * LOG2E)
        # channel n turns with its partner by angle i; the others stay
        if HALVES:
            half: tl.constexpr = N // 2
            low = n < half
            i = tl.where(low, n, n - half)
            turns = nm & (i < S)
            partner = tl.where(turns, tl.where(low, n + half, n - half), n)
            sign = tl.where(low, -1.0, 1.0)
        else:
            i = n // 2
            turns = nm & (i < S)
            partner = tl.where(turns, n + 1 - 2 * (n % 2), n)
            sign = tl.where(n % 2 == 0, -1.0, 1.0)
        angle = turned(theta, turn, line, b, d, tl.where(turns, i, 0), turns, S)
        angle = tl.where(turns, angle - 6.283185307179586 * tl.floor(angle * 0.15915494309189535), 0.0)
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
        s = tl.arange(0, BS)
        new_theta = turned(theta, turn, line, b, d, s, s < S, S)
        group = head // (heads // groups)
        Ks = ()
        Qs = ()
        lasts = ()
        for r in tl.static_range(R):
            at = ((b * R + r) * groups + group) * N
            at_bias = (head * R + r) * N
            Ks += (rotated(B, at, B_bias, at_bias, n, partner, sign, cosine, sine, N),)
            Qs += (rotated(C, at, C_bias, at_bias, n, partner, sign, cosine, sine, N),)
            lasts += (tl.load(last_K + ((b * R + r) * heads + head) * N + n, mask=nm, other=0.0),)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            pm = p < P
            at_state = h + (line * P + p)[:, None] * N + n[None, :]
            m = pm[:, None] & nm[None, :]
            now = tl.load(x + line * P + p, mask=pm, other=0.0).to(tl.float32)
            last = tl.load(last_x + line * P + p, mask=pm, other=0.0)
            state = alpha * tl.load(at_state, mask=m, other=0.0)
            gains = ()
            for r in tl.static_range(R):
                gain = tl.full([BP], 1.0, tl.float32)
                if mimo_x is not None:
                    gain = tl.load(mimo_x + (head * R + r) * P + p, mask=pm, other=0.0).to(tl.float32)
                gains += (gain,)
                state += ((1.0 - lam) * d * alpha * last * gain)[:, None] * lasts[r][None, :]
                state += (lam * d * now * gain)[:, None] * Ks[r][None, :]
            tl.store(at_state, state, mask=m)
            tl.store(last_x + line * P + p, now, mask=pm)
            total_y = tl.zeros([BP], tl.float32)
            for r in tl.static_range(R):
                out = tl.sum(state * Qs[r][None, :], 1)
                if D is not None:
                    out += tl.load(D + head).to(tl.float32) * now * gains[r]
                if CONTRACT:
                    if z is not None:
                        gate = tl.load(z + line * P + p, mask=pm, other=0.0).to(tl.float32)
                        if mimo_z is not None:
                            gate *= tl.load(mimo_z + (head * R + r) * P + p, mask=pm, other=0.0).to(tl.float32)
                        out = out * gate * sigmoid(gate)
                    if mimo_o is not None:
                        out *= tl.load(mimo_o + (head * R + r) * P + p, mask=pm, other=0.0).to(tl.float32)
                    total_y += out
                else:
                    tl.store(y + ((b * R + r) * heads + head) * P + p, out.to(y.dtype.element_ty), mask=pm)
            if CONTRACT:
                tl.store(y + line * P + p, total_y.to(y.dtype.element_ty), mask=pm)
        # every thread has read the old ones by now
        tl.debug_barrier()
        tl.store(theta + line * S + s, new_theta, mask=s < S)
        for r in tl.static_range(R):
            tl.store(last_K + ((b * R + r) * heads + head) * N + n, Ks[r], mask=nm)


def forward(*arguments, save=False):
    """See :func:`zoo_kernels.mamba3_step`; canonical arguments."""
    *tensors, halves, contract = arguments
    x = tensors[0]
    batch, heads, P = x.shape
    R, groups, N = tensors[3].shape[1:]
    S = tensors[6].shape[1]
    shape = (batch, heads, P) if contract else (batch, R, heads, P)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    given = [None if t is None else t.contiguous() for t in tensors]
    BN = _gpu.power_of_two(N)
    BP = max(1, min(_gpu.power_of_two(P), 4096 // BN))
    with _gpu.guard(x):
        _gpu.launch(
            step_kernel, batch * heads, *given, y, heads, groups, P=P, N=N, R=R, S=S, BP=BP, BN=BN,
            BS=_gpu.power_of_two(S), HALVES=bool(halves), CONTRACT=bool(contract),
        )  # fmt: skip
    return y
