# Tuples of results are unpacked whole, though a kernel may need some of them only.
# ruff: noqa: RUF059
"""The device code of the chunked scan with one decay per head. ``gpu.py`` launches it and says what is computed where.

Formulas and names are those of ``chunked.py``. Running sums of log decays are formed in float64 and kept as two float32
numbers (``hi + lo``): differences between neighbours stay exact after strong decays at the cost of two subtractions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo_kernels._gpu import LOG2E, product, program


def _jit(function):
    """Lengths and their kin must not force a new compilation."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    plain = ("order_b", "length", "steps", "chunks", "total", "a_b", "w_b", "splits")
    return triton.jit(function, do_not_specialize=[name for name in names if name in plain])


@triton.jit
def visits(order, order_b, b, t, steps):
    """The rows of steps ``t`` and whether these steps visit one."""
    there = t < steps
    row = tl.where(there, t, 0)
    if order is not None:
        row = tl.load(order + b * order_b + row, mask=there, other=-1)
        there = row >= 0
        row = tl.where(there, row, 0)
    return row, there


@triton.jit
def decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q: tl.constexpr):
    """Of a chunk: running sums of the log decays (hi, lo), segments, exp(c), exp(c_end - c), exp(c_end)."""
    c = tl.zeros([Q], tl.float64)
    end = tl.sum(c, 0)
    if decay is not None:
        a = tl.load(decay + b * a_b + row * a_l + h * a_h, mask=there, other=0.0).to(tl.float32)
        # A decay of -inf forgets as -1e4 does, and differences of sums stay finite.
        a = tl.maximum(a, -1e4).to(tl.float64)
        c = tl.cumsum(a, 0)
        end = tl.sum(a, 0)
    hi = c.to(tl.float32)
    lo = (c - hi.to(tl.float64)).to(tl.float32)
    carry = tl.exp2(hi * LOG2E)
    last = tl.exp2((end - c).to(tl.float32) * LOG2E)
    whole = tl.exp2(end.to(tl.float32) * LOG2E)
    segment = tl.zeros([Q], tl.int32)
    if resets is not None:
        drop = tl.load(resets + b * length + row, mask=there, other=0).to(tl.int32)
        segment = tl.cumsum(drop, 0)
        final = tl.sum(drop, 0)
        carry = tl.where(segment > 0, 0.0, carry)
        last = tl.where(segment == final, last, 0.0)
        whole = tl.where(final > 0, 0.0, whole)
    return hi, lo, segment, carry, last, whole


@triton.jit
def mask_of(hi, lo, segment, Q: tl.constexpr, STRICT: tl.constexpr):
    """M[t, s]; masked before the exponential, whose argument is positive above the diagonal."""
    t = tl.arange(0, Q)
    on = segment[:, None] == segment[None, :]
    if STRICT:
        on = on & (t[:, None] > t[None, :])
    else:
        on = on & (t[:, None] >= t[None, :])
    difference = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
    return tl.exp2(tl.where(on, difference, float("-inf")) * LOG2E)


@triton.jit
def tile(base, row, stride, column, there, width):
    """Rows of a (length, width) matrix as (Q, columns), float32 or as stored; 0 outside."""
    mask = there[:, None] & (column < width)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def weights_of(weight, w_b, w_l, w_h, b, h, row, there, Q: tl.constexpr):
    w = tl.full([Q], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + b * w_b + row * w_l + h * w_h, mask=there, other=0.0).to(tl.float32)
    return w


@_jit
def state_kernel(
    v, decay, weight, k, state, resets, order, borders, final,
    v_b, v_l, v_h, a_b, a_l, a_h, w_b, w_l, w_h, k_b, k_l, k_g, order_b, length, steps, chunks, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before every chunk, (batch, chunks, heads, P, N), and the last one: one chunk after the other."""
    work = program()
    if work < total:
        nb: tl.constexpr = (N + BN - 1) // BN
        pb: tl.constexpr = (P + BP - 1) // BP
        n = (work % nb) * BN + tl.arange(0, BN)
        p = ((work // nb) % pb) * BP + tl.arange(0, BP)
        h = (work // (nb * pb)) % heads
        b = work // (nb * pb * heads)
        inside = (p < P)[:, None] & (n < N)[None, :]
        local = p[:, None] * N + n[None, :]
        S = tl.zeros([BP, BN], tl.float32)
        if state is not None:
            S = tl.load(state + (b * heads + h) * P * N + local, mask=inside, other=0.0).to(tl.float32)
        for i in range(0, chunks):
            tl.store(borders + ((b * chunks + i) * heads + h) * P * N + local, S, mask=inside)
            row, there = visits(order, order_b, b, i * Q + tl.arange(0, Q).to(tl.int64), steps)
            hi, lo, segment, carry, last, whole = decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q)
            w = weights_of(weight, w_b, w_l, w_h, b, h, row, there, Q)
            u = tile(v + b * v_b + h * v_h, row, v_l, p, there, P).to(tl.float32) * (w * last)[:, None]
            ks = tile(k + b * k_b + (h // repeat) * k_g, row, k_l, n, there, N)
            S = whole * S + product(tl.trans(u), ks, DOT, PRECISION)
        tl.store(final + (b * heads + h) * P * N + local, S, mask=inside)


@_jit
def output_kernel(
    v, decay, weight, k, q, D, resets, order, borders, y,
    v_b, v_l, v_h, a_b, a_l, a_h, w_b, w_l, w_h, k_b, k_l, k_g, q_b, q_l, q_g, order_b,
    length, steps, chunks, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """y of a chunk, a head and a block of its channels: what the chunk adds and what its first state leaves."""
    work = program()
    if work < total:
        pb: tl.constexpr = (P + BP - 1) // BP
        p = (work % pb) * BP + tl.arange(0, BP)
        h = (work // pb) % heads
        i = (work // (pb * heads)) % chunks
        b = work // (pb * heads * chunks)
        row, there = visits(order, order_b, b, i * Q + tl.arange(0, Q).to(tl.int64), steps)
        hi, lo, segment, carry, last, whole = decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q)
        scores = tl.zeros([Q, Q], tl.float32)
        from_state = tl.zeros([Q, BP], tl.float32)
        for j in range(0, N, BN):
            n = j + tl.arange(0, BN)
            ks = tile(k + b * k_b + (h // repeat) * k_g, row, k_l, n, there, N)
            qs = tile(q + b * q_b + (h // repeat) * q_g, row, q_l, n, there, N)
            at = ((b * chunks + i) * heads + h) * P * N + p[:, None] * N + n[None, :]
            S = tl.load(borders + at, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
            scores += product(qs, tl.trans(ks), DOT, PRECISION)
            from_state += product(qs, tl.trans(S), DOT, PRECISION)
        w = weights_of(weight, w_b, w_l, w_h, b, h, row, there, Q)
        vs = tile(v + b * v_b + h * v_h, row, v_l, p, there, P).to(tl.float32)
        out = product(scores * mask_of(hi, lo, segment, Q, STRICT), vs * w[:, None], DOT, PRECISION)
        out += carry[:, None] * from_state
        if D is not None:
            out += tl.load(D + h * P + p, mask=p < P, other=0.0)[None, :] * vs
        at_y = ((b * length + row)[:, None] * heads + h) * P + p[None, :]
        tl.store(y + at_y, out.to(y.dtype.element_ty), mask=there[:, None] & (p < P)[None, :])


@_jit
def state_gradient_kernel(
    decay, q, dy, resets, order, dfinal, dborders, dstate,
    a_b, a_l, a_h, q_b, q_l, q_g, order_b, length, steps, chunks, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the states after every chunk, from the last to the first, and that of the initial state."""
    work = program()
    if work < total:
        nb: tl.constexpr = (N + BN - 1) // BN
        pb: tl.constexpr = (P + BP - 1) // BP
        n = (work % nb) * BN + tl.arange(0, BN)
        p = ((work // nb) % pb) * BP + tl.arange(0, BP)
        h = (work // (nb * pb)) % heads
        b = work // (nb * pb * heads)
        inside = (p < P)[:, None] & (n < N)[None, :]
        local = p[:, None] * N + n[None, :]
        dS = tl.load(dfinal + (b * heads + h) * P * N + local, mask=inside, other=0.0).to(tl.float32)
        for step in range(0, chunks):
            i = chunks - 1 - step
            tl.store(dborders + ((b * chunks + i) * heads + h) * P * N + local, dS, mask=inside)
            row, there = visits(order, order_b, b, i * Q + tl.arange(0, Q).to(tl.int64), steps)
            hi, lo, segment, carry, last, whole = decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q)
            g = tile(dy + (b * length * heads + h) * P, row, heads * P, p, there, P).to(tl.float32)
            qs = tile(q + b * q_b + (h // repeat) * q_g, row, q_l, n, there, N)
            dS = whole * dS + product(tl.trans(g * carry[:, None]), qs, DOT, PRECISION)
        if dstate is not None:
            tl.store(dstate + (b * heads + h) * P * N + local, dS, mask=inside)


@_jit
def value_gradient_kernel(
    v, decay, weight, k, q, D, dy, resets, order, dborders, dv, dweight, dD,
    v_b, v_l, v_h, a_b, a_l, a_h, w_b, w_l, w_h, k_b, k_l, k_g, q_b, q_l, q_g, order_b,
    batch, length, steps, chunks, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """dv of a chunk, a head and a block of its channels; that block's share of dweight and of dD."""
    work = program()
    if work < total:
        pb: tl.constexpr = (P + BP - 1) // BP
        block = work % pb
        p = block * BP + tl.arange(0, BP)
        h = (work // pb) % heads
        i = (work // (pb * heads)) % chunks
        b = work // (pb * heads * chunks)
        row, there = visits(order, order_b, b, i * Q + tl.arange(0, Q).to(tl.int64), steps)
        hi, lo, segment, carry, last, whole = decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q)
        scores = tl.zeros([Q, Q], tl.float32)
        through_state = tl.zeros([Q, BP], tl.float32)
        for j in range(0, N, BN):
            n = j + tl.arange(0, BN)
            ks = tile(k + b * k_b + (h // repeat) * k_g, row, k_l, n, there, N)
            qs = tile(q + b * q_b + (h // repeat) * q_g, row, q_l, n, there, N)
            at = ((b * chunks + i) * heads + h) * P * N + p[:, None] * N + n[None, :]
            dS = tl.load(dborders + at, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
            scores += product(qs, tl.trans(ks), DOT, PRECISION)
            through_state += product(ks, tl.trans(dS), DOT, PRECISION)
        g = tile(dy + (b * length * heads + h) * P, row, heads * P, p, there, P).to(tl.float32)
        scores = scores * mask_of(hi, lo, segment, Q, STRICT)
        du = product(tl.trans(scores), g, DOT, PRECISION) + last[:, None] * through_state
        vs = tile(v + b * v_b + h * v_h, row, v_l, p, there, P).to(tl.float32)
        if weight is not None:
            at_w = ((block * batch + b) * length + row) * heads + h
            tl.store(dweight + at_w, tl.sum(du * vs, 1), mask=there)
            du = du * weights_of(weight, w_b, w_l, w_h, b, h, row, there, Q)[:, None]
        if D is not None:
            du += tl.load(D + h * P + p, mask=p < P, other=0.0)[None, :] * g
            tl.store(dD + ((b * chunks + i) * heads + h) * P + p, tl.sum(g * vs, 0), mask=p < P)
        at_v = ((b * length + row)[:, None] * heads + h) * P + p[None, :]
        tl.store(dv + at_v, du.to(dv.dtype.element_ty), mask=there[:, None] & (p < P)[None, :])


@_jit
def key_gradient_kernel(
    v, decay, weight, k, q, dy, resets, order, borders, dborders, dk, dq, ddecay,
    v_b, v_l, v_h, a_b, a_l, a_h, w_b, w_l, w_h, k_b, k_l, k_g, q_b, q_l, q_g, order_b,
    batch, length, steps, chunks, heads, repeat, splits, total,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """dk and dq of a chunk, a group and a block of its keys, summed over a share of the group's heads; for every head
    that block's share of the gradient of the decays."""
    work = program()
    if work < total:
        nb: tl.constexpr = (N + BN - 1) // BN
        block = work % nb
        n = block * BN + tl.arange(0, BN)
        split = (work // nb) % splits
        groups = heads // repeat
        group = (work // (nb * splits)) % groups
        i = (work // (nb * splits * groups)) % chunks
        b = work // (nb * splits * groups * chunks)
        row, there = visits(order, order_b, b, i * Q + tl.arange(0, Q).to(tl.int64), steps)
        ks = tile(k + b * k_b + group * k_g, row, k_l, n, there, N)
        qs = tile(q + b * q_b + group * q_g, row, q_l, n, there, N)
        dk_sum = tl.zeros([Q, BN], tl.float32)
        dq_sum = tl.zeros([Q, BN], tl.float32)
        share = (repeat + splits - 1) // splits
        for one in range(split * share, tl.minimum((split + 1) * share, repeat)):
            h = group * repeat + one
            hi, lo, segment, carry, last, whole = decays(decay, a_b, a_l, a_h, resets, b, h, length, row, there, Q)
            w = weights_of(weight, w_b, w_l, w_h, b, h, row, there, Q)
            pairs = tl.zeros([Q, Q], tl.float32)
            to_q = tl.zeros([Q, BN], tl.float32)
            to_k = tl.zeros([Q, BN], tl.float32)
            meeting = tl.zeros([BN], tl.float32)
            for j in range(0, P, BP):
                p = j + tl.arange(0, BP)
                g = tile(dy + (b * length * heads + h) * P, row, heads * P, p, there, P).to(tl.float32)
                u = tile(v + b * v_b + h * v_h, row, v_l, p, there, P).to(tl.float32) * w[:, None]
                at = ((b * chunks + i) * heads + h) * P * N + p[:, None] * N + n[None, :]
                inside = (p < P)[:, None] & (n < N)[None, :]
                S = tl.load(borders + at, mask=inside, other=0.0)
                dS = tl.load(dborders + at, mask=inside, other=0.0)
                pairs += product(g, tl.trans(u), DOT, PRECISION)
                to_q += product(g, S, DOT, PRECISION)
                to_k += product(u, dS, DOT, PRECISION)
                meeting += tl.sum(S * dS, 0)
            pairs = pairs * mask_of(hi, lo, segment, Q, STRICT)
            to_q = to_q * carry[:, None] + product(pairs, ks, DOT, PRECISION)
            to_k = to_k * last[:, None]
            inner = product(tl.trans(pairs), qs, DOT, PRECISION)
            if ddecay is not None:
                # A decay acts on all pairs across its step: row sums less column sums, summed from the end of the
                # chunk. With what reaches the last state: its share over the earlier steps, and the whole of the first
                # state.
                rows = tl.sum(to_q * qs.to(tl.float32) - inner * ks.to(tl.float32), 1)
                out = tl.sum(to_k * ks.to(tl.float32), 1)
                tail = tl.sum(rows, 0) - tl.cumsum(rows, 0) + rows
                da = tail + whole * tl.sum(meeting, 0) + tl.cumsum(out, 0) - out
                if resets is not None:
                    drop = tl.load(resets + b * length + row, mask=there, other=0)
                    da = tl.where(drop != 0, 0.0, da)
                at_a = ((block * batch + b) * length + row) * heads + h
                tl.store(ddecay + at_a, da, mask=there)
            dq_sum += to_q
            dk_sum += to_k + inner
        at_n = (((split * batch + b) * length + row)[:, None] * groups + group) * N + n[None, :]
        mask = there[:, None] & (n < N)[None, :]
        tl.store(dk + at_n, dk_sum, mask=mask)
        tl.store(dq + at_n, dq_sum, mask=mask)
