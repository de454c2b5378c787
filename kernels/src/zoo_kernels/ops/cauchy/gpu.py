# mypy: ignore-errors
"""The Triton path of the Cauchy sums, forward and backward: sums over keys or nodes stay in registers.

A program sums one channel of one head, over all n for a block of nodes (forward) or over all nodes for a block of n
(backward). Bound: one complex division per n and node; nothing of size channels x N x nodes is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import program

BK, BN = 128, 32


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments, (torch.complex64,))


@triton.jit
def pair(pointer, at, mask, other):
    """A complex number as its real and imaginary part."""
    at = 2 * at.to(tl.int64)
    return tl.load(pointer + at, mask=mask, other=other), tl.load(pointer + at + 1, mask=mask, other=0.0)


@triton.jit
def inverse(pr, pi, qr, qi, ar, ai):
    """1 / (p - a q)."""
    er = pr - (ar * qr - ai * qi)
    ei = pi - (ar * qi + ai * qr)
    size = er * er + ei * ei
    return er / size, -ei / size


@triton.jit(do_not_specialize=["nodes", "total"])
def forward_kernel(v, a, p, q, r, channels, nodes, total, N: tl.constexpr, BK: tl.constexpr):
    work = program()
    if work < total:
        blocks = (nodes + BK - 1) // BK
        k = (work % blocks) * BK + tl.arange(0, BK)
        line = work // blocks  # head and channel
        channel = line % channels
        km = k < nodes
        pr, pi = pair(p, k, km, 1.0)
        qr, qi = pair(q, k, km, 0.0)
        outr = tl.zeros([BK], tl.float32)
        outi = tl.zeros([BK], tl.float32)
        for n in range(0, N):
            vr = tl.load(v + 2 * (line * N + n))
            vi = tl.load(v + 2 * (line * N + n) + 1)
            ar = tl.load(a + 2 * (channel * N + n))
            ai = tl.load(a + 2 * (channel * N + n) + 1)
            cr, ci = inverse(pr, pi, qr, qi, ar, ai)
            dr, di = inverse(pr, pi, qr, qi, ar, -ai)
            outr += vr * (cr + dr) - vi * (ci - di)
            outi += vr * (ci + di) + vi * (cr - dr)
        tl.store(r + 2 * (line * nodes + k), 2.0 * outr, mask=km)
        tl.store(r + 2 * (line * nodes + k) + 1, 2.0 * outi, mask=km)


@triton.jit(do_not_specialize=["nodes", "total"])
def backward_kernel(v, a, p, q, g, dv, da, channels, nodes, total, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dv, and this head's share of da."""
    work = program()
    if work < total:
        blocks: tl.constexpr = (N + BN - 1) // BN
        n = (work % blocks) * BN + tl.arange(0, BN)
        line = work // blocks
        nm = n < N
        vr, vi = pair(v, line * N + n, nm, 0.0)
        ar, ai = pair(a, (line % channels) * N + n, nm, 0.0)
        leftr = tl.zeros([BN], tl.float32)
        lefti = tl.zeros([BN], tl.float32)
        slopr = tl.zeros([BN], tl.float32)
        slopi = tl.zeros([BN], tl.float32)
        for first in range(0, nodes, BK):
            k = first + tl.arange(0, BK)
            km = k < nodes
            pr, pi = pair(p, k, km, 1.0)
            qr, qi = pair(q, k, km, 0.0)
            gr, gi = pair(g, line * nodes + k, km, 0.0)
            cr, ci = inverse(pr[None, :], pi[None, :], qr[None, :], qi[None, :], ar[:, None], ai[:, None])
            dr, di = inverse(pr[None, :], pi[None, :], qr[None, :], qi[None, :], ar[:, None], -ai[:, None])
            gr = gr[None, :]
            gi = gi[None, :]
            # g conj(c) + conj(g) d
            leftr += tl.sum(gr * (cr + dr) + gi * (ci + di), 1)
            lefti += tl.sum(gi * (cr - dr) + gr * (di - ci), 1)
            # s = q c^2 and t = q d^2: g conj(s) + conj(g) t
            c2r = cr * cr - ci * ci
            c2i = 2.0 * cr * ci
            d2r = dr * dr - di * di
            d2i = 2.0 * dr * di
            sr = qr[None, :] * c2r - qi[None, :] * c2i
            si = qr[None, :] * c2i + qi[None, :] * c2r
            tr = qr[None, :] * d2r - qi[None, :] * d2i
            ti = qr[None, :] * d2i + qi[None, :] * d2r
            slopr += tl.sum(gr * (sr + tr) + gi * (si + ti), 1)
            slopi += tl.sum(gi * (sr - tr) + gr * (ti - si), 1)
        at = 2 * (line * N + n)
        tl.store(dv + at, 2.0 * leftr, mask=nm)
        tl.store(dv + at + 1, 2.0 * lefti, mask=nm)
        # times 2 conj(v)
        tl.store(da + at, 2.0 * (vr * slopr + vi * slopi), mask=nm)
        tl.store(da + at + 1, 2.0 * (vr * slopi - vi * slopr), mask=nm)


def _raw(tensor):
    return torch.view_as_real(tensor.resolve_conj().contiguous())


def forward(v, a, p, q, *, save=False):
    """See :func:`zoo_kernels.cauchy`; v (heads, channels, N), a (channels, N), p and q (nodes,)."""
    heads, channels, N = v.shape
    nodes = p.shape[0]
    r = torch.empty(heads, channels, nodes, dtype=v.dtype, device=v.device)
    with _gpu.guard(v):
        _gpu.launch(
            forward_kernel, heads * channels * triton.cdiv(nodes, BK), _raw(v), _raw(a), _raw(p), _raw(q),
            torch.view_as_real(r), channels, nodes, N=N, BK=BK,
        )  # fmt: skip
    return (r,)


def backward(grads, arguments, saved, needs):
    """Gradients of v and a."""
    v, a, p, q = arguments
    heads, channels, N = v.shape
    dv, da = (torch.empty(heads, channels, N, dtype=v.dtype, device=v.device) for _ in range(2))
    with _gpu.guard(v):
        _gpu.launch(
            backward_kernel, heads * channels * triton.cdiv(N, BN), _raw(v), _raw(a), _raw(p), _raw(q), _raw(grads[0]),
            torch.view_as_real(dv), torch.view_as_real(da), channels, p.shape[0], N=N, BN=BN, BK=BK // 2,
        )  # fmt: skip
    return [dv, da.sum(0)]
