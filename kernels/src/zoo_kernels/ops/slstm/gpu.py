# Compile-time and run-time conditions must not share an `if`, and types in kernels are those of the device.
# mypy: ignore-errors
"""The Triton path of the sLSTM: the whole walk over time in one kernel, forward and backward.

A program walks one head for 16 sequences. The last output (backward: the gradients before the activations) goes through
memory once a step, because the product with the head's recurrent weights needs all of it in every thread; everything
else stays in registers. Heads do not see each other, so programs never wait for one another. Bound: reading the
recurrent weights from cache at every step. The gradient of the recurrent weights is one matrix product over all steps,
after the walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LN2, LOG2E, product, program, sigmoid

BB = 16  # sequences a program: the least that a matrix product takes
WIDEST = 512  # channels of a head whose four gates fit the registers


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    if arguments[0].shape[-1] > WIDEST:
        return f"headdim is {arguments[0].shape[-1]}; the Triton kernel takes at most {WIDEST}"
    return _gpu.unsupported(arguments)


def _jit(function):
    """Lengths and their kin must not force a new compilation."""
    plain = ("order_b", "batch", "length", "steps", "total")
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in plain])


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(x) * LOG2E)) * LN2


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def visited(order, order_b, b, bm, t):
    """Rows of step ``t`` for sequences ``b``, and which of them visit one."""
    row = tl.zeros_like(b) + t
    on = bm
    if order is not None:
        row = tl.load(order + b * order_b + t, mask=bm, other=-1)
        on = row >= 0
        row = tl.where(on, row, 0)
    return row, on


@_jit
def forward_kernel(
    gates, recurrent, bias, state, resets, order, y, final, raw, trace, last,
    order_b, batch, length, steps, heads, total,
    P: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    work = program()
    if work < total:
        h = work % heads
        b = (work // heads) * BB + tl.arange(0, BB)
        o = tl.arange(0, BP)
        bm = b < batch
        om = o < P
        m2 = bm[:, None] & om[None, :]
        at_state = (b[:, None] * heads + h) * P + o[None, :]
        part = (batch * heads * P).to(tl.int64)
        h_y = tl.zeros([BB, BP], tl.float32)
        c = tl.zeros([BB, BP], tl.float32)
        n = tl.zeros([BB, BP], tl.float32)
        s = tl.zeros([BB, BP], tl.float32)
        if state is not None:
            h_y = tl.load(state + at_state, mask=m2, other=0.0).to(tl.float32)
            c = tl.load(state + part + at_state, mask=m2, other=0.0).to(tl.float32)
            n = tl.load(state + 2 * part + at_state, mask=m2, other=0.0).to(tl.float32)
            s = tl.load(state + 3 * part + at_state, mask=m2, other=0.0).to(tl.float32)
        bi = tl.zeros([BP], tl.float32)
        bf = tl.zeros([BP], tl.float32)
        bz = tl.zeros([BP], tl.float32)
        bo = tl.zeros([BP], tl.float32)
        if bias is not None:
            bi = tl.load(bias + h * 4 * P + o, mask=om, other=0.0).to(tl.float32)
            bf = tl.load(bias + (h * 4 + 1) * P + o, mask=om, other=0.0).to(tl.float32)
            bz = tl.load(bias + (h * 4 + 2) * P + o, mask=om, other=0.0).to(tl.float32)
            bo = tl.load(bias + (h * 4 + 3) * P + o, mask=om, other=0.0).to(tl.float32)
        for t in range(0, steps):
            row, on = visited(order, order_b, b, bm, t)
            if resets is not None:
                drop = tl.load(resets + b * length + row, mask=on, other=0) != 0
                h_y = tl.where(drop[:, None], 0.0, h_y)
                c = tl.where(drop[:, None], 0.0, c)
                n = tl.where(drop[:, None], 0.0, n)
                s = tl.where(drop[:, None], 0.0, s)
            tl.store(last + at_state, h_y, mask=m2)
            tl.debug_barrier()
            mask = on[:, None] & om[None, :]
            at = ((b * length + row)[:, None] * 4 * heads + h) * P + o[None, :]
            hp = (heads * P).to(tl.int64)
            gi = tl.load(gates + at, mask=mask, other=0.0).to(tl.float32) + bi[None, :]
            gf = tl.load(gates + at + hp, mask=mask, other=0.0).to(tl.float32) + bf[None, :]
            gz = tl.load(gates + at + 2 * hp, mask=mask, other=0.0).to(tl.float32) + bz[None, :]
            go = tl.load(gates + at + 3 * hp, mask=mask, other=0.0).to(tl.float32) + bo[None, :]
            for first in range(0, P, BK):
                k = first + tl.arange(0, BK)
                seen = tl.load(
                    last + (b[:, None] * heads + h) * P + k[None, :], mask=bm[:, None] & (k < P)[None, :], other=0.0
                )
                at_r = (h * P + k)[:, None] * 4 * P + o[None, :]
                rm = (k < P)[:, None] & om[None, :]
                gi += product(seen, tl.load(recurrent + at_r, mask=rm, other=0.0), DOT, PRECISION)
                gf += product(seen, tl.load(recurrent + at_r + P, mask=rm, other=0.0), DOT, PRECISION)
                gz += product(seen, tl.load(recurrent + at_r + 2 * P, mask=rm, other=0.0), DOT, PRECISION)
                go += product(seen, tl.load(recurrent + at_r + 3 * P, mask=rm, other=0.0), DOT, PRECISION)
            tl.debug_barrier()
            kept = s + log_sigmoid(gf)
            s_new = tl.where(n == 0, gi, tl.maximum(gi, kept))  # nothing remembered yet: nothing to compare with
            i = tl.minimum(tl.exp2((gi - s_new) * LOG2E), 1.0)
            f = tl.minimum(tl.exp2((kept - s_new) * LOG2E), 1.0)
            c_new = f * c + i * tanh(gz)
            n_new = f * n + i
            y_new = sigmoid(go) * c_new / n_new
            c = tl.where(mask, c_new, c)
            n = tl.where(mask, n_new, n)
            s = tl.where(mask, s_new, s)
            h_y = tl.where(mask, y_new, h_y)
            at_y = ((b * length + row)[:, None] * heads + h) * P + o[None, :]
            tl.store(y + at_y, h_y.to(y.dtype.element_ty), mask=mask)
            if raw is not None:
                at_raw = ((b * steps + t)[:, None] * 4 * heads + h) * P + o[None, :]
                tl.store(raw + at_raw, gi, mask=m2)
                tl.store(raw + at_raw + hp, gf, mask=m2)
                tl.store(raw + at_raw + 2 * hp, gz, mask=m2)
                tl.store(raw + at_raw + 3 * hp, go, mask=m2)
                at_trace = ((b * steps + t)[:, None] * 3 * heads + h) * P + o[None, :]
                tl.store(trace + at_trace, c, mask=m2)
                tl.store(trace + at_trace + hp, n, mask=m2)
                tl.store(trace + at_trace + 2 * hp, s, mask=m2)
        tl.store(final + at_state, h_y, mask=m2)
        tl.store(final + part + at_state, c, mask=m2)
        tl.store(final + 2 * part + at_state, n, mask=m2)
        tl.store(final + 3 * part + at_state, s, mask=m2)


@_jit
def backward_kernel(
    raw, trace, recurrent, state, resets, order, dy, dfinal, draw, dgates, dstate,
    order_b, batch, length, steps, heads, total,
    P: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before activation, in walking order (``draw``) and by row (``dgates``)."""
    work = program()
    if work < total:
        h = work % heads
        b = (work // heads) * BB + tl.arange(0, BB)
        o = tl.arange(0, BP)
        bm = b < batch
        om = o < P
        m2 = bm[:, None] & om[None, :]
        at_state = (b[:, None] * heads + h) * P + o[None, :]
        part = (batch * heads * P).to(tl.int64)
        hp = (heads * P).to(tl.int64)
        gy = tl.load(dfinal + at_state, mask=m2, other=0.0)
        gc = tl.load(dfinal + part + at_state, mask=m2, other=0.0)
        gn = tl.load(dfinal + 2 * part + at_state, mask=m2, other=0.0)
        gs = tl.load(dfinal + 3 * part + at_state, mask=m2, other=0.0)
        for back in range(0, steps):
            t = steps - 1 - back
            row, on = visited(order, order_b, b, bm, t)
            mask = on[:, None] & om[None, :]
            at_raw = ((b * steps + t)[:, None] * 4 * heads + h) * P + o[None, :]
            gi = tl.load(raw + at_raw, mask=mask, other=0.0)
            gf = tl.load(raw + at_raw + hp, mask=mask, other=0.0)
            gz = tl.load(raw + at_raw + 2 * hp, mask=mask, other=0.0)
            go = tl.load(raw + at_raw + 3 * hp, mask=mask, other=0.0)
            at_trace = ((b * steps + t)[:, None] * 3 * heads + h) * P + o[None, :]
            c = tl.load(trace + at_trace, mask=mask, other=0.0)
            n = tl.load(trace + at_trace + hp, mask=mask, other=1.0)
            s = tl.load(trace + at_trace + 2 * hp, mask=mask, other=0.0)
            c_old = tl.zeros([BB, BP], tl.float32)
            n_old = tl.zeros([BB, BP], tl.float32)
            s_old = tl.zeros([BB, BP], tl.float32)
            if t > 0:
                at_old = ((b * steps + t - 1)[:, None] * 3 * heads + h) * P + o[None, :]
                c_old = tl.load(trace + at_old, mask=mask, other=0.0)
                n_old = tl.load(trace + at_old + hp, mask=mask, other=0.0)
                s_old = tl.load(trace + at_old + 2 * hp, mask=mask, other=0.0)
            else:
                if state is not None:
                    c_old = tl.load(state + part + at_state, mask=mask, other=0.0).to(tl.float32)
                    n_old = tl.load(state + 2 * part + at_state, mask=mask, other=0.0).to(tl.float32)
                    s_old = tl.load(state + 3 * part + at_state, mask=mask, other=0.0).to(tl.float32)
            if resets is not None:
                drop = tl.load(resets + b * length + row, mask=on, other=0) != 0
                c_old = tl.where(drop[:, None], 0.0, c_old)
                n_old = tl.where(drop[:, None], 0.0, n_old)
                s_old = tl.where(drop[:, None], 0.0, s_old)
            at_y = ((b * length + row)[:, None] * heads + h) * P + o[None, :]
            g = gy + tl.load(dy + at_y, mask=mask, other=0.0).to(tl.float32)
            kept = s_old + log_sigmoid(gf)
            i = tl.minimum(tl.exp2((gi - s) * LOG2E), 1.0)
            f = tl.minimum(tl.exp2((kept - s) * LOG2E), 1.0)
            gate = sigmoid(go)
            z = tanh(gz)
            d_o = g * (c / n) * gate * (1.0 - gate)
            hc = gc + g * gate / n
            hn = gn - g * gate * c / (n * n)
            di = tl.where(gi - s <= 0, (hc * z + hn) * i, 0.0)
            df = tl.where(kept - s <= 0, (hc * c_old + hn * n_old) * f, 0.0)
            hs = gs - di - df
            # The stabiliser is the input gate where nothing was remembered, else the larger of two (halves at a tie).
            to_i = tl.where(n_old == 0, 1.0, tl.where(gi > kept, 1.0, tl.where(gi == kept, 0.5, 0.0)))
            d_i = di + hs * to_i
            d_kept = df + hs * (1.0 - to_i)
            d_f = d_kept * sigmoid(-gf)
            d_z = hc * i * (1.0 - z * z)
            d_i = tl.where(mask, d_i, 0.0)
            d_f = tl.where(mask, d_f, 0.0)
            d_z = tl.where(mask, d_z, 0.0)
            d_o = tl.where(mask, d_o, 0.0)
            tl.store(draw + at_raw, d_i, mask=m2)
            tl.store(draw + at_raw + hp, d_f, mask=m2)
            tl.store(draw + at_raw + 2 * hp, d_z, mask=m2)
            tl.store(draw + at_raw + 3 * hp, d_o, mask=m2)
            at = ((b * length + row)[:, None] * 4 * heads + h) * P + o[None, :]
            tl.store(dgates + at, d_i.to(dgates.dtype.element_ty), mask=mask)
            tl.store(dgates + at + hp, d_f.to(dgates.dtype.element_ty), mask=mask)
            tl.store(dgates + at + 2 * hp, d_z.to(dgates.dtype.element_ty), mask=mask)
            tl.store(dgates + at + 3 * hp, d_o.to(dgates.dtype.element_ty), mask=mask)
            tl.debug_barrier()
            to_y = tl.zeros([BB, BP], tl.float32)
            for q in range(0, 4):
                for first in range(0, P, BK):
                    k = first + tl.arange(0, BK)
                    at_k = ((b * steps + t)[:, None] * 4 * heads + q * heads + h) * P + k[None, :]
                    dk = tl.load(draw + at_k, mask=bm[:, None] & (k < P)[None, :], other=0.0)
                    # R[in, gate, out] as (out, in)
                    at_r = (h * P + o)[None, :] * 4 * P + q * P + k[:, None]
                    R = tl.load(recurrent + at_r, mask=(k < P)[:, None] & om[None, :], other=0.0)
                    to_y += product(dk, R, DOT, PRECISION)
            tl.debug_barrier()
            keep = mask
            old_c = hc * f
            old_n = hn * f
            old_s = d_kept
            if resets is not None:
                to_y = tl.where(drop[:, None], 0.0, to_y)
                old_c = tl.where(drop[:, None], 0.0, old_c)
                old_n = tl.where(drop[:, None], 0.0, old_n)
                old_s = tl.where(drop[:, None], 0.0, old_s)
            gy = tl.where(keep, to_y, gy)
            gc = tl.where(keep, old_c, gc)
            gn = tl.where(keep, old_n, gn)
            gs = tl.where(keep, old_s, gs)
        tl.store(dstate + at_state, gy, mask=m2)
        tl.store(dstate + part + at_state, gc, mask=m2)
        tl.store(dstate + 2 * part + at_state, gn, mask=m2)
        tl.store(dstate + 3 * part + at_state, gs, mask=m2)


def _meta(gates, recurrent) -> dict:
    P = gates.shape[-1]
    BP = _gpu.power_of_two(P, 16)
    low = recurrent.dtype == torch.bfloat16
    exact = recurrent.dtype == torch.float32
    return {
        "P": P, "BP": BP, "BK": max(16, min(64, BP, 8192 // BP)), "BB": BB, "DOT": tl.bfloat16 if low else tl.float32,
        "PRECISION": "tf32x3" if exact else "tf32", "num_warps": 4 if BP <= 64 else 8, "num_stages": 1,
    }  # fmt: skip


def forward(gates, recurrent, bias, state, resets, order, *, save=False):
    """See :func:`zoo_kernels.slstm`; gates (batch, length, 4, heads, headdim)."""
    gates, recurrent = gates.contiguous(), recurrent.contiguous()
    batch, length, _, heads, P = gates.shape
    steps = length if order is None else order.shape[1]
    f32 = {"dtype": torch.float32, "device": gates.device}
    make = torch.empty if order is None else torch.zeros
    y = make(batch, length, heads, P, dtype=gates.dtype, device=gates.device)
    final = torch.empty(4, batch, heads, P, **f32)
    raw = torch.empty(batch, steps, 4, heads, P, **f32) if save else None
    trace = torch.empty(batch, steps, 3, heads, P, **f32) if save else None
    order, order_b = _gpu.walk_of(order)
    with _gpu.guard(gates):
        _gpu.launch(
            forward_kernel, triton.cdiv(batch, BB) * heads, gates, recurrent, None if bias is None else
            bias.contiguous(), None if state is None else state.contiguous(), None if resets is None else
            resets.view(torch.uint8), order, y, final, raw, trace, torch.empty(batch, heads, P, **f32), order_b, batch,
            length, steps, heads, **_meta(gates, recurrent),
        )  # fmt: skip
    nothing = gates.new_empty(0, dtype=torch.float32)
    return y, final, nothing if raw is None else raw, nothing.clone() if trace is None else trace


def backward(grads, arguments, saved, needs):
    """Gradients of gates, recurrent, bias, state."""
    gates, recurrent, bias, state, resets, order = arguments
    raw, trace = saved
    batch, length, _, heads, P = gates.shape
    steps = raw.shape[1]
    f32 = {"dtype": torch.float32, "device": gates.device}
    make = torch.empty if order is None else torch.zeros
    dgates = make(gates.shape, dtype=gates.dtype, device=gates.device)
    draw = torch.empty(batch, steps, 4, heads, P, **f32)
    dstate = torch.empty(4, batch, heads, P, **f32)
    start = None if state is None else state.contiguous()
    path, order_b = _gpu.walk_of(order)
    with _gpu.guard(gates):
        _gpu.launch(
            backward_kernel, triton.cdiv(batch, BB) * heads, raw, trace, recurrent.contiguous(), start,
            None if resets is None else resets.view(torch.uint8), path, grads[0].contiguous(),
            grads[1].to(torch.float32).contiguous(), draw, dgates, dstate, order_b, batch, length, steps, heads,
            **_meta(gates, recurrent),
        )  # fmt: skip
    drecurrent = None
    if needs[1]:
        # What each step saw of its predecessor; steps that visit nothing have no gradient, and saw nothing.
        seen = torch.zeros(batch, steps, heads, P, **f32)
        if steps:
            outputs = torch.sigmoid(raw[:, :-1, 3]) * trace[:, :-1, 0] / trace[:, :-1, 1]
            if order is not None:
                outputs = torch.where((order >= 0)[:, :-1, None, None], outputs, 0.0)
            seen[:, 1:] = outputs
            if state is not None:
                seen[:, 0] = state[0]
        if resets is not None:
            rows = torch.arange(steps, device=gates.device)[None] if order is None else order.clamp(min=0)
            drop = resets.gather(1, rows.expand(batch, -1))
            seen = torch.where(drop[..., None, None], 0.0, seen)
        left = seen.permute(2, 3, 0, 1).reshape(heads, P, batch * steps)
        right = draw.permute(3, 0, 1, 2, 4).reshape(heads, batch * steps, 4 * P)
        drecurrent = torch.bmm(left, right).view(heads, P, 4, P)
    dbias = None if bias is None else draw.sum((0, 1)).transpose(0, 1)
    return [dgates, drecurrent, dbias, None if state is None else dstate]
