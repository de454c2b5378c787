# Compile-time and run-time conditions must not share an `if`, and types here are those of the device.
# ruff: noqa: SIM102, RUF059
# mypy: ignore-errors
"""The device code of the selective scan. ``gpu.py`` launches it.

One program walks a segment of one path for one sequence and a block of channels. The tile of states is (state,
channel), channels along the threads: a thread owns all states of its channel, so that the sum over states needs no
exchange between threads, and the row of B or C is one broadcast load (two threads share a channel in blocks of 16
channels: twice the warps, for one exchange). Few warps walk a sequence, so nothing hides the way from memory but loads
that start early: an iteration takes GROUPS groups of U steps and begins by reading u, dt and z of the iteration after
it; a group begins by reading the rows of B and C of the group after it. Loads are never masked by the step: those past
the end repeat the last row. A is multiplied by log2(e) beforehand: exp is exp2.

Offsets inside a sequence are 32 bits wide where all of them fit (WIDE says that they do not).

Pointers that decide the layout of the tile (A, states) are not specialised on alignment: wide vector loads would spread
the states of one channel over several threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo_kernels._gpu import LN2, into_L2, program, sigmoid, softplus


def _jit(function):
    """No value may force a new compilation (a new length, say); only B and C are specialised, whose rows are
    vectors."""
    plain = [name for name, kind in function.__annotations__.items() if kind == "tl.constexpr"] + ["B", "C"]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name not in plain])


@triton.jit
def locate(work, segments, blocks, width, lanes, BC: tl.constexpr, G: tl.constexpr):
    """Sequence, segment, group, block, channels, their numbers in the group and their mask, of a unit of work.

    ``lanes``: the numbers 0 to BC - 1, in the shape that the channels shall have."""
    segment = work % segments
    rest = work // segments
    block = rest % (blocks * G)
    group = block // blocks
    inside = (block % blocks) * BC + lanes
    return rest // (blocks * G), segment, group, block % blocks, group * width + inside, inside, inside < width


@triton.jit
def step_size(raw, bias_c, mask, SOFTPLUS: tl.constexpr):
    """d of a step, 0 where masked: such a step changes no state."""
    raw = raw + bias_c
    d = softplus(raw) if SOFTPLUS else raw
    return tl.where(mask, d, 0.0)


@triton.jit
def safe_rows(t0, stop, count, path, U: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr):
    """The rows that steps t0 to t0 + U visit; steps beyond the last repeat its row, so that every load is allowed."""
    rows = ()
    for j in tl.static_range(U):
        t = tl.minimum(t0 + j, stop - 1)
        position = count - 1 - t if REVERSE else t
        if path is not None:
            position = tl.load(path + position.to(tl.int64)).to(tl.int32)
        rows += (position.to(tl.int64) if WIDE else position,)
    return rows


@triton.jit
def states_at(pointer, n, N: tl.constexpr, BN: tl.constexpr):
    """A row of B or C."""
    return tl.load(pointer + n) if N == BN else tl.load(pointer + n, mask=n < N, other=0.0)


@triton.jit
def channels_at(u, dt, z, dy, rows, u_l, dt_l, z_l, dy_l, U: tl.constexpr):
    """What U steps at ``rows`` read for each channel, as stored; nothing of what is None. Pointers: of row 0 and this
    block's channels."""
    us, ds, zs, dys = (), (), (), ()
    for j in tl.static_range(U):
        ds += (tl.load(dt + rows[j] * dt_l),)
        if u is not None:
            us += (tl.load(u + rows[j] * u_l),)
        if z is not None:
            zs += (tl.load(z + rows[j] * z_l),)
        if dy is not None:
            dys += (tl.load(dy + rows[j] * dy_l),)
    return us, ds, zs, dys


@triton.jit
def states_of(
    B, C, resets, rows, n, N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr, U: tl.constexpr
):
    """What U steps, from ``rows[FIRST]`` on, read for all channels."""
    Bs, Cs, drops = (), (), ()
    for j in tl.static_range(FIRST, FIRST + U):
        if B is not None:
            Bs += (states_at(B + rows[j] * (G * N), n, N, BN),)
        if C is not None:
            Cs += (states_at(C + rows[j] * (G * N), n, N, BN),)
        if resets is not None:
            drops += (tl.load(resets + rows[j]) != 0,)
    return Bs, Cs, drops


@triton.jit
def advance(
    h, d_sum, kept, channel, state, rows, t0, stop, A_t, bias_c, D_c, y, channels, cm,
    FIRST: tl.constexpr, U: tl.constexpr, SOFTPLUS: tl.constexpr, SUMMARY: tl.constexpr, ADD: tl.constexpr,
    RESETS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """U steps from the FIRST of those that ``channel`` was read for; steps at and after ``stop`` change nothing."""
    us, ds, zs, _ = channel
    Bs, Cs, drops = state
    for j in tl.static_range(FIRST, FIRST + U):
        ok = t0 + j < stop
        x = us[j].to(tl.float32)
        d = step_size(ds[j].to(tl.float32), bias_c, ok, SOFTPLUS)
        if RESETS:
            lost = drops[j - FIRST] & ok
            h = tl.where(lost, 0.0, h)
            if SUMMARY:
                kept = tl.where(lost, 0.0, kept)
        h = tl.exp2(d[None, :] * A_t) * h + (d * x)[None, :] * Bs[j - FIRST][:, None]
        if SUMMARY:
            d_sum += d
        else:
            out = tl.sum(h * Cs[j - FIRST][:, None], 0) + D_c * x
            if GATE:
                gate = zs[j].to(tl.float32)
                out = out * gate * sigmoid(gate)
            at_y = y + rows[j] * channels
            m = cm & tl.where(ok, True, False)
            if ADD:
                out += tl.load(at_y, mask=m, other=0.0).to(tl.float32)
            tl.store(at_y, out.to(y.dtype.element_ty), mask=m)
    return h, d_sum, kept


@_jit
def scan_kernel(
    u, dt, A, B, C, D, z, bias, path, resets, lengths, state_in, y, borders, final, decay, keep,
    u_b, u_l, dt_b, dt_l, z_b, z_l, path_b, border_b, state_b, state_s, final_b,
    length, steps, channels, width, blocks, segments, span, total,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr, ADD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The walk. SUMMARY: from a zero state, and only its end state (to ``final``), decay and whether it was kept."""
    work = program()
    if work < total:
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, tl.arange(0, BC), BC, G)
        n = tl.arange(0, BN)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int32)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int32)
        start = segment.to(tl.int32) * span
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
        if start < stop:
            # A lane outside the block's channels reads the last channel's numbers and writes nothing.
            safe = tl.minimum(c, channels - 1)
            u_0 = u + b * u_b + safe
            dt_0 = dt + b * dt_b + safe
            z_0 = None
            if z is not None:
                z_0 = z + b * z_b + safe
            B_0 = B + (b * length * G + group) * N
            C_0 = None
            y_0 = None
            if not SUMMARY:
                C_0 = C + (b * length * G + group) * N
                y_0 = y + b * length * channels + c
            resets_0 = None
            if resets is not None:
                resets_0 = resets + b * length
            path_0 = None
            if path is not None:
                path_0 = path + b * path_b
            RESETS: tl.constexpr = resets is not None
            GATE: tl.constexpr = z is not None
            S: tl.constexpr = GROUPS * U
            rows = safe_rows(start, stop, count, path_0, S, REVERSE, WIDE)
            ahead = safe_rows(start + S, stop, count, path_0, S, REVERSE, WIDE)
            channel = channels_at(u_0, dt_0, z_0, None, rows, u_l, dt_l, z_l, 0, S)
            state = states_of(B_0, C_0, resets_0, rows, n, N, G, BN, 0, U)
            for t0 in range(start, stop, S):
                coming = channels_at(u_0, dt_0, z_0, None, ahead, u_l, dt_l, z_l, 0, S)
                later = safe_rows(t0 + 2 * S, stop, count, path_0, S, REVERSE, WIDE)
                if borders is not None:
                    if t0 % CHUNK == 0:
                        border = borders + b * border_b + (t0 // CHUNK) * (N * channels).to(tl.int64)
                        tl.store(border + tile, h, mask=tm)
                for i in tl.static_range(GROUPS):
                    if i + 1 < GROUPS:
                        following = states_of(B_0, C_0, resets_0, rows, n, N, G, BN, (i + 1) * U, U)
                    else:
                        following = states_of(B_0, C_0, resets_0, ahead, n, N, G, BN, 0, U)
                    h, d_sum, kept = advance(
                        h, d_sum, kept, channel, state, rows, t0, stop, A_t, bias_c, D_c, y_0, channels, cm,
                        i * U, U, SOFTPLUS, SUMMARY, ADD, RESETS, GATE,
                    )  # fmt: skip
                    state = following
                channel = coming
                rows = ahead
                ahead = later
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
        b, segment, group, block, c, inside, cm = locate(work, 1, blocks, width, tl.arange(0, BC), BC, G)
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
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient that a segment hands to the state before it when none comes from behind; its decay."""
    work = program()
    if work < total:
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, tl.arange(0, BC), BC, G)
        n = tl.arange(0, BN)
        tile = n[:, None].to(tl.int64) * channels + c[None, :]
        tm = (n[:, None] < N) & cm[None, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int32)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int32)
        start = segment.to(tl.int32) * span
        stop = tl.minimum(count, start + span)
        bias_c = tl.zeros([BC], tl.float32)
        if bias is not None:
            bias_c = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        g = tl.zeros([BN, BC], tl.float32)
        d_sum = tl.zeros([BC], tl.float32)
        kept = tl.full([BC], 1.0, tl.float32)
        if start < stop:
            safe = tl.minimum(c, channels - 1)
            dt_0 = dt + b * dt_b + safe
            C_0 = C + (b * length * G + group) * N
            dy_0 = dy + b * length * channels + safe
            z_0 = None
            if z is not None:
                z_0 = z + b * z_b + safe
            resets_0 = None
            if resets is not None:
                resets_0 = resets + b * length
            path_0 = None
            if path is not None:
                path_0 = path + b * path_b
            t0 = start + (stop - start - 1) // U * U
            rows = safe_rows(t0, stop, count, path_0, U, REVERSE, WIDE)
            _, ds, zs, dys = channels_at(None, dt_0, z_0, dy_0, rows, 0, dt_l, z_l, channels, U)
            _, Cs, drops = states_of(None, C_0, resets_0, rows, n, N, G, BN, 0, U)
            for _i in range(start, stop, U):
                rows = safe_rows(tl.maximum(t0 - U, start), stop, count, path_0, U, REVERSE, WIDE)
                coming = channels_at(None, dt_0, z_0, dy_0, rows, 0, dt_l, z_l, channels, U)
                following = states_of(None, C_0, resets_0, rows, n, N, G, BN, 0, U)
                for j in tl.static_range(U - 1, -1, -1):
                    ok = t0 + j < stop
                    d = step_size(ds[j].to(tl.float32), bias_c, ok, SOFTPLUS)
                    gy = dys[j].to(tl.float32)
                    if z is not None:
                        gate = zs[j].to(tl.float32)
                        gy = gy * gate * sigmoid(gate)
                    gy = tl.where(ok, gy, 0.0)
                    g = tl.exp2(d[None, :] * A_t) * (g + Cs[j][:, None] * gy[None, :])
                    d_sum += d
                    if resets is not None:
                        lost = drops[j] & ok
                        g = tl.where(lost, 0.0, g)
                        kept = tl.where(lost, 0.0, kept)
                _, ds, zs, dys = coming
                _, Cs, drops = following
                t0 -= U
        at = b * segments + segment
        tl.store(ends + at * (N * channels).to(tl.int64) + tile, g, mask=tm)
        tl.store(decay + at * channels + c, d_sum, mask=cm)
        tl.store(keep + at * channels + c, kept, mask=cm)


@triton.jit
def replay(
    h, room, room_l, u, dt, B, z, dy, resets, first, last, count, path, A_t, bias_c, u_l, dt_l, z_l, dy_l, n,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The states before every group of U steps, from ``h`` at ``first`` on, into ``room``. The rows of dy and z, which
    the walk back reads for the first time, are brought into the cache meanwhile."""
    S: tl.constexpr = GROUPS * U
    rows = safe_rows(first, last, count, path, S, REVERSE, WIDE)
    us, ds, _, _ = channels_at(u, dt, None, None, rows, u_l, dt_l, 0, 0, S)
    Bs, _, drops = states_of(B, None, resets, rows, n, N, G, BN, 0, U)
    for t0 in range(first, last, S):
        ahead = safe_rows(t0 + S, last, count, path, S, REVERSE, WIDE)
        coming = channels_at(u, dt, None, None, ahead, u_l, dt_l, 0, 0, S)
        for p in tl.static_range(GROUPS):
            tl.store(room + ((t0 - first) // U + p).to(tl.int64) * room_l, h)
            if p + 1 < GROUPS:
                following = states_of(B, None, resets, rows, n, N, G, BN, (p + 1) * U, U)
            else:
                following = states_of(B, None, resets, ahead, n, N, G, BN, 0, U)
            for j in tl.static_range(U):
                ok = t0 + p * U + j < last
                into_L2(dy + rows[p * U + j] * dy_l)
                if z is not None:
                    into_L2(z + rows[p * U + j] * z_l)
                x = us[p * U + j].to(tl.float32)
                d = step_size(ds[p * U + j].to(tl.float32), bias_c, ok, SOFTPLUS)
                if resets is not None:
                    h = tl.where(drops[j] & ok, 0.0, h)
                h = tl.exp2(d[None, :, :] * A_t) * h + (d * x)[None, :, :] * Bs[j][:, None, None]
            Bs, _, drops = following
        us, ds, _, _ = coming
        rows = ahead


@_jit
def backward_kernel(
    u, dt, A, B, C, D, z, bias, path, resets, lengths, borders, dy, d_in,
    du, ddt, dA, dB, dC, dD, dz, dbias, dinit, scratch,
    u_b, u_l, dt_b, dt_l, z_b, z_l, path_b, border_b, d_b, state_s, du_b, du_l, ddt_b, ddt_l, dinit_b,
    batch, length, steps, channels, width, blocks, segments, span, units, programs,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, SETS: tl.constexpr, U: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Chunks from the last to the first. Each is replayed from its border, keeping every U-th state in ``scratch``;
    then its groups of U steps are replayed into registers and walked backwards. dB and dC are sums over this block's
    channels.

    The tile is (state, set, channel): BC channels in SETS sets. A set has as many channels as share a warp with a few
    states each, so that sums over channels exchange numbers between fewer threads than if each owned one channel.
    """
    n = tl.arange(0, BN)
    lanes = tl.arange(0, SETS)[:, None] * (BC // SETS) + tl.arange(0, BC // SETS)[None, :]
    local = n[:, None, None] * BC + lanes[None, :, :]
    room = scratch + program() * ((CHUNK // U) * BN * BC)
    for work in range(program(), units, programs):
        b, segment, group, block, c, inside, cm = locate(work, segments, blocks, width, lanes, BC, G)
        tile = n[:, None, None].to(tl.int64) * channels + c[None, :, :]
        tm = (n[:, None, None] < N) & cm[None, :, :]
        A_t = tl.load(A + tile, mask=tm, other=0.0)
        count = steps.to(tl.int32)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int32)
        start = segment.to(tl.int32) * span
        stop = tl.minimum(count, start + span)
        bias_c = tl.zeros([SETS, BC // SETS], tl.float32)
        if bias is not None:
            bias_c = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        D_c = tl.zeros([SETS, BC // SETS], tl.float32)
        if D is not None:
            D_c = tl.load(D + c, mask=cm, other=0.0).to(tl.float32)
        g = tl.zeros([BN, SETS, BC // SETS], tl.float32)
        if d_in is not None:
            g = tl.load(d_in + b * d_b + segment * state_s + tile, mask=tm, other=0.0)
        dA_t = tl.zeros([BN, SETS, BC // SETS], tl.float32)
        dD_c = tl.zeros([SETS, BC // SETS], tl.float32)
        dbias_c = tl.zeros([SETS, BC // SETS], tl.float32)
        # A lane outside the block's channels reads the last channel's numbers and writes nothing; its gradient of y
        # counts as 0, for the sums over channels.
        safe = tl.minimum(c, channels - 1)
        u_0 = u + b * u_b + safe
        dt_0 = dt + b * dt_b + safe
        dy_0 = dy + b * length * channels + safe
        B_0 = B + (b * length * G + group) * N
        C_0 = C + (b * length * G + group) * N
        du_0 = du + b * du_b + c
        ddt_0 = ddt + b * ddt_b + c
        part = ((block * batch + b) * length * G + group) * N
        dB_0 = dB + part
        dC_0 = dC + part
        z_0 = None
        dz_0 = None
        if z is not None:
            z_0 = z + b * z_b + safe
            dz_0 = dz + b * length * channels + c
        resets_0 = None
        if resets is not None:
            resets_0 = resets + b * length
        path_0 = None
        if path is not None:
            path_0 = path + b * path_b
        chunks = tl.maximum(stop - start + CHUNK - 1, 0) // CHUNK
        for i in range(0, chunks):
            first = start + (chunks - 1 - i) * CHUNK
            last = tl.minimum(first + CHUNK, stop)
            groups = (last - first + U - 1) // U
            border = borders + b * border_b + (first // CHUNK) * (N * channels).to(tl.int64)
            h = tl.load(border + tile, mask=tm, other=0.0)
            replay(
                h, room + local, BN * BC, u_0, dt_0, B_0, z_0, dy_0, resets_0, first, last, count, path_0, A_t, bias_c,
                u_l, dt_l, z_l, channels, n, N, G, BN, U, GROUPS, SOFTPLUS, REVERSE, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
            rows = safe_rows(first + (groups - 1) * U, last, count, path_0, U, REVERSE, WIDE)
            channel = channels_at(u_0, dt_0, z_0, dy_0, rows, u_l, dt_l, z_l, channels, U)
            state = states_of(B_0, C_0, resets_0, rows, n, N, G, BN, 0, U)
            kept = tl.load(room + (groups - 1).to(tl.int64) * (BN * BC) + local)
            for q in range(0, groups):
                base = first + (groups - 1 - q) * U
                before = tl.maximum(groups - 2 - q, 0)
                ahead = safe_rows(first + before * U, last, count, path_0, U, REVERSE, WIDE)
                coming = channels_at(u_0, dt_0, z_0, dy_0, ahead, u_l, dt_l, z_l, channels, U)
                following = states_of(B_0, C_0, resets_0, ahead, n, N, G, BN, 0, U)
                coming_h = tl.load(room + before.to(tl.int64) * (BN * BC) + local)
                us, ds, zs, dys = channel
                Bs, Cs, drops = state
                h = kept
                steps_d = ()
                inputs = ()
                olds = ()
                decays = ()
                for j in tl.static_range(U):
                    ok = base + j < last
                    d = step_size(ds[j].to(tl.float32), bias_c, ok, SOFTPLUS)
                    if resets is not None:
                        h = tl.where(drops[j] & ok, 0.0, h)
                    a = tl.exp2(d[None, :, :] * A_t)
                    decayed = a * h
                    dx = tl.where(cm, d * us[j].to(tl.float32), 0.0)
                    h = decayed + dx[None, :, :] * Bs[j][:, None, None]
                    steps_d += (d,)
                    inputs += (dx,)
                    olds += (decayed,)
                    decays += (a,)
                for j in tl.static_range(U - 1, -1, -1):
                    ok = base + j < last
                    m = cm & tl.where(ok, True, False)
                    x = us[j].to(tl.float32)
                    B_n = Bs[j][:, None, None]
                    C_n = Cs[j][:, None, None]
                    gy = tl.where(m, dys[j].to(tl.float32), 0.0)
                    h_j = olds[j] + inputs[j][None, :, :] * B_n
                    if z is not None:
                        gate = zs[j].to(tl.float32)
                        s = sigmoid(gate)
                        out = tl.sum(h_j * C_n, 0) + D_c * x
                        gated = gy * out * (s * (1.0 + gate * (1.0 - s)))
                        tl.store(dz_0 + rows[j] * channels, gated.to(dz.dtype.element_ty), mask=m)
                        gy = gy * gate * s
                    g += C_n * gy[None, :, :]
                    through_B = tl.sum(g * B_n, 0)
                    through_A = g * olds[j]
                    dA_t += through_A * steps_d[j][None, :, :]
                    dd = through_B * x + tl.sum(through_A * A_t, 0) * LN2
                    if SOFTPLUS:
                        dd = dd * sigmoid(ds[j].to(tl.float32) + bias_c)
                    dd = tl.where(m, dd, 0.0)
                    dx = through_B * steps_d[j] + D_c * gy
                    dD_c += gy * x
                    dbias_c += dd
                    nm = n < tl.where(ok, N, 0)
                    at_n = rows[j] * (G * N) + n
                    tl.store(dC_0 + at_n, tl.sum(tl.sum(h_j * gy[None, :, :], 1), 1), mask=nm)
                    tl.store(dB_0 + at_n, tl.sum(tl.sum(g * inputs[j][None, :, :], 1), 1), mask=nm)
                    tl.store(ddt_0 + rows[j] * ddt_l, dd.to(ddt.dtype.element_ty), mask=m)
                    at_u = du_0 + rows[j] * du_l
                    if ADD:
                        dx += tl.load(at_u, mask=m, other=0.0).to(tl.float32)
                    tl.store(at_u, dx.to(du.dtype.element_ty), mask=m)
                    g = decays[j] * g
                    if resets is not None:
                        g = tl.where(drops[j] & ok, 0.0, g)
                channel = coming
                state = following
                kept = coming_h
                rows = ahead
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
