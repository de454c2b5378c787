# Compile-time and run-time conditions must not share an `if`, and types here are those of the device.
# ruff: noqa: SIM102, RUF059
# mypy: ignore-errors
"""The device code of the selective scan. ``gpu.py`` launches it.

One program walks a segment of one path for one sequence and a block of channels. The tile of states is (state,
channel), channels along the threads: a thread owns all states of its channel, so that the sum over states needs no
exchange between threads, and the row of B or C is one broadcast load. Steps go in groups of ``U``: first the loads of
the whole group, then its arithmetic, then its stores, so that no store keeps a load waiting. A is multiplied by log2(e)
beforehand: exp is exp2.

Pointers that decide the layout of the tile (A, states) are not specialised on alignment: wide vector loads would spread
the states of one channel over several threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo_kernels._gpu import LN2, exp2_fma, program, row_of, sigmoid, silu_grad, softplus


def _jit(function):
    """No value may force a new compilation (a new length, say); only B and C are specialised, whose rows are
    vectors."""
    plain = [name for name, kind in function.__annotations__.items() if kind == "tl.constexpr"] + ["B", "C"]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name not in plain])


@triton.jit
def locate(work, segments, blocks, width, BC: tl.constexpr, G: tl.constexpr):
    """Sequence, segment, group, block, channels, their numbers in the group and their mask, of a unit of work."""
    segment = work % segments
    rest = work // segments
    block = rest % (blocks * G)
    group = block // blocks
    inside = (block % blocks) * BC + tl.arange(0, BC)
    return rest // (blocks * G), segment, group, block % blocks, group * width + inside, inside, inside < width


@triton.jit
def step_size(raw, bias_c, mask, SOFTPLUS: tl.constexpr):
    """d of a step, 0 where masked: such a step changes no state."""
    raw = raw + bias_c
    d = softplus(raw) if SOFTPLUS else raw
    return tl.where(mask, d, 0.0)


@_jit
def scan_kernel(
    u, dt, A, B, C, D, z, bias, path, resets, lengths, state_in, y, borders, final, decay, keep,
    u_b, u_l, dt_b, dt_l, z_b, z_l, path_b, border_b, state_b, state_s, final_b,
    length, steps, channels, width, blocks, segments, span, total,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, CHUNK: tl.constexpr,
    POLY: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The walk. SUMMARY: from a zero state, and only its end state (to ``final``), decay and whether it was kept."""
    work = program()
    if work < total:
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, BC, G)
        n = tl.arange(0, BN)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        start = segment * span
        stop = tl.minimum(count, start + span)
        h = tl.zeros([BN, BC], tl.float32)
        if state_in is not None:
            h = tl.load(state_in + b * state_b + segment * state_s + tile, mask=tm, other=0.0)
        bias_c = tl.zeros([BC], tl.float32)
        if bias is not None:
            bias_c = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        D_c = tl.zeros([BC], tl.float32)
        if D is not None:
            D_c = tl.load(D + c, mask=cm, other=0.0).to(tl.float32)
        d_sum = tl.zeros([BC], tl.float32)
        kept = tl.full([BC], 1.0, tl.float32)
        for chunk in range(start, stop, CHUNK):
            if borders is not None:
                border = borders + b * border_b + (chunk // CHUNK) * (N * channels).to(tl.int64)
                tl.store(border + tile, h, mask=tm)
            for t0 in range(chunk, tl.minimum(chunk + CHUNK, stop), U):
                rows = ()
                us = ()
                ds = ()
                Bs = ()
                Cs = ()
                zs = ()
                drops = ()
                for j in tl.static_range(U):
                    ok = t0 + j < stop
                    row = row_of(t0 + j, count, b, path, path_b, REVERSE)
                    m = inside < tl.where(ok, width, 0)
                    nm = n < tl.where(ok, N, 0)
                    raw = tl.load(dt + b * dt_b + row * dt_l + c, mask=m, other=0.0).to(tl.float32)
                    d = step_size(raw, bias_c, m, SOFTPLUS)
                    rows += (row,)
                    ds += (d,)
                    us += (tl.load(u + b * u_b + row * u_l + c, mask=m, other=0.0).to(tl.float32),)
                    at = ((b * length + row) * G + group) * N
                    Bs += (tl.load(B + at + n, mask=nm, other=0.0),)
                    if not SUMMARY:
                        Cs += (tl.load(C + at + n, mask=nm, other=0.0),)
                    if z is not None:
                        zs += (tl.load(z + b * z_b + row * z_l + c, mask=m, other=0.0).to(tl.float32),)
                    if resets is not None:
                        drops += (tl.load(resets + b * length + row, mask=ok, other=0) != 0,)
                outs = ()
                for j in tl.static_range(U):
                    if resets is not None:
                        h = tl.where(drops[j], 0.0, h)
                        if SUMMARY:
                            kept = tl.where(drops[j], 0.0, kept)
                    x = ds[j][None, :] * A_t
                    if j < POLY:
                        a = exp2_fma(x)
                    else:
                        a = tl.exp2(x)
                    h = a * h + (ds[j] * us[j])[None, :] * Bs[j][:, None]
                    if SUMMARY:
                        d_sum += ds[j]
                    else:
                        out = tl.sum(h * Cs[j][:, None], 0) + D_c * us[j]
                        if z is not None:
                            out = out * zs[j] * sigmoid(zs[j])
                        outs += (out,)
                if not SUMMARY:
                    for j in tl.static_range(U):
                        at_y = y + (b * length + rows[j]) * channels + c
                        m = inside < tl.where(t0 + j < stop, width, 0)
                        out = outs[j]
                        if ADD:
                            out += tl.load(at_y, mask=m, other=0.0).to(tl.float32)
                        tl.store(at_y, out.to(y.dtype.element_ty), mask=m)
        if SUMMARY:
            tl.store(final + b * final_b + segment * state_s + tile, h, mask=tm)
            tl.store(decay + (b * segments + segment) * channels + c, d_sum, mask=cm)
            tl.store(keep + (b * segments + segment) * channels + c, kept, mask=cm)
        elif final is not None:
            if segment == segments - 1:
                tl.store(final + b * final_b + tile, h, mask=tm)


@_jit
def carry_kernel(
    A, ends, decay, keep, state_in, states, state_b, channels, width, blocks, segments, total,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Each segment's incoming state, from the summaries: states[i + 1] = decay[i] states[i] + ends[i] (or from the
    end)."""
    work = program()
    if work < total:
        b, segment, group, block, c, inside, cm = locate(work, 1, blocks, width, BC, G)
        n = tl.arange(0, BN)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        h = tl.zeros([BN, BC], tl.float32)
        if state_in is not None:
            h = tl.load(state_in + b * state_b + tile, mask=tm, other=0.0)
        for i in range(0, segments):
            part = b * segments + (segments - 1 - i if BACKWARD else i)
            at = part * (N * channels).to(tl.int64) + tile
            tl.store(states + at, h, mask=tm)
            d = tl.load(decay + part * channels + c, mask=cm, other=0.0)
            kept = tl.load(keep + part * channels + c, mask=cm, other=0.0)
            h = tl.where(kept[None, :] > 0, tl.exp2(d[None, :] * A_t) * h, 0.0)
            h += tl.load(ends + at, mask=tm, other=0.0)


@_jit
def backward_summary_kernel(
    dt, A, C, z, bias, path, resets, lengths, dy, ends, decay, keep,
    dt_b, dt_l, z_b, z_l, path_b, length, steps, channels, width, blocks, segments, span, total,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, U: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient that a segment hands to the state before it when none comes from behind; its decay."""
    work = program()
    if work < total:
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, BC, G)
        n = tl.arange(0, BN)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        start = segment * span
        stop = tl.minimum(count, start + span)
        bias_c = tl.zeros([BC], tl.float32)
        if bias is not None:
            bias_c = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        g = tl.zeros([BN, BC], tl.float32)
        d_sum = tl.zeros([BC], tl.float32)
        kept = tl.full([BC], 1.0, tl.float32)
        for i in range(0, tl.maximum(stop - start, 0), U):
            ds = ()
            Cs = ()
            dys = ()
            drops = ()
            for j in tl.static_range(U):
                t = stop - 1 - i - j
                ok = t >= start
                row = row_of(tl.maximum(t, 0), count, b, path, path_b, REVERSE)
                m = inside < tl.where(ok, width, 0)
                raw = tl.load(dt + b * dt_b + row * dt_l + c, mask=m, other=0.0).to(tl.float32)
                d = step_size(raw, bias_c, m, SOFTPLUS)
                ds += (d,)
                Cs += (tl.load(C + ((b * length + row) * G + group) * N + n, mask=n < tl.where(ok, N, 0), other=0.0),)
                gy = tl.load(dy + (b * length + row) * channels + c, mask=m, other=0.0).to(tl.float32)
                if z is not None:
                    zc = tl.load(z + b * z_b + row * z_l + c, mask=m, other=0.0).to(tl.float32)
                    gy = gy * zc * sigmoid(zc)
                dys += (gy,)
                if resets is not None:
                    drops += (tl.load(resets + b * length + row, mask=ok, other=0) != 0,)
            for j in tl.static_range(U):
                g = tl.exp2(ds[j][None, :] * A_t) * (g + Cs[j][:, None] * dys[j][None, :])
                d_sum += ds[j]
                if resets is not None:
                    g = tl.where(drops[j], 0.0, g)
                    kept = tl.where(drops[j], 0.0, kept)
        at = b * segments + segment
        tl.store(ends + at * (N * channels).to(tl.int64) + tile, g, mask=tm)
        tl.store(decay + at * channels + c, d_sum, mask=cm)
        tl.store(keep + at * channels + c, kept, mask=cm)


@_jit
def backward_kernel(
    u, dt, A, B, C, D, z, bias, path, resets, lengths, borders, dy, d_in,
    du, ddt, dA, dB, dC, dD, dz, dbias, dinit, scratch,
    u_b, u_l, dt_b, dt_l, z_b, z_l, path_b, border_b, d_b, state_s, du_b, du_l, ddt_b, ddt_l, dinit_b,
    batch, length, steps, channels, width, blocks, segments, span, units, programs,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Chunks from the last to the first. Each is replayed from its border, keeping every U-th state in ``scratch``;
    then its groups of U steps are replayed into registers and walked backwards. dB and dC are sums over this block's
    channels."""
    n = tl.arange(0, BN)
    local = n[:, None] * BC + tl.arange(0, BC)[None, :]
    room = scratch + program() * ((CHUNK // U) * BN * BC)
    for work in range(program(), units, programs):
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, BC, G)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        start = segment * span
        stop = tl.minimum(count, start + span)
        bias_c = tl.zeros([BC], tl.float32)
        if bias is not None:
            bias_c = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        D_c = tl.zeros([BC], tl.float32)
        if D is not None:
            D_c = tl.load(D + c, mask=cm, other=0.0).to(tl.float32)
        g = tl.zeros([BN, BC], tl.float32)
        if d_in is not None:
            g = tl.load(d_in + b * d_b + segment * state_s + tile, mask=tm, other=0.0)
        dA_t = tl.zeros([BN, BC], tl.float32)
        dD_c = tl.zeros([BC], tl.float32)
        dbias_c = tl.zeros([BC], tl.float32)
        chunks = tl.maximum(stop - start + CHUNK - 1, 0) // CHUNK
        for i in range(0, chunks):
            first = start + (chunks - 1 - i) * CHUNK
            last = tl.minimum(first + CHUNK, stop)
            groups = (last - first + U - 1) // U
            border = borders + b * border_b + (first // CHUNK) * (N * channels).to(tl.int64)
            h = tl.load(border + tile, mask=tm, other=0.0)
            for q in range(0, groups):
                tl.store(room + q * (BN * BC) + local, h)
                for j in tl.static_range(U):
                    t = first + q * U + j
                    ok = t < last
                    row = row_of(t, count, b, path, path_b, REVERSE)
                    m = inside < tl.where(ok, width, 0)
                    raw = tl.load(dt + b * dt_b + row * dt_l + c, mask=m, other=0.0).to(tl.float32)
                    d = step_size(raw, bias_c, m, SOFTPLUS)
                    x = tl.load(u + b * u_b + row * u_l + c, mask=m, other=0.0).to(tl.float32)
                    at_n = ((b * length + row) * G + group) * N + n
                    B_n = tl.load(B + at_n, mask=n < tl.where(ok, N, 0), other=0.0)
                    if resets is not None:
                        h = tl.where(tl.load(resets + b * length + row, mask=ok, other=0) != 0, 0.0, h)
                    h = tl.exp2(d[None, :] * A_t) * h + (d * x)[None, :] * B_n[:, None]
            tl.debug_barrier()
            for q in range(0, groups):
                base = first + (groups - 1 - q) * U
                h = tl.load(room + (groups - 1 - q) * (BN * BC) + local)
                rows = ()
                us = ()
                ds = ()
                raws = ()
                olds = ()
                decays = ()
                drops = ()
                for j in tl.static_range(U):
                    t = base + j
                    ok = t < last
                    row = row_of(t, count, b, path, path_b, REVERSE)
                    m = inside < tl.where(ok, width, 0)
                    raw = tl.load(dt + b * dt_b + row * dt_l + c, mask=m, other=0.0).to(tl.float32)
                    d = step_size(raw, bias_c, m, SOFTPLUS)
                    x = tl.load(u + b * u_b + row * u_l + c, mask=m, other=0.0).to(tl.float32)
                    at_n = ((b * length + row) * G + group) * N + n
                    B_n = tl.load(B + at_n, mask=n < tl.where(ok, N, 0), other=0.0)
                    if resets is not None:
                        drop = tl.load(resets + b * length + row, mask=ok, other=0) != 0
                        h = tl.where(drop, 0.0, h)
                        drops += (drop,)
                    a = tl.exp2(d[None, :] * A_t)
                    decayed = a * h
                    h = decayed + (d * x)[None, :] * B_n[:, None]
                    rows += (row,)
                    us += (x,)
                    ds += (d,)
                    raws += (raw + bias_c,)
                    olds += (decayed,)
                    decays += (a,)
                for j in tl.static_range(U - 1, -1, -1):
                    ok = base + j < last
                    m = inside < tl.where(ok, width, 0)
                    nm = n < tl.where(ok, N, 0)
                    at_n = ((b * length + rows[j]) * G + group) * N + n
                    B_n = tl.load(B + at_n, mask=nm, other=0.0)
                    C_n = tl.load(C + at_n, mask=nm, other=0.0)
                    at_c = (b * length + rows[j]) * channels + c
                    gy = tl.load(dy + at_c, mask=m, other=0.0).to(tl.float32)
                    h_j = olds[j] + (ds[j] * us[j])[None, :] * B_n[:, None]
                    if z is not None:
                        zc = tl.load(z + b * z_b + rows[j] * z_l + c, mask=m, other=0.0).to(tl.float32)
                        out = tl.sum(h_j * C_n[:, None], 0) + D_c * us[j]
                        tl.store(dz + at_c, (gy * out * silu_grad(zc)).to(dz.dtype.element_ty), mask=m)
                        gy = gy * zc * sigmoid(zc)
                    g += C_n[:, None] * gy[None, :]
                    through_B = tl.sum(g * B_n[:, None], 0)
                    through_A = g * olds[j]
                    dA_t += through_A * ds[j][None, :]
                    dd = through_B * us[j] + tl.sum(through_A * A_t, 0) * LN2
                    if SOFTPLUS:
                        dd = tl.where(raws[j] > 20.0, dd, dd * sigmoid(raws[j]))
                    dd = tl.where(m, dd, 0.0)
                    dx = through_B * ds[j] + D_c * gy
                    dD_c += gy * us[j]
                    dbias_c += dd
                    at_part = block * batch * length * G * N + at_n
                    tl.store(dC + at_part, tl.sum(h_j * gy[None, :], 1), mask=nm)
                    tl.store(dB + at_part, tl.sum(g * (ds[j] * us[j])[None, :], 1), mask=nm)
                    tl.store(ddt + b * ddt_b + rows[j] * ddt_l + c, dd.to(ddt.dtype.element_ty), mask=m)
                    at_u = du + b * du_b + rows[j] * du_l + c
                    if ADD:
                        dx += tl.load(at_u, mask=m, other=0.0).to(tl.float32)
                    tl.store(at_u, dx.to(du.dtype.element_ty), mask=m)
                    g = decays[j] * g
                    if resets is not None:
                        g = tl.where(drops[j], 0.0, g)
            tl.debug_barrier()
        part = b * segments + segment
        tl.store(dA + part * (N * channels).to(tl.int64) + tile, dA_t, mask=tm)
        if dD is not None:
            tl.store(dD + part * channels + c, dD_c, mask=cm)
        if dbias is not None:
            tl.store(dbias + part * channels + c, dbias_c, mask=cm)
        if dinit is not None:
            if segment == 0:
                tl.store(dinit + b * dinit_b + tile, g, mask=tm)
