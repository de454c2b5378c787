# Compile-time and run-time conditions must not share an `if`, and types in kernels are those of the device.
# ruff: noqa: SIM102
# mypy: ignore-errors
"""The Triton path of the (gated) normalisation: one read of the inputs and one write of the results each way.

A program normalises one group of channels in a few rows at a time; backward keeps its share of the gradients of weight
and bias in registers over all its rows, and shares are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import program, sigmoid, silu_grad

WIDEST = 1 << 16  # channels of a group that fit the registers of one program


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    x, groups = arguments[0], arguments[5]
    if x.shape[1] // groups > WIDEST:
        return f"a group has {x.shape[1] // groups} channels; the Triton kernel takes at most {WIDEST}"
    return _gpu.unsupported(arguments)


@triton.jit
def normalised(h, m, width, eps, CENTRED: tl.constexpr):
    """Groups (rows, channels) over their root mean square, and its inverse."""
    if CENTRED:
        h = tl.where(m, h - (tl.sum(h, 1) / width)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    return h * r[:, None], r


@triton.jit(do_not_specialize=["count", "total", "eps"])
def forward_kernel(
    x, z, weight, bias, y, x_b, z_b, count, dim, width, eps, total,
    G: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    work = program()
    if work < total:
        group = work % G
        rows = (work // G) * BR + tl.arange(0, BR)
        inside = tl.arange(0, BD)
        c = group * width + inside
        cm = inside < width
        m = (rows < count)[:, None] & cm[None, :]
        h = tl.load(x + rows[:, None] * x_b + c[None, :], mask=m, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + rows[:, None] * z_b + c[None, :], mask=m, other=0.0).to(tl.float32)
            gate = gate * sigmoid(gate)
            if not FIRST:
                h = h * gate
        h, _r = normalised(h, m, width, eps, CENTRED)
        if weight is not None:
            h = h * tl.load(weight + c, mask=cm, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            h = h + tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)[None, :]
        if z is not None:
            if FIRST:
                h = h * gate
        tl.store(y + rows[:, None] * dim + c[None, :], h.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["count", "shares", "total", "eps"])
def backward_kernel(
    x, z, weight, bias, dy, dx, dz, dweight, dbias, x_b, z_b, count, dim, width, eps, shares, total,
    G: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    work = program()
    if work < total:
        group = work % G
        share = work // G
        inside = tl.arange(0, BD)
        c = group * width + inside
        cm = inside < width
        w = tl.full([BD], 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + c, mask=cm, other=0.0).to(tl.float32)
        offset = tl.zeros([BD], tl.float32)
        if bias is not None:
            offset = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        dw = tl.zeros([BD], tl.float32)
        db = tl.zeros([BD], tl.float32)
        for first in range(share * BR, count, shares * BR):
            rows = first + tl.arange(0, BR).to(tl.int64)
            m = (rows < count)[:, None] & cm[None, :]
            value = tl.load(x + rows[:, None] * x_b + c[None, :], mask=m, other=0.0).to(tl.float32)
            g = tl.load(dy + rows[:, None] * dim + c[None, :], mask=m, other=0.0).to(tl.float32)
            h = value
            if z is not None:
                raw = tl.load(z + rows[:, None] * z_b + c[None, :], mask=m, other=0.0).to(tl.float32)
                gate = raw * sigmoid(raw)
                if not FIRST:
                    h = h * gate
            h, r = normalised(h, m, width, eps, CENTRED)
            if z is not None:
                if FIRST:
                    dgate = g * (h * w[None, :] + offset[None, :])
                    g = g * gate
            dw += tl.sum(g * h, 0)
            db += tl.sum(g, 0)
            g = g * w[None, :]
            g = r[:, None] * (g - h * (tl.sum(g * h, 1) / width)[:, None])
            if CENTRED:
                g = tl.where(m, g - (tl.sum(g, 1) / width)[:, None], 0.0)
            if z is not None:
                if not FIRST:
                    dgate = g * value
                    g = g * gate
                at = rows[:, None] * dim + c[None, :]
                tl.store(dz + at, (dgate * silu_grad(raw)).to(dz.dtype.element_ty), mask=m)
            tl.store(dx + rows[:, None] * dim + c[None, :], g.to(dx.dtype.element_ty), mask=m)
        tl.store(dweight + share * dim + c, dw, mask=cm)
        tl.store(dbias + share * dim + c, db, mask=cm)


def _meta(dim: int, groups: int, norm_before_gate: bool, centred: bool) -> dict:
    BD = _gpu.power_of_two(dim // groups)
    BR = max(1, min(4, 2048 // BD))
    warps = 1 if BD <= 256 else 4 if BD <= 2048 else 8 if BD <= 8192 else 16
    return {"G": groups, "BR": BR, "BD": BD, "FIRST": norm_before_gate, "CENTRED": centred, "num_warps": warps}


def forward(x, z, weight, bias, eps, groups, norm_before_gate, centred, *, save=False):
    """See :func:`zoo_kernels.gated_rms_norm`; x and z (rows, dim)."""
    x, z = _gpu.rows(x), None if z is None else _gpu.rows(z)
    count, dim = x.shape
    y = torch.empty(count, dim, dtype=x.dtype, device=x.device)
    meta = _meta(dim, groups, norm_before_gate, centred)
    with _gpu.guard(x):
        _gpu.launch(
            forward_kernel, triton.cdiv(count, meta["BR"]) * groups, x, z, weight, bias, y, x.stride(0),
            0 if z is None else z.stride(0), count, dim, dim // groups, eps, **meta,
        )  # fmt: skip
    return (y,)


def backward(grads, arguments, saved, needs):
    """Gradients of x, z, weight, bias."""
    x, z, weight, bias, eps, groups, norm_before_gate, centred = arguments
    x, z = _gpu.rows(x), None if z is None else _gpu.rows(z)
    count, dim = x.shape
    meta = _meta(dim, groups, norm_before_gate, centred)
    shares = max(1, min(triton.cdiv(count, meta["BR"]), 8 * _gpu.multiprocessors(x) // groups))
    dx = torch.empty(count, dim, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(count, dim, dtype=z.dtype, device=x.device)
    dweight, dbias = (torch.empty(shares, dim, dtype=torch.float32, device=x.device) for _ in range(2))
    with _gpu.guard(x):
        _gpu.launch(
            backward_kernel, shares * groups, x, z, weight, bias, grads[0].contiguous(), dx, dz, dweight, dbias,
            x.stride(0), 0 if z is None else z.stride(0), count, dim, dim // groups, eps, shares, **meta,
        )  # fmt: skip
    return [dx, dz, None if weight is None else dweight.sum(0), None if bias is None else dbias.sum(0)]
