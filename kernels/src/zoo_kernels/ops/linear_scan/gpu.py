# Compile-time and run-time conditions must not share an `if`, and types in kernels are those of the device.
# ruff: noqa: SIM102
# mypy: ignore-errors
"""The Triton path of the linear scan, real and complex: forward and backward.

A program walks one sequence and a block of channels in tiles of 64 steps; inside a tile the recurrence is an
associative scan over pairs (a, x), so that all rows of a tile are read at once. Where sequences times blocks cannot
fill the device the length is cut into segments: products and end states first, then a short carry, then the walk.
Backward replays the tiles from the states that forward kept at their borders and scans the gradient the other way.
Bound: one read of x and a, one write of h (with segments, x and a are read twice).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo_kernels import _gpu
from zoo_kernels._gpu import program, row_of

CHUNK = 64  # as in __init__


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments, (*_gpu.HALF_OR_FLOAT, torch.complex64))


def _jit(function):
    """Lengths and their kin must not force a new compilation."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    plain = ("path_b", "length", "steps", "segments", "span", "chunks", "total", "state_b", "state_s")
    return triton.jit(function, do_not_specialize=[name for name in names if name in plain])


@triton.jit
def affine(a1, x1, a2, x2):
    """First (a1, x1), then (a2, x2). A zero drops what was before, infinite or not."""
    return a1 * a2, tl.where(a2 == 0, x2, a2 * x1 + x2)


@triton.jit
def affine_complex(a1r, a1i, x1r, x1i, a2r, a2i, x2r, x2i):
    ar = a1r * a2r - a1i * a2i
    ai = a1r * a2i + a1i * a2r
    zero = (a2r == 0) & (a2i == 0)
    xr = tl.where(zero, x2r, a2r * x1r - a2i * x1i + x2r)
    xi = tl.where(zero, x2i, a2r * x1i + a2i * x1r + x2i)
    return ar, ai, xr, xi


@triton.jit
def scanned(ar, ai, xr, xi, COMPLEX: tl.constexpr, REVERSE: tl.constexpr):
    if COMPLEX:
        ar, ai, xr, xi = tl.associative_scan((ar, ai, xr, xi), 0, affine_complex, reverse=REVERSE)
    else:
        ar, xr = tl.associative_scan((ar, xr), 0, affine, reverse=REVERSE)
    return ar, ai, xr, xi


@triton.jit
def applied(ar, ai, xr, xi, hr, hi, COMPLEX: tl.constexpr):
    """a h + x, tiles (steps, channels) and h (channels,)."""
    hr = hr[None, :]
    hi = hi[None, :]
    if COMPLEX:
        zero = (ar == 0) & (ai == 0)
        real = tl.where(zero, xr, ar * hr - ai * hi + xr)
        imaginary = tl.where(zero, xi, ar * hi + ai * hr + xi)
        return real, imaginary
    return tl.where(ar == 0, xr, ar * hr + xr), xi


@triton.jit
def read(pointer, at, mask, other, COMPLEX: tl.constexpr):
    """Values at element offsets ``at`` as float32; complex ones are pairs in memory."""
    if COMPLEX:
        return tl.load(pointer + 2 * at, mask=mask, other=other), tl.load(pointer + 2 * at + 1, mask=mask, other=0.0)
    value = tl.load(pointer + at, mask=mask, other=other).to(tl.float32)
    return value, tl.zeros_like(value)


@triton.jit
def write(pointer, at, real, imaginary, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * at, real, mask=mask)
        tl.store(pointer + 2 * at + 1, imaginary, mask=mask)
    else:
        tl.store(pointer + at, real.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def last_row(value, t, at):
    """Row ``at`` of a tile."""
    return tl.sum(tl.where((t == at)[:, None], value, 0.0), 0)


@triton.jit
def factors(a, resets, b, row, there, a_b, a_l, length, c, cm, COMPLEX: tl.constexpr):
    """a of steps: 1 where there is none, 0 at a reset."""
    ar, ai = read(a, b * a_b + row[:, None] * a_l + c[None, :], there[:, None] & cm[None, :], 1.0, COMPLEX)
    if resets is not None:
        drop = tl.load(resets + b * length + row, mask=there, other=0) != 0
        ar = tl.where(drop[:, None], 0.0, ar)
        ai = tl.where(drop[:, None], 0.0, ai)
    return ar, ai


@_jit
def scan_kernel(
    x, a, path, resets, lengths, state_in, h, borders, final, products,
    x_b, x_l, a_b, a_l, path_b, state_b, state_s, length, steps, channels, segments, span, chunks, total,
    T: tl.constexpr, BC: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """The walk of a segment. SUMMARY: from a zero state, and only its end state and the product of its a."""
    work = program()
    if work < total:
        segment = work % segments
        blocks = (channels + BC - 1) // BC
        c = ((work // segments) % blocks) * BC + tl.arange(0, BC)
        cm = c < channels
        b = work // (segments * blocks)
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        start = segment * span
        stop = tl.minimum(count, start + span)
        hr = tl.zeros([BC], tl.float32)
        hi = tl.zeros([BC], tl.float32)
        if state_in is not None:
            hr, hi = read(state_in, b * state_b + segment * state_s + c, cm, 0.0, COMPLEX)
        pr = tl.full([BC], 1.0, tl.float32)
        pi = tl.zeros([BC], tl.float32)
        j = tl.arange(0, T)
        for first in range(start, stop, T):
            if borders is not None:
                write(borders, (b * chunks + first // T) * channels + c, hr, hi, cm, COMPLEX)
            t = first + j
            row = row_of(t, count, b, path, path_b, REVERSE)
            there = t < stop
            xr, xi = read(x, b * x_b + row[:, None] * x_l + c[None, :], there[:, None] & cm[None, :], 0.0, COMPLEX)
            ar, ai = factors(a, resets, b, row, there, a_b, a_l, length, c, cm, COMPLEX)
            ar, ai, xr, xi = scanned(ar, ai, xr, xi, COMPLEX, False)
            outr, outi = applied(ar, ai, xr, xi, hr, hi, COMPLEX)
            hr = last_row(outr, j, T - 1)
            hi = last_row(outi, j, T - 1)
            if SUMMARY:
                er = last_row(ar, j, T - 1)
                ei = last_row(ai, j, T - 1)
                if COMPLEX:
                    qr = pr * er - pi * ei
                    pi = pr * ei + pi * er
                    pr = qr
                else:
                    pr = pr * er
            else:
                at = (b * length + row)[:, None] * channels + c[None, :]
                write(h, at, outr, outi, there[:, None] & cm[None, :], COMPLEX)
        if SUMMARY:
            at_end = (b * segments + segment) * channels + c
            write(final, at_end, hr, hi, cm, COMPLEX)
            write(products, at_end, pr, pi, cm, COMPLEX)
        elif final is not None:
            if segment == segments - 1:
                write(final, b * channels + c, hr, hi, cm, COMPLEX)


@_jit
def carry_kernel(
    ends, products, state_in, states, state_b, channels, segments, total,
    BC: tl.constexpr, COMPLEX: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Each segment's incoming state (or gradient, from the end) out of the summaries."""
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        c = (work % blocks) * BC + tl.arange(0, BC)
        cm = c < channels
        b = work // blocks
        hr = tl.zeros([BC], tl.float32)
        hi = tl.zeros([BC], tl.float32)
        if state_in is not None:
            hr, hi = read(state_in, b * state_b + c, cm, 0.0, COMPLEX)
        for i in range(0, segments):
            at = (b * segments + (segments - 1 - i if BACKWARD else i)) * channels + c
            write(states, at, hr, hi, cm, COMPLEX)
            pr, pi = read(products, at, cm, 0.0, COMPLEX)
            er, ei = read(ends, at, cm, 0.0, COMPLEX)
            if COMPLEX:
                zero = (pr == 0) & (pi == 0)
                nr = tl.where(zero, er, pr * hr - pi * hi + er)
                hi = tl.where(zero, ei, pr * hi + pi * hr + ei)
                hr = nr
            else:
                hr = tl.where(pr == 0, er, pr * hr + er)


@_jit
def backward_kernel(
    x, a, path, resets, lengths, borders, dh, d_in, dx, da, dinit, ends, products,
    x_b, x_l, a_b, a_l, path_b, state_b, state_s, length, steps, channels, segments, span, chunks, total,
    T: tl.constexpr, BC: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """g_t = dh_t + conj(a_{t+1}) g_{t+1}; dx_t = g_t, da_t = g_t conj(h_{t-1}). Carried: conj(a_first) g_first of what
    comes later. SUMMARY: only what the segment hands on from a zero gradient, and the product of its conj(a). SHARED: a
    is the same at every step; the sum of da over the segment."""
    work = program()
    if work < total:
        segment = work % segments
        blocks = (channels + BC - 1) // BC
        c = ((work // segments) % blocks) * BC + tl.arange(0, BC)
        cm = c < channels
        b = work // (segments * blocks)
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        start = segment * span
        stop = tl.minimum(count, start + span)
        gr = tl.zeros([BC], tl.float32)
        gi = tl.zeros([BC], tl.float32)
        if d_in is not None:
            gr, gi = read(d_in, b * state_b + segment * state_s + c, cm, 0.0, COMPLEX)
        pr = tl.full([BC], 1.0, tl.float32)
        pi = tl.zeros([BC], tl.float32)
        sr = tl.zeros([BC], tl.float32)
        si = tl.zeros([BC], tl.float32)
        j = tl.arange(0, T)
        tiles = tl.maximum(stop - start + T - 1, 0) // T
        for i in range(0, tiles):
            first = start + (tiles - 1 - i) * T
            t = first + j
            there = t < stop
            row = row_of(t, count, b, path, path_b, REVERSE)
            at = (b * length + row)[:, None] * channels + c[None, :]
            mask = there[:, None] & cm[None, :]
            ownr, owni = factors(a, resets, b, row, there, a_b, a_l, length, c, cm, COMPLEX)
            # What multiplies g_{t+1}: conj(a_{t+1}), and 1 at the tile's last step, whose incoming gradient has it
            # already.
            next_row = row_of(t + 1, count, b, path, path_b, REVERSE)
            next_there = (t + 1 < stop) & (j < T - 1)
            nextr, nexti = factors(a, resets, b, next_row, next_there, a_b, a_l, length, c, cm, COMPLEX)
            yr, yi = read(dh, at, mask, 0.0, COMPLEX)
            ar, ai, yr, yi = scanned(nextr, -nexti, yr, yi, COMPLEX, True)
            yr, yi = applied(ar, ai, yr, yi, gr, gi, COMPLEX)
            if not SUMMARY:
                write(dx, at, yr, yi, mask, COMPLEX)
                # h_{t-1}: the same scan one step later, from the border.
                old_row = row_of(t - 1, count, b, path, path_b, REVERSE)
                old_there = there & (j > 0)
                old_mask = old_there[:, None] & cm[None, :]
                xr, xi = read(x, b * x_b + old_row[:, None] * x_l + c[None, :], old_mask, 0.0, COMPLEX)
                or_, oi_ = factors(a, resets, b, old_row, old_there, a_b, a_l, length, c, cm, COMPLEX)
                or_, oi_, xr, xi = scanned(or_, oi_, xr, xi, COMPLEX, False)
                br, bi = read(borders, (b * chunks + first // T) * channels + c, cm, 0.0, COMPLEX)
                hr, hi = applied(or_, oi_, xr, xi, br, bi, COMPLEX)
                if COMPLEX:
                    dar = yr * hr + yi * hi
                    dai = yi * hr - yr * hi
                else:
                    dar = yr * hr
                    dai = yi
                if resets is not None:
                    drop = tl.load(resets + b * length + row, mask=there, other=0) != 0
                    dar = tl.where(drop[:, None], 0.0, dar)
                    dai = tl.where(drop[:, None], 0.0, dai)
                if SHARED:
                    sr += tl.sum(tl.where(mask, dar, 0.0), 0)
                    si += tl.sum(tl.where(mask, dai, 0.0), 0)
                else:
                    write(da, at, dar, dai, mask, COMPLEX)
            # Hand on conj(a_first) g_first.
            fr = last_row(ownr, j, 0)
            fi = last_row(owni, j, 0)
            g0r = last_row(yr, j, 0)
            g0i = last_row(yi, j, 0)
            if COMPLEX:
                zero = (fr == 0) & (fi == 0)
                gr = tl.where(zero, 0.0, fr * g0r + fi * g0i)
                gi = tl.where(zero, 0.0, fr * g0i - fi * g0r)
            else:
                gr = tl.where(fr == 0, 0.0, fr * g0r)
            if SUMMARY:
                er = last_row(ar, j, 0)
                ei = last_row(ai, j, 0)
                if COMPLEX:
                    qr = fr * er + fi * ei
                    ei = fr * ei - fi * er
                    er = qr
                    qr = pr * er - pi * ei
                    pi = pr * ei + pi * er
                    pr = qr
                else:
                    pr = pr * er * fr
        if SUMMARY:
            at_end = (b * segments + segment) * channels + c
            write(ends, at_end, gr, gi, cm, COMPLEX)
            write(products, at_end, pr, pi, cm, COMPLEX)
        else:
            if SHARED:
                write(da, (b * segments + segment) * channels + c, sr, si, cm, COMPLEX)
            if dinit is not None:
                if segment == 0:
                    write(dinit, b * channels + c, gr, gi, cm, COMPLEX)


class _Problem:
    def __init__(self, x, a, path, reverse, init, resets, lengths, split):
        self.batch, self.length, self.channels = x.shape
        self.complex = x.is_complex()
        self.work = torch.complex64 if self.complex else torch.float32
        self.x = _gpu.rows(x)
        self.a = _gpu.rows(a.resolve_conj())
        self.steps = self.length if path is None else path.shape[-1]
        self.path, self.path_b = _gpu.walk_of(path)
        self.resets = None if resets is None else resets.view(torch.uint8)
        self.lengths, self.init = lengths, None if init is None else init.to(self.work).contiguous()
        self.chunks = triton.cdiv(self.steps, CHUNK)
        self.whole = lengths is None and self.steps == self.length
        BC = _gpu.block_of(self.channels, 32 if self.complex else 64)
        self.blocks = triton.cdiv(self.channels, BC)
        programs = self.batch * self.blocks
        wanted = 4 * _gpu.multiprocessors(x) // max(1, programs) if split is None else split
        segments = max(1, min(wanted, self.chunks))
        self.span = triton.cdiv(max(1, self.chunks), segments) * CHUNK
        self.segments = max(1, triton.cdiv(self.steps, self.span))
        self.programs = programs
        self.meta = {"BC": BC, "COMPLEX": self.complex, "num_warps": 4}
        self.walk = {"T": CHUNK, "REVERSE": bool(reverse)}
        self.sizes = (self.length, self.steps, self.channels, self.segments, self.span, self.chunks)
        a_b = self.a.stride(0) if self.a.shape[0] > 1 else 0
        a_l = self.a.stride(1) if self.a.shape[1] > 1 else 0
        self.strides = (self.x.stride(0), self.x.stride(1), a_b, a_l, self.path_b)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.work, device=self.x.device)

    def rows(self, dtype: torch.dtype) -> Tensor:
        make = torch.empty if self.whole else torch.zeros
        return make(self.batch, self.length, self.channels, dtype=dtype, device=self.x.device)


def _raw(tensor: Tensor | None) -> Tensor | None:
    """What the kernels see: complex numbers as pairs of floats."""
    return torch.view_as_real(tensor) if tensor is not None and tensor.is_complex() else tensor


def forward(x, a, path, reverse, initial_state, return_final_state, resets, lengths, *, save, split: int | None = None):
    """See :func:`zoo_kernels.linear_scan`; canonical arguments."""
    p = _Problem(x, a, path, reverse, initial_state, resets, lengths, split)
    h = p.rows(x.dtype)
    borders = p.empty(p.batch, p.chunks, p.channels) if save else None
    final = p.empty(p.batch, p.channels) if return_final_state else None
    state, state_b, state_s = p.init, p.channels, 0

    def walk(state, state_b, state_s, h, borders, final, products, summary):
        _gpu.launch(
            scan_kernel, p.programs * p.segments, _raw(p.x), _raw(p.a), p.path, p.resets, p.lengths, _raw(state),
            _raw(h), _raw(borders), _raw(final), _raw(products), *p.strides, state_b, state_s, *p.sizes,
            SUMMARY=summary, **p.walk, **p.meta,
        )  # fmt: skip

    with _gpu.guard(x):
        if p.segments > 1:
            ends, products, states = (p.empty(p.batch, p.segments, p.channels) for _ in range(3))
            walk(None, 0, 0, None, None, ends, products, True)
            _gpu.launch(
                carry_kernel, p.programs, _raw(ends), _raw(products), _raw(state), _raw(states), state_b, p.channels,
                p.segments, BACKWARD=False, **p.meta,
            )  # fmt: skip
            state, state_b, state_s = states, p.segments * p.channels, p.channels
        walk(state, state_b, state_s, h, borders, final, None, False)
    nothing = x.new_empty(0, dtype=p.work)
    return h, nothing if final is None else final, nothing.clone() if borders is None else borders


def backward(grads, arguments, saved, needs, *, split: int | None = None):
    """Gradients of x, a, initial_state."""
    x, a, path, reverse, init, return_final, resets, lengths = arguments
    p = _Problem(x, a, path, reverse, init, resets, lengths, split)
    dh = grads[0].resolve_conj().contiguous()
    shared = a.shape[1] == 1 and p.length != 1
    dx = p.rows(x.dtype)
    da = p.empty(p.batch, p.segments, p.channels) if shared else p.rows(p.work)
    dinit = None if init is None else p.empty(p.batch, p.channels)
    state = grads[1].resolve_conj().to(p.work).contiguous() if return_final else None
    state_b, state_s = p.channels, 0

    def walk(state, state_b, state_s, ends, products, summary):
        _gpu.launch(
            backward_kernel, p.programs * p.segments, _raw(p.x), _raw(p.a), p.path, p.resets, p.lengths, _raw(saved[0]),
            _raw(dh), _raw(state), _raw(dx), _raw(da), _raw(dinit), _raw(ends), _raw(products), *p.strides, state_b,
            state_s, *p.sizes, SUMMARY=summary, SHARED=shared, **p.walk, **p.meta,
        )  # fmt: skip

    with _gpu.guard(x):
        if p.segments > 1:
            ends, products, states = (p.empty(p.batch, p.segments, p.channels) for _ in range(3))
            walk(None, 0, 0, ends, products, True)
            _gpu.launch(
                carry_kernel, p.programs, _raw(ends), _raw(products), _raw(state), _raw(states), state_b, p.channels,
                p.segments, BACKWARD=True, **p.meta,
            )  # fmt: skip
            state, state_b, state_s = states, p.segments * p.channels, p.channels
        walk(state, state_b, state_s, None, None, False)
    if shared:
        da = da.sum(1, keepdim=True)
    if a.shape[0] == 1:
        da = da.sum(0, keepdim=True)
    return [dx, da, dinit]
